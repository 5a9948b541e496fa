"""What a client is told at the beginning of a round."""

from dataclasses import dataclass

from flwr.app import ConfigRecord

from flsplit.message.fields import value


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
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

    server_round: int
    num_rounds: int
    cut: str
    segment_version: int
    seed: int
    lr: float
    batch_size: int
    local_epochs: int
    local_steps: int
    drop_last: bool
    experiment: str = ""

    def to_config(self) -> ConfigRecord:
        """Return the plan as the record ``config`` of a message."""
        return ConfigRecord(
            {
                "server-round": self.server_round,
                "num-rounds": self.num_rounds,
                "cut": self.cut,
                "segment-version": self.segment_version,
                "seed": self.seed,
                "lr": self.lr,
                "batch-size": self.batch_size,
                "local-epochs": self.local_epochs,
                "local-steps": self.local_steps,
                "drop-last": self.drop_last,
                "experiment": self.experiment,
            }
        )

    @classmethod
    def from_config(cls, config: ConfigRecord) -> "RoundPlan":
        """Return the plan in a record ``config``.

        Raises
        ------
        ProtocolError
            If a field is missing, of another type or too small.
        """
        return cls(
            server_round=value(config, "server-round", int, minimum=1),
            num_rounds=value(config, "num-rounds", int, minimum=1),
            cut=value(config, "cut", str),
            segment_version=value(config, "segment-version", int, minimum=0),
            seed=value(config, "seed", int, minimum=0),
            lr=value(config, "lr", float, minimum=0.0),
            batch_size=value(config, "batch-size", int, minimum=1),
            local_epochs=value(config, "local-epochs", int, minimum=0),
            local_steps=value(config, "local-steps", int, minimum=0),
            drop_last=value(config, "drop-last", bool),
            experiment=value(config, "experiment", str),
        )
