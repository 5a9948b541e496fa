"""The command line: ``flsplit profile``, ``plan``, ``bench …``, ``attack`` and ``clean``."""

import gc
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flsplit.bench.commands import bench
from flsplit.command_errors import errors_in_a_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Split learning for Flower: where to cut a model, and what a round costs.",
)
app.add_typer(bench, name="bench")


Model = Annotated[
    str, typer.Argument(help="A torchvision model (resnet18) or module:function of your own.")
]
Classes = Annotated[
    int | None, typer.Option(min=1, help="Number of classes, passed on as num_classes.")
]
Sample = Annotated[
    str,
    typer.Option(
        "--input",
        help="Shape of one sample, and dtype if not the model's: 7:int64. Several inputs: "
        "ids=7:int64,mask=7:int64.",
    ),
]
Share = Annotated[
    list[str] | None, typer.Option(help="An input that the server may see; once for each.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Picture = Annotated[Path | None, typer.Option(help="Also draw a picture there (.png, .svg, .pdf).")]


@app.command()
def profile(
    model: Model,
    classes: Classes = None,
    shape: Sample = "3x224x224",
    every: Annotated[
        bool, typer.Option("--all", help="Show each place, also those that differ in nothing.")
    ] = False,
    share: Share = None,
    several: Annotated[
        bool, typer.Option(help="Show places, too, where several tensors cross.")
    ] = False,
    measured: Annotated[
        bool, typer.Option("--measure", help="Also measure the model on this machine.")
    ] = False,
    as_json: AsJson = False,
    picture: Picture = None,
) -> None:
    """Show what every cut of MODEL means for a client: parameters, FLOPs, smashed data, memory."""
    gc.disable()  # see plan
    from flsplit.wireless.measure import effective_flops, measure
    from flsplit.wireless.models import example_input, load_model
    from flsplit.wireless.profile import profile_model
    from flsplit.wireless.profile_table import format_profile, profile_to_json

    with errors_in_a_line():
        network = load_model(model, classes)
        example = example_input(shape)
        found = profile_model(network, example, model, share=share or (), several=several)
        rows = found.rows(every)
        times = measure(network, found) if measured else None
        if as_json:
            print(json.dumps(profile_to_json(rows, times), indent=2))
        else:
            print(format_profile(rows, times))
        if times is not None and not as_json:
            speed = effective_flops(found, times)
            print(f'\nfor a fleet file: compute = "{speed / 1e9:.2f} GFLOP/s"')
        if picture is not None:
            from flsplit.wireless.pictures import draw_profile

            _drawn(draw_profile(found, picture), as_json)


@app.command()
def plan(
    fleet: Annotated[Path, typer.Argument(help="A TOML file that describes the fleet.")],
    model: Annotated[
        str, typer.Option(help="A torchvision model (resnet18) or module:function of your own.")
    ],
    strategy: Annotated[
        str, typer.Option(help="An installed strategy's name, or fedavg: devices train all of it.")
    ],
    strategy_args: Annotated[
        str, typer.Option(help="The strategy's arguments, as in a run's config: '{phi = 0.5}'.")
    ] = "{}",
    classes: Classes = None,
    shape: Sample = "3x224x224",
    share: Share = None,
    second_cut: Annotated[
        str, typer.Option(help="Keep labels and the layers after this one at the devices.")
    ] = "",
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per device and mini-batch.", show_default="64")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Mini-batches per device and round.", show_default="1")
    ] = None,
    optimizer_slots: Annotated[
        int,
        typer.Option(help="Numbers an optimizer keeps per parameter: SGD 0, momentum 1, Adam 2."),
    ] = 0,
    as_json: AsJson = False,
    picture: Picture = None,
) -> None:
    """Choose cut, subchannels and powers for FLEET, so that a round is as short as possible."""
    gc.disable()  # imports make a great many objects and no garbage: looking for it takes a while
    from flsplit.errors import ConfigError
    from flsplit.run.registry import arguments_table, plan_method
    from flsplit.wireless.fleet_file import load_fleet
    from flsplit.wireless.fleet_plan import format_plan, make_plan, plan_to_json
    from flsplit.wireless.models import example_input, load_model
    from flsplit.wireless.phases import Training
    from flsplit.wireless.problem import Problem
    from flsplit.wireless.profile import profile_model
    from flsplit.wireless.unsplit import FEDAVG

    with errors_in_a_line():
        if second_cut and strategy == FEDAVG.name:
            raise ConfigError(f"--second-cut is {second_cut!r}, but {strategy} cuts nothing")
        if "cut" in arguments_table(strategy_args):
            raise ConfigError("strategy-args have a cut, but a plan chooses it: leave it out")
        sizes = {"batch_size": batch_size, "steps": steps}
        given = {name: size for name, size in sizes.items() if size is not None}
        training = Training(**given, optimizer_slots=optimizer_slots)
        devices = load_fleet(fleet)
        network = load_model(model, classes)
        found = profile_model(network, example_input(shape), model, share=share or ())
        if second_cut:
            found = found.cut_twice(second_cut)
        method, training = plan_method(strategy, strategy_args, network, found, training)
        for name, size in given.items():
            if size != (meant := getattr(training, name)):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {size}, but strategy-args say {meant}: leave "
                    "one of them out"
                )
        made = make_plan(Problem(devices, found, method, training))
        print(json.dumps(plan_to_json(made), indent=2) if as_json else format_plan(made))
        if picture is not None:
            from flsplit.wireless.pictures import draw_round

            _drawn(draw_round(made, picture), as_json)


@app.command()
def attack(
    run: Annotated[
        Path, typer.Argument(help="The folder of a recording (flsplit.privacy.Record).")
    ],
    undefended: Annotated[
        Path | None, typer.Option(help="The same run without its defences, also recorded.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="The model, as for plan; without it, labels alone are attacked.")
    ] = "",
    data: Annotated[
        str, typer.Option(help="module:function that returns the attacker's own inputs.")
    ] = "",
    private: Annotated[
        str, typer.Option(help="module:function that takes a client's name: its training inputs.")
    ] = "",
    classes: Classes = None,
    epochs: Annotated[int, typer.Option(min=0, help="Over which a decoder is trained.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Attack what the server saw in RUN: labels from gradients, inputs from smashed data."""
    from flsplit.privacy.replay import attack_run, format_findings
    from flsplit.privacy.same_run import check_undefended

    with errors_in_a_line():
        if undefended is not None:
            check_undefended(run, undefended)
        found = {
            folder: attack_run(
                folder, model=model, classes=classes, data=data, private=private, epochs=epochs
            )
            for folder in (run, undefended)
            if folder is not None
        }
        beside = found[undefended] if undefended is not None else None
        if as_json:
            print(json.dumps({"run": found[run], "undefended": beside}, indent=2))
        else:
            print(format_findings(found[run], beside))
            if beside is None:
                print("no defence counts without the same run undefended beside it: --undefended")


@app.command()
def clean(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoint and state folders, or folders of them.")
    ] = None,
    days: Annotated[
        float, typer.Option(min=0.0, help="How long nothing must have been written there.")
    ] = 30.0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove it; otherwise it is only shown.")
    ] = False,
) -> None:
    """Show, or remove, what ended runs have left in FOLDERS and among temporary files."""
    import tempfile

    from flsplit.storage.cleaning import find_leftovers, remove

    with errors_in_a_line():
        found = find_leftovers(folders or [], days, temporary_in=[Path(tempfile.gettempdir())])
        for one in found:
            if one.keep:
                print(f"stays: {one.folder} ({one.keep})")
                continue
            size = f"{one.nbytes / 1e6:.1f} MB, {one.age_days:.1f} days old"
            if yes:
                remove(one)
            print(f"{'removed' if yes else 'may go'}: {one.folder} ({size})")
        if not yes and any(not one.keep for one in found):
            print("nothing was removed; --yes removes what may go")


def _drawn(path: Path, quietly: bool) -> None:
    print(f"drawn: {path}", file=sys.stderr if quietly else sys.stdout)


if __name__ == "__main__":
    app()
