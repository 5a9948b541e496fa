"""The client and the server segment: the whole model's forward, of which each computes a part."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.cut_errors import (
    GIVE_AN_EXAMPLE,
    CrossingError,
    CutError,
    ExampleError,
    check_keys,
)
from flsplit.cut.examples import NEEDS_VALUES, Row, needs_values, with_values
from flsplit.cut.look import Look, free_copies, fresh, look, undisturbed
from flsplit.cut.partial_forward import eager, instrument, place_of, places_of
from flsplit.cut.plain_chain import PlainChain
from flsplit.cut.remembering import remembered
from flsplit.cut.sides import AWAY, filled, without_data
from flsplit.cut.stand_ins import Script
from flsplit.cut.stretch import (
    Crossing,
    Returning,
    aliases,
    for_tail,
    record,
    run_from_cut,
    run_to_cut,
    run_to_layer,
    script_for,
    tensor_at,
)
from flsplit.cut.survey import Passage
from flsplit.cut.trace import Spec, Trace, leaves_in, map_tree, tensors_in
from flsplit.cut.verifying import verify
from flsplit.cut.watch import Recording
from flsplit.errors import TORCH_ERRORS
from flsplit.untrained import copied, put_all


@dataclass(frozen=True)
class Cut:
    """A cut of one model: where, what may be sent, and what was found out."""

    name: str  # the cut layer, as the user gave it; or the two of a U-shaped split
    share: frozenset[str]  # inputs that may be sent to the server
    found: Look  # what was found with the batch that the model was split with
    rows: tuple[Row, ...]  # without an example: what a row of the model's input may be
    key: Any  # stands for the model, see `remembering.fingerprint`
    compiled: bool = False  # whether modules of the model are compiled


class Half(nn.Module):
    """One side of a cut model.

    Its parameters and buffers are the model's own, under the model's names. Those of the other
    side are out of reach of ``parameters()``, ``state_dict()`` and ``to()``: they have no data.
    """

    side = ""

    def __init__(self, whole: nn.Module, cut: Cut) -> None:
        super().__init__()
        own = vars(self)
        # The same dictionaries: what is moved or loaded here is so in the whole model, too.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[name] = vars(whole)[name]
        own["_whole"], own["_cut"], own["_reports"] = whole, cut, False
        first, second = places_of(cut.name)
        layer, nth = place_of(first)
        own["_chain"] = PlainChain(whole, layer) if nth == 1 and not second else None
        own["_foreign"] = [
            f"{path}.{name}".lstrip(".")
            for path, module in whole.named_modules()
            for name in vars(module).get(AWAY, ())
        ]
        self.training = whole.training

    def _watched(self) -> nn.Module:
        """Return the model, with all that runs of a part of it need; a loop doesn't."""
        own = vars(self)
        if not own["_reports"]:
            own["_reports"] = True
            instrument(own["_whole"], own["_cut"].name, own["_cut"].found.before)
        return own["_whole"]  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "Half":
        """Set the mode, as the whole model does it."""
        vars(self)["_whole"].train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return this side's state, also where a module writes down its own in its own way."""
        state = super().state_dict(*args, **kwargs)
        for name in vars(self)["_foreign"]:
            state.pop(f"{kwargs.get('prefix', '')}{name}", None)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load this side's state.

        StateDictError if keys of this side are missing or others are there, and ``strict`` is set.
        """
        if strict:
            check_keys(f"the {self.side} segment's state dict", state_dict, [*self.state_dict()])
        # BatchNorm adds a key to old state dicts by itself, also where its state isn't.
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Half":
        """Move or convert this side, and the other's tensors along: they are to go together."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        done = set[int]()
        for module in vars(self)["_whole"].modules():
            for name in vars(module).get(AWAY, ()):
                tensor = vars(module)[name]
                if not tensor.is_meta:
                    vars(module)[name] = fn(tensor)
                elif id(tensor) not in done:
                    done.add(id(tensor))
                    dtype = fn(torch.empty(0, dtype=tensor.dtype)).dtype
                    tensor.data = torch.empty_like(tensor.data, dtype=dtype)
        return self

    def extra_repr(self) -> str:
        """Return the side and the cut."""
        return f"{self.side} segment, cut={vars(self)['_cut'].name!r}"

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_whole" not in vars(self):
                raise
            return getattr(vars(self)["_whole"], name)


class ClientHalf(Half):
    """The client segment: turns a batch into what crosses the cut."""

    side = "client"

    def __init__(self, whole: nn.Module, cut: Cut) -> None:
        super().__init__(whole, cut)
        vars(self)["_passages"] = dict[Any, tuple[Passage, ...]]()
        vars(self)["_scripts"] = _Scripts()
        vars(self)["_told"] = ""

    def expect(self, inputs: str) -> None:
        """Be told with which inputs the server has looked at the model: :attr:`ServerHalf.inputs`.

        With others a forward that asks for sizes can't be followed from smashed data alone.
        """
        own = vars(self)
        if inputs != own["_told"]:
            own["_told"] = inputs
            own["_passages"].clear()

    def _server_knows(self, passage: Passage) -> bool:
        """Tell whether a batch is one that the server can tell from its smashed data alone."""
        cut: Cut = vars(self)["_cut"]
        inputs, told = inputs_of(passage), vars(self)["_told"]
        if told:
            return bool(inputs == told)
        # Nobody gave the server an example: it makes up the same batches as are made up here.
        made_up = (in_words([Spec((1, *shape), dtype)]) for shape, dtype in cut.rows)
        return inputs == inputs_of(cut.found.passage) or inputs in made_up

    def _of_known_dtypes(self, passage: Passage) -> bool:
        """Tell whether all dtypes that matter after the cut are those of the example.

        Smashed data of another one are taken on the server for what autocast made of it.
        """
        example: Passage = vars(self)["_cut"].found.passage
        if passage.dtype != example.dtype and not _autocasts():
            return False
        return not passage.asks_dtypes or dtypes_of(passage) == dtypes_of(example)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the smashed data.

        A batch of a new shape is looked at first: both segments and the uncut model, on the same
        weights, have to compute the same.

        Returns
        -------
        Tensor or Crossing
            The tensor if a single one crosses, rows first, and neither numbers nor sizes that the
            server doesn't know; else see :meth:`crossing`.

        Raises
        ------
        CutError
            If the model can't be cut here with such a batch.
        """
        own = vars(self)
        key = batch_key(args, kwargs, self.training)
        known = own["_passages"].get(key) or self._look(key, args, kwargs)
        item = known[0].item
        if item is None or known[0].kept:
            return self.crossing(*args, **kwargs)
        chain: PlainChain | None = own["_chain"]
        sides = chain.sides() if chain and len(args) == 1 and not kwargs else None
        if sides is None:
            return tensor_at(item, run_to_layer(self._watched(), own["_cut"].name, args, kwargs))
        (value,) = args
        for module in sides[0]:
            value = module(value)
        return tensor_at(item, value)

    def returning(
        self, given: Tensor, head: Tensor | Crossing, args: Any, kwargs: Mapping[str, Any]
    ) -> Returning:
        """Return what :meth:`tail` takes: what the server segment of a U-shaped split returned.

        ``given`` is that, ``head`` what :meth:`forward` returned for the same batch.
        """
        known: tuple[Passage, ...] = vars(self)["_passages"][batch_key(args, kwargs, self.training)]
        passage = known[0]
        if isinstance(head, Crossing):
            passage = next(one for one in known if one.trace == head.trace)
        return for_tail(passage, given, head)

    def tail(self, returning: Returning, /, **extra: Any) -> Any:
        """Return the model's output, computed by the last layers of a U-shaped split.

        ``returning`` is worked on in a copy; ``extra`` are arguments of the model that only these
        layers need, such as ``labels``.
        """
        own = vars(self)
        second = places_of(own["_cut"].name)[1]
        with eager() if own["_cut"].compiled else nullcontext():
            script = own["_scripts"].script(returning)
            return run_from_cut(self._watched(), second, returning, extra, script)

    def crossing(self, *args: Any, **kwargs: Any) -> Crossing:
        """Return all that crosses, whether a single tensor or many."""
        cut: Cut = vars(self)["_cut"]
        key = batch_key(args, kwargs, self.training)
        known: tuple[Passage, ...] = vars(self)["_passages"].get(key) or self._look(
            key, args, kwargs
        )
        varies = any(passage.reads or passage.sized_by_data for passage in known)
        before = self._kept(args, kwargs) if varies else None
        with eager() if cut.compiled else nullcontext():
            trace, held = run_to_cut(self._watched(), cut.name, args, kwargs, known)
        passage = next((p for p in known if p.trace == trace), None)
        if passage is None:  # another way through forward than any batch of this shape so far
            if before is None:
                raise CutError(f"forward takes a way before {cut.name!r} that it didn't before")
            self._put_back(before)
            self._look(key, args, kwargs, trace.digest)
            return self.crossing(*args, **kwargs)
        values = {key: held[key] for key in passage.values}
        kept = {key: held[key] for key in passage.kept}
        raw = frozenset(
            key
            for key, value in passage.values.items()
            if not value.learnt and value.inputs <= cut.share
        )
        return Crossing(values, trace, aliases(values), raw, kept)

    def _kept(self, args: Any, kwargs: Any) -> Any:
        gpu = next((t.device for t in tensors_in((args, kwargs)) if t.is_cuda), None)
        on_gpu = (gpu, torch.cuda.get_rng_state(gpu)) if gpu else None
        return [buffer.clone() for buffer in self.buffers()], torch.get_rng_state(), on_gpu

    def _put_back(self, before: Any) -> None:
        buffers, state, on_gpu = before
        put_all(self.buffers(), buffers)
        torch.set_rng_state(state)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu[1], on_gpu[0])

    def _look(
        self, key: Any, args: Any, kwargs: Mapping[str, Any], way: str = ""
    ) -> tuple[Passage, ...]:
        """Look at a batch; ``way`` is its trace's digest, if others of its shape are known."""
        own = vars(self)
        cut: Cut = own["_cut"]

        def find() -> Look:
            # The server's weights aren't here. Whether cut and uncut agree, any weights can tell.
            device = next((t.device for t in tensors_in((args, kwargs))), torch.device("cpu"))
            model = filled(own["_whole"], device)
            try:
                found = look(model, cut.name, args, kwargs, cut.share)
            except TORCH_ERRORS as error:
                if isinstance(error, CutError) or cut.found.passage.item is None:
                    raise
                # The uncut model can't take this batch. The client's part may, if it is the
                # server's that wants more rows, of several clients, say.
                instrument(model, cut.name, cut.found.before)
                with undisturbed(args, kwargs):
                    own_args, own_kwargs = fresh(args, kwargs)
                    run_to_layer(model, cut.name, own_args, own_kwargs)
                return cut.found
            missing = [n for n in found.client if n not in cut.found.client]
            if missing:
                raise CutError(
                    f"with such a batch, the client segment of a cut at {cut.name!r} needs "
                    f"{missing[0]!r}, which was found to be the server's: {GIVE_AN_EXAMPLE}"
                )
            verify(model, cut.name, found, args, kwargs)
            free_copies(model)
            return found

        known: tuple[Passage, ...] = own["_passages"].get(key, ())
        seen = [passage.trace.digest for passage in known]
        found = remembered((cut.key, key, way), find)
        if found.passage.trace.digest in seen:
            raise CutError(f"forward takes another way before {cut.name!r} when it is run again")
        passage = found.passage
        parts = [passage, *([passage.tail] if passage.tail else [])]
        told = not passage.asks_sizes or self._server_knows(passage)
        told = told and self._of_known_dtypes(passage)
        if any(part.asks_unknown for part in parts) or not told:
            passage = replace(passage, item=None)
        own["_passages"][key] = (*known, passage)
        return own["_passages"][key]  # type: ignore[no-any-return]


_MOST_SCRIPTS = 64


class _Scripts(dict[Any, Script]):
    """Scripts by trace. They are made anew in a copy: they hold tensors without data."""

    def __reduce__(self) -> Any:
        """Pickle and copy as an empty one."""
        return _Scripts, ()

    def script(self, given: Crossing) -> Script:
        """Return what was made ready for the same trace before."""
        values = given.values
        device = next(iter(values.values())).device if values else None
        key = id(given.trace.calls), device, *values
        if key not in self:
            if len(self) >= _MOST_SCRIPTS:
                self.clear()
            self[key] = script_for(given)  # holds the calls, so that their id stays theirs
        return self[key]


@dataclass(frozen=True)
class _Derived:
    """What the client's forward must have done, found out without it."""

    trace: Trace
    name: str
    asks_sizes: bool
    is_loop: bool


class ServerHalf(Half):
    """The server segment: turns what crosses into the model's output, or the second cut's."""

    side = "server"

    def __init__(self, whole: nn.Module, cut: Cut) -> None:
        super().__init__(whole, cut)
        vars(self)["_derived"] = dict[Any, _Derived]()
        vars(self)["_scripts"] = _Scripts()

    @property
    def inputs(self) -> str:
        """What the model was looked at with, if the client has to know that; else empty."""
        passage: Passage = vars(self)["_cut"].found.passage
        return inputs_of(passage) if passage.asks_sizes else ""

    @property
    def smashed_dtype(self) -> torch.dtype | None:
        """The dtype of the tensor that crosses, where one does alone, as forward itself makes it.

        A tensor that comes in a narrower one was computed under autocast.
        """
        found: Look = vars(self)["_cut"].found
        return found.passage.dtype

    def forward(self, given: Tensor | Crossing, /, **extra: Any) -> Any:
        """Return the model's output for smashed data; of a U-shaped split, the second cut's.

        It works on copies of what it is given: a network's first operation after the cut may be
        one in place.

        Parameters
        ----------
        given : Tensor or Crossing
            What the client segment returned. Without the trace, that is of a tensor alone, the
            client's forward is followed without data, from the sizes of the smashed data.
        **extra
            Arguments of the model that only the server has, such as ``labels``.

        Raises
        ------
        CutError
            If this can't be what crosses.
        """
        own = vars(self)
        if isinstance(given, Tensor):
            derived = self._trace_for(given)
            sides = own["_chain"].sides() if derived.is_loop and not extra else None
            if sides is not None:
                value = given.clone()
                for module in sides[1]:
                    value = module(value)
                return value
            given = Crossing({derived.name: given}, derived.trace)
        whole, name = self._watched(), own["_cut"].name
        with eager() if own["_cut"].compiled else nullcontext():
            output = run_from_cut(whole, name, given, extra, own["_scripts"].script(given))
        found: Look = own["_cut"].found
        return tensor_at(found.item, output) if found.passage.tail else output

    def _trace_for(self, given: Tensor) -> _Derived:
        known: dict[Any, _Derived] = vars(self)["_derived"]
        mode = self.training, torch.is_grad_enabled(), _autocast()
        found = known.get(mode) or known.get((mode, given.shape))
        if found is None:
            with undisturbed((), {}):
                found = self._derive(given)
            known[(mode, given.shape) if found.asks_sizes else mode] = found
        return found

    def _derive(self, given: Tensor) -> _Derived:
        """Follow the client's forward on batches without data until one fits."""
        cut: Cut = vars(self)["_cut"]
        if cut.found.passage.item is None:
            raise CrossingError(
                f"after {cut.name!r} more than one tensor crosses: the server needs the client's "
                "Crossing, with its trace"
            )
        fitting = dict[Any, _Derived]()
        found = cut.found.passage
        for recording in self._recordings(cut, len(given) if given.dim() else 1):
            smashed = tensors_in(recording.output)[cut.found.passage.item]
            name = next((k for k, t in recording.held.items() if t is smashed), None)
            asks_sizes = recording.asked or cut.found.passage.asks_sizes
            if name is None or (asks_sizes and smashed.shape != given.shape):
                continue
            chain: PlainChain | None = vars(self)["_chain"]
            alone = chain is not None and recording.output is smashed
            is_loop = alone and chain.is_all_of(recording.trace)  # type: ignore[union-attr]
            derived = _Derived(recording.trace, name, asks_sizes, is_loop)
            fitting[derived.trace.digest] = derived
            if not asks_sizes or not cut.rows or len(fitting) > 1:
                break
        if not fitting and not cut.rows and not found.asks_sizes:
            # Values that were made up don't do. But the example's way is all batches' way: no
            # number crosses, and nobody asks for sizes.
            (name,) = found.values
            return _Derived(found.trace, name, asks_sizes=False, is_loop=False)
        if not fitting or not self._all_same(given, list(fitting.values())):
            raise ExampleError(
                f"smashed data of shape {tuple(given.shape)} came, and "
                f"{'several inputs give' if fitting else 'no input was found that gives'} such "
                f"data at {cut.name!r}: {GIVE_AN_EXAMPLE}"
            )
        return next(iter(fitting.values()))

    def _recordings(self, cut: Cut, rows: int) -> Iterator[Recording]:
        """Follow the client's forward on the *meta* device, or with made-up weights and values."""
        ghost, solid = without_data(self._watched()), None
        for batch in self._batches(rows):
            recording = Recording(None, cut.found.passage.whole, cut.name)
            try:
                try:
                    with torch.device("meta"):
                        record(recording, ghost, cut.name, *batch)
                except NEEDS_VALUES as error:
                    if not needs_values(error):
                        raise
                    solid = solid or self._solid(cut)
                    recording = self._made_up(cut, solid, batch)
            except (CutError, *TORCH_ERRORS):
                continue
            if not recording.read:
                yield recording

    def _made_up(self, cut: Cut, solid: nn.Module, batch: Any) -> Recording:
        """Follow the client's forward with made-up values: integers may be ids, or lengths."""
        for integer in (0, 1):
            recording = Recording(None, cut.found.passage.whole, cut.name)
            filled = map_tree(partial(with_values, integer=integer), batch)
            try:
                with undisturbed((), {}):
                    record(recording, solid, cut.name, *filled)
            except TORCH_ERRORS:
                if integer:
                    raise
            else:
                break
        return recording

    def _solid(self, cut: Cut) -> nn.Module:
        model = filled(vars(self)["_whole"], torch.device("cpu"))
        instrument(model, cut.name, cut.found.before)
        return model

    def _all_same(self, given: Tensor, fitting: list[_Derived]) -> bool:
        """Tell whether it makes no difference which of several inputs it was."""
        outputs = []
        for derived in fitting if len(fitting) > 1 else ():
            model = copied(self._watched())
            crossing = Crossing({derived.name: given.detach()}, derived.trace)
            with undisturbed(given, {}), torch.no_grad():
                outputs.append(run_from_cut(model, vars(self)["_cut"].name, crossing))
        return all(
            torch.equal(a, b)
            for other in outputs[1:]
            for a, b in zip(tensors_in(outputs[0]), tensors_in(other), strict=True)
        )

    def _batches(self, rows: int) -> Iterator[tuple[Any, Any]]:
        cut: Cut = vars(self)["_cut"]
        args, kwargs = cut.found.passage.trace.calls[0][1]
        old = next((leaf.shape[0] for leaf in leaves_in((args, kwargs)) if isinstance(leaf, Spec)
                    and leaf.shape), rows)  # fmt: skip

        def batch(leaf: Any) -> Any:
            if not isinstance(leaf, Spec):
                return leaf
            shape = leaf.shape
            if shape and shape[0] == old:
                shape = (rows, *shape[1:])
            return torch.empty(shape, dtype=leaf.dtype, device="meta")

        yield map_tree(batch, (args, kwargs))
        for shape, dtype in cut.rows:
            yield (torch.empty((rows, *shape), dtype=dtype, device="meta"),), {}


def inputs_of(passage: Passage) -> str:
    """Return what a batch was, but for its number of rows."""
    return in_words(_specs(passage))


def dtypes_of(passage: Passage) -> list[torch.dtype]:
    """Return the dtypes of a batch's tensors."""
    return [spec.dtype for spec in _specs(passage)]


def _specs(passage: Passage) -> list[Spec]:
    given = leaves_in(passage.trace.calls[0][1])
    return [leaf for leaf in given if isinstance(leaf, Spec)]


def in_words(specs: list[Spec]) -> str:
    """Return what tensors are, but for their number of rows, in one text."""
    rows = next((spec.shape[:1] for spec in specs if spec.shape), ())
    shapes = [("rows", *s.shape[1:]) if s.shape[:1] == rows else s.shape for s in specs]
    return ", ".join(f"{shape} {s.dtype}" for shape, s in zip(shapes, specs, strict=True))


def batch_key(args: Any, kwargs: Mapping[str, Any], training: bool) -> Any:
    """Return what tells batches apart: shapes, dtypes, and how the model is run."""
    mode = training, torch.is_grad_enabled(), _autocast()
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        x = args[0]
        return x.shape, x.dtype, x.requires_grad, x.device, mode
    shapes = map_tree(_shape, (args, dict(kwargs)))
    return repr(shapes), mode


def _shape(leaf: Any) -> Any:
    return (Spec.of(leaf), leaf.device.type) if isinstance(leaf, Tensor) else leaf


def _autocasts() -> bool:
    return bool(_autocast() != (False, False))


def _autocast() -> Any:
    on = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return on if not any(on) else (on, torch.get_autocast_dtype("cuda" if on[1] else "cpu"))
