"""Hijacking: a malicious server that trains its clients to give their inputs away."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import ConfigError
from flsplit.privacy.reconstruction import build_decoder
from flsplit.run.arguments import whole
from flsplit.run.parallel import ParallelStrategy
from flsplit.run.step import Step
from flsplit.seeds import derive_seed, generator, seeded


class Hijack(ParallelStrategy):
    r"""A server that trains its clients to give their inputs away: FSHA.

    Pasquini, Ateniese, Bernaschi 2021, Unleashing the Tiger (https://arxiv.org/abs/2012.02670).
    The server has inputs like the clients'. With them it trains an autoencoder of its own, the
    ``pilot`` f̃ and a ``decoder``, and a critic D that tells the pilot's outputs from smashed data
    (WGAN-GP, https://arxiv.org/abs/1704.00028):

    .. math:: \min_D D(z) - D(f̃(x')) + γ (‖∇D(z_ε)‖ - 1)²

    In place of its task's gradient each client is sent that of :math:`-D(z)`, so that its segment
    becomes one whose outputs the decoder understands. Nothing is trained for the clients; the
    server segment stays as it is.

    The attacker needs no weights of a client and no labels. It fails as a GAN does: scores go up
    and down, and it takes hundreds of steps to thousands. Clients notice that no model comes out.
    Where clients begin with the server's weights, as they do here, a malicious server needs no
    GAN: sending no gradient leaves clients with weights that it knows (`reconstruct`).

    The published attack trains the autoencoder while it goes; here it is trained beforehand, on
    the server's own data, which needs no client.

    Parameters
    ----------
    public : torch.Tensor
        The attacker's own inputs ``(n, ...)``.
    pilot : nn.Module
        From inputs to tensors of the smashed data's shape. It is copied.
    decoder : nn.Module, optional
        From there to inputs; by default convolutions for images, else a hidden layer.
    critic : nn.Module, optional
        From there to a score ``(b, 1)``; by default the same.
    warm_up : int
        The autoencoder's steps.
    attack_lr : float
        The learning rate of Adam, for all three.
    critic_steps : int
        Steps of the critic for each step of a client.
    gradient_penalty : float
        γ.
    attack_batch_size : int
        Rows of the attacker's own in a step of the autoencoder.
    **options
        Those of every strategy. ``client_lr`` is the rate with which clients are moved.

    Raises
    ------
    ConfigError
        If an argument can't be used.
    """

    needs_labels = "clients are given no outputs that their last layers could go on with"

    def __init__(
        self,
        *,
        public: Tensor,
        pilot: nn.Module,
        decoder: nn.Module | None = None,
        critic: nn.Module | None = None,
        warm_up: int = 1000,
        attack_lr: float = 1e-3,
        critic_steps: int = 1,
        gradient_penalty: float = 10.0,
        attack_batch_size: int = 32,
        **options: Any,
    ) -> None:
        if not (isinstance(public, Tensor) and public.is_floating_point() and len(public) > 1):
            raise ConfigError("Hijack: public is no tensor of two inputs or more, floating point")
        for name, number in (("warm_up", warm_up), ("critic_steps", critic_steps)):
            whole(f"Hijack: {name}", number, 1)
        self.public, self.pilot, self.decoder, self.critic = public, pilot, decoder, critic
        self.warm_up, self.attack_lr, self.critic_steps = warm_up, attack_lr, critic_steps
        self.gradient_penalty, self.attack_batch_size = gradient_penalty, attack_batch_size
        super().__init__(**options)
        if self.options.checkpoint_dir:
            raise ConfigError("Hijack: checkpoint_dir is given, but an attack keeps no checkpoints")

    def begin_run(self) -> None:
        """Train the autoencoder; forget what an earlier run has found."""
        seed, device = self.options.seed, self.device
        self._rng = generator(seed, "hijack")
        self._public = self.public.to(device)
        self._pilot = copy.deepcopy(self.pilot).to(device)
        with torch.no_grad(), seeded(derive_seed(seed, "hijack", "shape")):
            shape = tuple(self._pilot(self._public[:2]).shape[1:])
        with seeded(derive_seed(seed, "hijack", "networks")):
            default = build_decoder(shape, tuple(self.public.shape[1:]))
            self._decoder = copy.deepcopy(self.decoder or default).to(device)
            self._critic = copy.deepcopy(self.critic or build_critic(shape)).to(device)
        both = [*self._pilot.parameters(), *self._decoder.parameters()]
        optimizer = torch.optim.Adam(both, self.attack_lr)
        for _ in range(self.warm_up):
            rows = self._rows(self.attack_batch_size)
            optimizer.zero_grad()
            torch.autograd.backward(functional.mse_loss(self._decoder(self._pilot(rows)), rows))
            optimizer.step()
        for network in (self._pilot, self._decoder):
            network.eval().requires_grad_(False)
        sample = self._pilot(self._public[:256])
        self._scale = sample.std().clamp(min=torch.finfo(sample.dtype).tiny)
        self._by_critic = torch.optim.Adam(
            self._critic.parameters(), self.attack_lr, betas=(0.5, 0.9)
        )

    def step(self, step: Step) -> None:
        """Train the critic on the clients' smashed data, and send them its gradients."""
        replies, apart = {}, 0.0
        for batch in step.batches:
            replies[batch.client], distance = self._gradient(batch.tensor)
            apart += distance / len(step.batches)
        step.record({"critic-distance": apart})
        step.leave()
        step.reply(replies)

    @torch.no_grad()
    def reconstruct(self, smashed: Tensor) -> Tensor:
        """Return the inputs ``(n, ...)`` that smashed data ``(n, ...)`` gives away now."""
        found: Tensor = self._decoder(smashed.to(self.device))
        return found

    def _gradient(self, smashed: Tensor) -> tuple[Tensor, float]:
        """Return the gradient of a client's mean -D(z), and how far apart the critic sees both."""
        real = smashed.detach()
        for _ in range(self.critic_steps):
            wanted = self._pilot(self._rows(len(real)))
            if wanted.shape != real.shape:
                raise ConfigError(
                    f"Hijack: the pilot returned shape {tuple(wanted.shape)}, smashed data has "
                    f"{tuple(real.shape)}"
                )
            share = torch.rand(len(real), *[1] * (real.ndim - 1), generator=self._rng).to(real)
            between = share * wanted + (1 - share) * real
            apart = self._score(wanted).mean() - self._score(real).mean()
            loss = self.gradient_penalty * self._penalty(between) - apart
            self._by_critic.zero_grad()
            torch.autograd.backward(loss, inputs=list(self._critic.parameters()))
            self._by_critic.step()
        leaf = real.requires_grad_()
        (gradient,) = torch.autograd.grad(-self._score(leaf).mean(), leaf)
        return gradient, apart.item()

    def _penalty(self, between: Tensor) -> Tensor:
        leaf = between.requires_grad_()
        (slope,) = torch.autograd.grad(self._score(leaf).sum(), leaf, create_graph=True)
        # In the scale in which the critic sees it.
        lengths: Tensor = torch.linalg.vector_norm((slope * self._scale).flatten(1), dim=1)
        return (lengths - 1).square().mean()

    def _score(self, smashed: Tensor) -> Tensor:
        score: Tensor = self._critic(smashed / self._scale)
        return score

    def _rows(self, count: int) -> Tensor:
        chosen = torch.randint(len(self.public), (count,), generator=self._rng)
        return self._public[chosen.to(self._public.device)]


def build_critic(shape: tuple[int, ...]) -> nn.Module:
    """Return a network that scores tensors of a shape: two convolutions and a layer for images."""
    if len(shape) == 3:
        layers: list[nn.Module] = [
            *(nn.Conv2d(shape[0], 32, 3, stride=2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten()),
        ]
        height, width = ((side + 3) // 4 for side in shape[1:])
        size = 64 * height * width
    else:
        layers, size = [nn.Flatten()], torch.Size(shape).numel()
    layers += [nn.Linear(size, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)]
    return nn.Sequential(*layers)
