"""The commands ``flsplit bench …``: what an exchange and a training step take on this machine."""
