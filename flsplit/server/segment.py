"""The server segment with its optimizer, which lives as long as the run."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flsplit.cut.halves import ServerHalf
from flsplit.cut.smashed import Smashed, smashed_in_words
from flsplit.errors import TORCH_ERRORS, ConfigError, DataError, SegmentMismatchError
from flsplit.losses import ClientsCriterion, Criterion, Loss
from flsplit.message.arrays import check_like
from flsplit.optimizers import UserOptimizer, make_scheduler
from flsplit.seeds import seeded
from flsplit.untrained import Buffers, keeping_buffers, load_state, names_of_buffers

ServerGradients = list[Tensor | None]
"""One gradient per trainable parameter of the server segment, None where there is none."""


class ServerSegment:
    """The server's part of the model, on its device, with optimizer, scheduler and loss.

    There is no ``loss`` where clients have the last layers and compute it. The scheduler steps once
    per round.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: Loss | None,
        optimizer: Callable[..., Optimizer],
        lr: float,
        device: torch.device,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        self.module = module.to(device).train()
        self.buffers = Buffers(module)
        self.device = device
        self.criterion = ClientsCriterion() if loss is None else Criterion(loss, device)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        if not self.parameters:
            raise ConfigError(
                "all parameters of the server segment are frozen (requires_grad=False): there is "
                "nothing to train on the server"
            )
        self.updates = UserOptimizer("server_optimizer", optimizer, named, lr)
        self.updates.warn("")
        self.optimizer = self.updates.torch
        self.scheduler = make_scheduler(scheduler, self.updates) if scheduler else None
        self._dtype = smashed_dtype(module)
        self.pools: dict[tuple[torch.Size, torch.dtype], bool] = {}
        """Whether rows of such a shape may go through it together; see `can_be_pooled`."""

    def train(self) -> None:
        """Set the segment to training mode."""
        if not self.module.training:
            self.module.train()

    def part_for(self, client: str) -> "ServerSegment":
        """Return what goes on where this client is cut: all of it, where all are cut at one place.

        Only the whole segment is trained and stored.
        """
        return self

    def forward(self, smashed: Smashed, labels: Any = None, *, moves_buffers: bool = True) -> Any:
        """Return the model's output for ``smashed`` ``(b, ...)``; errors name what didn't fit.

        ``labels`` go in where the model computes its own loss. Without ``moves_buffers``
        BatchNorm's running statistics stay as they are.
        """
        argument = self.criterion.argument
        extra = {} if argument is None or labels is None else {argument: labels}
        watching = self.criterion.watching_model() if extra else nullcontext()
        try:
            with watching:
                if moves_buffers:
                    logits = self.module(smashed, **extra)
                else:  # copies move: the backward pass may still need what this pass left in them
                    copies = {name: one.clone() for name, one in self.module.named_buffers()}
                    logits = functional_call(self.module, copies, (smashed,), extra)
        except DataError:  # labels are out of range in a model that computes its own loss
            raise
        except Exception as error:  # a user's model may raise anything
            kind = "" if isinstance(error, TORCH_ERRORS) else f"{type(error).__name__}: "
            if "more than 1 value per channel" in str(error):
                raise DataError(
                    f"BatchNorm in the server segment can't train on a batch of one "
                    f"({smashed_in_words(smashed)}); use another batch-size, or drop-last"
                ) from error
            raise SegmentMismatchError(
                f"the server segment can't take {smashed_in_words(smashed)}: {kind}{error}"
            ) from error
        return logits

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Compute in evaluation mode; buffers, mode and random numbers are as before at the end."""
        trains = self.module.training
        self.module.eval()
        try:
            with keeping_buffers(self.module), seeded(0, self.device):
                yield
        finally:
            self.module.train(trains)

    def receive(self, smashed: Smashed) -> Smashed:
        """Move smashed data to the segment's device.

        It keeps its dtype, but where the model's own forward would have made a floating one that is
        no narrower: then the client computes in a lower precision than the server (``autocast``).
        """
        if not isinstance(smashed, Tensor):
            return smashed.to(self.device)
        own = self._dtype
        if own and smashed.is_floating_point() and smashed.dtype.itemsize <= own.itemsize:
            return smashed.to(self.device, own)
        return smashed.to(self.device)

    def step(self, gradients: ServerGradients, lr_factor: float = 1.0) -> None:
        """Let the optimizer step with ``gradients``, at ``lr_factor`` times its learning rate."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.updates.step(lr_factor)
        self.updates.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameter groups, as the optimizer's factory does."""
        self.updates.set_lr(lr)

    def end_round(self) -> None:
        """Let the scheduler, if there is one, step."""
        if self.scheduler:
            with warnings.catch_warnings():
                # Its rate follows the rounds, also while its client has been left out.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                try:
                    self.scheduler.step()
                except TORCH_ERRORS as error:  # OneCycleLR counts how often it may
                    raise ConfigError(
                        f"server_scheduler: {type(self.scheduler).__name__} can't step at the end "
                        f"of the round: {error}; it steps once per round"
                    ) from error

    def arrays(self) -> dict[str, Tensor]:
        """Return the segment's state dict."""
        state: dict[str, Tensor] = self.module.state_dict()
        return state

    def load_arrays(self, arrays: dict[str, Tensor]) -> None:
        """Take parameters and buffers; the optimizer's state stays."""
        free = names_of_buffers(self.module)
        given = check_like(arrays, self.arrays(), what="the server segment", free=free)
        load_state(self.module, given)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint needs: arrays, the optimizer's state, the scheduler's."""
        return {
            "arrays": self.arrays(),
            "optimizer": self.updates.state(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.load_arrays(state["arrays"])
        self.updates.load(state["optimizer"])
        if self.scheduler and state["scheduler"]:
            self.scheduler.load_state_dict(state["scheduler"])
            rates = self.scheduler.get_last_lr()
            for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = lr


def smashed_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the floating dtype of smashed data as the model's own forward makes them."""
    dtype = module.smashed_dtype if isinstance(module, ServerHalf) else None
    return dtype if dtype and dtype.is_floating_point else None
