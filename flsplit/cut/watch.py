"""Runs a model's own forward up to a cut, or from it.

- On the client, `Recording` numbers the calls before the cut, writes down what each returned
  (shapes, not values), and ends the forward there.
- On the server, `Replaying` lets no call before the cut compute anything: each returns what the
  client wrote down, as `Absent` tensors, which have a shape but no data. So no weights, random
  numbers or BatchNorm statistics of the client's part are touched. At the cut those that are
  needed later are swapped, object for object, for the values that came, the watching ends, and
  the rest is an ordinary forward. Touching any other `Absent` raises.

A module that is done before the cut, and of which nothing but its output is needed later, is one
call: on the client it runs unwatched, on the server it doesn't run at all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flsplit.cut.call_names import ASKS_SIZES, asks, name_of
from flsplit.cut.cut_errors import CrossingError
from flsplit.cut.partial_forward import PartialForward, Stub
from flsplit.cut.private import Unseen
from flsplit.cut.trace import Number, Same, Spec, Trace, map_tree, tensors_in

NUMBERS = (bool, int, float, complex, str, list, tuple, torch.dtype, torch.device, type(None))


class Recording(TorchFunctionMode, PartialForward):
    """Writes down what the calls before the cut return.

    ``keys`` are the values to hold, ``"call.output"``; None for all. Modules in ``whole`` are one
    call.
    """

    watches = True

    def __init__(self, keys: set[str] | None, whole: frozenset[str], cut: str) -> None:
        TorchFunctionMode.__init__(self)
        PartialForward.__init__(self, cut)
        self.calls: list[tuple[str, Any]] = []
        self.numbers: list[Any] = []
        self.held: dict[str, Tensor] = {}
        self.asked = False  # whether forward asked for the size of anything
        self.read = False  # whether it made numbers of tensors
        self._keys, self._whole, self._resting = keys, whole, False

    @property
    def trace(self) -> Trace:
        """What was written down."""
        return Trace(tuple(self.calls), tuple(self.numbers))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call and write down what it returns."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not (self._resting or self.passed):
            self.write(name_of(func), (args, kwargs), output)
        return output

    def module(self, stub: Stub, args: Any, kwargs: Any) -> Any:
        """Call a module, as one call if it can be one."""
        if self._resting or stub.name not in self._whole:
            return stub.forward(*args, **kwargs)
        self._resting = True
        try:
            output = stub.forward(*args, **kwargs)
        finally:
            self._resting = False
        with Unseen():
            self.write(stub.as_call, (args, kwargs), output)
        return output

    def write(self, name: str, given: Any, output: Any) -> None:
        """Write down what a call returned."""
        if name in ASKS_SIZES:
            self.asked = True
        ins, outs = tensors_in(given), tensors_in(output)
        if not outs and (asks(name) or not ins):
            return
        if not outs and not isinstance(output, bool | type(None)):  # these are part of the route
            self.numbers.append(sendable(name, output))
            output = Number(len(self.numbers) - 1)
        self.read |= not outs
        place, known, n = len(self.calls), {id(t): i for i, t in enumerate(ins)}, -1

        def described(leaf: Any) -> Any:
            nonlocal n
            if not isinstance(leaf, Tensor):
                return leaf
            n += 1
            if id(leaf) in known:
                return Same(known[id(leaf)])
            key = f"{place}.{n}"
            if self._keys is None or key in self._keys:
                self.held[key] = leaf
            return Spec.of(leaf)

        self.calls.append((name, map_tree(described, output)))


def sendable(name: str, number: Any) -> Any:
    """Return what a call made of tensors, or refuse it if it is no number."""
    if not isinstance(number, NUMBERS):
        raise CrossingError(
            f"before the cut, {name} makes a {type(number).__name__} of a tensor, which can't be "
            "sent"
        )
    return number
