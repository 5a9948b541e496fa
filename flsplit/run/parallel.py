"""The parallel schedule: all clients of a round do the same step at the same time."""

from flsplit.message.request import Backward
from flsplit.message.steps import FinishReply
from flsplit.run.round import Round
from flsplit.run.strategy import SplitStrategy


class ParallelStrategy(SplitStrategy):
    """Base class of methods whose clients work in parallel.

    A subclass says what the server does in one step, in :meth:`step`. A client that has finished
    its epoch drops out of the round's later steps.
    """

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Let all participants step together until each has done its steps."""
        replies, finished = round_.exchange(
            {name: round_.first_request(name) for name in round_.participants}
        )
        steps = max((reply.num_steps for reply in replies.values()), default=0)
        for index in range(steps):
            told: dict[str, Backward] = {}
            if batches := round_.batches(replies):  # else all sit this step out
                told = self.take_step(round_, index, steps, batches)
                if round_.entry.left_out:
                    left = round_.others_than(())
                    replies = {name: reply for name, reply in replies.items() if name in left}
            nothing = Backward(index, None)
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
