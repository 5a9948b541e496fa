"""The page."""


def write_page(path, runs, size):
    """Later."""
