"""Speaks to a client as a server would, message by message."""

import torch
from flwr.app import Message
from reference import CUT, LR, SEED, fresh

from flsplit import LocalGrid
from flsplit.message.evaluate import EvaluateReply, EvaluateRequest
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.round_plan import RoundPlan
from flsplit.message.steps import FinishReply, FinishRequest, StepReply, StepRequest
from flsplit.message.types import EVALUATE, FINISH, STEP


class RefusedError(Exception):
    """The client answered with an error."""


class Drive:
    """One client of a LocalGrid.

    Parameters
    ----------
    app : ClientApp
        The client's app.
    build : callable
        Its model; the client begins with the weights of ``fresh(build)``.
    cache : bool
        Whether the client stays in the process between messages.
    """

    def __init__(self, app, build, *, cache=True, client=0, num_clients=1):
        self.grid = LocalGrid(app, num_clients, cache=cache, progress=False)
        self.node = list(self.grid.get_node_ids())[client]
        model = fresh(build)
        self.first = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if name.startswith(f"{CUT}.")
        }
        self.round = 0

    def begin(self, *, segment=None, optimizer=None, version=0, lr=LR, **plan):
        """Begin the next round; return the reply with the first smashed data."""
        self.round += 1
        if segment is None and self.round == 1:
            segment = self.first
        defaults = {
            "server_round": self.round, "num_rounds": 9, "cut": CUT, "seed": SEED, "lr": lr,
            "batch_size": 4, "local_epochs": 1, "local_steps": 0, "drop_last": False,
            "segment_version": version,
        }  # fmt: skip
        return self._step(
            StepRequest(
                self.round, 0, plan=RoundPlan(**(defaults | plan)),
                segment=SegmentArrays(version, segment) if segment else None,
                optimizer=optimizer,
            )
        )  # fmt: skip

    def step(self, step, gradient):
        """Hand over the gradient of the step before; return the reply with the next."""
        return self._step(StepRequest(self.round, step, Backward(step - 1, gradient)))

    def finish(self, backward_step=None, gradient=None):
        """End the round; return the reply with segment and optimizer state."""
        backward = None if backward_step is None else Backward(backward_step, gradient)
        request = FinishRequest(self.round, backward, upload_segment=True, upload_optimizer=True)
        return FinishReply.from_content(self._ask(request, FINISH))

    def evaluate(self, batch=0, batch_size=64, version=0):
        """Return the reply with a test batch's smashed data."""
        request = EvaluateRequest(self.round, batch, batch_size, version)
        return EvaluateReply.from_content(self._ask(request, EVALUATE))

    def train_round(self, gradient_of, **plan):
        """Do a round with the gradients ``gradient_of(step, reply)``; return its end's reply."""
        reply = self.begin(**plan)
        for step in range(1, reply.num_steps):
            reply = self.step(step, gradient_of(step - 1, reply))
        return self.finish(reply.num_steps - 1, gradient_of(reply.num_steps - 1, reply))

    def _step(self, request):
        return StepReply.from_content(self._ask(request, STEP))

    def _ask(self, request, message_type):
        message = Message(request.to_content(), self.node, message_type)
        (reply,) = self.grid.send_and_receive([message])
        if reply.has_error():
            raise RefusedError(reply.error.reason)
        return reply.content


def some_gradient(step, reply):
    """Return a gradient that depends on nothing but the step, of the right shape."""
    rng = torch.Generator().manual_seed(step)
    return torch.randn(reply.smashed.shape, generator=rng)
