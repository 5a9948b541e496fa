"""Vanilla split learning: clients in turn."""

from typing import Any

from flsplit.errors import ConfigError
from flsplit.message.optimizer_state import OptimizerState
from flsplit.message.request import Backward
from flsplit.message.steps import FinishReply
from flsplit.run import Round, SplitStrategy, Step
from flsplit.storage import State
from flsplit.wireless.phases import Phase, Stage, Where, Work, tail_stages


class SequentialSL(SplitStrategy):
    """Sequential (vanilla) split learning: one client after the other trains with the server.

    In its turn a client does all its steps of the round; then its segment goes on to the next
    client, and the state of its optimizer with it. Clients take turns in their fixed order.

    Parameters
    ----------
    **options
        See :class:`~flsplit.run.SplitOptions`. A ``client_strategy`` is refused:
        there is only one client segment.

    References
    ----------
    .. [1] Gupta and Raskar, Distributed learning of deep neural network over multiple agents,
       https://arxiv.org/abs/1810.06060
    """

    hands_on = True
    keeps_labels = True
    one_cut = "it hands one client segment on from client to client"
    pools = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.aggregator:
            raise ConfigError(
                "SequentialSL hands one client segment on: there is nothing for client_strategy to "
                "aggregate"
            )

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        r"""Return what a round sends and computes: turns.

        A client's turn is, ``steps`` times, client forward :math:`b F_c`, uplink :math:`b \Gamma`,
        server forward :math:`b F_s`, server backward :math:`b B_s`, unicast :math:`b \Gamma`,
        client backward :math:`b B_c` (FLOPs and bits), and once :math:`|w_c|` (bits) up and down
        again. A U-shaped split has its last layers between the server's passes.
        """
        place, rows = work.place, work.training.batch_size
        turn = (
            Stage("client forward", Where.DEVICE, rows * place.client_flops_forward),
            Stage("uplink", Where.UPLINK, rows * work.activation_bits),
            Stage("server forward", Where.SERVER, rows * place.server_flops_forward),
            *tail_stages(work),
            Stage("server backward", Where.SERVER, rows * place.server_flops_backward),
            Stage("unicast", Where.DOWNLINK, rows * work.gradient_bits),
            Stage("client backward", Where.DEVICE, rows * place.client_flops_backward),
        )
        hand_over = (
            Stage("hand over up", Where.UPLINK, work.client_bits),
            Stage("hand over down", Where.DOWNLINK, work.client_bits),
        )
        return (Phase(turn, work.training.steps, in_turn=True), Phase(hand_over, in_turn=True))

    def begin_run(self) -> None:
        """Start without an optimizer state; nobody has trained yet."""
        self._optimizer: OptimizerState | None = None

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Let the participants take turns."""
        finished: dict[str, FinishReply] = {}
        for name in round_.participants:
            finished |= self._take_turn(round_, name)
            if round_.problem:
                break
        return finished

    def step(self, step: Step) -> None:
        """Do one pass and one optimizer step on the client's batch."""
        found = step.gradients()
        step.update(found)
        step.reply(found.cut_gradients)

    def exchanges_per_round(self, steps: int, participants: int) -> int:
        """Count every client's turn."""
        return participants * super().exchanges_per_round(steps, 1)

    def _take_turn(self, round_: Round, name: str) -> dict[str, FinishReply]:
        round_.begin_with(self.client_segment)
        replies, finished = round_.exchange({name: round_.first_request(name, self._optimizer)})
        while replies:
            batches = round_.batches(replies)
            step, steps = replies[name].step, replies[name].num_steps
            backward = Backward(step, None)
            if batches:  # else the client sits this step out
                told = self.take_step(round_, step, steps, batches)
                if name not in told:  # its batch can't be computed: the others go on
                    break
                backward = told[name]
            request = round_.next_request(replies[name], backward, upload_optimizer=True)
            replies, finished = round_.exchange({name: request})
        if reply := finished.get(name):
            self.replace_client_segment(self.parts_of(reply))
            self._optimizer = reply.optimizer
        else:  # what it trained is lost; it must not go on or be evaluated with that
            round_.clients.holds.pop(name, None)
        return finished

    def state_dict(self) -> State:
        """Return all that a checkpoint needs, with the optimizer state that is handed on."""
        return super().state_dict() | {"handed-on-optimizer": self._optimizer or {}}

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        self._optimizer = state["handed-on-optimizer"]
