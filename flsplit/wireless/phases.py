r"""What a round consists of: the words in which a method says so, and the phases of many methods.

A round is a sequence of phases. In a phase every device does the phase's stages one after the
other; the phase ends when the last device has done so, or, where devices take turns, when all have
had theirs. A stage is an amount of FLOPs or bits. In the formulas here and in the methods' files

- n devices each train on ``steps`` mini-batches of b samples,
- :math:`F_c, B_c, F_s, B_s` are the FLOPs per sample of a forward and a backward pass on the client
  and on the server, :math:`B_l` those of the last layer's backward pass,
- :math:`\Gamma` are the bits of one sample's smashed data, and of its gradient; where client parts
  compress, those that they send, which may differ up and down,
- :math:`|w_c|, |w|` are the bits of the client segment's and the whole model's parameters.

Labels, message headers and the time of the optimizers are left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar

import torch

from flsplit.client_parts import ClientPart
from flsplit.client_parts.client_part import overrides
from flsplit.client_parts.compression import compressing
from flsplit.errors import ConfigError
from flsplit.wireless.profile import BACKWARD_PER_FORWARD, ModelProfile, Place

BITS = 8
"""Bits per byte."""


_FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}


class Where(Enum):
    """Where a stage happens, and in what its amount is."""

    DEVICE = "device"
    """FLOPs on the device."""
    SERVER = "server"
    """FLOPs on the server."""
    UPLINK = "uplink"
    """Bits from the device."""
    DOWNLINK = "downlink"
    """Bits to the device alone."""
    BROADCAST = "broadcast"
    """Bits to all devices."""


@dataclass(frozen=True)
class Stage:
    """Something that takes time.

    Attributes
    ----------
    name : str
        What it is called.
    where : Where
        Where it happens.
    amount : float
        FLOPs or bits, for one device; on the server, for all in a phase that they share.
    """

    name: str
    where: Where
    amount: float


@dataclass(frozen=True)
class Phase:
    """Stages that every device does one after the other.

    Attributes
    ----------
    stages : tuple of Stage
        In order.
    repeat : int
        How often the phase happens in a round.
    in_turn : bool
        Whether one device does them after the other, or all at once.
    waits : bool
        Whether a device waits for the others before it begins. Otherwise its stages and those of
        the phase before are one chain, if the device does those, too, by itself:
        :meth:`Method.phases` joins the two.
    """

    stages: tuple[Stage, ...]
    repeat: int = 1
    in_turn: bool = False
    waits: bool = True


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a round trains.

    Attributes
    ----------
    batch_size : int
        Samples per device and mini-batch.
    steps : int
        Mini-batches per device and round.
    optimizer_slots : int
        Numbers that the optimizer keeps per parameter: 0 for SGD, 1 with momentum, 2 for Adam.
    """

    batch_size: int = 64
    steps: int = 1
    optimizer_slots: int = 0

    def __post_init__(self) -> None:
        """Refuse values that can't be used."""
        for name, least in (("batch_size", 1), ("steps", 1), ("optimizer_slots", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Work:
    """What a round has to do.

    Attributes
    ----------
    profile : ModelProfile
        The model.
    place : Place
        Where it is cut.
    num_devices : int
        How many devices train.
    training : Training
        On what.
    parts : sequence of ClientPart
        What clients do beside the plain step; those that compress change bits.
    """

    profile: ModelProfile
    place: Place
    num_devices: int
    training: Training
    parts: Sequence[ClientPart] = ()

    @property
    def rows(self) -> int:
        """Samples that all devices together have in a step: n b."""
        return self.num_devices * self.training.batch_size

    @property
    def activation_bits(self) -> float:
        """Bits of one sample's smashed data, and of inputs that go with it."""
        place = self.place
        return self._sent_bits("smashed-data", place.gradient_bytes) + BITS * place.shared_bytes

    @property
    def gradient_bits(self) -> float:
        """Bits of one sample's cut-layer gradient."""
        return self._sent_bits("cut-gradient", self.place.gradient_bytes)

    @property
    def output_bits(self) -> float:
        """Bits of what the server returns of a sample in a U-shaped split."""
        return self._sent_bits("outputs", self.place.output_bytes)

    @property
    def output_gradient_bits(self) -> float:
        """Bits of its gradient, which goes up."""
        return self._sent_bits("output-gradient", self.place.output_bytes)

    @property
    def shares_gradients(self) -> bool:
        """Whether cut-layer gradients can be broadcast: no part makes them each client's own."""
        edited = any(overrides(part, "down") for part in self.parts)
        return not (edited or compressing(self.parts, "cut-gradient"))

    def _sent_bits(self, record: str, bytes_of_row: int) -> float:
        """Return a sample's bits in a message; of a whole batch's a share, where it is packed."""
        part, size = compressing(self.parts, record), self.place.element_bytes
        if part is None:
            return BITS * bytes_of_row
        rows, dtype = self.training.batch_size, _FLOATS.get(size, torch.float32)
        return BITS * part.nbytes(rows, bytes_of_row // size, dtype) / rows

    @property
    def client_bits(self) -> int:
        """Bits of the client segment's parameters."""
        return BITS * self.place.client_bytes

    @property
    def auxiliary_flops(self) -> int:
        """FLOPs of a sample's forward and backward pass through a linear auxiliary model.

        For e elements of a sample's smashed data and c classes :math:`F_a + B_a`, with
        :math:`F_a = 2 e c`.
        """
        forward = 2 * self.place.activation_elements * self.profile.num_classes
        return (1 + BACKWARD_PER_FORWARD) * forward

    @property
    def auxiliary_bits(self) -> int:
        """Bits of a linear auxiliary model's :math:`c (e + 1)` parameters, weights and biases."""
        params = self.profile.num_classes * (self.place.activation_elements + 1)
        return BITS * self.place.element_bytes * params


class SaysPhases:
    """What the planner and a fleet's clock ask of a class of methods.

    Everywhere ``arguments`` are those of the class's constructor by name, with the defaults, but
    for ``model`` and ``cut``: ``work`` says where the model is cut.

    Attributes
    ----------
    aggregates : bool
        Whether client segments are aggregated even if no ``client_strategy`` is given.
    """

    aggregates: ClassVar[bool] = False

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        """Return what a round sends (bits) and computes (FLOPs), in its order.

        By default parallel steps, and an aggregation of the client segments where there is one.
        """
        return (*parallel_steps(work), *cls.aggregation_phases(work, **arguments))

    @classmethod
    def aggregation_phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        r"""Return the phases of the client segments' aggregation; none where there is none.

        Each device sends :math:`|w_c|` (bits) as soon as it has done its last backward pass, and
        the mean, :math:`|w_c|` (bits), is broadcast.
        """
        aggregates = cls.aggregates or arguments.get("client_strategy") is not None
        return aggregation(work.client_bits) if aggregates else ()

    @classmethod
    def plan_note(cls, **arguments: Any) -> str:
        """Return what to know of what :meth:`phases` charges; by default nothing."""
        return ""

    @classmethod
    def device_memory_bytes(cls, work: Work, **arguments: Any) -> int:
        """Return the bytes that a device needs besides `Place.client_memory_bytes`."""
        return 0


@dataclass(frozen=True)
class Method:
    """A method of training, with its arguments."""

    name: str  # the strategy's name, as in a run's configuration
    kind: type[SaysPhases]  # says the phases
    # those of its constructor, with all defaults
    arguments: Mapping[str, Any] = field(default_factory=dict)
    # what a run's configuration must say to have them: text, numbers, lists and tables of such
    given: Mapping[str, Any] = field(default_factory=dict)
    # whether devices train the whole model, so that there is nothing to cut
    whole_model: bool = False
    # what its clients do beside the plain step
    parts: Sequence[ClientPart] = ()

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of; a ConfigError says if the class doesn't."""
        found = self.kind.phases(replace(work, parts=self.parts), **self.arguments)
        if not (isinstance(found, tuple) and all(isinstance(one, Phase) for one in found)):
            raise ConfigError(f"phases of {self.name} are {found!r}, expected a tuple of Phase")
        return _chained(found)


def _chained(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Join phases for which no device waits with those before them; `Phase.waits`."""
    found: list[Phase] = []
    for phase in phases:
        before = found[-1] if found else None
        if before is None or phase.waits or not (_is_own(before) and _is_own(phase)):
            found.append(phase)
            continue
        found[-1:] = [replace(before, repeat=before.repeat - 1)] if before.repeat > 1 else []
        found.append(Phase((*before.stages, *phase.stages), waits=before.waits))
        if phase.repeat > 1:
            found.append(replace(phase, repeat=phase.repeat - 1))
    return tuple(found)


def _is_own(phase: Phase) -> bool:
    """Return whether each device does a phase by itself, at the same time as the others."""
    together = (Where.SERVER, Where.BROADCAST)
    return not phase.in_turn and all(stage.where not in together for stage in phase.stages)


# ------------------------------------------------------------------------------------------------
# Phases that many methods have


def parallel_steps(
    work: Work,
    *,
    shared_rows: int = 0,
    server: Iterable[Phase] | None = None,
    tails_in_turn: bool = False,
) -> tuple[Phase, ...]:
    r"""Return the phases of a round's parallel steps.

    With :math:`m` shared rows a step has the phases

    - client forward :math:`b F_c` (FLOPs per device), uplink :math:`b \Gamma` (bits per device),
    - what the server does; in a U-shaped split, after its forward pass, `tail_stages`,
    - broadcast :math:`m \Gamma` (bits),
    - unicast :math:`(b - m) \Gamma` (bits per device), client backward :math:`b B_c` (FLOPs per
      device).

    In a round of several steps the last phase of a step and the first of the next are one: a
    device goes on without waiting for the others. Rows that client parts compress or edit are each
    device's own: then nothing is broadcast.

    Parameters
    ----------
    work : Work
        What there is to do.
    shared_rows : int
        How many rows of the cut-layer gradients are the same for all devices.
    server : iterable of Phase, optional
        What the server does in a step. Default: `server_passes`, each row forward and backward.
    tails_in_turn : bool
        Whether the server asks for the last layers of a U-shaped split one device after the
        other, because it steps on each one's batch before it goes on to the next. Default: all at
        once.
    """
    place, rows, steps = work.place, work.training.batch_size, work.training.steps
    bits = work.gradient_bits
    shared_rows = shared_rows if work.shares_gradients else 0
    up = (
        Stage("client forward", Where.DEVICE, rows * place.client_flops_forward),
        Stage("uplink", Where.UPLINK, rows * work.activation_bits),
    )
    down = (
        Stage("unicast", Where.DOWNLINK, (rows - shared_rows) * bits),
        Stage("client backward", Where.DEVICE, rows * place.client_flops_backward),
    )
    broadcast = Phase((Stage("broadcast", Where.BROADCAST, shared_rows * bits),))
    first, *others = server_passes(work) if server is None else server
    last_layers = (Phase(tail, in_turn=tails_in_turn),) if (tail := tail_stages(work)) else ()
    in_each = (first, *last_layers, *others, broadcast)
    between = (Phase((*down, *up), steps - 1),) if steps > 1 else ()
    return (
        Phase(up),
        *(replace(phase, repeat=steps * phase.repeat) for phase in in_each),
        *between,
        Phase(down),
    )


def tail_stages(work: Work) -> tuple[Stage, ...]:
    r"""Return what comes between the server's passes in a U-shaped split; nothing otherwise.

    Outputs down :math:`b \Gamma_2` (bits), the last layers forward and backward :math:`b (F_t +
    B_t)` (FLOPs), and the outputs' gradient up, as large as they.
    """
    place, rows = work.place, work.training.batch_size
    if not place.output_elements:
        return ()
    return (
        Stage("outputs", Where.DOWNLINK, rows * work.output_bits),
        Stage("last layers", Where.DEVICE, rows * place.tail_flops),
        Stage("output gradients", Where.UPLINK, rows * work.output_gradient_bits),
    )


def server_passes(
    work: Work,
    *,
    forward_rows: float | None = None,
    backward_rows: float | None = None,
    logit_rows: float | None = None,
) -> tuple[Phase, Phase]:
    r"""Return the phases of the server's passes over rows.

    Forward ``forward_rows`` :math:`F_s`, backward ``logit_rows`` :math:`B_l` + ``backward_rows``
    :math:`(B_s - B_l)` (FLOPs).

    Parameters
    ----------
    work : Work
        What there is to do.
    forward_rows, backward_rows, logit_rows : float, optional
        How many rows go forward; back to the cut; and back through the last layer, to which each
        row's own gradient comes even where those behind it are merged. Default: all rows of a
        step, and ``backward_rows`` for ``logit_rows``.
    """
    place, last = work.place, work.profile.last_layer_flops_backward
    forward_rows = work.rows if forward_rows is None else forward_rows
    backward_rows = work.rows if backward_rows is None else backward_rows
    logit_rows = backward_rows if logit_rows is None else logit_rows
    backward = logit_rows * last + backward_rows * (place.server_flops_backward - last)
    return (
        server_phase("server forward", forward_rows * place.server_flops_forward),
        server_phase("server backward", backward),
    )


def server_phase(name: str, flops: float) -> Phase:
    """Return a phase in which the server computes (FLOPs)."""
    return Phase((Stage(name, Where.SERVER, flops),))


def aggregation(bits: float) -> tuple[Phase, Phase]:
    """Return the phases of an average over devices: ``bits`` up from each, and broadcast.

    A device sends when it has done what comes before; it doesn't wait for the others.
    """
    return (
        Phase((Stage("aggregation up", Where.UPLINK, bits),), waits=False),
        Phase((Stage("aggregation down", Where.BROADCAST, bits),)),
    )
