"""Pictures of profiles and rounds; the path's suffix chooses the format."""

from dataclasses import replace
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flsplit.errors import ConfigError
from flsplit.nested import tensors_of
from flsplit.wireless.fleet_plan import FleetPlan
from flsplit.wireless.latency import SERVER, spans
from flsplit.wireless.profile import ModelProfile

_MOST_DEVICES = 20


def draw_profile(profile: ModelProfile, path: str | Path) -> Path:
    """Draw what a client holds, computes, keeps and sends, by cut, and return the path."""
    rows = profile.summary()
    panels = (
        ("client's parameters (millions)", [row.client_params / 1e6 for row in rows]),
        ("client's forward pass (MFLOP)", [row.client_flops_forward / 1e6 for row in rows]),
        ("kept for backward (KiB)", [row.saved_bytes / 1024 for row in rows]),
        ("smashed data (KiB)", [row.activation_bytes / 1024 for row in rows]),
    )
    figure = Figure(figsize=(11, 1.5 + 0.24 * len(rows)), layout="constrained")
    names = [row.cut for row in rows]
    grid = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, values) in zip(grid, panels, strict=True):
        axes.barh(names, values, color="#1f77b4")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    shape = ", ".join("x".join(map(str, one.shape)) for one in tensors_of(profile.sample))
    figure.suptitle(f"{profile.model}, input {shape}, per sample, by cut", fontsize=11)
    return save_picture(figure, path)


def draw_round(plan: FleetPlan, path: str | Path) -> Path:
    """Draw who does what when in one step of a planned round, and in what follows the steps.

    Of several steps the title says that it is one. Of more than 20 devices the first 20 are drawn.
    Returns the path.
    """
    problem, solution = plan.problem, plan.solution
    height = 1.8 + 0.3 * min(_MOST_DEVICES, problem.fleet.num_devices)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    one_step = replace(problem, training=replace(problem.training, steps=1))
    found = spans(one_step.phases(solution.place), problem.fleet, solution.rates)
    names = [device.name for device in problem.fleet.devices[:_MOST_DEVICES]]
    rows = {name: index for index, name in enumerate([SERVER, *names])}
    stages = dict.fromkeys(span.stage for span in found)
    colours = {stage: colormaps["tab20"](index % 20) for index, stage in enumerate(stages)}
    for span in found:
        if span.actor in rows:
            width = span.end_s - span.start_s
            row, colour = rows[span.actor], colours[span.stage]
            axes.barh(row, width, left=span.start_s, color=colour, height=0.7)
    axes.set_yticks(list(rows.values()), [SERVER, *(f"device {name}" for name in names)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    cut = "whole model" if problem.method.whole_model else f"cut after {solution.place.cut}"
    steps = problem.training.steps
    drawn = f", one step of {steps}" if steps > 1 else ""
    axes.set_title(f"{problem.method.name} {plan.strategy_args}, {cut}{drawn}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(
        handles=[Patch(color=colours[stage], label=stage) for stage in stages],
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return save_picture(figure, path)


def save_picture(figure: Figure, path: str | Path) -> Path:
    """Write a picture whose format the path's suffix says, and return the path."""
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise ConfigError(f"the picture {path} can't be written: {error}") from error
    return Path(path)
