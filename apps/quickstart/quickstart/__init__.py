"""Split learning with Flower, as short as it gets."""
