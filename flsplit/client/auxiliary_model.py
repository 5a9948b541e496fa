"""A client's auxiliary model."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flsplit.auxiliary import GIVEN, auxiliary_loss, build_auxiliary
from flsplit.client.spec import ClientSpec
from flsplit.client.state import AuxiliaryState, own_tensors, put_tensors
from flsplit.client.tail import check_accumulated_hooks
from flsplit.cut import Split
from flsplit.errors import ConfigError, NonFiniteError, SegmentMismatchError
from flsplit.finite import total_norm
from flsplit.log import logger
from flsplit.losses import Criterion
from flsplit.message.arrays import check_like
from flsplit.message.local_steps import AuxiliaryPlan
from flsplit.message.optimizer_state import get_state, set_state
from flsplit.nested import to_device
from flsplit.optimizers import UserOptimizer
from flsplit.seeds import seeded
from flsplit.untrained import keeping_buffers, load_state, names_of_buffers


class Auxiliary:
    """A client's live auxiliary model, and its optimizer where the client trains it."""

    def __init__(
        self,
        plan: AuxiliaryPlan,
        spec: ClientSpec,
        device: torch.device,
        parts: Callable[[], Split],
    ) -> None:
        self.plan = plan
        self.device = device
        if spec.auxiliary is not None and plan.kind != GIVEN:
            logger.warning(
                "the auxiliary function of client_app is not used: the server asks for %r; pass "
                "the same function to the strategy",
                plan.kind,
            )
        if plan.given_loss and spec.loss is None:
            raise ConfigError(
                "the strategy's loss is not plain cross-entropy, and clients of this method compute"
                " the loss themselves: pass the same function as client_app(loss=…)"
            )
        if spec.loss is not None and not plan.given_loss:
            logger.warning(
                "the loss of client_app is not used: the strategy's is cross-entropy; pass the "
                "same function to the strategy"
            )
        loss = spec.loss if plan.given_loss and spec.loss else functional.cross_entropy
        self.criterion = Criterion(loss, device)
        with seeded(0, device):  # the weights come from the server or from a stored state
            self.module = build_auxiliary(
                plan.kind, plan.shape, plan.num_classes, given=spec.auxiliary, parts=parts
            ).to(device)
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        check_accumulated_hooks("the auxiliary model", dict(named))
        self.parameters = [p for _, p in named]
        self.optimizer: UserOptimizer | None = None
        if plan.train:
            self.optimizer = UserOptimizer("optimizer", spec.optimizer, named, plan.lr)
        self.version = -1

    def fits(self, plan: AuxiliaryPlan) -> bool:
        """Tell whether this is the module that ``plan`` describes."""
        own = self.plan
        return (own.kind, own.shape, own.num_classes, own.train, own.given_loss) == (
            plan.kind, plan.shape, plan.num_classes, plan.train, plan.given_loss,
        )  # fmt: skip

    def begin(self, plan: AuxiliaryPlan) -> None:
        """Begin a round."""
        self.plan = plan
        if self.optimizer:
            self.optimizer.set_lr(plan.lr)

    def replace(self, tensors: dict[str, Tensor], version: int) -> None:
        """Take the server's weights; the optimizer's state stays."""
        like = self.module.state_dict()
        free = names_of_buffers(self.module)
        given = check_like(tensors, like, what="the auxiliary model from the server", free=free)
        load_state(self.module, given)
        self.version = version

    def gradient(self, smashed: Tensor, labels: Any, seed: int) -> Tensor:
        """Return ĝ of a batch; where the client trains the model, it then takes a step itself.

        NonFiniteError if its loss or a gradient is NaN or infinite; its weights stay as they were.
        """
        if smashed.ndim != len(self.plan.shape) + 1:  # sizes are the module's affair
            raise SegmentMismatchError(
                f"the auxiliary model was built for smashed data of shape (b, "
                f"{', '.join(map(str, self.plan.shape))}), this client's is {tuple(smashed.shape)}"
            )
        train = self.optimizer is not None
        leaf = smashed.detach().to(self.parameters[0]).requires_grad_(True)
        with nullcontext() if train else keeping_buffers(self.module):
            with seeded(seed, self.device):
                loss = auxiliary_loss(
                    self.module, leaf, to_device(labels, self.device), self.criterion
                )
            wanted = [leaf, *self.parameters] if train else [leaf]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        gradient = found[0]
        norms = total_norm(found)
        if gradient is None or not bool(torch.isfinite(loss) & torch.isfinite(norms)):
            raise NonFiniteError("the auxiliary model's loss or gradient is NaN or infinite")
        if self.optimizer:
            for parameter, own in zip(self.parameters, found[1:], strict=True):
                parameter.grad = own
            self.optimizer.step()
            self.optimizer.zero_grad()
        return gradient

    # --- state ---------------------------------------------------------------------------

    def state(self) -> AuxiliaryState:
        """Return what must be remembered between two messages."""
        return AuxiliaryState(
            plan=self.plan,
            tensors=own_tensors(self.module),
            optimizer=get_state(self.optimizer),
            version=self.version,
        )

    def load(self, state: AuxiliaryState) -> None:
        """Go on from a state."""
        put_tensors(self.module, state.tensors, what="the stored auxiliary model")
        set_state(self.optimizer, state.optimizer)
        self.version = state.version
