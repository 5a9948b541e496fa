"""Cuts a model in two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from flsplit.cut.clean_cuts import shared_inputs
from flsplit.cut.closures import check_functions
from flsplit.cut.cut_errors import GIVE_AN_EXAMPLE, CutError, ExampleError, check_keys, listed
from flsplit.cut.examples import NEEDS_VALUES, ROWS, likely_rows, needs_values, with_values
from flsplit.cut.halves import ClientHalf, Cut, ServerHalf, batch_key
from flsplit.cut.look import Look, find_layer, free_copies, look
from flsplit.cut.partial_forward import is_compiled, places_of
from flsplit.cut.remembering import fingerprint, remembered
from flsplit.cut.sides import one_side, without_data
from flsplit.cut.verifying import verify
from flsplit.nested import as_arguments, to_device

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Split:
    """A model in two halves, which share its parameters and buffers.

    Attributes
    ----------
    client : ClientHalf
        The client segment: turns an input batch into smashed data, a tensor or a `Crossing`. Of a
        U-shaped split it has the last layers, too, in ``tail``.
    server : ServerHalf
        The server segment: turns smashed data into the model's output, or into what comes back.
    cut : str
        The cut layer's name, or the two of a U-shaped split: ``"conv2,fc1"``.
    keys : tuple of str
        The keys of the whole model's state dict, in its order.
    """

    client: ClientHalf
    server: ServerHalf
    cut: str
    keys: tuple[str, ...]

    @property
    def crossing(self) -> tuple[str, ...]:
        """What crosses, in words: each tensor and number, with the batch that was looked at."""
        passage = vars(self.client)["_cut"].found.passage
        return tuple(value.what for value in (*passage.values.values(), *passage.reads))

    def divide(self, state_dict: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Divide a state dict of the whole model between the segments.

        Parameters
        ----------
        state_dict : mapping of str to anything
            Values by the whole model's keys.

        Returns
        -------
        tuple of two dicts
            The client segment's and the server segment's part. Frozen tensors that both sides use
            are in both. Values are not copied.

        Raises
        ------
        StateDictError
            If keys of the whole model are missing or others are there.
        """
        check_keys("the whole model's state dict", state_dict, self.keys)
        client, server = self.client.state_dict(), self.server.state_dict()
        return (
            {key: state_dict[key] for key in self.keys if key in client},
            {key: state_dict[key] for key in self.keys if key in server},
        )

    def join(self, client: Mapping[str, T], server: Mapping[str, T]) -> dict[str, T]:
        """Join the segments' state dicts.

        Parameters
        ----------
        client, server : mapping of str to anything
            Values by the keys of each segment.

        Returns
        -------
        dict
            The whole model's state dict, in its order. Values are not copied.

        Raises
        ------
        StateDictError
            If keys of a segment are missing or others are there.
        """
        check_keys("the client segment's state dict", client, tuple(self.client.state_dict()))
        check_keys("the server segment's state dict", server, tuple(self.server.state_dict()))
        return {key: server[key] if key in server else client[key] for key in self.keys}


def split(
    model: nn.Module, cut: str | tuple[str, str], example: Any = None, *, share: Sequence[str] = ()
) -> Split:
    """Cut a model in two after one of its modules, or out of it what lies between two.

    The client segment is everything up to the moment when the cut layer returns, the server
    segment is the rest. Both are the model's own forward, run by Python, of which only one
    stretch computes; so together they compute bit for bit what the model computes.

    Parameters
    ----------
    model : nn.Module
        The whole model. It is not changed.
    cut : str or (str, str)
        The cut layer: the dotted name of a submodule, as in ``model.named_modules()``. If forward
        calls it more than once, ``"relu#2"`` is after the second call. Two of them, also in one
        text (``"conv2,fc1"``), make a U-shaped split: the server has what comes after the first up
        to the second one, the client all else.
    example : Tensor, tuple or dict, optional
        A batch: the model's input, its arguments, or its keyword arguments. The model is run with
        it, whole and split, and both have to compute the same. Without an example, it is the
        model's own ``dummy_inputs`` (models of the transformers library have them), or one is made
        up from what the first layers take, where they take one tensor.
    share : sequence of str
        Inputs that may be sent to the server, as they are or in values made of them alone.

    Returns
    -------
    Split
        The two segments.

    Raises
    ------
    UnknownCutError
        If there is no such module, or forward doesn't call it, or calls it more than once.
    ExampleError
        If no input could be made up.
    CrossingError
        If something crosses that mustn't: an input that is not shared, what can't be described.
    SharedStateError
        If both sides would train the same parameter.
    EmptySegmentError
        If no parameters are left for the server.
    CutError
        If the split model would compute something else, for another reason.
    """
    cut = cut_name(cut)
    first, second = places_of(cut)
    for place in [first, second] if second else [first]:
        find_layer(model, place)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise CutError(f"{type(model).__name__} has lazy parameters: run it on one batch first")
    allowed = shared_inputs(model, share)
    key, alive = fingerprint(model)
    key = (*key, cut, allowed)
    if example is None:
        found = remembered(key, lambda: _look_without_example(model, cut, allowed), alive)
    else:
        args, kwargs = as_arguments(example)
        shapes = batch_key(args, kwargs, model.training)
        found = remembered(
            (*key, shapes), lambda: _look_and_verify(model, cut, allowed, args, kwargs), alive
        )
    rows = likely_rows(model) if example is None else ()
    plan = Cut(cut, allowed, found, rows, key, any(map(is_compiled, model.modules())))
    halves = Split(
        client=ClientHalf(one_side(model, found.client), plan),
        server=ServerHalf(one_side(model, found.server), plan),
        cut=cut,
        keys=tuple(model.state_dict()),
    )
    kept = {*halves.client.state_dict(), *halves.server.state_dict()}
    if lost := sorted(kept ^ set(halves.keys)):
        raise CutError(
            f"the segments' state dicts and that of {type(model).__name__} differ in "
            f"{listed(lost)}: a module makes its state dict in a way of its own"
        )
    return halves


def cut_name(cut: str | tuple[str, str]) -> str:
    """Return a cut, or two, as one text."""
    return ",".join(places_of(cut if isinstance(cut, str) else ",".join(cut))).strip(",")


def _look_and_verify(
    model: nn.Module, cut: str, share: frozenset[str], args: Any, kwargs: Any
) -> Look:
    check_functions(model)
    found = look(model, cut, args, kwargs, share)
    verify(model, cut, found, args, kwargs)
    free_copies(model)
    return found


def _look_without_example(model: nn.Module, cut: str, share: frozenset[str]) -> Look:
    """Look at a model with made-up batches until it takes one."""
    check_functions(model)
    ghost = without_data(model)
    solid = next((p.device for p in model.parameters()), torch.device("cpu"))
    reasons: list[str] = []
    if isinstance(dummy := getattr(model, "dummy_inputs", None), Mapping):
        try:
            return _look_and_verify(model, cut, share, (), to_device(dict(dummy), solid))
        except CutError:
            raise
        except Exception as error:
            reasons.append(f"its dummy_inputs: {type(error).__name__}: {error}")
    for shape, dtype in likely_rows(model):
        batch = torch.empty((ROWS, *shape), dtype=dtype, device="meta")
        try:
            try:
                with torch.device("meta"):
                    return look(ghost, cut, (batch,), {}, share)
            except NEEDS_VALUES as error:
                if not needs_values(error):
                    raise
                return look(model, cut, (with_values(batch).to(solid),), {}, share)
        except CutError:
            raise
        except Exception as error:
            reasons.append(f"{tuple(batch.shape)}: {type(error).__name__}: {error}")
    raise ExampleError(
        f"{type(model).__name__} has to be run once to be cut, and no input was found that it "
        f"takes: {GIVE_AN_EXAMPLE}. The first tried: {reasons[0] if reasons else 'none'}"
    )
