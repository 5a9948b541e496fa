"""What accuracies are drawn against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jobs import Run
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from measured import SIMULATED


@dataclass(frozen=True)
class Against:
    """A horizontal axis.

    Attributes
    ----------
    label : str
        What it shows.
    values : callable
        Returns a run's values, one for each round.
    logarithmic : bool
        Its scale.
    """

    label: str
    values: Callable[[Run], Sequence[float]]
    logarithmic: bool

    def mean(self, runs: list[Run]) -> Sequence[float]:
        """Return the mean of some runs' values, for each round."""
        return [float(one) for one in np.mean([self.values(run) for run in runs], axis=0)]

    def label_axes(self, axes: Axes) -> None:
        """Say what the axes are."""
        axes.set(xlabel=self.label, ylabel="test accuracy, %")
        if self.logarithmic:
            axes.set(xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)


ROUNDS = Against("round", lambda run: range(1, len(run["accuracy"]) + 1), False)
BYTES = Against("MB sent for training (logical)", lambda run: [n / 1e6 for n in run["bytes"]], True)
SECONDS = Against("simulated seconds on the fleet", lambda run: run[SIMULATED], True)
