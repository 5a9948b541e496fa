"""CSE-FSL."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flsplit.auxiliary import emulated_gradient
from flsplit.message.steps import FinishReply
from flsplit.run import DecoupledStrategy, Round
from flsplit.run.decoupled import AuxiliarySent
from flsplit.run.options import LearningRate, at_round, check_rate, of_kind
from flsplit.server.aggregate import average_buffers
from flsplit.storage import State
from flsplit.untrained import keeping_buffers
from flsplit.wireless.phases import Phase, Work, aggregation


class CSEFSL(DecoupledStrategy):
    """CSE-FSL: clients train their auxiliary models on their own loss; the server averages them.

    A client's auxiliary model gives it the gradient of a batch, and then takes a step on that
    batch's loss itself. Client segments and auxiliary models are averaged every round.

    Parameters
    ----------
    auxiliary_lr : float or callable, optional
        Learning rate of the auxiliary models, or a function of the round. They are trained with
        the client's kind of optimizer. Default: the clients' learning rate.
    average_auxiliary : bool
        Average the auxiliary models, weighted by the clients' numbers of examples; otherwise each
        stays with its client.
    upload_every, auxiliary, order, overlap
        See :class:`~flsplit.run.DecoupledStrategy`.
    **options
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] Mu and Shen, Communication and Storage Efficient Federated Split Learning,
       https://arxiv.org/abs/2302.05599
    """

    trains_auxiliary = True

    def __init__(
        self,
        *,
        auxiliary_lr: LearningRate | None = None,
        average_auxiliary: bool = True,
        **options: Any,
    ) -> None:
        of_kind("average_auxiliary", average_auxiliary, bool)
        if auxiliary_lr is not None:
            check_rate("auxiliary_lr", auxiliary_lr)
        self.average_auxiliary = self.uploads_auxiliary = average_auxiliary
        self.auxiliary_lr = auxiliary_lr
        super().__init__(**options)

    @classmethod
    def aggregation_phases(
        cls, work: Work, *, average_auxiliary: bool = True, **arguments: Any
    ) -> tuple[Phase, ...]:
        r"""Return the phases of the aggregation: :math:`|w_c| + |w_a|` (bits) up and broadcast."""
        return aggregation(work.client_bits + average_auxiliary * work.auxiliary_bits)

    def begin_run(self) -> None:
        """Begin with the initial auxiliary model."""
        super().begin_run()
        self._version = 0
        self._averaged: dict[str, Tensor] = {}

    def before_local_steps(self, round_: Round, names: list[str]) -> None:
        """Set the server's copy to what the clients begin with."""
        self._copy = self.new_auxiliary()
        self._copy.load_state_dict(self._averaged or self.initial)

    def auxiliary_lr_in(self, round_: Round) -> float:
        """Return the round's learning rate."""
        given = self.auxiliary_lr
        return round_.plan.lr if given is None else at_round(given, round_.plan.server_round)

    def auxiliary_of(self, client: str) -> AuxiliarySent:
        """Return the averaged auxiliary model, the same for all."""
        return AuxiliarySent(self._version, self._averaged or self.initial)

    def emulated(self, client: str, smashed: Tensor, labels: Tensor) -> Tensor | None:
        """Return ĝ with the model that the clients began the round with."""
        if not self.uploads_auxiliary:
            return None
        with keeping_buffers(self._copy):
            return emulated_gradient(self._copy, smashed, labels, self.server.criterion)

    def end_round(self, round_: Round, finished: Mapping[str, FinishReply]) -> None:
        """Average the auxiliary models beside the client segments."""
        super().end_round(round_, finished)
        if self.uploads_auxiliary and self._row:
            self._average()

    def _average(self) -> None:
        replies = list(self.ended.values())
        if replies:
            self._averaged = average_buffers(
                [reply.auxiliary for reply in replies if reply.auxiliary is not None],
                [reply.num_examples for reply in replies],
            )
        self._version += 1

    def state_dict(self) -> State:
        """Return all that a checkpoint needs, with the averaged auxiliary model."""
        averaged = {"version": self._version, "tensors": self._averaged}
        return super().state_dict() | {"averaged": averaged}

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        self._version = state["averaged"]["version"]
        self._averaged = state["averaged"]["tensors"]
