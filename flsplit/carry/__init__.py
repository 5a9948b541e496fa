"""Carriers: Grids that bring messages to clients."""
