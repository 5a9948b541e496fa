"""Chooses subchannels, powers and the cut together, by block-coordinate descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from flsplit.cut import CutError
from flsplit.wireless.latency import RoundTerms, round_seconds
from flsplit.wireless.power import EVEN, WATER, control_power
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import Place
from flsplit.wireless.rates import Allocation, Rates, link_rates, lone_rates, radio_rates, who_owns
from flsplit.wireless.subchannels import Cell, Owner, at_random, greedy, improved

_BETTER = 1.0 - 1e-9
_WORTHWHILE = 1.0 - 1e-5  # a sweep that shortens the round by less is the last
_MOST_SWEEPS = 50
_LEAST_CUTS = 2
_DESCENTS = 4000  # cuts to begin at, times devices squared: few devices are cheap


@dataclass(frozen=True)
class Freedom:
    """What an optimisation may choose."""

    subchannels: bool = True  # otherwise they are drawn by chance
    power: bool = True  # otherwise every device spreads its power evenly over its subchannels
    cut: str | None = None  # the cut, or None to choose it


@dataclass(frozen=True)
class Solution:
    """A choice and the round it leads to."""

    place: Place
    allocation: Allocation | None  # subchannels and powers; None where there are none to choose
    rates: Rates  # what the links then carry
    seconds: float  # the length of a round, in s
    history: tuple[float, ...]  # the length (s) before and after each change that the descent made


@dataclass(frozen=True)
class _State:
    """Where a descent is: the cut's index, subchannels and powers, and the round (s)."""

    place: int
    allocation: Allocation
    seconds: float


_End = tuple[_State, list[float]]  # where a descent ends, and the rounds (s) on the way there
_Block = Callable[[_State], _State]


class Optimiser:
    """Makes the round of one problem short, with more or less freedom.

    Subchannels, powers and the cut are improved in turn, each with the others held, until none
    helps; a change is made only if the round gets shorter. Because such a descent ends where no
    single change helps, it is done at each of the cuts that begin best (all of them for small
    fleets), and goes on from the best end with the cut free to change.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._dealt: dict[int, Owner] = {}
        self._ends: dict[tuple[Freedom, int], _End] = {}

    def solve(self, freedom: Freedom | None = None, seed: int = 0) -> Solution:
        """Make the round as short as possible; see `optimise`."""
        freedom = freedom or Freedom()
        problem = self.problem
        places = [place for place in problem.places if freedom.cut in (None, place.cut)]
        if not places:
            problem.profile.place(str(freedom.cut))  # says so if there is no such cut
            raise CutError(f"the cut {freedom.cut!r} exceeds a device's memory")
        if not problem.is_allocated:  # then all cuts can be tried
            rates = lone_rates(problem.fleet) if problem.in_turn else link_rates(problem.fleet)
            rounds = [round_seconds(problem.phases(one), problem.fleet, rates) for one in places]
            best = int(np.argmin(rounds))
            return Solution(places[best], None, rates, rounds[best], (rounds[best],))
        state, history = self.end(freedom, seed)
        rates = radio_rates(problem.fleet, state.allocation)
        place = problem.places[state.place]
        return Solution(place, state.allocation, rates, state.seconds, tuple(history))

    # What several descents need is computed once.

    @cached_property
    def terms(self) -> list[RoundTerms]:
        """The round's terms by cut."""
        problem = self.problem
        return [RoundTerms.of(problem.phases(place), problem.fleet) for place in problem.places]

    @cached_property
    def even(self) -> Cell:
        """The cell if every device spreads its power evenly."""
        return Cell.of(self.problem.fleet, EVEN)

    @cached_property
    def filled(self) -> Cell:
        """The cell if every device's power carries most."""
        return Cell.of(self.problem.fleet, WATER)

    def dealt(self, place: int) -> Owner:
        """Return subchannels that are dealt out greedily, for the cut of this index."""
        if place not in self._dealt:
            self._dealt[place] = greedy(self.even, self.terms[place])
        return self._dealt[place]

    def end(self, freedom: Freedom, seed: int) -> _End:
        """Return where the descent with this freedom ends; the seed is of drawn subchannels."""
        key = freedom, 0 if freedom.subchannels else seed
        if key not in self._ends:
            self._ends[key] = _Descent(self, freedom, seed).end()
        return self._ends[key]


class _Descent:
    def __init__(self, shared: Optimiser, freedom: Freedom, seed: int) -> None:
        self.shared, self.freedom, self.seed = shared, freedom, seed
        self.fleet, self.terms = shared.problem.fleet, shared.terms
        places = enumerate(shared.problem.places)
        self.places = [index for index, place in places if freedom.cut in (None, place.cut)]

    def end(self) -> _End:
        """Descend at each of the cuts that begin best, then from the best end with the cut free.

        At a cut the descent also begins where even powers lead, so as never to do worse.
        """
        shared, freedom = self.shared, self.freedom
        if freedom.subchannels:
            owners = {place: shared.dealt(place) for place in self.places}
        else:
            drawn = at_random(*shared.even.shape, np.random.default_rng(self.seed))
            owners = dict.fromkeys(self.places, drawn)
        starts = [self._powered(place, owner) for place, owner in owners.items()]
        starts.sort(key=lambda start: start.seconds)
        ends = []
        for start in starts[: max(_LEAST_CUTS, _DESCENTS // self.fleet.num_devices**2)]:
            ends.append(self._descend(start, (self._subchannels, self._power)))
            if freedom.subchannels and freedom.power:
                cut = shared.problem.places[start.place].cut
                even, _ = shared.end(replace(freedom, power=False, cut=cut), self.seed)
                ends.append(self._descend(even, (self._power, self._subchannels)))
        state, history = min(ends, key=lambda end: end[0].seconds)
        state, more = self._descend(state, (self._cut, self._subchannels, self._power))
        return state, [*history, *more[1:]]

    def _descend(self, state: _State, blocks: Sequence[_Block]) -> _End:
        history = [state.seconds]
        for _ in range(_MOST_SWEEPS):
            before = state.seconds
            for block in blocks:
                candidate = block(state)
                if candidate.seconds < state.seconds * _BETTER:
                    state = candidate
                    history.append(state.seconds)
            if state.seconds >= before * _WORTHWHILE:
                break
        return state, history

    def _subchannels(self, state: _State) -> _State:
        if not self.freedom.subchannels:
            return state
        cell = self.shared.even
        if self.freedom.power:
            spent_w = state.allocation.device_power_w(self.fleet.num_devices)
            cell = replace(self.shared.filled, budget_w=spent_w)
        owner = improved(cell, self.terms[state.place], state.allocation.owner)
        return self._powered(state.place, owner)

    def _power(self, state: _State) -> _State:
        return self._powered(state.place, state.allocation.owner)

    def _powered(self, place: int, owner: Owner) -> _State:
        """Return the state with the best powers for its subchannels, if they may be chosen."""
        allocation, fleet = self.shared.even.allocation(owner), self.fleet
        if self.freedom.power:
            assert fleet.radio is not None
            powers = control_power(
                fleet.snr_per_watt,
                who_owns(owner, fleet.num_devices),
                fleet.power_w,
                fleet.radio.total_power_w,
                fleet.radio.subchannel_hz,
                self.terms[place].deadlines(self.shared.filled.rates(owner)),
            )
            allocation = Allocation(owner, powers.sum(axis=0))
        rates = radio_rates(fleet, allocation)
        return _State(place, allocation, self.terms[place].seconds(rates))

    def _cut(self, state: _State) -> _State:
        rates = radio_rates(self.fleet, state.allocation)
        seconds, best = min((self.terms[place].seconds(rates), place) for place in self.places)
        return _State(best, state.allocation, seconds)


def optimise(problem: Problem, freedom: Freedom | None = None, seed: int = 0) -> Solution:
    """Make a round as short as possible; an :class:`Optimiser` does so several times, quicker.

    By default all may be chosen; the seed is of what is drawn by chance.

    Raises
    ------
    CutError
        If no cut fits into the devices' memory.
    """
    return Optimiser(problem).solve(freedom, seed)
