"""A malicious server, which trains the clients to give their inputs away."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import ConfigError
from flsplit.privacy.reconstruction import build_decoder
from flsplit.run import ParallelStrategy, Step
from flsplit.seeds import seeded


class Hijack(ParallelStrategy):
    """FSHA: send gradients that make smashed data like those of a network of the server's own.

    Pasquini, Ateniese, Bernaschi 2021 (https://arxiv.org/abs/2012.02670). The server trains a pilot
    and its decoder on data of its own, and a discriminator that tells the pilot's outputs from
    smashed data; clients get the gradient that lets their smashed data pass for the pilot's. Then
    the decoder reads them: :meth:`decode`. It is no method of training: the model learns nothing,
    which a client that looks at its accuracy sees. It fails, too, where clients add noise or clip,
    where they take few steps, and where they check gradients against their labels.

    Parameters
    ----------
    public : torch.Tensor
        Inputs ``(n, ...)`` like the clients', without labels.
    inner_lr : float
        Adam's learning rate for pilot, decoder and discriminator.
    **options
        See :class:`~flsplit.run.SplitOptions`. Labels are not used.

    References
    ----------
    The discriminator is trained with cross-entropy, as in the paper's formulas; the authors' code
    has a gradient penalty besides.
    """

    one_cut = "its discriminator takes smashed data of one shape"

    def __init__(self, *, public: Tensor, inner_lr: float = 1e-3, **options: Any) -> None:
        if not (isinstance(public, Tensor) and public.is_floating_point() and len(public) > 1):
            raise ConfigError("public: expected a floating-point tensor of inputs, two or more")
        super().__init__(**options)
        self.public, self.inner_lr = public, inner_lr

    def begin_run(self) -> None:
        """Make the networks."""
        with seeded(self.options.seed):
            self._pilot = copy.deepcopy(self.parts.client).cpu().train()
            with torch.no_grad():
                smashed = self._pilot(self.public[:2])
            if not isinstance(smashed, Tensor):
                raise ConfigError("several values cross the cut; hijacking takes one tensor")
            self._decoder = build_decoder(tuple(smashed.shape[1:]), tuple(self.public.shape[1:]))
            size = smashed[0].numel()
            self._judge = nn.Sequential(
                nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 1)
            )
        both = [*self._pilot.parameters(), *self._decoder.parameters()]
        self._by_own = torch.optim.Adam(both, lr=self.inner_lr)
        self._by_judge = torch.optim.Adam(self._judge.parameters(), lr=self.inner_lr)

    def step(self, step: Step) -> None:
        """Train the server's own networks, and send clients the discriminator's gradients."""
        seen = torch.cat([batch.tensor.detach().cpu().float() for batch in step.batches])
        chosen = torch.randint(len(self.public), (len(seen),), generator=step.generator("public"))
        self._learn(self.public[chosen], seen)
        replies = {}
        for batch in step.batches:
            leaf = batch.tensor.detach().cpu().float().requires_grad_()
            verdict = self._judge(leaf)
            loss = functional.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))
            (gradient,) = torch.autograd.grad(loss, leaf)
            replies[batch.client] = gradient.to(batch.tensor)
        step.leave()
        step.reply(replies)

    def _learn(self, public: Tensor, seen: Tensor) -> None:
        own = self._pilot(public)
        self._by_own.zero_grad()
        torch.autograd.backward(functional.mse_loss(self._decoder(own), public))
        self._by_own.step()
        real, fake = self._judge(own.detach()), self._judge(seen)
        self._by_judge.zero_grad()
        told = functional.binary_cross_entropy_with_logits
        torch.autograd.backward(
            told(real, torch.ones_like(real)) + told(fake, torch.zeros_like(fake))
        )
        self._by_judge.step()

    @torch.no_grad()
    def decode(self, smashed: Tensor) -> Tensor:
        """Return the inputs that smashed data ``(n, ...)`` is taken to be of."""
        found: Tensor = self._decoder(smashed.cpu().float())
        return found
