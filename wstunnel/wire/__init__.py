"""The protocol, sans I/O: bytes in, events out. No trio, socket, ssl, clock or randomness of its own."""
