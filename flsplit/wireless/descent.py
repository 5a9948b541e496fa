"""Block-coordinate descent over a fleet's subchannels, powers and cuts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flsplit.wireless.latency import RoundTerms
from flsplit.wireless.power import EVEN, WATER, control_power
from flsplit.wireless.problem import Problem
from flsplit.wireless.rates import Allocation, radio_rates
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
class State:
    """Where a descent is: the cut's index, subchannels and powers, and the round (s)."""

    place: int
    allocation: Allocation
    seconds: float


End = tuple[State, list[float]]
"""Where a descent ends, and the lengths of the round (s) on the way there."""

_Block = Callable[[State], State]


class Descents:
    """Descents for one problem, with more or less freedom. What serves several is computed once.

    Parameters
    ----------
    problem : Problem
        The fleet, the model and the method.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.terms = [
            RoundTerms.of(problem.phases(place), problem.fleet) for place in problem.places
        ]
        self.even = Cell.of(problem.fleet, EVEN)
        self.filled = Cell.of(problem.fleet, WATER)
        self._dealt: dict[int, Owner] = {}
        self._ends: dict[tuple[Freedom, int], End] = {}

    def end(self, freedom: Freedom, seed: int) -> End:
        """Return where the descent with this freedom ends; the seed is of drawn subchannels."""
        key = freedom, 0 if freedom.subchannels else seed
        if key not in self._ends:
            self._ends[key] = _Descent(self, freedom, seed).end()
        return self._ends[key]

    def dealt(self, place: int) -> Owner:
        """Return subchannels that are dealt out greedily, for the cut of this index."""
        if place not in self._dealt:
            self._dealt[place] = greedy(self.even, self.terms[place])
        return self._dealt[place]


class _Descent:
    """A descent with one freedom."""

    def __init__(self, shared: Descents, freedom: Freedom, seed: int) -> None:
        self.shared = shared
        self.fleet = shared.problem.fleet
        self.terms = shared.terms
        self.freedom = freedom
        self.seed = seed
        self.places = [
            index
            for index, place in enumerate(shared.problem.places)
            if freedom.cut in (None, place.cut)
        ]

    def end(self) -> End:
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
        return max(_LEAST_CUTS, _DESCENTS // self.fleet.num_devices**2)

    def _with_even_power(self, place: int) -> State:
        """Return where a descent at a cut ends if powers are spread evenly."""
        cut = self.shared.problem.places[place].cut
        return self.shared.end(replace(self.freedom, power=False, cut=cut), self.seed)[0]

    def _starts(self) -> list[State]:
        """Begin at every cut, with subchannels that are dealt out greedily or by chance."""
        if self.freedom.subchannels:
            return [self._powered(place, self.shared.dealt(place)) for place in self.places]
        drawn = at_random(*self.shared.even.shape, np.random.default_rng(self.seed))
        return [self._powered(place, drawn) for place in self.places]

    def _state(self, place: int, allocation: Allocation) -> State:
        rates = radio_rates(self.fleet, allocation)
        return State(place, allocation, self.terms[place].seconds(rates))

    def _descend(self, state: State, blocks: Sequence[_Block]) -> End:
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

    def _subchannels(self, state: State) -> State:
        if not self.freedom.subchannels:
            return state
        terms = self.terms[state.place]
        cell = self.shared.even
        if self.freedom.power:
            spent_w = state.allocation.device_power_w(self.fleet.num_devices)
            cell = replace(self.shared.filled, budget_w=spent_w)
        return self._powered(state.place, improved(cell, terms, state.allocation.owner))

    def _power(self, state: State) -> State:
        return self._powered(state.place, state.allocation.owner)

    def _powered(self, place: int, owner: Owner) -> State:
        """Return the state with the best powers for its subchannels, if they may be chosen."""
        if not self.freedom.power:
            return self._state(place, self.shared.even.allocation(owner))
        fleet = self.fleet
        assert fleet.radio is not None
        powers = control_power(
            fleet.snr_per_watt,
            self.shared.even.owned(owner),
            fleet.power_w,
            fleet.radio.total_power_w,
            fleet.radio.subchannel_hz,
            self.terms[place].deadlines(self.shared.filled.rates(owner)),
        )
        return self._state(place, Allocation(owner, powers.sum(axis=0)))

    def _cut(self, state: State) -> State:
        rates = radio_rates(self.fleet, state.allocation)
        seconds, best = min((self.terms[place].seconds(rates), place) for place in self.places)
        return State(best, state.allocation, seconds)
