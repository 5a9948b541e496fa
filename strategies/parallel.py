"""The parallel schedule: all clients of a round do the same step at the same time."""

from abc import abstractmethod

from flsplit.message.request import Backward
from flsplit.message.steps import FinishReply
from flsplit.server.step import ClientBatch
from flsplit.strategies.base import SplitStrategy
from flsplit.strategies.round import Round


class ParallelStrategy(SplitStrategy):
    """Base class of methods whose clients work in parallel.

    A client that has finished its epoch drops out of the round's later steps.
    """

    @abstractmethod
    def server_step(
        self, round_: Round, step: int, steps: int, batches: list[ClientBatch]
    ) -> dict[str, Backward]:
        """Turn one step's smashed data into what each client is told for its backward pass."""

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Let all participants step together until each has done its steps."""
        replies, finished = round_.exchange(
            {name: round_.first_request(name) for name in round_.participants}
        )
        steps = max((reply.num_steps for reply in replies.values()), default=0)
        for step in range(steps):
            told: dict[str, Backward] = {}
            if batches := round_.batches(replies):  # else all sit this step out
                told = self.server_step(round_, step, steps, batches)
                round_.entry.steps += 1
            nothing = Backward(step, None)
            replies, ended = round_.exchange(
                {
                    name: round_.next_request(reply, told.get(name, nothing))
                    for name, reply in replies.items()
                }
            )
            finished |= ended
            if not replies:
                break
        return finished
