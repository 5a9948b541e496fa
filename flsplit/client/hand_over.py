"""Flower's privacy mods at the one place where they make sense: a client's segment that leaves."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from flsplit.client.live_client import Client
from flsplit.errors import ConfigError, DataError
from flsplit.flower_internals import CLIPPING_NORM, NORM_BIT
from flsplit.log import warn_once
from flsplit.message.arrays import check_like, from_record, to_record
from flsplit.message.local_steps import LocalReply
from flsplit.message.request import Reply
from flsplit.message.round_plan import RoundPlan
from flsplit.message.steps import FinishReply

_CLIPPING = (fixedclipping_mod, adaptiveclipping_mod)


def sort_mods(mods: Iterable[Mod]) -> tuple[list[Mod], list[Mod]]:
    """Return the mods that go around every handler, and those for the hand-over.

    ConfigError if one would let everything through unprotected, though it is there to protect.
    """
    around: list[Mod] = []
    at_hand_over: list[Mod] = []
    for mod in mods:
        module = str(getattr(mod, "__module__", ""))
        if mod in _CLIPPING or isinstance(mod, LocalDpMod):
            at_hand_over.append(mod)
        elif module.startswith("flwr.client.mod.secure_aggregation"):
            raise ConfigError(
                f"mods: {_name(mod)} needs a server that exchanges keys and unmasks sums in rounds "
                "of its own, which no split strategy does; segments would leave unmasked"
            )
        elif module.startswith("flwr.client.mod."):  # it looks for messages called "train"
            raise ConfigError(
                f"mods: {module}.{_name(mod)} is of Flower's legacy interface and would change "
                f"nothing; take {_name(mod)} of flwr.clientapp.mod"
            )
        else:
            around.append(mod)
    return around, at_hand_over


def check_mods(mods: Iterable[Mod], plan: RoundPlan) -> None:
    """Refuse a round in which the client strategy counts on a mod that isn't there, or not on one.

    ConfigError if so.
    """
    clipping = [mod for mod in mods if mod in _CLIPPING]
    wanted = adaptiveclipping_mod if plan.norm_bit else fixedclipping_mod
    if clipping and not plan.clipping_norm:
        raise ConfigError(
            f"{', '.join(map(_name, clipping))} needs a clipping_norm from the server: "
            "client_strategy=DifferentialPrivacyClientSideFixedClipping(…), or the adaptive one"
        )
    fits = adaptiveclipping_mod in clipping if plan.norm_bit else clipping
    if plan.clipping_norm and not fits:
        raise ConfigError(
            f"the client strategy counts on the clients to clip to {plan.clipping_norm:g}, but "
            f"this one has no mod for that: client_app(mods=[{_name(wanted)}])"
        )


def through_mods(client: Client, message: Message, reply: Reply) -> Reply:
    """Return a reply whose segment, if there is one, has gone through the app's privacy mods.

    They see what they would see of a whole model: a message with the trainable parameters as the
    server gave them last, answered by one with those that are handed over.

    ConfigError or DataError if a mod answers with an error, or nothing was trained.
    SegmentMismatchError if what a mod returns doesn't fit.
    """
    mods = client.spec.privacy_mods
    if not (mods and isinstance(reply, FinishReply | LocalReply)):
        return reply
    names, run = ", ".join(map(_name, mods)), client.plan.experiment
    if reply.segment is None:
        if isinstance(reply, FinishReply):
            warn_once(run, f"{names}: no client segment is handed over in this round; {_REST}")
        return reply
    start = client.memory.given
    trained = {name: reply.segment[name] for name in start}
    if not start:  # all of it is frozen
        return replace(reply, clipped=False)
    warn_once(run, f"{names}: only the client segment's parameters are edited; {_REST}")
    config = ConfigRecord({"server-round": reply.server_round})
    if norm := client.plan.clipping_norm:
        config[CLIPPING_NORM] = norm
    asked = Message(RecordDict({"arrays": _record(start), "config": config}), reply_to=message)

    def hand_over(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": reply.num_examples})
        content = RecordDict({"arrays": _record(trained), "metrics": metrics})
        return Message(content, reply_to=message)

    call: ClientAppCallable = hand_over
    for mod in reversed(mods):
        call = partial(_called, mod, call)
    try:
        answer = call(asked, client.context)
    except ZeroDivisionError as error:  # Flower's mods divide by the length of the update
        raise DataError(
            f"client {client.name!r}: {names} can't clip what has not changed in this round"
        ) from error
    if answer.has_error():
        raise ConfigError(f"client {client.name!r}: {answer.error.reason}")
    (arrays,) = answer.content.array_records.values()
    (metrics,) = answer.content.metric_records.values()
    edited = from_record(arrays, field="arrays")
    edited |= {name: edited[name].reshape(()) for name, one in trained.items() if one.ndim == 0}
    segment = reply.segment | check_like(edited, trained, what=f"what {names} returned")
    bit = metrics.get(NORM_BIT)
    return replace(reply, segment=segment, clipped=None if bit is None else bool(bit))


_REST = "smashed data, labels, buffers, optimizer states and auxiliary models leave as they are"


def _called(mod: Mod, inner: ClientAppCallable, message: Message, context: Context) -> Message:
    return mod(message, context, inner)


def _record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    # NumPy computes with an array of no dimension out of place: Flower's mods would leave it as it
    # is, neither clipped nor with noise.
    return to_record({name: one.reshape(one.shape or (1,)) for name, one in tensors.items()})


def _name(mod: object) -> str:
    return str(getattr(mod, "__name__", type(mod).__name__))
