"""Finds the model that a command line names."""

import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.flops import BATCH
from flsplit.errors import ConfigError
from flsplit.vision import load_torchvision


def load_model(name: str, classes: int | None = None) -> nn.Module:
    """Return a new model.

    ``name`` is a torchvision model (``resnet18``), or ``module:function`` of a function that
    returns a model; the module is also looked for in the working directory. ``classes`` is passed
    on as ``num_classes``.

    ConfigError if there is no such model, or the function fails or returns something else.
    """
    make = find_function(name, "the model") if ":" in name else _torchvision(name)
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


def example_input(text: str) -> Tensor | tuple[int, ...] | list[Tensor] | dict[str, Tensor]:
    """Return what ``text`` says of one sample: a shape, ``3x64x64``, maybe a dtype, ``7:int64``.

    That is a batch without data; or the shape of a sample where no dtype is given,
    which is then the model's. Several inputs are written one after the other, by their names or in
    the order in which the model takes them: ``ids=7:int64,mask=7:int64``.

    ConfigError if it says something else.
    """
    if "," not in text and "=" not in text:
        return _input(text)
    names, samples = list[str](), list[Tensor]()
    for part in text.split(","):
        name, _, sample = part.rpartition("=")
        found = _input(sample)
        row = found[0] if isinstance(found, Tensor) else torch.empty(found, device="meta")
        names.append(name.strip())
        samples.append(row.expand(BATCH, *row.shape))
    if len(set(names)) == len(names) and all(names):
        return dict(zip(names, samples, strict=True))
    if any(names):
        raise ConfigError(f"input {text!r}: give each input a name of its own, or none a name")
    return samples


def _input(text: str) -> Tensor | tuple[int, ...]:
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


def find_function(name: str, what: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names; ``what`` it is stands in errors.

    ConfigError if there is none.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} {name!r} can't be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"{name} is not a function")
    made: Callable[..., Any] = found
    return made
