"""What a run asks of what carries its messages, beyond what Flower's own Grid can do."""

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid


class MessageGrid(Grid):
    """A Grid that makes messages as Flower's ``Message(…)`` does."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class Carrier(MessageGrid):
    """A Grid that a run can use without knowing which it is.

    What it says of itself holds for a Grid that does nothing special; others override it.
    """

    in_process: bool = False
    """Nothing goes over a wire (the ledger's column stays 0), and no node comes or goes."""

    simulated: bool = False
    """The nodes are simulated: all are there from the beginning, and run copies of one app."""

    works_ahead: bool = False
    """Clients work on what was pushed while the server computes, so sending ahead saves time."""

    def receive(self, ids: list[str], *, timeout: float | None = None) -> list[Message]:
        """Return the answers to messages that were pushed, waiting for them where that helps."""
        return list(self.pull_messages(ids))

    def check_speed(self, exchange_seconds: float, exchanges: int) -> None:
        """Raise an error if ``exchanges`` more of this length would take too long."""

    def end_round(self, server_round: int, timeout: float) -> None:
        """Let go of nodes where they are lent for some rounds only, and get them back.

        Not to be called after the last round.

        Parameters
        ----------
        server_round : int
            The round that is over.
        timeout : float
            Seconds to wait for nodes.
        """

    def end_run(self) -> None:
        """Clean up; another run may follow."""
