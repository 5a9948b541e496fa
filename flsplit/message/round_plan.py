"""What a client is told at the beginning of a round."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, Self

from flsplit.errors import ConfigError, ProtocolError
from flsplit.message.fields import Fields, In

MOST_BATCHES = 10**6
"""Batches that a client can say it has, in a round or an evaluation, where nobody told it."""


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
        The cut layer, or two. A client that is cut elsewhere refuses the round.
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
    batch_sizes : tuple of int
        Examples of each step of the round, in place of ``batch_size``, ``drop_last`` and what
        says how many steps there are; in a step of 0
        the client sits out. Empty for ``batch_size`` everywhere. An epoch then ends within a batch.
    client_parts : str
        What the client does beside the plain step, as :mod:`flsplit.client_parts` describes it.
    clipping_norm : float
        To what length the client is to clip what becomes of its segment; 0 for not at all.
    norm_bit : bool
        Whether it then says if that was longer.
    inputs : str
        What the server has looked at the model with, where ``forward`` asks inputs for their sizes:
        with others a client sends the trace. Empty where nobody gave the strategy an example.
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
    batch_sizes: Annotated[tuple[int, ...], In(least=0)] = ()
    client_parts: str = ""
    clipping_norm: Annotated[float, In(least=0.0)] = 0.0
    norm_bit: bool = False
    inputs: str = ""

    @cached_property
    def keeps_labels(self) -> bool:
        """Whether the client has the last layers, too, and so keeps its labels."""
        return "," in self.cut

    def rows_at(self, step: int) -> int:
        """Return how many rows a step may have; 0 if the client sits it out."""
        if not self.batch_sizes:
            return self.batch_size
        return self.batch_sizes[step] if step < len(self.batch_sizes) else 0

    @property
    def num_steps(self) -> int | None:
        """How many steps the round has; None if that depends on how much data a client has."""
        return len(self.batch_sizes) or self.local_steps or None

    def steps_of(self, num_examples: int) -> int:
        """Return how many steps a client with so many examples has, those it sits out included."""
        if steps := self.num_steps:
            return steps
        full, rest = divmod(num_examples, self.batch_size)
        return self.local_epochs * (full + (1 if rest and not self.drop_last else 0))

    def check_steps(self, num_steps: int, num_examples: int) -> None:
        """Refuse another number of steps than that, or one that nobody has; ProtocolError."""
        expected = self.steps_of(num_examples)
        if num_steps == expected and (num_steps <= MOST_BATCHES or self.num_steps):
            return
        wanted = f"at most {MOST_BATCHES}" if num_steps == expected else str(expected)
        raise ProtocolError(
            f"reply: num-steps is {num_steps}, expected {wanted} (num-examples is {num_examples}, "
            f"batch-size {self.batch_size}, local-epochs {self.local_epochs})"
        )

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the plan with other values, by field.

        ConfigError if there is no such field, or it can't have this value.
        """
        known = [one.name for one in fields(self)]
        if unknown := [name for name in changes if name not in known]:
            raise ConfigError(f"a plan has no field {unknown[0]!r} (it has {', '.join(known)})")
        try:
            plan = self.from_config(replace(self, **changes).to_config())
        except (ProtocolError, TypeError) as error:
            raise ConfigError(str(error)) from error
        if not (plan.num_steps or plan.local_epochs):
            raise ConfigError("local-epochs and local-steps are both 0: nothing would be trained")
        return plan
