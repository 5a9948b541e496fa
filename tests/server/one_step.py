"""One step at the server without a run: a real Step on a small made-up round."""

from types import SimpleNamespace

import torch
from torch.nn import functional

from flsplit.account.ledger import RoundEntry
from flsplit.run.step import Step, StepSettings
from flsplit.server.segment import ServerSegment

CPU = torch.device("cpu")


class MadeUpRound:
    """What a Step asks of its round; remembers what it is told."""

    def __init__(self, server_round=1, num_rounds=1, seed=0, clock=None):
        self.plan = SimpleNamespace(
            server_round=server_round, num_rounds=num_rounds, lr=0.1, seed=seed
        )
        self.clients = SimpleNamespace(clock=clock)
        self.entry = RoundEntry(server_round)
        self.losses, self.metrics = [], {}

    def record_loss(self, batch, loss, count):
        self.losses.append((batch.client, loss))

    def record_metrics(self, metrics):
        self.metrics |= metrics


class RecordedSegment(ServerSegment):
    """Remembers the gradients that its optimizer stepped with, and the rate's factor."""

    def __init__(self, module, loss=functional.cross_entropy):
        super().__init__(module, loss=loss, optimizer=torch.optim.SGD, lr=0.1, device=CPU)
        self.steps = []

    def step(self, gradients, lr_factor=1.0):
        self.steps.append(([g if g is None else g.clone() for g in gradients], lr_factor))
        super().step(gradients, lr_factor)


def make_step(
    segment, batches, *, round_=None, index=0, num_steps=1, shares="examples", reduction="mean",
    pools=True,
):  # fmt: skip
    settings = StepSettings(shares, reduction, pools)
    return Step("Mine", segment, settings, round_ or MadeUpRound(), index, num_steps, batches)


def taken(strategy, segment, batches, **options):
    """Let a strategy do one step; return gradients, rate factor, what clients are told, round."""
    round_ = options.setdefault("round_", MadeUpRound())
    step = make_step(segment, batches, **options)
    strategy.step(step)
    ((gradients, factor),) = segment.steps
    told = step.end(replies_expected=True)
    return SimpleNamespace(gradients=gradients, factor=factor, told=told, round=round_)
