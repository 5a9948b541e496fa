"""The messages that flsplit sends: their schema, and how tensors travel in them."""
