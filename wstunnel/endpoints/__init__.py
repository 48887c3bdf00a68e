"""Ways in and out of the tunnel."""
