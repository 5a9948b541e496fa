"""GAPSL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flsplit.errors import ConfigError, NonFiniteError
from flsplit.run import ParallelStrategy, Reduction, Step, StepGradients, ceil_fraction
from flsplit.run.arguments import number, one_of
from flsplit.storage import State

Floats = NDArray[np.float64]
Excluded = Literal["own_gradient", "skip"]
Module = Literal["on", "off", "random"]
Active = Literal["none", "projection"]
Single = Literal["error", "keep"]

TOLERANCE = 1e-6
"""A client at the threshold is kept: so much rounding is allowed for, in radians."""


@dataclass(frozen=True)
class LeaderAlignment:
    """How the clients of a step stand to the leader; arrays in the clients' order."""

    scores: Floats  # mean angle of each client to the others, in radians
    dispersion: float  # standard deviation of the scores
    ratio: float  # K, the percentage of clients that make up the leader
    leaders: NDArray[np.bool_]  # who they are
    angles: Floats  # each client's angle to the leader
    threshold: float  # the largest angle that is kept
    kept: NDArray[np.bool_]  # whose gradients the server steps with
    lead_norm: float  # length of the leader gradient


class GAPSL(ParallelStrategy):
    r"""GAPSL: PSL whose server steps only with gradients that point the way of a leader gradient.

    In each step [1]_: a gradient of the server segment per client; a leader gradient, the mean of
    those that agree most with the others (LGI); and the sum of the gradients whose angle to it is
    below a threshold (GDA). Clients receive their own cut-layer gradients, so the traffic is PSL's.

    With :math:`g_i` the gradient of client i's mean loss by all parameters of the server segment
    (equations of [1]_; t/T is the run's ``progress``):

    .. math::
        \theta_i &= \tfrac{1}{S-1} \sum_{j \ne i} \angle(g_i, g_j) & (1) \\
        K &= K_{min} + \tfrac{t}{T} \tfrac{\nu_{max} - \nu}{\nu_{max} - \nu_{min}}
             (K_{max} - K_{min}), \quad \nu = \operatorname{std}(\theta) & (2) \\
        g_{lead} &= \text{mean of } g_i \text{ over the } \lceil K\% \cdot S \rceil
             \text{ smallest } \theta_i & (3, 4) \\
        \theta_{lead,i} &= \angle(g_i, g_{lead}) & (5) \\
        \theta_{th} &= \max(\min(\mu(\theta_{lead}) - \eta \operatorname{std}(\theta_{lead}),
             \pi/2), 0) & (6) \\
        \text{loss} &= \sum_{i: \theta_{lead,i} \le \theta_{th}} L_i
             + \lambda (1 - \cos \theta_{lead,i}) & (7, 8)

    **λ moves only the reported loss.** A footnote of the paper says that :math:`g_i` and
    :math:`g_{lead}` are detached constants; so the term's gradient is zero, and the server steps
    with the sum of the kept clients' gradients. The loss of equation 8 is in the ledger.
    ``active_alignment='projection'`` is an extension of *ours* that lets λ act at first order:
    each kept gradient becomes
    :math:`g_i + \lambda \lVert g_i \rVert (\hat g_{lead} - \cos \theta_{lead,i} \, \hat g_i)`.

    Our readings, where the paper is silent: a training round t is a mini-batch step; std is the
    population's; at first, when all dispersions so far are equal, K is :math:`K_{min}`; if no
    client is below the threshold (η > 1/√(S−1) allows it), the one nearest to the leader is
    kept; a client within 1e-6 rad of the threshold is kept, so that ties stay.

    Memory: at most S + 2 times the server segment for S clients (gradients, their combination,
    the weights), beside optimizer and activations; large Linear layers need less.
    ``low_memory`` needs about half the gradients and another backward pass.

    Parameters
    ----------
    eta : float
        Sensitivity η of the threshold; the larger, the fewer clients are kept. The paper gives
        no value; a very negative one keeps all clients within a right angle of the leader.
    k_min, k_max : float
        :math:`K_{min}` and :math:`K_{max}` in percent.
    lam : float
        Weight λ of the alignment term.
    loss_reduction : {'sum', 'mean'}
        Add up the kept clients' losses (the paper's), or take their mean. ``sum`` makes the
        server's step longer the more clients are kept.
    excluded_clients : {'own_gradient', 'skip'}
        What clients that aren't kept do: step with their own cut-layer gradient, or not step at
        all. The paper's text allows both; a client that never steps stays as it began.
    lgi : {'on', 'off', 'random'}
        Ablations: the leader is the mean of all gradients (``off``, as the paper's Non-LGI), or
        of as many random ones as it would have (``random``). The paper has a Rand-LGI; what is
        drawn is our reading.
    gda : {'on', 'off', 'random'}
        Ablations: the server steps with the clients that make up the leader (``off``, our reading
        of the paper's Non-GDA, which "relies solely on the leader gradient"), or with as many
        random ones as would be kept (``random``; the paper has a Rand-GDA, what is drawn is our
        reading).
    active_alignment : {'none', 'projection'}
        Whether λ acts; see above.
    single_client : {'error', 'keep'}
        What to do in a step with one client, for which there is no angle. It happens where
        clients have different numbers of steps.
    low_memory : bool
        Compute gradients twice instead of keeping all of them.
    **options
        See :class:`~flsplit.run.SplitOptions`. ``shares`` is ``equal`` by default: the paper's sum
        has no weights. ``server_batchnorm`` and ``reduction`` are refused: BatchNorm sees one
        client at a time, as the gradients are each client's own, and ``loss_reduction`` says how
        losses add up.

    References
    ----------
    .. [1] Lin et al., GAPSL: A Gradient-Aligned Parallel Split Learning on Heterogeneous Data,
       https://arxiv.org/abs/2603.18540
    """

    keeps_labels = True
    several_cuts = True
    pools = False

    def __init__(
        self,
        *,
        eta: float = 0.0,
        k_min: float = 20.0,
        k_max: float = 80.0,
        lam: float = 5e-4,
        loss_reduction: Reduction = "sum",
        excluded_clients: Excluded = "own_gradient",
        lgi: Module = "on",
        gda: Module = "on",
        active_alignment: Active = "none",
        single_client: Single = "error",
        low_memory: bool = False,
        **options: Any,
    ) -> None:
        self.eta = number("eta", eta)
        self.k_min, self.k_max = number("k_min", k_min, 0, 100), number("k_max", k_max, 0, 100)
        if self.k_min > self.k_max:
            raise ConfigError(f"k_min is {k_min!r}, more than k_max = {k_max!r}")
        self.lam = number("lam", lam, minimum=0.0)
        self.loss_reduction = one_of("loss_reduction", loss_reduction, get_args(Reduction))
        self.excluded_clients = one_of("excluded_clients", excluded_clients, get_args(Excluded))
        self.lgi = one_of("lgi", lgi, get_args(Module))
        self.gda = one_of("gda", gda, get_args(Module))
        self.active_alignment = one_of("active_alignment", active_alignment, get_args(Active))
        self.single_client = one_of("single_client", single_client, get_args(Single))
        self.low_memory = low_memory
        if "server_batchnorm" in options:
            raise ConfigError(
                f"server_batchnorm is {options['server_batchnorm']!r}, but GAPSL takes none: it "
                "needs each client's own gradients, so BatchNorm sees one client at a time"
            )
        if options.get("reduction", "mean") != "mean":
            raise ConfigError(
                f"reduction is {options['reduction']!r}, but GAPSL says itself how the clients' "
                "losses add up (loss_reduction): give that one only"
            )
        options.setdefault("shares", "equal")
        super().__init__(**options)
        self._settings = replace(self._settings, reduction=loss_reduction)
        if self.options.several_cuts and low_memory:
            raise ConfigError(
                "low_memory is True, but cut differs from client to client: gradients of several "
                "cuts are compared when all of them are in memory"
            )
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the extremes of the dispersion."""
        self._extremes: list[float] = []

    def step(self, step: Step) -> None:
        """Compare the clients' gradients, update with those that are kept, reply."""
        found = step.gradients(per_client=True, low_memory=self.low_memory)
        if found.clients is None:
            raise AssertionError("asked for per client")
        if len(step.clients) == 1:
            self._check_single(step)
            step.update(found.clients.combine([1.0]))
            step.reply(found.cut_gradients)
            return
        gram = np.asarray(found.clients.gram(), dtype=np.float64)
        alignment = self.align(gram, step)
        weights = self._weights(step, alignment)
        step.update(found.clients.combine(self._coefficients(weights, alignment, gram).tolist()))
        # Only now: a step that fails is done again without the client that it fails for.
        self._extremes = self._extremes_with(alignment.dispersion)
        pairs = zip(step.clients, alignment.kept, strict=True)
        told = [c for c, kept in pairs if kept or self.excluded_clients == "own_gradient"]
        step.reply({client: found.cut_gradients[client] for client in told})
        self._report(step, found, alignment, weights)

    def align(self, gram: Floats, step: Step) -> LeaderAlignment:
        """Return who leads and who is kept, from the inner products ``gram`` of the gradients."""
        norms = self._norms(gram, step)
        pairwise = angles_of(gram, norms, norms[:, None])
        np.fill_diagonal(pairwise, 0.0)
        scores = pairwise.sum(1) / (len(norms) - 1)  # (1)
        dispersion = float(scores.std())
        ratio = self._ratio(dispersion, step.progress)  # (2)
        leaders = self._leaders(scores, ratio, step)  # (3)
        mean = leaders / leaders.sum()  # g_lead = Σ mean_i g_i (4)
        lead_norm = math.sqrt(max(float(mean @ gram @ mean), 0.0))
        if lead_norm == 0.0:
            raise NonFiniteError(
                f"the leader gradient of clients {_names(step, leaders)} is zero: it has no "
                "direction to align with"
            )
        angles = angles_of(gram @ mean, norms, lead_norm)  # (5)
        threshold = max(min(float(angles.mean() - self.eta * angles.std()), math.pi / 2), 0.0)
        kept = self._kept(angles, threshold, leaders, step)  # (6)
        return LeaderAlignment(
            scores, dispersion, ratio, leaders, angles, threshold, kept, lead_norm
        )

    def _ratio(self, dispersion: float, progress: float) -> float:
        low, high = self._extremes_with(dispersion)
        if high == low:
            return self.k_min
        spread = (high - dispersion) / (high - low)
        return self.k_min + progress * spread * (self.k_max - self.k_min)

    def _extremes_with(self, dispersion: float) -> list[float]:
        return [min([dispersion, *self._extremes]), max([dispersion, *self._extremes])]

    def _leaders(self, scores: Floats, ratio: float, step: Step) -> NDArray[np.bool_]:
        count = max(ceil_fraction(ratio / 100, len(scores)), 1)
        if self.lgi == "off":
            return np.ones(len(scores), dtype=np.bool_)
        if self.lgi == "random":
            return _mask(step.rng.choice(len(scores), count, replace=False), len(scores))
        return _mask(np.argsort(scores, kind="stable")[:count], len(scores))

    def _kept(
        self, angles: Floats, threshold: float, leaders: NDArray[np.bool_], step: Step
    ) -> NDArray[np.bool_]:
        if self.gda == "off":
            return leaders
        kept: NDArray[np.bool_] = angles <= threshold + TOLERANCE
        if not kept.any():
            kept = _mask([int(angles.argmin())], len(angles))
        if self.gda == "random":
            count = int(kept.sum())
            return _mask(step.rng.choice(len(angles), count, replace=False), len(angles))
        return kept

    def _weights(self, step: Step, alignment: LeaderAlignment) -> Floats:
        """Return what each client's loss counts: its share among the kept, times S for a sum."""
        shares = np.array([step.shares[name] for name in step.clients])
        if self.loss_reduction == "sum":
            return np.where(alignment.kept, shares * len(shares), 0.0)
        return np.where(alignment.kept, shares / math.fsum(shares[alignment.kept]), 0.0)

    def _coefficients(self, weights: Floats, alignment: LeaderAlignment, gram: Floats) -> Floats:
        """Return c with which the server's gradient is Σ c_i g_i."""
        if self.active_alignment == "none":
            return weights
        norms, cosines = np.sqrt(gram.diagonal()), np.cos(alignment.angles)
        towards_leader = float((weights * self.lam * norms).sum()) / alignment.lead_norm
        mean = alignment.leaders / alignment.leaders.sum()
        moved: Floats = weights * (1 - self.lam * cosines) + towards_leader * mean
        return moved

    def _check_single(self, step: Step) -> None:
        if self.single_client == "error":
            raise ConfigError(
                f"client {step.clients[0]!r} is alone in the step: there is no other to "
                "compare its gradient with. Give all clients as many steps (local_steps), or let "
                "a single client go on as it is with single_client='keep'"
            )

    def _norms(self, gram: Floats, step: Step) -> Floats:
        for name, square in zip(step.clients, gram.diagonal(), strict=True):
            if not (math.isfinite(square) and square):
                what = "zero: it has no angle to others"
                if square:
                    what = "NaN or infinite: it has no angle"
                error = NonFiniteError(f"the server gradient of client {name!r} is {what}")
                error.client = name
                raise error
        norms: Floats = np.sqrt(gram.diagonal())
        return norms

    def _report(
        self, step: Step, found: StepGradients, alignment: LeaderAlignment, weights: Floats
    ) -> None:
        losses = np.array([found.losses[name] for name in step.clients])
        aligned = losses + self.lam * (1 - np.cos(alignment.angles))  # (7)
        numbers = {
            "loss": float(aligned @ weights),  # (8)
            "dispersion": alignment.dispersion,
            "k-percent": alignment.ratio,
            "leaders": float(alignment.leaders.sum()),
            "threshold": alignment.threshold,
            "angle-mean": float(alignment.angles.mean()),
            "angle-std": float(alignment.angles.std()),
            "score-mean": float(alignment.scores.mean()),
            "kept": float(alignment.kept.sum()),
        }
        if step.keeps_labels:
            del numbers["loss"]
        for name, angle, kept in zip(step.clients, alignment.angles, alignment.kept, strict=True):
            numbers[f"angle.{name}"] = float(angle)
            numbers[f"kept.{name}"] = float(kept)
        step.record({f"leader-alignment.{key}": value for key, value in numbers.items()})

    def state_dict(self) -> State:
        """Return all that a checkpoint needs, with the extremes of the dispersion."""
        return super().state_dict() | {"dispersion-extremes": self._extremes}

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        self._extremes = [float(one) for one in state["dispersion-extremes"]]


def angles_of(products: Floats, norms: Floats, other_norms: Floats | float) -> Floats:
    """Return arccos of ``products`` over norms, in radians."""
    angles: Floats = np.arccos(np.clip(products / norms / other_norms, -1.0, 1.0))
    return angles


def _mask(indices: Sequence[int] | NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=np.bool_)
    mask[indices] = True
    return mask


def _names(step: Step, mask: NDArray[np.bool_]) -> str:
    pairs = zip(step.clients, mask, strict=True)
    return ", ".join(repr(name) for name, there in pairs if there)
