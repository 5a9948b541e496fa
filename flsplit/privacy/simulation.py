"""Labels and inputs by simulated clients: what a passive server finds with data of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import ConfigError
from flsplit.privacy.hijack import build_critic
from flsplit.seeds import generator, seeded


@dataclass(frozen=True)
class Simulation:
    """A client that the server has made up, and its own layers between.

    Attributes
    ----------
    client : nn.Module
        The simulated first layers.
    server : nn.Module
        The server segment.
    tail : nn.Module
        The simulated last layers.
    """

    client: nn.Module
    server: nn.Module
    tail: nn.Module

    @torch.no_grad()
    def labels(self, smashed: Tensor) -> Tensor:
        """Return the classes ``(n,)`` that the simulated tail sees in real smashed data."""
        found: Tensor = self.tail(self.server(smashed)).argmax(1)
        return found

    @torch.no_grad()
    def smash(self, inputs: Tensor) -> Tensor:
        """Return simulated smashed data, on which a decoder can be trained (`reconstruct`)."""
        found: Tensor = self.client(inputs)
        return found


def simulate(
    server: nn.Module,
    smashed: Tensor,
    known: tuple[Tensor, Tensor],
    *,
    client: Callable[[], nn.Module],
    tail: Callable[[], nn.Module],
    steps: int = 600,
    batch_size: int = 32,
    adversarial: float = 0.05,
    lr: float = 1e-3,
    seed: int = 0,
) -> Simulation:
    r"""Return a client that is simulated on data of the attacker's own, as SDAR does.

    Zhu, Luo, Ooi, Xiao 2025 (https://arxiv.org/abs/2310.10483). A passive server in a U-shaped
    split has inputs and labels like the clients', and knows the architecture of their layers. It
    trains a simulated client f̃ and tail h̃ through its own segment g, which stays as it is, and a
    critic D lets f̃'s outputs look like real smashed data z:

    .. math:: \min_{f̃, h̃} CE(h̃(g(f̃(x'))), y') - λ \log D(f̃(x'))

    h̃ then reads the labels of real rows off g(z). Gradients are not looked at: noise on them
    doesn't help. It fails where the attacker's data is of another kind, where g doesn't separate
    the classes yet, and where z is mostly noise. The published attack runs along with the training;
    here it comes after some of it, with the smashed data of the last steps and the server segment
    as it is then.

    Parameters
    ----------
    server : nn.Module
        The server segment, from smashed data to its outputs; it is run in evaluation mode.
    smashed : torch.Tensor
        Recorded ``(n, ...)``, of about the time of ``server``.
    known : tuple of torch.Tensor
        The attacker's inputs ``(m, ...)``, and their labels ``(m,)``.
    client, tail : callable
        Return untrained networks: inputs to smashed data, outputs to logits.
    steps, batch_size : int
        Of the simulation's training.
    adversarial : float
        λ; with 0 a tail is trained on whatever client fits it.
    lr : float
        Adam's learning rate.
    seed : int
        All random choices follow from it.

    Raises
    ------
    ConfigError
        If shapes don't fit.
    """
    inputs, labels = known
    with seeded(seed):
        fake, last, critic = client(), tail(), build_critic(tuple(smashed.shape[1:]))
    if len(inputs) != len(labels) or len(inputs) < 2:
        raise ConfigError(
            f"the attacker has {len(inputs)} inputs and {len(labels)} labels, expected the same "
            "number, at least 2"
        )
    with torch.no_grad():
        if (shape := fake(inputs[:2]).shape[1:]) != smashed.shape[1:]:
            raise ConfigError(
                f"the simulated client returns rows of shape {tuple(shape)}, smashed data has "
                f"{tuple(smashed.shape[1:])}"
            )
    trained = server.training
    server.eval()
    rng, scale = generator(seed, "simulate"), smashed.std().clamp(min=1e-12)
    own = [*fake.parameters(), *last.parameters()]
    by_client = torch.optim.Adam(own, lr)
    by_critic = torch.optim.Adam(critic.parameters(), lr, betas=(0.5, 0.9))
    is_real = (torch.arange(2 * batch_size) < batch_size).to(smashed)[:, None]
    for _ in range(steps):
        rows = torch.randint(len(inputs), (batch_size,), generator=rng)
        real = smashed[torch.randint(len(smashed), (batch_size,), generator=rng)]
        made = fake(inputs[rows])
        scores = critic(torch.cat([real, made.detach()]) / scale)
        by_critic.zero_grad()
        torch.autograd.backward(functional.binary_cross_entropy_with_logits(scores, is_real))
        by_critic.step()
        loss = functional.cross_entropy(last(server(made)), labels[rows])
        if adversarial:
            loss = loss + adversarial * functional.softplus(-critic(made / scale)).mean()
        by_client.zero_grad()
        torch.autograd.backward(loss, inputs=own)
        by_client.step()
    server.train(trained)
    return Simulation(fake.eval(), server, last.eval())
