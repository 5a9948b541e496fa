"""Client parts of a run with two cuts: which of them stand at the second, and what goes without."""

from collections.abc import Sequence

from flsplit.client_parts.client_part import ClientPart
from flsplit.client_parts.compression import Compression
from flsplit.client_parts.defences import LabelNoise
from flsplit.client_parts.stock import CUT_GRADIENT, OUTPUT_GRADIENT, OUTPUTS, SMASHED, Clip, Noise
from flsplit.errors import ConfigError
from flsplit.log import logger


def check_places(parts: Sequence[ClientPart], *, two_cuts: bool) -> None:
    """Refuse parts at a second cut of a model that is cut once.

    Raises
    ------
    ConfigError
        If there is one.
    """
    for part in parts:
        place = getattr(part, "place", None)
        if place in (OUTPUTS, OUTPUT_GRADIENT) and not two_cuts:
            raise ConfigError(
                f"client part {part.name!r}: place is {place!r}, which there is at a second cut, "
                "but the model is cut once"
            )


def warn_of_second_cut(parts: Sequence[ClientPart]) -> None:
    """Say what parts of a run with two cuts don't do at the second, or don't do at all."""
    for part in parts:
        place = getattr(part, "place", None)
        if isinstance(part, LabelNoise) and place == CUT_GRADIENT:
            logger.warning(
                "client part %r adds noise to the gradients that go down, but the clients have "
                "the labels: place='output-gradient' hides these from the server", part.name,
            )  # fmt: skip
        other = {SMASHED: OUTPUT_GRADIENT, CUT_GRADIENT: OUTPUTS}.get(str(place))
        crosses = isinstance(part, Compression) or (
            isinstance(part, Clip | Noise) and place == SMASHED
        )
        if other and crosses and not _stands_at(parts, other):
            logger.warning(
                "client part %r stands at the first cut alone (place=%r): what crosses the second "
                "the same way goes without, unless a part has place=%r", part.name, place, other,
            )  # fmt: skip


def _stands_at(parts: Sequence[ClientPart], place: str) -> bool:
    return any(getattr(part, "place", None) == place for part in parts)
