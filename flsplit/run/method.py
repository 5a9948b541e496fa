"""What a method is: what it says of itself, its server segment, its state, its step."""

import copy
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from flsplit.client.spec import pick_device
from flsplit.client_parts import ClientPart
from flsplit.cut import Split, split
from flsplit.cut.client_cuts import all_cuts, cut_of, joined
from flsplit.cut.private import gradient_hooks
from flsplit.errors import OF_A_BATCH, ConfigError, FlsplitError, LostClientsError, at, located
from flsplit.flower_internals import NORM_BIT
from flsplit.message.arrays import check_like, from_record, to_record
from flsplit.message.request import Backward, SegmentArrays
from flsplit.message.steps import FinishReply
from flsplit.run.options import SplitOptions, at_round, refuse_unknown
from flsplit.run.own_arguments import argument_names, own_parameters
from flsplit.run.round import Round
from flsplit.run.step import Step, StepSettings
from flsplit.server.aggregate import CLIENT_SEGMENTS, SegmentAggregator, Upload
from flsplit.server.client_batch import ClientBatch
from flsplit.server.cut_segment import CutServerSegment
from flsplit.server.gradient_checks import culprits
from flsplit.server.segment import ServerSegment
from flsplit.storage import State
from flsplit.untrained import names_of_buffers, names_of_frozen
from flsplit.wireless.phases import Method, SaysPhases


class SplitMethod(SaysPhases):
    """A method of split learning, as far as it needs nothing of Flower's strategies.

    A subclass says how a round is trained (:meth:`train_round`); most derive from
    :class:`~flsplit.run.parallel.ParallelStrategy` and only say what the server does
    with the smashed data of one step.

    Parameters
    ----------
    **options
        The fields of :class:`~flsplit.run.options.SplitOptions`; ``model`` and ``cut``
        are required.

    Attributes
    ----------
    aggregates : bool
        Whether client segments are aggregated even if no ``client_strategy`` is given; then by
        FedAvg.
    hands_on : bool
        Whether all clients work on one segment in turn, so that a whole model comes out.
    pools : bool
        Whether the method computes with the clients' rows of a step together, so that they must
        be of one shape; a client whose rows differ from those of most is left out.
    several_cuts : bool
        Whether clients may be cut at different places.
    one_cut : str
        Why not, where they may not.
    keeps_labels : bool
        Whether labels, loss and last layers may be at the clients (a U-shaped split).
    needs_labels : str
        Why not, where they may not.
    client_parts : sequence of ClientPart
        What the method has its clients do beside the plain step; the options' parts come after.

    Raises
    ------
    ConfigError
        If an option doesn't exist, has a value that can't be used, or contradicts another.
    flsplit.cut.CutError
        If the model can't be cut there.
    """

    hands_on: ClassVar[bool] = False
    pools: ClassVar[bool] = True
    several_cuts: ClassVar[bool] = False
    one_cut: ClassVar[str] = "it computes with the smashed data of all clients together"
    keeps_labels: ClassVar[bool] = False
    needs_labels: ClassVar[str] = "it computes with labels or logits at the server"
    client_parts: Sequence[ClientPart] = ()

    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        "options", "parts", "_splits", "device", "aggregator", "server",
        "client_segment", "_settings",
    )  # fmt: skip
    """What every method has; anything else is its own."""

    server: ServerSegment
    client_segment: SegmentArrays

    def __init__(self, **options: Any) -> None:
        refuse_unknown(type(self).__name__, options, argument_names(type(self)))
        self.options = SplitOptions(**options)
        if self.options.several_cuts and not self.several_cuts:
            raise ConfigError(
                f"cut is {self.options.cut!r}, but {type(self).__name__} needs one cut for all "
                f"clients: {self.one_cut}"
            )
        if self.options.keeps_labels and not self.keeps_labels:
            raise ConfigError(
                f"cut is {self.options.cut!r}, which keeps labels at the clients, but "
                f"{type(self).__name__} can't do without them: {self.needs_labels}"
            )
        self._splits: dict[str, Split] = {}
        self.parts = self._make_parts()
        self.device = pick_device(self.options.device)
        self._settings = StepSettings(
            self.options.shares,
            self.options.reduction,
            pools=self.options.server_batchnorm == "pooled",
            keeps_labels=self.options.keeps_labels,
        )
        self.aggregator = self._make_aggregator()

    def split(self, model: nn.Module, cut: str = "") -> Split:
        """Return a model of the options' kind, cut in two."""
        options = self.options
        return split(model, cut or options.default_cut, options.example, share=options.share)

    @property
    def inputs(self) -> str:
        """What clients are told of the example, if they have to know it; else empty."""
        return "" if self.options.example is None else self.parts.server.inputs

    # --- different cuts for different clients ----------------------------------------------

    def parts_at(self, cut: str) -> Split:
        """Return the model cut at a place."""
        if cut not in self._splits:
            self._splits[cut] = self.split(self.options.model, cut)
        return self._splits[cut]

    def parts_for(self, client: str) -> Split:
        """Return the model cut where this client is cut."""
        return self.parts_at(cut_of(self.options.cut, client))

    def segment_for(self, client: str) -> SegmentArrays:
        """Return the server's version of the client segment, of the size that this client has."""
        whole = self.client_segment
        if not self.options.several_cuts:
            return whole
        own = self.parts_for(client).client.state_dict().keys()
        tensors = {name: tensor for name, tensor in whole.tensors.items() if name in own}
        return SegmentArrays(whole.version, tensors, whole.frozen & own, whole.buffers & own)

    def server_for(self, client: str) -> ServerSegment:
        """Return the server segment that goes on where this client is cut; not to be trained."""
        return self.server.part_for(client)

    def _make_parts(self) -> Split:
        """Return the client segment and the server segment of which the method keeps one.

        Of several cuts these are the largest: what is the client's for some and the server's for
        others is in both.
        """
        options = self.options
        if not options.several_cuts:
            return self.parts_at(options.default_cut)
        splits = list(map(self.parts_at, all_cuts(options.cut)))
        return joined(splits, options.default_cut)

    def _make_server(self) -> ServerSegment:
        options = self.options
        if not options.several_cuts:
            return self.new_server_segment()
        # Copied together, they go on sharing their parameters.
        halves = {cut: one.server for cut, one in self._splits.items()}
        first = next(cut for cut, half in halves.items() if half is self.parts.server)
        halves = copy.deepcopy({first: halves.pop(first), **halves})
        settings = self._server_settings(1)
        return CutServerSegment(halves, lambda client: cut_of(options.cut, client), **settings)

    def _with_server(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a client handed over, and of the layers after its cut the server's version.

        So a layer's average counts the server's version for each client that leaves it there.
        """
        if not self.options.several_cuts:
            return own
        whole = self.server.arrays() | own
        return {name: whole[name] for name in self.client_segment.tensors}

    # --- what a subclass says ------------------------------------------------------------

    @abstractmethod
    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Train one round and return the clients' replies at its end."""

    @abstractmethod
    def step(self, step: Step) -> None:
        """Do one step at the server: gradients, what the method makes of them, update, reply."""

    def begin_run(self) -> None:
        """Prepare what the method remembers beside the server segment."""

    def begin_round(self, round_: Round) -> None:
        """Prepare a round; a client's plan may be changed here, in ``round_.overrides``."""

    def end_round(self, round_: Round, finished: Mapping[str, FinishReply]) -> None:
        """Aggregate what the clients handed over at the end of a round."""
        if self.aggregator:
            uploads = {
                name: self.upload(round_, reply, self._with_server(self.parts_of(reply)))
                for name, reply in finished.items()
            }
            aggregated = self.aggregator.aggregate(
                round_.plan.server_round, uploads, self.client_segment.tensors
            )
            self.replace_client_segment(aggregated)
            if self.options.several_cuts:
                server = self.server.arrays()
                self.server.load_arrays(
                    {name: aggregated.get(name, server[name]) for name in server}
                )

    def upload(self, round_: Round, reply: FinishReply, tensors: dict[str, Tensor]) -> Upload:
        """Return what a client brings to an aggregation: tensors, its weight, how it trained."""
        tally, metrics = round_.tallies.get(reply.client), {}
        if tally and tally.mean_loss is not None:
            metrics["train-loss"] = tally.mean_loss
        if tally and tally.accuracy is not None:
            metrics["train-accuracy"] = tally.accuracy
        if round_.plan.norm_bit and reply.clipped is not None:
            metrics[NORM_BIT] = int(reply.clipped)
        return Upload(tensors, reply.num_examples, metrics)

    def exchanges_per_round(self, steps: int, participants: int) -> int:
        """Return how many exchanges a round takes whose clients have up to ``steps`` steps."""
        return steps * (2 if self.options.keeps_labels else 1) + 1

    # --- what the planner and a fleet's clock ask ----------------------------------------

    def planned(self, name: str = "", given: Mapping[str, Any] | None = None) -> Method:
        """Return the method as the planner wants it: the class, and what it was made with.

        An argument of the constructor has the value of the attribute of that name, as far as there
        is one, and otherwise its default.

        Parameters
        ----------
        name : str
            The strategy's name in a run's configuration. Default: its class's.
        given : mapping of str to object, optional
            Its arguments in a run's configuration, to be shown with a plan.
        """
        kind, options = type(self), self.options
        arguments = {one.name: getattr(options, one.name) for one in fields(options)}
        for parameter in own_parameters(kind):
            kept = vars(self).get(parameter.name, parameter.default)
            arguments.setdefault(parameter.name, kept)
        for name_of_model in ("model", "cut", "example", "share"):  # a plan has a profile instead
            del arguments[name_of_model]
        parts = self.all_client_parts()
        return Method(name or kind.__name__, kind, arguments, given or {}, parts=parts)

    # --- state of a run ------------------------------------------------------------------

    @property
    def gives_whole_model(self) -> bool:
        """Whether ``Result.arrays`` is a whole model's state dict."""
        return self.aggregator is not None or self.hands_on

    def arrays(self) -> ArrayRecord:
        """Return the whole model's state dict, or the server segment's."""
        server = self.server.arrays()
        if not self.gives_whole_model:
            return to_record(server)
        return to_record(self.parts.join(self.client_segment.tensors, server))

    def replace_client_segment(self, tensors: dict[str, Tensor]) -> None:
        """Make ``tensors`` the server's version of the client segment, which clients then get."""
        before = self.client_segment
        self.client_segment = replace(before, version=before.version + 1, tensors=tensors)

    def parts_of(self, reply: FinishReply) -> dict[str, Tensor]:
        """Return the client segment in a reply at the end of a round."""
        if reply.segment is None:
            raise FlsplitError(f"client {reply.client!r} handed over no segment")
        return self.segment_for(reply.client).completed(reply.segment)

    def new_server_segment(
        self, server_round: int = 1, parts: Split | None = None
    ) -> ServerSegment:
        """Return a copy of the server segment as it is in the model, with a new optimizer."""
        module = copy.deepcopy((parts or self.parts).server)
        segment = ServerSegment(module, **self._server_settings(server_round))
        for _ in range(1, server_round):
            segment.end_round()
        return segment

    def _server_settings(self, server_round: int) -> dict[str, Any]:
        options = self.options
        return {
            "loss": None if options.keeps_labels else options.loss,
            "optimizer": options.server_optimizer,
            "lr": at_round(options.server_lr, server_round),
            "scheduler": options.server_scheduler,
            "device": self.device,
        }

    def _segment_of(
        self, version: int, tensors: dict[str, Tensor], parts: Split | None = None
    ) -> SegmentArrays:
        """Return a client segment that knows which of its tensors nobody trains."""
        client = (parts or self.parts).client
        return SegmentArrays(version, tensors, names_of_frozen(client), names_of_buffers(client))

    def server_segments(self) -> list[ServerSegment]:
        """Return all server segments that learn; their learning rates go together."""
        return [self.server]

    def begin(self, initial_arrays: ArrayRecord) -> None:
        """Take the initial arrays, and forget an earlier run."""
        self._check_gradient_hooks()
        tensors = from_record(initial_arrays, field="initial_arrays")
        client, server = self.parts.divide(tensors)
        like = self.parts.client.state_dict()
        free = names_of_buffers(self.parts.client)
        client = check_like(client, like, what="initial_arrays, client segment", free=free)
        self.client_segment = self._segment_of(0, client)
        self.server = self._make_server()
        with located("initial_arrays"):
            self.server.load_arrays(server)
        self.begin_run()

    def _check_gradient_hooks(self) -> None:
        """Refuse hooks that nobody would call: copies have none, and nothing is accumulated."""
        for name, parameter in self.parts.server.named_parameters():
            for kind in gradient_hooks(parameter):
                raise ConfigError(
                    f"model: {name!r}, a parameter of the server segment, has a hook ({kind}), "
                    "which the server would not call: hook the module (register_full_backward_hook)"
                    ", or give a server_optimizer with a hook (register_step_pre_hook)"
                )

    # --- a round -------------------------------------------------------------------------

    def all_client_parts(self) -> list[ClientPart]:
        """Return the method's own client parts, then those of the options."""
        return [*self.client_parts, *self.options.client_parts]

    def least_clients(self) -> int:
        """Return how many clients a round needs; a client strategy would wait for them for ever."""
        least = max(self.options.min_available_nodes, self.options.min_train_nodes)
        if self.aggregator:
            least = max(least, self.aggregator.least_clients)
        return least

    def aggregated_tensors(self) -> dict[str, Tensor]:
        """Return what the client strategy aggregates, as it is before the round."""
        return self.client_segment.tensors

    def clipping(self, participants: Sequence[str]) -> dict[str, Any]:
        """Return what plans say of clipping what is handed over, where the client strategy does.

        ConfigError if something that is aggregated isn't at the clients, which would clip it.
        """
        aggregator = self.aggregator
        if not (aggregator and aggregator.clipping_norm):
            return {}
        whole = self.aggregated_tensors().keys()
        if any(self.segment_for(name).tensors.keys() != whole for name in participants):
            raise ConfigError(
                f"{type(aggregator.strategy).__name__} lets clients clip, but "
                f"{type(self).__name__} also aggregates layers that are at the server, which "
                "nobody would clip: take the wrapper whose name has ServerSide"
            )
        return {"clipping_norm": aggregator.clipping_norm, "norm_bit": aggregator.wants_norm_bit}

    def take_step(
        self,
        round_: Round,
        index: int,
        num_steps: int,
        batches: Sequence[ClientBatch],
        *,
        replies_expected: bool = True,
    ) -> dict[str, Backward]:
        """Let the method do one step on the clients' batches; return what each is told.

        A client whose batch can't be computed is left out of the round, and the step is done
        without it: by all others, or by those that were not told anything yet.

        Raises
        ------
        NonFiniteError, DataError, SegmentMismatchError
            If the loss or a gradient is NaN or infinite, or the step can't be computed, and no
            client is left without which it could be.
        MethodError
            If the method does something with the step that it can't.
        """
        started, name = time.perf_counter(), type(self).__name__
        waited = round_.entry.waiting_seconds
        told: dict[str, Backward] = {}
        first: FlsplitError | None = None
        while batches:
            step = Step(name, self.server, self._settings, round_, index, num_steps, batches)
            try:
                self.step(step)
                told |= step.end(replies_expected=replies_expected)
                break
            except LostClientsError:  # who had the last layers: they are left out already
                told |= step.break_off()
                if not round_.enough_are_left():
                    break
                left = round_.others_than(list(told))
                batches = [one for one in batches if one.client in left]
            except FlsplitError as error:
                at(step.where, error)
                if not isinstance(error, OF_A_BATCH):
                    raise
                first = first or error
                told |= step.break_off()
                names = [one.client for one in batches]
                pinned = error.client in names  # else it's nobody's, or of pooled rows
                bad = {str(error.client): error} if pinned else culprits(self.server_for, batches)
                if not bad and round_.give_up(error):
                    break
                if not bad or not round_.anybody_but(bad):
                    raise first from None
                for client, why in bad.items():
                    round_.leave_out(client, index, why)
                batches = [one for one in batches if one.client not in {**bad, **told}]
        round_.entry.steps += 1
        waited = round_.entry.waiting_seconds - waited  # for last layers at the clients
        round_.entry.server_seconds += time.perf_counter() - started - waited
        return told

    # --- checkpoints ---------------------------------------------------------------------

    def auxiliary_flops(self) -> int:
        """Return the FLOPs of a row's forward pass through an auxiliary model, if there is one."""
        return 0

    def state_dict(self) -> State:
        """Return all that a checkpoint of the run needs: nested dicts of tensors and numbers.

        A method that remembers something from step to step adds it to what this returns, and takes
        it in :meth:`load_state_dict`.
        """
        state: State = {
            "client-segment": dict(self.client_segment.tensors),
            "segment-version": self.client_segment.version,
            "server": self.server.state_dict(),
        }
        if self.aggregator:
            state["client-strategy"] = self.aggregator.state_dict()
        return state

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`; only what is there by name is looked at."""
        version, tensors = state["segment-version"], state["client-segment"]
        self.client_segment = self._segment_of(version, tensors)
        self.server.load_state_dict(state["server"])
        if self.aggregator:
            self.aggregator.load_state_dict(state["client-strategy"])

    # --- construction --------------------------------------------------------------------

    def _make_aggregator(self) -> SegmentAggregator | None:
        strategy = self.options.client_strategy
        if strategy is None and not self.aggregates:
            return None
        return self.aggregator_of(strategy or self._default_strategy())

    def given_aggregators(self) -> list[SegmentAggregator]:
        """Return those whose Flower strategies the user gave."""
        return [self.aggregator] if self.aggregator and self.options.client_strategy else []

    def aggregator_of(self, strategy: Strategy, sees: str = CLIENT_SEGMENTS) -> SegmentAggregator:
        """Return what lets a Flower strategy aggregate this model's segments."""
        model = self.options.model
        buffers = {name for name, _ in model.named_buffers()}
        return SegmentAggregator(strategy, buffers, names_of_frozen(model), sees)

    def _default_strategy(self) -> FedAvg:
        options = self.options
        return FedAvg(
            fraction_train=options.fraction_train,
            min_train_nodes=options.min_train_nodes,
            min_available_nodes=options.min_available_nodes,
            weighted_by_key=options.weighted_by_key,
        )
