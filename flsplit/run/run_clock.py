"""The clock of a run on a fleet: what it needs to know, from the strategy and from a client."""

import threading
from collections.abc import Callable
from functools import cache

from flsplit.account.ledger import RoundEntry
from flsplit.cut.partial_forward import places_of
from flsplit.errors import ConfigError, located
from flsplit.log import logger
from flsplit.message.shape import ShapeReply, ShapeRequest
from flsplit.nested import map_tensors
from flsplit.run.options import SplitOptions
from flsplit.server.clients import Clients
from flsplit.wireless.fleet_clock import Costs, FleetClock
from flsplit.wireless.fleet_file import find_fleet
from flsplit.wireless.optimise import Freedom, optimise
from flsplit.wireless.phases import Method, Training
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import ModelProfile, profile_model


def make_clock(
    options: SplitOptions,
    method: Method,
    auxiliary_flops: Callable[[], int],
    clients: Clients,
    request: ShapeRequest,
) -> FleetClock | None:
    """Return the clock of a run on the fleet that the options name, if they do.

    ``request`` asks a client what its inputs look like. The links of a radio network are those that
    a plan for this cut and method gives the devices.
    """
    if not options.fleet:
        return None
    if options.several_cuts:
        raise ConfigError("fleet: the simulated time of clients with different cuts isn't known")
    fleet = find_fleet(options.fleet)
    with located("fleet"):
        profile = _profile(options, clients, request)
        if options.keeps_labels:
            profile = profile.cut_twice(places_of(options.default_cut)[1])
        place = profile.place(options.default_cut)
        training = Training(batch_size=options.batch_size, steps=options.local_steps or 1)
        problem = Problem(fleet, profile, method, training)
        rates = optimise(problem, Freedom(cut=place.cut)).rates
    if fleet.radio:
        logger.info("the fleet's subchannels and powers are as planned for this cut")
    # A decoupled method knows its auxiliary model only once a client has said what it has.
    costs = Costs(place, profile.last_layer_flops_backward, cache(auxiliary_flops))
    wait = threading.Event().wait if options.realtime else None
    return FleetClock(fleet, rates, costs, wait=wait)


def _profile(options: SplitOptions, clients: Clients, request: ShapeRequest) -> ModelProfile:
    for name in clients.directory.discover():
        reply = clients.exchange({name: request}, RoundEntry(request.server_round)).get(name)
        if isinstance(reply, ShapeReply):
            example = map_tensors(
                lambda no_rows: no_rows.new_empty(2, *no_rows.shape[1:], device="meta"),
                reply.inputs,
            )
            name = type(options.model).__name__
            return profile_model(options.model, example, name, share=options.share)
    raise ConfigError("no client said what its inputs look like, so FLOPs can't be counted")
