"""Inputs back from smashed data, by a decoder that was trained on other data."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import ConfigError
from flsplit.seeds import generator, seeded

Decode = Callable[[Tensor], Tensor]

_RIDGE = (1e-6, 1e-3, 1e-1, 10.0)
"""What a linear decoder is regularised with, in units of the features' mean square."""


@dataclass(frozen=True)
class Reconstruction:
    """How near reconstructed inputs come to the real ones.

    Attributes
    ----------
    mse : float
        Mean squared error per element, of inputs that are scaled to 0 … 1.
    ssim : float
        Structural similarity of images (1: the same); NaN of inputs that are none.
    cross_entropy : float
        Mean binary cross-entropy per element between input and reconstruction, both as numbers
        from 0 to 1; more is better hidden. It has a floor above 0: ``floor``.
    floor : float
        The cross-entropy of the inputs with themselves.
    guess : float
        The mse of an attacker who has seen no smashed data and says the mean of its own data.
    pictures : torch.Tensor
        The reconstructed inputs, in their own scale.
    """

    mse: float
    ssim: float
    cross_entropy: float
    floor: float
    guess: float
    pictures: Tensor = field(repr=False)

    @property
    def explained(self) -> float:
        """The share of the inputs' variance that was found: 1 perfectly, 0 (or less) not at all."""
        return 1 - self.mse / self.guess if self.guess else float("nan")


def reconstruct(
    known: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    *,
    epochs: int = 30,
    seed: int = 0,
) -> Reconstruction:
    """Train a decoder on data of the attacker's own, and reconstruct private inputs with it.

    Two decoders are trained, a linear and a convolutional one (for inputs that are no images: one
    with a hidden layer); the one that is better on a tenth of the attacker's own data is used. So
    it is a lower bound: another decoder may find more. The attacker is an honest but curious server
    (Vepakomma et al. 2020, https://arxiv.org/abs/2008.09161; Pal et al. 2021,
    https://arxiv.org/abs/2112.05929, with a decoder trained beforehand) that has data like the
    private ones **and can run the client segment**, which it holds where segments are aggregated,
    and doesn't elsewhere. It fails on noise, where ``explained`` is about 0.

    Parameters
    ----------
    known, private : tuple of torch.Tensor
        Smashed data ``(n, ...)`` and inputs ``(n, ...)``: the attacker's, and those under attack.
    epochs : int
        How often the convolutional decoder sees the attacker's data.
    seed : int
        All random choices follow from it.

    Raises
    ------
    ConfigError
        If shapes don't fit, or a private input is among the attacker's.
    """
    smashed, inputs = (one.detach().cpu().float() for one in known)
    seen, truth = (one.detach().cpu().float() for one in private)
    _check(smashed, inputs, seen, truth)
    refuse_shared_rows(inputs, truth)
    low, high = float(inputs.min()), float(inputs.max())
    if not high > low:
        raise ConfigError("the attacker's inputs are all one number: nothing can be learned")
    scaled = (inputs - low) / (high - low)
    decode = train_decoder(smashed, scaled, epochs=epochs, seed=seed)
    found = decode(seen).clamp(0, 1)
    wanted = ((truth - low) / (high - low)).clamp(0, 1)
    return Reconstruction(
        mse=float(functional.mse_loss(found, wanted)),
        ssim=ssim(found, wanted) if wanted.ndim == 4 else float("nan"),
        cross_entropy=_cross_entropy(found, wanted),
        floor=_cross_entropy(wanted, wanted),
        guess=float(functional.mse_loss(scaled.mean(0).expand_as(wanted), wanted)),
        pictures=found * (high - low) + low,
    )


def refuse_shared_rows(own: Tensor, private: Tensor) -> None:
    """Raise ConfigError if a row of the private inputs is among the attacker's."""
    rows = {row.numpy().tobytes() for row in own.detach().cpu().float()}
    if shared := sum(row.numpy().tobytes() in rows for row in private.detach().cpu().float()):
        raise ConfigError(
            f"{shared} of {len(private)} private inputs are among the attacker's own: an attack on "
            "data that it was trained on shows nothing"
        )


def _check(smashed: Tensor, inputs: Tensor, seen: Tensor, truth: Tensor) -> None:
    for what, rows, of_rows in (("attacker's", smashed, inputs), ("private", seen, truth)):
        if len(rows) != len(of_rows) or len(rows) < 2:
            raise ConfigError(
                f"the {what} data has {len(rows)} rows of smashed data and {len(of_rows)} of "
                "inputs, expected the same number, at least 2"
            )
    if smashed.shape[1:] != seen.shape[1:] or inputs.shape[1:] != truth.shape[1:]:
        raise ConfigError(
            f"the attacker's rows are {tuple(smashed.shape[1:])} and {tuple(inputs.shape[1:])}, "
            f"the private ones {tuple(seen.shape[1:])} and {tuple(truth.shape[1:])}"
        )


# --- decoders --------------------------------------------------------------------------------


def train_decoder(smashed: Tensor, inputs: Tensor, *, epochs: int, seed: int) -> Decode:
    """Return the better of two decoders, of smashed data ``(n, ...)`` to inputs ``(n, ...)``."""
    order = torch.randperm(len(inputs), generator=generator(seed, "decoder"))
    held = order[: max(1, len(order) // 10)]
    used = order[len(held) :] if len(order) > len(held) else order
    candidates = [_linear(smashed[used], inputs[used], smashed[held], inputs[held])]
    if epochs:
        candidates.append(_network(smashed[used], inputs[used], epochs, seed))
    errors = [float(functional.mse_loss(one(smashed[held]), inputs[held])) for one in candidates]
    return candidates[errors.index(min(errors))]


def _linear(smashed: Tensor, inputs: Tensor, seen: Tensor, wanted: Tensor) -> Decode:
    """Return ridge regression, with what of some regularisations is best on ``seen``."""
    x, y = smashed.flatten(1).double(), inputs.flatten(1).double()
    middle, target = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd(x - middle, full_matrices=False)
    projected = u.T @ (y - target)
    unit = float(s.square().mean()) or 1.0

    def with_ridge(ridge: float) -> Decode:
        weight = v.T @ ((s / (s.square() + ridge * unit))[:, None] * projected)

        def decode(rows: Tensor) -> Tensor:
            flat: Tensor = (rows.flatten(1).double() - middle) @ weight + target
            return flat.float().reshape(-1, *inputs.shape[1:])

        return decode

    decoders = [with_ridge(ridge) for ridge in _RIDGE]
    errors = [float(functional.mse_loss(one(seen), wanted)) for one in decoders]
    return decoders[errors.index(min(errors))]


def _network(smashed: Tensor, inputs: Tensor, epochs: int, seed: int) -> Decode:
    middle = smashed.mean(0)
    scale = smashed.std() or torch.tensor(1.0)
    with seeded(seed):
        network = build_decoder(tuple(smashed.shape[1:]), tuple(inputs.shape[1:]))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = epochs * -(-len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    rows = generator(seed, "decoder-rows")
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(inputs), generator=rows), 64):
            optimizer.zero_grad()
            found = network((smashed[chosen] - middle) / scale)
            torch.autograd.backward(functional.mse_loss(found, inputs[chosen]))
            optimizer.step()
            schedule.step()
    network.eval()

    @torch.no_grad()
    def decode(seen: Tensor) -> Tensor:
        found: Tensor = network((seen - middle) / scale)
        return found

    return decode


def build_decoder(smashed: tuple[int, ...], inputs: tuple[int, ...]) -> nn.Module:
    """Return an untrained network from smashed data of a shape to inputs of a shape."""
    if len(smashed) == 3 and len(inputs) == 3:
        return nn.Sequential(
            nn.Conv2d(smashed[0], 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(inputs[1:], mode="bilinear"),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, inputs[0], 3, padding=1),
        )
    size = torch.Size(inputs).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(torch.Size(smashed).numel(), 256),
        nn.ReLU(),
        nn.Linear(256, size),
        nn.Unflatten(1, inputs),
    )


# --- how near --------------------------------------------------------------------------------


def _cross_entropy(found: Tensor, wanted: Tensor) -> float:
    return float(functional.binary_cross_entropy(found.clamp(1e-6, 1 - 1e-6), wanted))


def ssim(found: Tensor, wanted: Tensor, *, window: int = 7) -> float:
    """Return the mean structural similarity of images with values from 0 to 1.

    Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861), with a square window, as
    scikit-image has it by default; of smaller images the window is as large as they are.

    Parameters
    ----------
    found, wanted : torch.Tensor
        ``(n, channels, height, width)``.
    window : int
        The window's side.
    """
    side = min(window, *found.shape[-2:])
    unbiased = side**2 / (side**2 - 1) if side > 1 else 1.0

    def mean(images: Tensor) -> Tensor:
        return functional.avg_pool2d(images, side, stride=1)

    x, y = found.double(), wanted.double()
    mx, my = mean(x), mean(y)
    vx = (mean(x * x) - mx * mx) * unbiased
    vy = (mean(y * y) - my * my) * unbiased
    both = (mean(x * y) - mx * my) * unbiased
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * both + c2)
    return float((top / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())
