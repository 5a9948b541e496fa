"""Chooses subchannels, powers and the cut together, by block-coordinate descent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flsplit.cut import CutError
from flsplit.wireless.descent import Descents, Freedom
from flsplit.wireless.latency import round_seconds
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import Place
from flsplit.wireless.rates import Allocation, Rates, link_rates, lone_rates, radio_rates


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


class Optimiser:
    """Makes the round of one problem short, with more or less freedom.

    Subchannels, powers and the cut are improved in turn, each with the others held, until none
    helps; a change is made only if the round gets shorter. Because such a descent ends where no
    single change helps, it is done at each of the cuts that begin best (all of them for small
    fleets), and goes on from the best end with the cut free to change.

    Parameters
    ----------
    problem : Problem
        The fleet, the model and the method.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def solve(self, freedom: Freedom | None = None, seed: int = 0) -> Solution:
        """Make the round as short as possible; see `optimise`."""
        freedom = freedom or Freedom()
        places = self._places(freedom.cut)
        if not self.problem.is_allocated:
            return _best_cut(self.problem, places)
        state, history = self._descents.end(freedom, seed)
        rates = radio_rates(self.problem.fleet, state.allocation)
        place = self.problem.places[state.place]
        return Solution(place, state.allocation, rates, state.seconds, tuple(history))

    @cached_property
    def _descents(self) -> Descents:
        return Descents(self.problem)

    def _places(self, cut: str | None) -> Sequence[Place]:
        """Return where a freedom allows to cut."""
        places = [place for place in self.problem.places if cut in (None, place.cut)]
        if not places:
            self.problem.profile.place(str(cut))  # says so if there is no such cut
            raise CutError(f"the cut {cut!r} exceeds a device's memory")
        return places


def optimise(problem: Problem, freedom: Freedom | None = None, seed: int = 0) -> Solution:
    """Make a round as short as possible; an :class:`Optimiser` does so several times, quicker.

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
    return Optimiser(problem).solve(freedom, seed)


def _best_cut(problem: Problem, places: Sequence[Place]) -> Solution:
    """Try all cuts, where there is nothing else to choose."""
    rates = lone_rates(problem.fleet) if problem.in_turn else link_rates(problem.fleet)
    seconds = [round_seconds(problem.phases(place), problem.fleet, rates) for place in places]
    best = int(np.argmin(seconds))
    return Solution(places[best], None, rates, seconds[best], (seconds[best],))
