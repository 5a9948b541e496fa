"""Finds the model that a command line names."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.errors import ConfigError
from flsplit.vision import load_torchvision


def load_model(name: str, classes: int | None = None) -> nn.Module:
    """Return a new model.

    ``name`` is a torchvision model (``resnet18``), or ``module:function`` of a function that
    returns a model; the module is also looked for in the working directory. ``classes`` is passed
    on as ``num_classes``.

    Raises
    ------
    ConfigError
        If there is no such model, or the function fails or returns something else.
    """
    make = _function(name) if ":" in name else _torchvision(name)
    options = {} if classes is None else {"num_classes": classes}
    try:
        model = make(**options)
    except Exception as error:
        raise ConfigError(
            f"{name} could not be made with {options or 'no arguments'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def example_input(text: str) -> Tensor | tuple[int, ...]:
    """Return what ``text`` says of one sample: a shape, ``3x64x64``, maybe a dtype, ``7:int64``.

    That is a batch of one sample, without data; or the shape of a sample where no dtype is given,
    which is then the model's.

    Raises
    ------
    ConfigError
        If it says something else.
    """
    shape, has_dtype, name = text.partition(":")
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"input {text!r} is no shape of a sample, expected such as 3x64x64")
    row = tuple(int(size) for size in sizes)
    if not has_dtype:
        return row
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"input {text!r}: {name!r} is no dtype of torch, expected such as int64")
    return torch.empty((1, *row), dtype=dtype, device="meta")


def _torchvision(name: str) -> Callable[..., Any]:
    own = "for a model of your own write module:function"
    try:
        found: Callable[..., Any] = load_torchvision().models.get_model_builder(name)
    except ImportError as error:
        raise ConfigError(
            f"the model {name!r} comes from torchvision, which is not installed; {own}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"torchvision has no model {name!r}; {own}") from error
    return found


def _function(name: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the model {name!r} can't be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"{name} is not a function")
    made: Callable[..., Any] = found
    return made
