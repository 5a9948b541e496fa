"""Follows one whole forward: who makes and who uses each value and each weight, and when."""

import inspect
import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flsplit.cut.call_names import (
    ASKS_DTYPES,
    ASKS_SIZES,
    LIKES,
    asks,
    is_of_rows,
    is_sized_by_data,
    name_of,
    reads_data,
)
from flsplit.cut.cut_errors import CrossingError, CutError
from flsplit.cut.partial_forward import PartialForward, Stub, eager, instrument
from flsplit.cut.private import HigherOrderOperator, Unseen, bare
from flsplit.cut.python_state import KeptState
from flsplit.cut.scripted import Scripted
from flsplit.cut.trace import Number, Same, Spec, Trace, can_be_sent, map_tree, tensors_in
from flsplit.cut.watch import sendable


@dataclass
class Value:
    """A tensor that forward makes, or a number (without a spec) that it makes of tensors."""

    what: str
    spec: Spec | None
    made: int  # the number of the call
    inputs: frozenset[str] = frozenset()  # the model's inputs that it depends on
    learnt: bool = False  # whether a parameter or buffer had a part in it
    uses: list[int] = field(default_factory=list)  # the numbers of the calls

    def crosses(self, cut: "Call", end: "Call | None" = None) -> bool:
        """Tell whether it is made before a cut and used after it (and before another)."""
        if self.made >= cut.reached or not self.uses or self.uses[-1] < cut.reached:
            return False
        return end is None or any(cut.reached <= use < end.reached for use in self.uses)


@dataclass
class Call:
    """One call of a module, whose forward made the watched calls from `start` to `end`."""

    name: str
    nth: int
    start: int
    around: tuple["Call", ...]
    inside_torch: bool  # in one of torch's own layers, which call their parts as they like
    output: "Written | None" = None  # of forward, if it can be part of a trace
    end: int = 0
    returned: list[int] = field(default_factory=list)  # after the hooks, which are of its side
    reached: int = 0
    drawn: bool = False  # whether Python or NumPy had drawn a random number by then
    grad: bool = True  # whether gradients were recorded as at the start
    closed: bool = False  # one of torch's own layers


@dataclass
class State:
    """A parameter or buffer: its names, and the calls that used it."""

    tensor: Tensor
    names: list[str]
    version: int
    uses: list[int] = field(default_factory=list)


class Numbers:
    """Numbers tensors without holding them, so that a survey takes no more memory than a forward.

    An id is soon another tensor's, a number never is.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        self._count = count(1)

    def of(self, tensor: Tensor) -> int:
        """Return a tensor's number, a new one if it has none."""
        number = self.known(tensor)
        if not number:
            forget, place = self._known.pop, id(tensor)
            number = next(self._count)
            self._known[place] = number, weakref.ref(tensor, lambda _: forget(place, None))
        return number

    def known(self, tensor: Tensor) -> int:
        """Return a tensor's number, 0 if it has none."""
        return self._known.get(id(tensor), (0,))[0]

    def alive(self) -> list[tuple[int, Tensor]]:
        """Return the tensors that are still there, with their numbers."""
        found = [(number, tensor()) for number, tensor in [*self._known.values()]]
        return [(number, tensor) for number, tensor in found if tensor is not None]


@dataclass(frozen=True)
class Written:
    """One call and what it returned: a tree for a `Trace`, and its new tensors' numbers."""

    name: str
    tree: Any
    made: list[int]  # 0: one of its arguments

    @classmethod
    def of(cls, name: str, ins: list[Tensor], output: Any, numbers: Numbers) -> "Written":
        """Describe a call as `Recording` does."""
        made: list[int] = []
        known = {id(t): i for i, t in enumerate(ins)}

        def described(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            made.append(0 if id(leaf) in known else numbers.of(leaf))
            return Same(known[id(leaf)]) if id(leaf) in known else Spec.of(leaf)

        return cls(name, map_tree(described, output), made)


@dataclass(frozen=True)
class Passage:
    """What crosses at one place."""

    trace: Trace  # the calls before it
    whole: frozenset[str]  # the modules that are one call
    values: dict[str, Value]  # the tensors that cross
    reads: tuple[Value, ...]  # the numbers that cross, as part of the trace
    # If a single tensor crosses and no number: which of the tensors that the layer returns
    item: int | None
    # Whether the other side has to know sizes of tensors before the cut beside those that cross
    asks_sizes: bool = False
    asks_dtypes: bool = False  # whether it has to know their dtypes after the cut
    sized_by_data: bool = False  # whether values say how large some tensors before the cut are
    # Whether some of the sizes that the other side has to know can't be told from the inputs' sizes
    asks_unknown: bool = False
    tail: "Passage | None" = None  # at the first of two cuts: what crosses at the second one

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the tensor that crosses, where one does alone."""
        (value,) = self.values.values() if self.item is not None else (None,)
        return value.spec.dtype if value and value.spec else None

    @cached_property
    def kept(self) -> frozenset[str]:
        """Names of what the client keeps for its last layers, after the second cut."""
        places = len(self.trace.calls)
        tail = self.tail.values if self.tail else ()
        return frozenset(key for key in tail if int(key.partition(".")[0]) < places)


class _Beneath(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a survey of what a call does beneath Python.

    Which tensors one uses that is none of Python's (TorchScript's), and where sizes follow values.
    """

    supports_higher_order_operators = True  # torch.cond and the like: to refuse them

    def __init__(self, survey: "Survey") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._survey = survey

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call."""
        if func.__name__.partition(".")[0] not in LIKES:
            self._survey._use((args, kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            raise CutError(
                f"forward calls torch's {func.__name__!r}, inside which nothing can be followed: "
                "write it in Python (an if or a loop, which both sides follow), or choose with "
                "torch.where"
            )
        if is_sized_by_data(func, args):
            self._survey._sized.append(len(self._survey._written))
        elif reads_data(func):
            self._survey._read.append(len(self._survey._written))
        return func(*args, **(kwargs or {}))


class Survey(TorchFunctionMode, PartialForward):
    """One forward of a copied model, with all that it does written down.

    The copy is changed for good. Of what the same copy's forward ``before`` has ``left`` nothing
    may be used in this one.
    """

    watches = True

    def __init__(
        self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], before: "Survey | None" = None
    ) -> None:
        TorchFunctionMode.__init__(self)
        PartialForward.__init__(self, "")
        if before is None:
            instrument(model, None)
        self.model = model
        self._before = before.left() if before else {}
        self.state: dict[int, State] = {}
        for name, t in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            self.state.setdefault(id(t), State(t, [], t._version)).names.append(name)
        self.calls: list[Call] = []
        self.reads: list[Value] = []
        # By what, when, and in which modules
        self._asked: list[tuple[Value, str, int, frozenset[str]]] = []
        # During which calls values became sizes, and numbers, which may become sizes.
        self._sized: list[int] = []
        self._read: list[int] = []
        self._written: list[Written] = []
        self._numbers = Numbers()
        self._values: dict[int, Value] = {}  # by the tensor's number
        self._open: list[Call] = []
        self._random = _drawn()
        self._kept = KeptState(model) if before else None  # the first forward may set up something
        self._used: set[int] = set()  # ids of tensors among it
        self._write("the inputs", (), (args, dict(kwargs)))
        self._name_inputs(args, kwargs)
        with eager(), self, _Beneath(self):
            output = self.run(model, args, kwargs)
        self._use(output)
        names = {name for state in self.state.values() for name in state.names}
        for name, _ in model.named_buffers():
            if name not in names:
                raise CutError(
                    f"forward makes the buffer {name!r}, which was None: its shape has to be known "
                    "before, so register it with a first value (an empty tensor, say)"
                )
        if self._kept and (what := self._kept.changed(lambda t: id(t) in self._used)):
            raise CutError(
                f"forward {what}: a server that serves several clients would go on otherwise, and "
                "so would a resumed run; make it a persistent buffer (register_buffer)"
            )

    def _name_inputs(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        signature = inspect.signature(self.model.forward)
        for name, tree in signature.bind_partial(*args, **kwargs).arguments.items():
            variadic = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            for label, part in tree.items() if variadic else [(name, tree)]:
                for t in tensors_in(part):
                    value = self._values[self._numbers.of(t)]
                    value.inputs, value.what = frozenset([label]), f"the input {label!r}"

    # --- watching ------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call and write down what it uses and returns."""
        kwargs, name = kwargs or {}, name_of(func)
        if not asks(name) and name not in LIKES:
            self._use((args, kwargs))
        elif name in ASKS_SIZES | ASKS_DTYPES | LIKES and not is_of_rows(name, args):
            around = frozenset(call.name for call in self._open)
            asked = self.values_of(list(map(self._numbers.known, tensors_in((args, kwargs)))))
            self._asked += [(value, name, len(self._written), around) for value in asked]
        output = func(*args, **kwargs)
        self._write(name, (args, kwargs), output)
        return output

    def module(self, stub: Stub, args: Any, kwargs: Any) -> Any:
        """Call a module."""
        nth = 1 + sum(c.name == stub.name for c in [*self.calls, *self._open])
        ins = tensors_in((args, kwargs))
        inside = any(call.closed for call in self._open)
        call = Call(stub.name, nth, len(self._written), tuple(self._open), inside)
        kind = type(stub.called)
        call.closed = kind.__module__.startswith("torch.nn.") and kind is not nn.Sequential
        self._open.append(call)
        try:
            if opaque := isinstance(stub.called, Scripted):  # nobody sees what it does
                state = [*stub.called.parameters(), *stub.called.buffers()]
                self._use([*ins, *state])
            output = stub.forward(*args, **kwargs)
            if opaque:
                with Unseen():
                    self._write(stub.as_call, [*ins, *state], output)
        finally:
            self._open.pop()
        with Unseen():
            written = Written.of(stub.as_call, ins, output, self._numbers)
        if can_be_sent(written.tree):  # other objects may hold tensors
            call.output = written
        call.returned = self._numbers_in(output)
        call.end = call.reached = len(self._written)
        self.calls.append(call)
        return output

    def layer_returned(self, name: str, output: Any) -> None:
        """Be told that a module returned, and its hooks."""
        call = next((c for c in reversed(self.calls) if c.name == name), None)
        if call:
            call.reached, call.returned = len(self._written), self._numbers_in(output)
            call.drawn, call.grad = _drawn() != self._random, torch.is_grad_enabled() == self._grad

    def _numbers_in(self, tree: Any) -> list[int]:
        return [self._numbers.of(t) for t in tensors_in(tree)]

    def _use(self, tree: Any) -> None:
        now = len(self._written)
        for t in map(bare, tensors_in(tree)):
            if self._kept and id(t) in self._kept.tensors:
                self._used.add(id(t))
            if state := self.state.get(id(t)):
                state.uses.append(now)
            elif value := self._values.get(self._numbers.known(t)):
                value.uses.append(now)
            elif id(t) in self._before and self._before[id(t)][0].inputs:
                raise CrossingError(
                    f"forward keeps a value {self._before[id(t)][0].what} from one batch for the "
                    "next: one client's would reach another"
                )

    def _write(self, name: str, given: Any, output: Any) -> None:
        ins, outs = tensors_in(given), tensors_in(output)
        if not outs and (asks(name) or not ins):
            return
        known = {id(t) for t in ins}
        if not outs:
            self.reads.append(self._value(f"{name}() = {str(output)[:40]}", None, ins))
        for t in outs:
            if id(t) not in known:
                self._values[self._numbers.of(t)] = self._value("made", Spec.of(t), ins)
        self._written.append(Written.of(name, ins, output, self._numbers))

    def _value(self, verb: str, spec: Spec | None, ins: list[Tensor]) -> Value:
        sources = self.values_of([self._numbers.known(t) for t in ins])
        learnt = any(id(t) in self.state for t in ins) or any(v.learnt for v in sources)
        inputs = frozenset[str]().union(*(v.inputs for v in sources))
        where = f"in {self._open[-1].name!r}" if self._open else "in forward"
        return Value(f"{verb} {where}", spec, len(self._written), inputs, learnt)

    # --- asking --------------------------------------------------------------------------

    def calls_of(self, name: str) -> list[Call]:
        """Return the calls of a module."""
        return [call for call in self.calls if call.name == name]

    def crossing(self, cut: Call) -> list[Value]:
        """Return the tensors that were made before a module returned and are used after it."""
        return [value for value in self._values.values() if value.crosses(cut)]

    def values_of(self, numbers: list[int]) -> list[Value]:
        """Return what is known of tensors, by their numbers."""
        return [self._values[number] for number in numbers if number in self._values]

    def left(self) -> dict[int, tuple[Value, Tensor]]:
        """Return the tensors that are still there, by their ids, which stay theirs: it holds them.

        Besides what forward keeps that is what waits for the garbage collector.
        """
        alive = self._numbers.alive()
        return {id(t): (self._values[n], t) for n, t in alive if n in self._values}

    def passage(self, cut: Call, end: Call | None = None) -> Passage:
        """Return what crosses when a module returns, and of two cuts what does at the second."""
        whole = self._whole(cut, end)
        if end is None:
            return self._passage(cut, whole)
        # The calls before the first cut are numbered alike in both traces.
        of_tail = self._whole(end, cut)
        whole &= of_tail
        before = {call.name for call in self.calls if call.end <= cut.reached}
        apart = (before - whole) | {call.name for call in cut.around}
        return replace(
            self._passage(cut, whole, end), tail=self._passage(end, frozenset(of_tail - apart))
        )

    def _passage(self, cut: Call, whole: frozenset[str], end: Call | None = None) -> Passage:
        outermost = {
            call.start: call
            for call in self.calls
            if call.name in whole and not any(c.name in whole for c in call.around)
        }
        calls: list[tuple[str, Any]] = []
        numbers: list[Any] = []
        keys: dict[int, str] = {}
        reads = {v.made: v for v in self.reads}
        visible: list[Value] = []
        place = 0
        while place < cut.reached:
            written, following = self._written[place], place + 1
            if call := outermost.get(place):
                written, following = call.output or written, call.end
            tree = written.tree
            if call is None and place in reads:
                visible.append(reads[place])
                if not isinstance(tree, bool | type(None)):
                    numbers.append(sendable(written.name, tree))
                    tree = Number(len(numbers) - 1)
            keys |= {made: f"{len(calls)}.{n}" for n, made in enumerate(written.made) if made}
            calls.append((written.name, tree))
            place = following
        crossing = {
            keys[i]: value
            for i, value in self._values.items()
            if i in keys and value.crosses(cut, end)
        }
        item = None
        if len(crossing) == 1 and not visible:
            returned = [keys.get(number) for number in cut.returned]
            item = next((i for i, key in enumerate(returned) if key in crossing), None)
        questions = [
            (value, name, place)
            for value, name, place, around in self._asked
            if value.made < cut.reached
            and not (around & whole)
            and (end is None or place < end.reached)
            and all(value is not one for one in crossing.values())
        ]
        asked = [value for value, name, _ in questions if name in ASKS_SIZES | LIKES]
        dtypes = any(n in ASKS_DTYPES | LIKES and at >= cut.reached for _, n, at in questions)
        sized = any(place < cut.reached for place in self._sized)
        since = min([*self._sized, *self._read], default=cut.reached)
        unknown = bool(asked) and (sized or any(value.made >= since for value in asked))
        trace = Trace(tuple(calls), tuple(numbers))
        return Passage(
            trace, whole, crossing, tuple(visible), item, bool(asked), dtypes, sized, unknown
        )

    def _whole(self, cut: Call, also: Call | None) -> frozenset[str]:
        """Return the modules that are done before the cut and keep nothing for later."""
        before = [c for c in self.calls if c.end <= cut.reached and c.start < c.end]
        names = {c.name for c in before} - {c.name for c in cut.around}
        for call in before:
            if call.name == cut.name or (also and call.name == also.name):  # these are counted
                names -= {c.name for c in call.around}
            if not (call.output and call.output.made):
                names.discard(call.name)
        for i, value in self._values.items():
            for call in before:
                outlives = call.start <= value.made < call.end <= (value.uses or [-1])[-1]
                if outlives and call.output and i not in call.output.made:
                    names.discard(call.name)
        return frozenset(names)


def _drawn() -> tuple[Any, int]:
    state = np.random.get_state()  # noqa: NPY002 - the generator that forwards use
    return random.getstate(), hash((state[2], state[1][:8].tobytes()))  # type: ignore[index]
