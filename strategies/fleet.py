"""A fleet for a run: what its clock needs to know, from the strategy and from a client."""

import threading
from functools import cache
from typing import TYPE_CHECKING

import torch

from flsplit.account.ledger import RoundEntry
from flsplit.errors import ConfigError, located
from flsplit.log import logger
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.server.clients import Clients
from flsplit.server.passes import Replay, ServerPass
from flsplit.server.passes.positions import AggregatingPass
from flsplit.wireless.clock import Costs, FleetClock
from flsplit.wireless.descent import Freedom
from flsplit.wireless.fleet_file import find_fleet
from flsplit.wireless.optimise import optimise
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import ModelProfile, profile_model
from flsplit.wireless.rounds import EPSL, FSLSAGE, PSL, Method, SequentialSL, SplitFed, Training

if TYPE_CHECKING:
    from flsplit.strategies.base import SplitStrategy


def make_clock(strategy: "SplitStrategy", clients: Clients, server_round: int) -> FleetClock | None:
    """Return the clock of a run on the fleet that the strategy's options name, if they do.

    The links of a radio network are those that a plan for this cut and method gives the devices.
    """
    options = strategy.options
    if not options.fleet:
        return None
    fleet = find_fleet(options.fleet)
    clients.directory.wait_for(strategy.least_clients())
    with located("fleet"):
        profile = _profile(strategy, clients, server_round)
        place = profile.place(options.cut)
        training = Training(batch_size=options.batch_size, steps=options.local_steps or 1)
        problem = Problem(fleet, profile, method_of(strategy), training)
        rates = optimise(problem, Freedom(cut=place.cut)).rates
    if fleet.radio:
        logger.info("the fleet's subchannels and powers are as planned for this cut")
    return FleetClock(
        fleet,
        rates,
        Costs(
            place,
            profile.last_layer_flops_backward,
            cache(strategy.auxiliary_flops),
            replays=_replays(strategy.server_pass),
        ),
        wait=threading.Event().wait if options.realtime else None,
    )


def method_of(strategy: "SplitStrategy") -> Method:
    """Return the latency model that is nearest to a strategy, for dividing subchannels."""
    if strategy.hands_on:
        return SequentialSL()
    if upload_every := getattr(strategy, "upload_every", 0):  # a decoupled one
        return FSLSAGE(
            upload_interval=upload_every,
            align_interval=getattr(strategy, "align_every", 0),  # CSE-FSL has no alignment
            align_epochs=getattr(strategy, "align_epochs", 0),
            buffer_rows=getattr(strategy, "buffer_size", 0),
        )
    server_pass = strategy.server_pass
    if isinstance(server_pass, AggregatingPass) and server_pass.phi > 0:
        return EPSL(server_pass.phi, replays=_replays(server_pass))
    return SplitFed() if strategy.aggregator else PSL()


def _replays(server_pass: ServerPass) -> bool:
    """Tell whether the pass sends all that it back-propagates forward a second time."""
    return isinstance(server_pass, Replay) and server_pass.phi > 0


def _profile(strategy: "SplitStrategy", clients: Clients, server_round: int) -> ModelProfile:
    """Profile the model on inputs as the clients have them."""
    request = ShapeRequest(server_round, strategy.options.cut)
    for name in clients.directory.discover():
        reply = clients.exchange({name: request}, RoundEntry(server_round)).get(name)
        if isinstance(reply, ShapeReply):
            example = torch.empty((1, *reply.input_shape), dtype=reply.input_dtype, device="meta")
            model = strategy.options.model
            return profile_model(model, example, type(model).__name__)
    raise ConfigError("no client said what its inputs look like, so FLOPs can't be counted")
