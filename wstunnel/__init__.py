"""TCP streams of any application protocol through one HTTP-friendly port, as WebSocket connections."""

__version__ = "0.1.0"
