"""The ε that clipping and Gaussian noise on smashed data buy, by Google's dp-accounting."""

import math
from collections.abc import Sequence

from flsplit.client_parts.client_part import ClientPart, overrides
from flsplit.client_parts.stock import SMASHED, Clip, Noise
from flsplit.errors import ConfigError
from flsplit.run.arguments import whole

ADJACENCIES = ("client", "example")


def epsilon(
    parts: Sequence[ClientPart],
    *,
    releases: int,
    delta: float,
    batch_size: int | None = None,
    adjacency: str = "client",
    values: int = 1,
) -> float:
    """Return the ε of (ε, δ)-differential privacy of the smashed data that one client sends.

    The parts must clip smashed data and then add noise: ``[Clip(1.0), Noise(0.5)]``. Two data sets
    are adjacent if they differ in

    * ``client``: anything, as large as the client's data is. A step then is a Gaussian mechanism of
      sensitivity 2 C √b (each of the b rows is clipped to C), or 2 C where a batch is clipped as
      one, and ``releases`` are the client's steps. This holds whatever the client segment learns.
    * ``example``: one example, replaced by any other. A release is one row of sensitivity 2 C, and
      ``releases`` is how often an example is sent: the epochs. It holds **only if nothing that
      makes smashed data depends on other examples**: the client segment is frozen or never
      trained on these data, without BatchNorm in training mode.

    No amplification by sampling is claimed: the server knows who trains. Labels, shapes, test
    batches, segments that are handed over and what malicious clients add are not covered. What the
    server computes from smashed data alone is.

    Parameters
    ----------
    parts : sequence of ClientPart
        The run's, in their order.
    releases : int
        How many Gaussian mechanisms are composed, see above.
    delta : float
        δ, above 0 and below 1.
    batch_size : int, optional
        b, the largest; for ``client`` with clipping per sample.
    adjacency : {'client', 'example'}
        What must not be told apart.
    values : int
        How many tensors cross: parts clip each by itself.

    Raises
    ------
    ConfigError
        If smashed data are given noise and not clipped before, or not given noise; if a number
        can't be used; or if the extra ``privacy`` is not installed.
    """
    clip, noise = _mechanism(parts)
    if adjacency not in ADJACENCIES:
        raise ConfigError(f"adjacency is {adjacency!r}, expected 'client' or 'example'")
    for name, number in (("releases", releases), ("values", values), ("batch_size", batch_size)):
        if number is not None:
            whole(name, number, 1)
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta!r}, expected a number above 0 and below 1")
    rows = 1
    if adjacency == "client" and clip.per == "sample":
        if batch_size is None:
            raise ConfigError("batch_size is missing: a client's step sends so many clipped rows")
        rows = batch_size
    elif adjacency == "example" and clip.per == "batch":
        raise ConfigError("adjacency 'example' needs clipping per sample, this clips whole batches")
    if noise.sigma == 0:
        return math.inf
    # T mechanisms of ratio r are one of ratio r / √T, also if each follows from those before.
    ratio = noise.sigma / (2 * clip.norm * math.sqrt(rows * values * releases))
    return gaussian_epsilon(ratio, delta)


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """Return the ε of one Gaussian mechanism whose noise is ``ratio`` times its sensitivity.

    ConfigError if dp-accounting is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError(
            "dp-accounting is not installed: pip install 'flsplit[privacy]'"
        ) from error
    # It rounds the privacy loss up to steps. As large as the loss may be, there are some 10^5.
    loss = 0.5 / ratio**2 + math.sqrt(2 * math.log(1 / delta)) / ratio
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        value_discretization_interval=max(1e-4, loss * 1e-5),
    )
    # The relation stands for a sensitivity of 1, whoever is replaced: it is in the ratio already.
    accountant.compose(dp_accounting.GaussianDpEvent(ratio))
    return float(accountant.get_epsilon(delta))


def _mechanism(parts: Sequence[ClientPart]) -> tuple[Clip, Noise]:
    """Return what clips and what adds noise right after it."""
    clip: Clip | None = None
    for part in parts:
        if isinstance(part, Clip) and part.place == SMASHED:
            clip = part
        elif isinstance(part, Noise) and part.place == SMASHED:
            if clip is None:
                raise ConfigError(
                    "smashed data are given noise but not clipped before: without a bound on their "
                    "length no noise has an epsilon. Put Clip(…) before Noise(…)"
                )
            return clip, part
        elif overrides(part, "smashed"):
            clip = None  # it may make them longer again
    raise ConfigError("no client part adds noise to smashed data: epsilon would be infinite")
