"""Gradient rules: small edits of a step's gradients, chained between pass and optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from flsplit.errors import ConfigError
from flsplit.server.passes import GRADIENT_PRODUCTS, ServerPass
from flsplit.server.step import Reduction, StepContext, StepResult


class GradientRule(ABC):
    """Edits server gradients, cut-layer gradients or the set of clients that step.

    Attributes
    ----------
    needs : frozenset of str
        What the server pass must provide.
    refuses : dict of str to str
        What the server pass must not provide, and why.
    across_clients : bool
        Whether the rule needs several clients in a step.
    sets_reduction : bool
        Whether the rule itself says how the clients' losses add up, instead of ``reduction``.
    only_once : bool
        Whether a second rule of the same kind is a mistake.
    """

    needs: frozenset[str] = frozenset()
    refuses: dict[str, str] = {}  # noqa: RUF012 - never changed in place
    across_clients: bool = False
    sets_reduction: bool = False
    only_once: bool = False

    @abstractmethod
    def __call__(self, context: StepContext, result: StepResult) -> StepResult:
        """Return the edited result; it may be the same object, changed."""

    def begin_run(self) -> None:  # noqa: B027 - most have no state
        """Forget what an earlier run left behind."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers from step to step, for checkpoints.

        Numbers, strings, None, and lists and dicts of them: a checkpoint writes it as JSON.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no state
        """Go on from a :meth:`state_dict`."""


def check_rules(
    server_pass: ServerPass, rules: Sequence[GradientRule], reduction: Reduction = "mean"
) -> None:
    """Raise ConfigError, with the reason, if pass, rules and reduction don't go together."""
    what = type(server_pass).__name__
    for index, rule in enumerate(rules):
        name = type(rule).__name__
        if lacking := rule.needs - server_pass.provides:
            raise ConfigError(
                f"rule {name} needs {', '.join(sorted(lacking))}, which server pass {what} doesn't "
                "provide"
            )
        for one, reason in rule.refuses.items():
            if one in server_pass.provides:
                raise ConfigError(
                    f"rule {name} doesn't go with server pass {what} ({one}): {reason}"
                )
        if rule.only_once and any(type(other) is type(rule) for other in rules[:index]):
            raise ConfigError(f"rule {name} is there twice")
        if rule.sets_reduction and reduction != "mean":
            raise ConfigError(
                f"reduction is {reduction!r}, but rule {name} says itself how the clients' losses "
                "add up (loss_reduction): give that one only"
            )
    if server_pass.leaves_server_gradients and not any(
        GRADIENT_PRODUCTS in rule.needs for rule in rules
    ):
        raise ConfigError(
            f"server pass {what} leaves the server's gradient to a rule that combines the clients' "
            "(LeaderAlignment), and there is none"
        )
