"""Chooses subchannels, powers and the cut together, by block-coordinate descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flsplit.cut import CutError
from flsplit.wireless.latency import RoundTerms, round_seconds
from flsplit.wireless.power import EVEN, WATER, control_power
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import Place
from flsplit.wireless.rates import Allocation, Rates, link_rates, lone_rates, radio_rates
from flsplit.wireless.subchannels import Cell, Owner, at_random, greedy, improved

_BETTER = 1.0 - 1e-9
_WORTHWHILE = 1.0 - 1e-5  # a sweep that shortens the round by less is the last
_MOST_SWEEPS = 50
_LEAST_CUTS = 2
_DESCENTS = 4000  # cuts to begin at, times devices squared: few devices are cheap


@dataclass(frozen=True)
class Freedom:
    """What an optimisation may choose.

    Attributes
    ----------
    subchannels : bool
        Otherwise they are drawn by chance.
    power : bool
        Otherwise every device spreads its power evenly over its subchannels.
    cut : str, optional
        The cut, or None to choose it.
    """

    subchannels: bool = True
    power: bool = True
    cut: str | None = None


@dataclass(frozen=True)
class Solution:
    """A choice and the round it leads to.

    Attributes
    ----------
    place : Place
        Where the model is cut.
    allocation : Allocation or None
        Subchannels and powers; None where there are none to choose.
    rates : Rates
        What the links then carry.
    seconds : float
        The length of a round, in s.
    history : tuple of float
        The length (s) before and after each change that the descent made.
    """

    place: Place
    allocation: Allocation | None
    rates: Rates
    seconds: float
    history: tuple[float, ...]


def optimise(problem: Problem, freedom: Freedom | None = None, seed: int = 0) -> Solution:
    """Make a round as short as possible.

    Subchannels, powers and the cut are improved in turn, each with the others held, until none
    helps; a change is made only if the round gets shorter. Because such a descent ends where no
    single change helps, it is done at each of the cuts that begin best (all of them for small
    fleets), and goes on from the best end with the cut free to change.

    Parameters
    ----------
    problem : Problem
        The fleet, the model and the method.
    freedom : Freedom, optional
        What may be chosen. Default: all.
    seed : int
        Of what is drawn by chance.

    Returns
    -------
    Solution
        The choice, and the length of the round in s.

    Raises
    ------
    CutError
        If no cut fits into the devices' memory.
    """
    freedom = freedom or Freedom()
    places = problem.places
    if freedom.cut is not None:
        places = tuple(place for place in places if place.cut == freedom.cut)
        if not places:
            problem.profile.place(freedom.cut)
            raise CutError(f"the cut {freedom.cut!r} exceeds a device's memory")
    if not problem.is_allocated:
        return _best_cut(problem, places)
    return _Descent(problem, freedom, places, seed).best()


def _best_cut(problem: Problem, places: Sequence[Place]) -> Solution:
    """Try all cuts, where there is nothing else to choose."""
    rates = lone_rates(problem.fleet) if problem.method.in_turn else link_rates(problem.fleet)
    seconds = [round_seconds(problem.phases(place), problem.fleet, rates) for place in places]
    best = int(np.argmin(seconds))
    return Solution(places[best], None, rates, seconds[best], (seconds[best],))


@dataclass(frozen=True)
class _State:
    place: int
    allocation: Allocation
    seconds: float


_Block = Callable[[_State], _State]


class _Descent:
    """Block-coordinate descent over a fleet's subchannels, powers and cuts."""

    def __init__(
        self, problem: Problem, freedom: Freedom, places: tuple[Place, ...], seed: int
    ) -> None:
        self.problem = problem
        self.freedom = freedom
        self.places = places
        self.terms = [RoundTerms.of(problem.phases(place), problem.fleet) for place in places]
        self.even = Cell.of(problem.fleet, EVEN)
        self.filled = Cell.of(problem.fleet, WATER)
        self.drawn = at_random(*self.even.shape, np.random.default_rng(seed))

    def best(self) -> Solution:
        """Return the solution where the round is shortest."""
        state, history = self.end()
        rates = radio_rates(self.problem.fleet, state.allocation)
        place = self.places[state.place]
        return Solution(place, state.allocation, rates, state.seconds, tuple(history))

    def end(self) -> tuple[_State, list[float]]:
        """Descend at each of the cuts that begin best, then from the best end with the cut free.

        At a cut the descent also begins where even powers lead, so as never to do worse.
        """
        starts = sorted(self._starts(), key=lambda start: start.seconds)
        ends = []
        for start in starts[: self._num_cuts()]:
            ends.append(self._descend(start, (self._subchannels, self._power)))
            if self.freedom.subchannels and self.freedom.power:
                even = self._with_even_power(start.place)
                ends.append(self._descend(even, (self._power, self._subchannels)))
        state, history = min(ends, key=lambda end: end[0].seconds)
        state, more = self._descend(state, (self._cut, self._subchannels, self._power))
        return state, [*history, *more[1:]]

    def _num_cuts(self) -> int:
        return max(_LEAST_CUTS, _DESCENTS // self.problem.fleet.num_devices**2)

    def _with_even_power(self, place: int) -> _State:
        """Return where a descent at a cut ends if powers are spread evenly."""
        freedom = replace(self.freedom, power=False)
        end, _ = _Descent(self.problem, freedom, (self.places[place],), 0).end()
        return replace(end, place=place)

    def _starts(self) -> list[_State]:
        """Begin at every cut, with subchannels that are dealt out greedily or by chance."""
        return [
            self._powered(
                place,
                greedy(self.even, self.terms[place]) if self.freedom.subchannels else self.drawn,
            )
            for place in range(len(self.places))
        ]

    def _state(self, place: int, allocation: Allocation) -> _State:
        rates = radio_rates(self.problem.fleet, allocation)
        return _State(place, allocation, self.terms[place].seconds(rates))

    def _descend(self, state: _State, blocks: Sequence[_Block]) -> tuple[_State, list[float]]:
        """Improve one block after the other until no more is gained; return the way there."""
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
        terms = self.terms[state.place]
        cell = self.even
        if self.freedom.power:
            spent_w = state.allocation.device_power_w(self.problem.fleet.num_devices)
            cell = replace(self.filled, budget_w=spent_w)
        return self._powered(state.place, improved(cell, terms, state.allocation.owner))

    def _power(self, state: _State) -> _State:
        return self._powered(state.place, state.allocation.owner)

    def _powered(self, place: int, owner: Owner) -> _State:
        """Return the state with the best powers for its subchannels, if they may be chosen."""
        if not self.freedom.power:
            return self._state(place, self.even.allocation(owner))
        fleet = self.problem.fleet
        assert fleet.radio is not None
        powers = control_power(
            fleet.snr_per_watt,
            self.even.owned(owner),
            fleet.power_w,
            fleet.radio.total_power_w,
            fleet.radio.subchannel_hz,
            self.terms[place].deadlines(self.filled.rates(owner)),
        )
        return self._state(place, Allocation(owner, powers.sum(axis=0)))

    def _cut(self, state: _State) -> _State:
        rates = radio_rates(self.problem.fleet, state.allocation)
        seconds = [terms.seconds(rates) for terms in self.terms]
        best = int(np.argmin(seconds))
        return _State(best, state.allocation, seconds[best])
