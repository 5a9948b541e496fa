"""The client side: one client step over an explicit state, and the ClientApp around it."""
