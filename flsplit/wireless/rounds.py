r"""What a round of each method consists of: our model, after EPSL.

A round is a sequence of phases. In a phase every device does the phase's stages one after the
other; the phase ends when the last device has done so, or, where devices take turns, when all have
had theirs. A stage is an amount of FLOPs or bits. Every function here returns phases for

- n devices that each train on ``steps`` mini-batches of b samples,
- :math:`F_c, B_c, F_s, B_s`, the FLOPs per sample of a forward and a backward pass on the client
  and on the server, :math:`B_l` those of the last layer's backward pass,
- :math:`\Gamma`, the bits of one sample's smashed data, and of its gradient,
- :math:`|w_c|, |w|`, the bits of the client segment's and the whole model's parameters.

Labels, message headers and the time of the optimizers are left out.
"""

import math
from dataclasses import dataclass
from enum import Enum

from flsplit.auxiliary import LINEAR
from flsplit.errors import ConfigError
from flsplit.wireless.profile import BACKWARD_PER_FORWARD, ModelProfile, Place

BITS = 8
"""Bits per byte."""

Argument = str | int | float
"""An argument of a strategy."""


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
    """

    stages: tuple[Stage, ...]
    repeat: int = 1
    in_turn: bool = False


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
    """What a round has to do, for `Method.phases`.

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
    """

    profile: ModelProfile
    place: Place
    num_devices: int
    training: Training

    @property
    def activation_bits(self) -> int:
        """Bits of one sample's smashed data, and of its gradient."""
        return BITS * self.place.activation_bytes

    @property
    def client_bits(self) -> int:
        """Bits of the client segment's parameters."""
        return BITS * self.place.client_bytes

    @property
    def auxiliary_flops(self) -> int:
        """FLOPs of a sample's forward and backward pass through a linear auxiliary model."""
        forward = 2 * self.place.activation_elements * self.profile.num_classes
        return (1 + BACKWARD_PER_FORWARD) * forward

    @property
    def auxiliary_bits(self) -> int:
        """Bits of a linear auxiliary model's parameters: weights and biases."""
        params = self.profile.num_classes * (self.place.activation_elements + 1)
        return BITS * self.place.element_bytes * params


class Method:
    """A method of training.

    Attributes
    ----------
    name : str
        The strategy's name, as in a run's configuration.
    whole_model : bool
        Whether devices train the whole model, so that there is nothing to cut.
    in_turn : bool
        Whether devices take turns, so that there are no subchannels to divide.
    """

    name: str
    whole_model = False
    in_turn = False

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        raise NotImplementedError

    @property
    def note(self) -> str:
        """What to know of what is charged; empty where there is nothing to say."""
        return ""

    def added_memory_bytes(self, work: Work) -> int:
        """Return the bytes that a device needs besides `Place.client_memory_bytes`."""
        return 0

    @property
    def arguments(self) -> dict[str, Argument]:
        """The arguments that make the strategy this method, as a run's configuration has them."""
        return {}


def aggregated_rows(phi: float, batch_size: int) -> int:
    """Return how many positions of a mini-batch EPSL aggregates: ``m = ceil(phi b)``.

    ``phi`` has no unit, from 0 to 1; ``batch_size`` and the result are in samples.
    """
    return math.ceil(phi * batch_size - 1e-9)


@dataclass(frozen=True)
class EPSL(Method):
    r"""Efficient parallel split learning: a share of the last layer's gradients is aggregated.

    With :math:`m = \lceil \varphi b \rceil` aggregated positions, a step has the phases

    - client forward :math:`b F_c` (FLOPs per device), uplink :math:`b \Gamma` (bits per device),
    - server forward :math:`n b F_s`, and with ``replays`` and :math:`m > 0` another
      :math:`(m + n (b - m)) F_s`; server backward
      :math:`n b B_l + (m + n (b - m)) (B_s - B_l)` (FLOPs),
    - broadcast :math:`m \Gamma` (bits),
    - unicast :math:`(b - m) \Gamma` (bits per device), client backward :math:`b B_c` (FLOPs per
      device).

    In a round of several steps the last phase of a step and the first of the next are one: a
    device goes on without waiting for the others.

    Parameters
    ----------
    phi : float
        The share, without unit, from 0 (parallel split learning) to 1.
    replays : bool
        Whether rows go through the server segment a second time to be back-propagated, as in
        `flsplit.server.passes.Replay`, which the strategy has by default. The paper's equations,
        as we understand them, have one forward pass.

    References
    ----------
    .. [1] Lin et al., Efficient Parallel Split Learning over Resource-constrained Wireless Edge
       Networks, https://arxiv.org/abs/2303.15991. The equations are our model after it.
    """

    phi: float = 0.5
    replays: bool = True
    name = "epsl"

    def __post_init__(self) -> None:
        """Refuse shares outside of 0 to 1."""
        if not 0.0 <= self.phi <= 1.0:
            raise ConfigError(f"phi is {self.phi:g}, expected a number from 0 to 1")

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        return _steps(work, self.phi, self.replays)

    @property
    def note(self) -> str:
        """Which forward passes are charged."""
        if not self.replays or self.phi == 0.0:
            return ""
        return 'server forward has the second pass of aggregation = "replay"'

    @property
    def arguments(self) -> dict[str, Argument]:
        """The strategy's arguments."""
        return {"phi": self.phi}


@dataclass(frozen=True)
class PSL(Method):
    """Parallel split learning: EPSL without aggregation, phi = 0."""

    name = "psl"

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        return _steps(work, 0.0)


@dataclass(frozen=True)
class SplitFed(Method):
    r"""SplitFed: parallel split learning, and the client segments are averaged every round.

    After the steps of `PSL` each device sends :math:`|w_c|` (bits) and the mean, :math:`|w_c|`
    (bits), is broadcast. The server's compute is the same with one copy (V2) and many (V1).

    Parameters
    ----------
    version : int
        1 or 2.
    """

    version: int = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        """The strategy's name."""
        return f"splitfed-v{self.version}"

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        return (*_steps(work, 0.0), *_aggregation(work.client_bits))


@dataclass(frozen=True)
class SequentialSL(Method):
    r"""Vanilla split learning: one device after the other, which hands the client segment on.

    A device's turn is, ``steps`` times, client forward :math:`b F_c`, uplink :math:`b \Gamma`,
    server forward :math:`b F_s`, server backward :math:`b B_s`, unicast :math:`b \Gamma`, client
    backward :math:`b B_c` (FLOPs and bits), and once :math:`|w_c|` (bits) up and down again.
    """

    name = "sequential-sl"
    in_turn = True

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        place, rows = work.place, work.training.batch_size
        bits = rows * work.activation_bits
        turn = (
            Stage("client forward", Where.DEVICE, rows * place.client_flops_forward),
            Stage("uplink", Where.UPLINK, bits),
            Stage("server forward", Where.SERVER, rows * place.server_flops_forward),
            Stage("server backward", Where.SERVER, rows * place.server_flops_backward),
            Stage("unicast", Where.DOWNLINK, bits),
            Stage("client backward", Where.DEVICE, rows * place.client_flops_backward),
        )
        hand_over = (
            Stage("hand over up", Where.UPLINK, work.client_bits),
            Stage("hand over down", Where.DOWNLINK, work.client_bits),
        )
        return (Phase(turn, work.training.steps, in_turn=True), Phase(hand_over, in_turn=True))


@dataclass(frozen=True)
class FSLSAGE(Method):
    r"""FSL-SAGE: devices train against auxiliary models, which are aligned now and then.

    The auxiliary model is the strategy's default, a linear classifier of the flattened smashed
    data. For e elements per sample and c classes it has :math:`F_a = 2 e c, B_a = 2 F_a` (FLOPs
    per sample) and :math:`|w_a|`, the bits of its :math:`c (e + 1)` parameters. In a round

    - a device does ``steps`` times client forward :math:`b F_c`, auxiliary :math:`b (F_a + B_a)`
      and client backward :math:`b B_c` (FLOPs), and uploads :math:`u = \lceil steps / q \rceil`
      batches of :math:`b \Gamma` (bits);
    - the server trains on them, :math:`n u b F_s` and :math:`n u b B_s` (FLOPs);
    - every l-th round, so a share 1/l of it in each, it aligns: N buffered samples of each device
      go through the server segment and E times through the auxiliary model, with second
      derivatives, :math:`n N (F_s + B_s + 2 E (F_a + B_a))` (FLOPs), and each device receives its
      auxiliary model, :math:`|w_a|` (bits);
    - client segments are averaged as in `SplitFed`.

    The server's work is counted after the devices', though some of it could overlap.

    Parameters
    ----------
    upload_interval, align_interval : int
        q (steps) and l (rounds); l = 0 for no alignment at all.
    align_epochs, buffer_rows : int
        E, and N (samples per device).

    References
    ----------
    .. [1] Nair et al., FSL-SAGE: Accelerating Federated Split Learning via Smashed Activation
       Gradient Estimation, ICML 2025, PMLR 267.
    """

    upload_interval: int = 5
    align_interval: int = 10
    align_epochs: int = 100
    buffer_rows: int = 1000
    name = "fsl-sage"

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        place, steps = work.place, work.training.steps
        rows = work.training.batch_size
        uploads = math.ceil(steps / self.upload_interval)
        local = (
            Stage("client forward", Where.DEVICE, steps * rows * place.client_flops_forward),
            Stage("auxiliary", Where.DEVICE, steps * rows * work.auxiliary_flops),
            Stage("client backward", Where.DEVICE, steps * rows * place.client_flops_backward),
            Stage("uplink", Where.UPLINK, uploads * rows * work.activation_bits),
        )
        uploaded = work.num_devices * uploads * rows
        return (
            Phase(local),
            _server("server forward", uploaded * place.server_flops_forward),
            _server("server backward", uploaded * place.server_flops_backward),
            *self._alignment(work),
            *_aggregation(work.client_bits),
        )

    def added_memory_bytes(self, work: Work) -> int:
        """Return the auxiliary model's bytes: ``(|w_a| + b Γ) / 8``, parameters and input.

        It is never trained on a device, so there are neither gradients nor an optimizer.
        """
        return (work.auxiliary_bits + work.training.batch_size * work.activation_bits) // BITS

    @property
    def arguments(self) -> dict[str, Argument]:
        """The strategy's arguments."""
        return {
            "auxiliary": LINEAR,
            "upload-every": self.upload_interval,
            "align-every": self.align_interval,
            "align-epochs": self.align_epochs,
            "buffer-size": self.buffer_rows,
        }

    def _alignment(self, work: Work) -> tuple[Phase, Phase]:
        place, often = work.place, 1.0 / self.align_interval if self.align_interval else 0.0
        per_row = float(place.server_flops_forward + place.server_flops_backward)
        per_row += 2 * self.align_epochs * work.auxiliary_flops
        flops = often * work.num_devices * self.buffer_rows * per_row
        return (
            _server("alignment", flops),
            Phase((Stage("auxiliary down", Where.DOWNLINK, often * work.auxiliary_bits),)),
        )


@dataclass(frozen=True)
class FedAvg(Method):
    r"""Federated averaging: every device trains the whole model.

    Client forward and backward are ``steps`` times :math:`b F` and :math:`b B` of the whole model
    (FLOPs), then :math:`|w|` (bits) go up from each device and are broadcast.
    """

    name = "fedavg"
    whole_model = True

    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        end, rows = work.profile.end, work.training.steps * work.training.batch_size
        bits = BITS * end.client_bytes
        local = (
            Stage("client forward", Where.DEVICE, rows * end.client_flops_forward),
            Stage("client backward", Where.DEVICE, rows * end.client_flops_backward),
            Stage("aggregation up", Where.UPLINK, bits),
        )
        return (Phase(local), Phase((Stage("aggregation down", Where.BROADCAST, bits),)))


METHODS = ("psl", "epsl", "splitfed-v1", "splitfed-v2", "sequential-sl", "fsl-sage", "fedavg")
"""The names that `method_of` knows."""


def method_of(name: str, phi: float | None = None) -> Method:
    """Return the method called ``name``, one of `METHODS`.

    Raises
    ------
    ConfigError
        If there is none, or ``phi`` (no unit) is given to another than EPSL.
    """
    if phi is not None and name != "epsl":
        raise ConfigError(f"{name} has no phi: it belongs to epsl")
    match name:
        case "psl":
            return PSL()
        case "epsl":
            return EPSL(0.5 if phi is None else phi)
        case "splitfed-v1" | "splitfed-v2":
            return SplitFed(int(name[-1]))
        case "sequential-sl":
            return SequentialSL()
        case "fsl-sage":
            return FSLSAGE()
        case "fedavg":
            return FedAvg()
    raise ConfigError(f"no latency model for {name!r} (there are {', '.join(METHODS)})")


def _steps(work: Work, phi: float, replays: bool = False) -> tuple[Phase, ...]:
    """Return the phases of a round's parallel steps; the formulas are in `EPSL`."""
    place, rows, bits = work.place, work.training.batch_size, work.activation_bits
    steps = work.training.steps
    shared = aggregated_rows(phi, rows)
    all_rows = work.num_devices * rows
    last = work.profile.last_layer_flops_backward
    back_rows = shared + work.num_devices * (rows - shared)
    forward_rows = all_rows + (back_rows if replays and shared else 0)
    backward = all_rows * last + back_rows * (place.server_flops_backward - last)
    up = (
        Stage("client forward", Where.DEVICE, rows * place.client_flops_forward),
        Stage("uplink", Where.UPLINK, rows * bits),
    )
    down = (
        Stage("unicast", Where.DOWNLINK, (rows - shared) * bits),
        Stage("client backward", Where.DEVICE, rows * place.client_flops_backward),
    )
    between = (Phase((*down, *up), steps - 1),) if steps > 1 else ()
    return (
        Phase(up),
        _server("server forward", forward_rows * place.server_flops_forward, steps),
        _server("server backward", backward, steps),
        Phase((Stage("broadcast", Where.BROADCAST, shared * bits),), steps),
        *between,
        Phase(down),
    )


def _server(name: str, flops: float, repeat: int = 1) -> Phase:
    return Phase((Stage(name, Where.SERVER, flops),), repeat)


def _aggregation(bits: float) -> tuple[Phase, Phase]:
    return (
        Phase((Stage("aggregation up", Where.UPLINK, bits),)),
        Phase((Stage("aggregation down", Where.BROADCAST, bits),)),
    )
