"""Fine-tune language models: devices hold the first blocks, a server the rest."""

from importlib.util import find_spec

from flsplit.vision import load_torchvision

if find_spec("torchvision"):
    load_torchvision()  # transformers imports it, also where its wheel doesn't fit torch's
