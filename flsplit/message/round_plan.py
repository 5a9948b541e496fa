"""What a client is told at the beginning of a round."""

from dataclasses import dataclass
from typing import Annotated

from flsplit.message.fields import Fields, In


@dataclass(frozen=True, kw_only=True)
class RoundPlan(Fields):
    """A round's knobs; they come from the server, so that they live in one place.

    Attributes
    ----------
    server_round : int
        The round, starting from 1.
    num_rounds : int
        How many rounds the run has.
    cut : str
        The cut layer. A client that is cut elsewhere refuses the round.
    segment_version : int
        Which of the server's client segments the client must hold.
    seed : int
        The run's seed.
    lr : float
        The client's learning rate.
    batch_size : int
        Examples per mini-batch.
    local_epochs : int
        How often a client goes over its data; used when ``local_steps`` is 0.
    local_steps : int
        Mini-batches per round; 0 stands for ``local_epochs`` whole epochs.
    experiment : str
        Names the run; a resumed one keeps it. A client that was in another run starts anew.
    drop_last : bool
        Leave out an epoch's last mini-batch when it is smaller than ``batch_size``.
    """

    server_round: Annotated[int, In(least=1)]
    num_rounds: Annotated[int, In(least=1)]
    cut: str
    segment_version: Annotated[int, In(least=0)]
    seed: Annotated[int, In(least=0)]
    lr: Annotated[float, In(least=0.0)]
    batch_size: Annotated[int, In(least=1)]
    local_epochs: Annotated[int, In(least=0)]
    local_steps: Annotated[int, In(least=0)]
    drop_last: bool
    experiment: str = ""
