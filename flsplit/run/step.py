"""One step of a method at the server: what it has in hand, and what it can do with it."""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from flsplit.cut.smashed import CutGradient
from flsplit.errors import MethodError, located
from flsplit.log import logger
from flsplit.losses import Count
from flsplit.message.request import Backward
from flsplit.nested import map_tensors
from flsplit.run.computations import Computations
from flsplit.run.misuse import shown, wrong_reply, wrong_update
from flsplit.run.options import Reduction, Shares
from flsplit.run.round import Round
from flsplit.run.shares import client_shares, of_a_sum
from flsplit.seeds import derive_seed, generator
from flsplit.server.client_batch import ClientBatch, named, pool, pool_labels
from flsplit.server.cut_segment import CutServerSegment, gradients_by_cut, grouped_by_cut
from flsplit.server.gradient_checks import check_finite, check_server_gradients, not_a_number
from flsplit.server.gradients import (
    AskTails,
    Computation,
    StepGradients,
    backward,
    client_gradients,
    client_loss,
    forward,
    pooled_gradients,
    separate_gradients,
    with_tails,
)
from flsplit.server.pooling import can_be_pooled
from flsplit.server.segment import ServerGradients, ServerSegment

POOL = "pooled rows"
"""What errors and seeds call rows of several clients that are computed on as one batch."""


@dataclass(frozen=True)
class StepSettings:
    """What a step takes from the strategy's options."""

    shares: Shares  # what a client's share λ follows
    reduction: Reduction  # Σ λ_i L_i, or S times that for S clients
    pools: bool  # whether the clients' rows go through the server segment together
    keeps_labels: bool = False  # whether the clients have the last layers, the labels and the loss


@dataclass(frozen=True)
class Forward:
    """A forward pass of rows through the server segment, whose backward pass may follow."""

    rows: Tensor  # a leaf of the graph
    outputs: Tensor


class Step:
    """What the server has in hand in one step, and what it can do with it.

    :meth:`gradients` computes and changes no weight, :meth:`update` moves the server segment,
    :meth:`reply` says what clients step with. Each may be called as often as a method wants.
    Every computation is seeded by its place in the step, so that random layers draw anew in each
    and the same in a run that is repeated; it is checked for what isn't finite, and counted in
    the ledger's rows and on a fleet's clock.

    Attributes
    ----------
    index, num_steps : int
        The step in the round, from 0, and how many steps the round has at most.
    round, num_rounds : int
        The round, from 1, and how many there are.
    progress : float
        From 0 at the run's first step towards 1 at its end.
    batches : list of ClientBatch
        The clients' smashed data and labels, on the server's device, in the clients' fixed order.
    clients : list of str
        Whose they are.
    shares : dict of str to float
        Their shares λ, which sum to 1 over the step.
    weights : dict of str to float
        What each client's mean loss counts in the server's: λ, times S for a sum.
    lr : float
        The clients' learning rate in this round.
    where : str
        Round and step, for errors.
    keeps_labels : bool
        Whether the clients have labels and loss, which then nobody knows here: losses are 0.
    """

    def __init__(
        self,
        method: str,
        segment: ServerSegment,
        settings: StepSettings,
        round_: Round,
        index: int,
        num_steps: int,
        batches: Sequence[ClientBatch],
    ) -> None:
        plan = round_.plan
        self.index, self.num_steps = index, num_steps
        self.round, self.num_rounds, self.lr = plan.server_round, plan.num_rounds, plan.lr
        self._batch_of: dict[str, ClientBatch] = {}
        for batch in batches:
            self._batch_of[batch.client] = batch.to(segment.part_for(batch.client))
        self.batches, self.clients = list(self._batch_of.values()), list(self._batch_of)
        self.where = f"round {self.round}, step {index}"
        self.shares = client_shares(self.batches, settings.shares)
        self.weights = self.shares if settings.reduction == "mean" else of_a_sum(self.shares)
        self._method, self._segment, self._settings = method, segment, settings
        self._round, self._seed = round_, plan.seed
        self.keeps_labels = settings.keeps_labels
        self._ask: AskTails | None = None
        if settings.keeps_labels:
            self._ask = partial(round_.ask_tails, index)
        self._told: dict[str, Backward] = {}
        self._losses: dict[str, tuple[ClientBatch, float, Count]] = {}  # as first computed
        self._updated = False
        self._mixed = False
        self._computations = Computations(plan.seed, self.round, index)

    @property
    def progress(self) -> float:
        """From 0 at the run's first step towards 1 at its end."""
        done = self.round - 1 + self.index / max(self.num_steps, self.index + 1)
        return done / self.num_rounds

    @cached_property
    def groups(self) -> list[list[str]]:
        """The clients, those that are cut at the same place together."""
        found = grouped_by_cut(self._segment, self.batches)
        return [[batch.client for batch in own] for _, own in found]

    def pooled(self) -> Tensor:
        """Return the smashed data of all clients, concatenated in their order."""
        self._expect_one_cut("pools rows of clients")
        return pool([batch.tensor for batch in self.batches], self.batches)

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this step, from the run's seed."""
        return np.random.default_rng(
            derive_seed(self._seed, "rules", self.round, self.index, *self.clients)
        )

    def generator(self, *labels: str | int) -> torch.Generator:
        """Return a torch generator (CPU) for one use in this step, named by ``labels``."""
        return generator(self._seed, *labels, self.round, self.index)

    # --- gradients -----------------------------------------------------------------------

    def gradients(
        self,
        batches: Sequence[ClientBatch] | None = None,
        *,
        segment: ServerSegment | None = None,
        per_client: bool = False,
        low_memory: bool = False,
    ) -> StepGradients:
        """Return the gradients of Σ_i λ_i L_i over ``batches``; no weight changes.

        Parameters
        ----------
        batches : sequence of ClientBatch, optional
            Some of the step's, or rows from :meth:`shuffled_rows`; all by default. The shares λ
            are renormalised over them.
        segment : ServerSegment, optional
            Another server segment than the strategy's own.
        per_client : bool
            Also each client's own gradient of the server segment, in ``clients``; BatchNorm then
            sees one client at a time.
        low_memory : bool
            Compute these twice, in parts, instead of keeping all of them.

        Raises
        ------
        NonFiniteError
            If a loss or gradient is NaN or infinite; it names the client.
        SegmentMismatchError, DataError
            If the server segment or the loss can't take a batch.
        """
        started, settings = time.perf_counter(), self._settings
        batches = self.batches if batches is None else batches
        if not batches:
            raise self._error("asked for the gradients of no batches")
        segment = segment or self._segment
        whole, means = batches is self.batches, settings.reduction == "mean"
        names = self.clients if whole else [batch.client for batch in batches]
        weights = self.weights if whole else client_shares(batches, settings.shares)
        if not (whole or means):
            weights = of_a_sum(weights)
        compute = partial(self._of_one_cut, weights, per_client, low_memory)

        def of_all() -> StepGradients:
            if isinstance(segment, CutServerSegment):
                found = gradients_by_cut(segment, batches, compute, self._ask, means=means)
            else:
                found = compute(segment, batches).result(self._ask)
            check_finite(found, segment, batches, self.where)
            return found

        found = self._computations.run(segment, names, of_all)
        self._take_note(batches, found, started)
        return found

    def one_by_one(
        self, segment_of: Mapping[str, ServerSegment]
    ) -> Iterator[tuple[ClientBatch, StepGradients]]:
        """Yield each client's gradients of a server segment of its own; no weight changes.

        That is :meth:`gradients` of one batch after the other; but clients that keep their labels
        are asked for what is theirs all at once.

        Parameters
        ----------
        segment_of : mapping of str to ServerSegment
            Server segments by client.
        """
        if not self._ask:
            for batch in self.batches:
                yield batch, self.gradients([batch], segment=segment_of[batch.client])
            return
        passes = [
            self._computations.run(segment, [batch.client], partial(forward, segment, [batch]))
            for batch in self.batches
            for segment in [segment_of[batch.client]]
        ]
        for batch, passed in zip(self.batches, with_tails(passes, self._ask), strict=True):
            started, segment = time.perf_counter(), segment_of[batch.client]
            found = backward(segment, {batch.client: 1.0}, [passed])
            check_finite(found, segment, [batch], self.where)
            self._take_note([batch], found, started)
            yield batch, found

    def _take_note(
        self, batches: Sequence[ClientBatch], found: StepGradients, started: float
    ) -> None:
        self._count(started, forward=found.rows, backward=found.rows, logits=found.rows)
        self._round.entry.rows += found.rows
        for batch in batches:
            name = batch.client
            if self._batch_of.get(name) is batch:  # else it is of mixed rows
                self._losses.setdefault(name, (batch, found.losses[name], found.counts[name]))

    def _of_one_cut(
        self,
        weights: Mapping[str, float],
        per_client: bool,
        low_memory: bool,
        segment: ServerSegment,
        batches: Sequence[ClientBatch],
    ) -> Computation:
        if len(batches) < len(weights):  # the others are cut elsewhere
            weights = {batch.client: weights[batch.client] for batch in batches}
        if per_client:
            return client_gradients(segment, batches, weights, low_memory=low_memory)
        if self._settings.pools and (len(batches) == 1 or can_be_pooled(segment, batches)):
            return pooled_gradients(segment, batches, weights)
        return separate_gradients(segment, batches, weights)

    def shuffled_rows(self, batch_size: int) -> Iterator[list[ClientBatch]]:
        """Yield mini-batches of all clients' rows, mixed: what a method trains the server on.

        Parameters
        ----------
        batch_size : int
            Rows in each; the last may have fewer.

        Yields
        ------
        list of ClientBatch
            One batch without an owner, for :meth:`gradients`. The order follows the run's seed.
        """
        self._expect_labels("mixes rows of clients")
        smashed = self.pooled()
        labels = pool_labels(self.batches)
        order = torch.from_numpy(self.rng.permutation(len(smashed))).to(smashed.device)
        for rows in torch.split(order, batch_size):
            self._mixed = True
            own = map_tensors(lambda tensor: tensor[rows], labels)  # noqa: B023
            yield [ClientBatch(POOL, smashed[rows], own, len(rows))]

    def forward(self, rows: Tensor, *, graph: bool = True, moves_buffers: bool = True) -> Forward:
        """Run rows through the server segment: the clients' own, or some that a method made up.

        Parameters
        ----------
        rows : torch.Tensor
            Smashed data ``(n, ...)``.
        graph : bool
            Whether :meth:`backward` is to follow.
        moves_buffers : bool
            Whether BatchNorm's running statistics move.
        """
        self._expect_one_cut("runs rows through the server segment")
        started, segment = time.perf_counter(), self._segment
        leaf = rows.detach().requires_grad_(graph)

        def run() -> Tensor:
            with located(named(self.batches)), torch.set_grad_enabled(graph):
                outputs: Tensor = segment.forward(leaf, moves_buffers=moves_buffers)
                return outputs

        outputs = self._computations.run(segment, self.clients, run)
        self._count(started, forward=len(rows))
        return Forward(leaf, outputs)

    def logit_gradients(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the gradient of each client's mean loss by its logits ``(b, C)``.

        Parameters
        ----------
        outputs : torch.Tensor
            Logits of all rows of the step, in the clients' order.
        """
        self._expect_labels("asked for gradients by logits")
        started = time.perf_counter()
        split = torch.split(outputs.detach(), [len(batch) for batch in self.batches])
        gradients = {}
        for batch, own in zip(self.batches, split, strict=True):
            leaf = own.detach().requires_grad_()
            loss, count = client_loss(self._segment, leaf, batch)
            if not math.isfinite(loss.item()):
                raise not_a_number("loss", batch.client, self.where)
            (gradients[batch.client],) = torch.autograd.grad(loss, leaf)
            self._losses.setdefault(batch.client, (batch, loss.item(), count))
        self._count(started, logits=len(outputs))
        return gradients

    def backward(self, forward: Forward, gradients: Tensor) -> tuple[ServerGradients, Tensor]:
        """Carry gradients at the logits back; return the server segment's, and the rows'.

        Parameters
        ----------
        forward : Forward
            From :meth:`forward`.
        gradients : torch.Tensor
            Of the shape of its outputs.
        """
        started, parameters = time.perf_counter(), self._segment.parameters
        found = torch.autograd.grad(
            forward.outputs, [*parameters, forward.rows], grad_outputs=gradients, allow_unused=True
        )
        by_rows = torch.zeros_like(forward.rows) if found[-1] is None else found[-1]
        self._count(started, backward=len(forward.rows))
        self._round.entry.rows += len(forward.rows)
        return list(found[:-1]), by_rows

    # --- what becomes of them ------------------------------------------------------------

    def update(
        self,
        found: StepGradients | ServerGradients,
        *,
        lr_factor: float = 1.0,
        segment: ServerSegment | None = None,
    ) -> None:
        """Let the server's optimizer step.

        Parameters
        ----------
        found : StepGradients, or list of torch.Tensor or None
            What :meth:`gradients` returned, or a gradient per trainable parameter of the server
            segment, in their order.
        lr_factor : float
            What the learning rate is multiplied with in this step.
        segment : ServerSegment, optional
            Another than the strategy's own.

        Raises
        ------
        NonFiniteError
            If a gradient is NaN or infinite; weights and buffers stay as they were.
        MethodError
            If it is something else than gradients.
        """
        segment = segment or self._segment
        if not (isinstance(lr_factor, (int, float)) and math.isfinite(lr_factor)):
            raise self._error(f"updated with lr_factor {lr_factor!r}, expected a finite number")
        checked = isinstance(found, StepGradients) and found.clients is None
        gradients = found.server_gradients if isinstance(found, StepGradients) else found
        if not checked:
            if wrong := wrong_update(gradients, segment):
                raise self._error(f"updated with {wrong}")
            try:
                check_server_gradients(gradients, segment, self.batches, self.where)
            except ArithmeticError:
                self._computations.undo_buffers(segment)
                raise
        if self._mixed:
            # Whose rows can't be computed may turn out later: the step is then done without them.
            self._computations.keep_state(segment)
        self._computations.update(segment, gradients, lr_factor)
        self._updated = True

    def leave(self) -> None:
        """Say that the server segment stays as it is in this step, on purpose."""
        self._updated = True

    def reply(
        self,
        cut_gradients: Mapping[str, CutGradient],
        *,
        shared_rows: Mapping[str, int] | None = None,
        repeated: Collection[str] = (),
    ) -> None:
        """Let clients step with these cut-layer gradients; who is told nothing does not step.

        Parameters
        ----------
        cut_gradients : mapping of str to torch.Tensor, or to dict of str to torch.Tensor
            By client; of the shape of its smashed data (where several values cross, by their
            names), and of the size of a gradient of the client's own mean loss.
        shared_rows : mapping of str to int, optional
            How many leading rows a client shares with others of the step: the ledger counts them
            once, as on a broadcast channel.
        repeated : collection of str
            Clients whose shared rows are all one row, which is broadcast once.

        Raises
        ------
        MethodError
            If a client is not in the step, or a gradient has another shape or isn't finite.
        """
        if not isinstance(cut_gradients, Mapping):
            raise self._error(f"replied with {shown(cut_gradients)}, expected a dict of gradients")
        shared = shared_rows or {}
        for client, gradient in cut_gradients.items():
            if (batch := self._batch_of.get(client)) is None:
                known = ", ".join(map(repr, self.clients))
                raise self._error(f"replied to client {client!r}, expected one of {known}")
            if wrong := wrong_reply(gradient, batch.smashed):
                raise self._error(f"replied to client {client!r} with {wrong}")
            self._told[client] = Backward(
                self.index,
                None if batch.frozen else gradient,
                shared.get(client, 0),
                client in repeated,
            )

    def record(self, metrics: Mapping[str, float]) -> None:
        """Put numbers into the ledger, by name; a round's entry has their mean over the steps.

        Raises
        ------
        MethodError
            If one is not a number.
        """
        if not isinstance(metrics, Mapping):
            raise self._error(f"recorded {shown(metrics)}, expected a dict of numbers")
        for name, number in metrics.items():
            try:
                self._round.record_metrics({name: float(number)})
            except (TypeError, ValueError) as error:
                raise self._error(
                    f"recorded {name!r} as {shown(number)}, expected a number"
                ) from error

    # --- for the strategy's base class ---------------------------------------------------

    def end(self, *, replies_expected: bool) -> dict[str, Backward]:
        """Return what each client is told; raise MethodError if the method forgot the server."""
        if not self._updated:
            raise self._error(
                "ended without update(): the server segment would never learn. Call "
                "step.update(found), or step.leave() where that is meant"
            )
        if replies_expected and not self._told and self.round == 1 and self.index == 0:
            logger.warning(
                "%s.step replied to no client in %s: no client steps (step.reply is missing?)",
                self._method, self.where,
            )  # fmt: skip
        for client in self.clients:
            if client not in self._told:
                self._told[client] = Backward(self.index, None)
        return self._counted()

    def break_off(self) -> dict[str, Backward]:
        """Return what clients were told before the step failed; all else is as if it never was."""
        self._computations.undo()
        return self._counted()

    def _counted(self) -> dict[str, Backward]:
        for client, loss in self._losses.items():
            if client in self._told:
                self._round.record_loss(*loss)
        return self._told

    def _count(
        self, started: float, *, forward: int = 0, backward: int = 0, logits: int = 0
    ) -> None:
        if clock := self._round.clients.clock:
            clock.stepped(
                [(client, self.index) for client in self.clients],
                forward_rows=forward,
                backward_rows=backward,
                logit_rows=logits,
                started=started,
            )

    def _expect_one_cut(self, what: str) -> None:
        if isinstance(self._segment, CutServerSegment):
            raise self._error(f"{what}, but clients may be cut at different places")

    def _expect_labels(self, what: str) -> None:
        if self.keeps_labels:
            raise self._error(f"{what}, but the clients keep their labels and the last layers")

    def _error(self, what: str) -> MethodError:
        return MethodError(f"{self._method}.step {what}")
