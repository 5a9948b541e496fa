"""A round's plan from the strategy's options and Flower's train and evaluate configs."""

from flwr.app import ConfigRecord, ConfigRecordValues

from flsplit.errors import ConfigError, ProtocolError
from flsplit.log import warn_once
from flsplit.message.round_plan import RoundPlan
from flsplit.run.options import SplitOptions, at_round, refuse_unknown

_TRAIN_KEYS = ("lr", "batch-size", "local-epochs", "local-steps", "drop-last")


def make_plan(
    options: SplitOptions,
    server_round: int,
    num_rounds: int,
    config: ConfigRecord | None,
    segment_version: int,
    experiment: str,
    client_parts: str,
    inputs: str,
) -> RoundPlan:
    """Return a round's plan; ``config`` goes before ``options``.

    ConfigError if ``config`` has an unknown key or a value that can't be used.
    """
    given = dict(config or {})
    given.pop("server-round", None)  # Flower sets it
    refuse_unknown("train_config", given, _TRAIN_KEYS)
    client_lr = options.server_lr if options.client_lr is None else options.client_lr
    fields: dict[str, ConfigRecordValues] = {
        "lr": at_round(client_lr, server_round),
        "batch-size": options.batch_size,
        "local-epochs": options.local_epochs,
        "local-steps": options.local_steps,
        "drop-last": options.drop_last,
    }
    fixed: dict[str, ConfigRecordValues] = {
        "server-round": server_round,
        "num-rounds": num_rounds,
        "cut": options.default_cut,
        "segment-version": segment_version,
        "experiment": experiment,
        "seed": options.seed,
        "batch-sizes": [],
        "client-parts": client_parts,
        "clipping-norm": 0.0,
        "norm-bit": False,
        "inputs": inputs,
    }
    try:
        plan = RoundPlan.from_config(ConfigRecord({**fields, **given, **fixed}))
    except ProtocolError as error:
        raise ConfigError(f"train_config: {error}") from error
    if not (plan.local_epochs or plan.local_steps):
        raise ConfigError(
            "train_config: local-epochs and local-steps are both 0: nothing would be trained"
        )
    if "local-epochs" in given and plan.local_steps:
        warn_once(
            experiment,
            f"train_config: local-epochs={plan.local_epochs} is not used: a round has "
            f"local-steps={plan.local_steps}",
        )
    return plan


def evaluate_amounts(options: SplitOptions, config: ConfigRecord | None) -> tuple[int, int]:
    """Return how many test examples go into one exchange, and how many exchanges; 0 for all."""
    given = dict(config or {})
    refuse_unknown("evaluate_config", given, ("batch-size", "batches"))
    amounts = []
    for key, option, least in (
        ("batch-size", options.evaluate_batch_size, 1),
        ("batches", options.evaluate_batches or 0, 0),
    ):
        if type(amount := given.get(key, option)) is not int or amount < least:
            raise ConfigError(
                f"evaluate_config: {key} is {amount!r}, expected a whole number of at least {least}"
            )
        amounts.append(amount)
    return amounts[0], amounts[1]
