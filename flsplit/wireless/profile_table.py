"""A profile as a table and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from flsplit.wireless.measure import Measured
from flsplit.wireless.profile import Place

_HEADER = ("cut", "params", "forward", "backward", "activation", "elements", "kbit", "kept")
_UNITS = ("", "", "MFLOP", "MFLOP", "shape", "", "", "KiB")
_MEASURED = (("forward", "backward"), ("ms", "ms"))


def format_profile(places: Sequence[Place], measured: Mapping[str, Measured] | None = None) -> str:
    """Return places as a table in plain text.

    Parameters
    ----------
    places : sequence of Place
        As `ModelProfile.rows` returns them.
    measured : mapping of str to Measured, optional
        Times to add, by cut.

    Returns
    -------
    str
        Per sample and for the client's side: parameters, 10^6 FLOPs forward and backward, the
        smashed data's shape, elements and 1000 bits, and what is kept for the backward pass (1024
        bytes).
    """
    extra = _MEASURED if measured is not None else ((), ())
    rows = [(*_HEADER, *extra[0]), (*_UNITS, *extra[1])]
    rows += [(*_row(place), *_times(place, measured)) for place in places]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(place: Place) -> tuple[str, ...]:
    return (
        place.cut,
        f"{place.client_params:,}",
        f"{place.client_flops_forward / 1e6:,.3f}",
        f"{place.client_flops_backward / 1e6:,.3f}",
        "x".join(map(str, place.activation_shape)),
        f"{place.activation_elements:,}",
        f"{8 * place.activation_bytes / 1e3:,.1f}",
        f"{place.saved_bytes / 1024:,.1f}",
    )


def _times(place: Place, measured: Mapping[str, Measured] | None) -> tuple[str, ...]:
    if measured is None:
        return ()
    took = measured[place.through]
    return f"{1e3 * took.forward_s:.3f}", f"{1e3 * took.backward_s:.3f}"


def profile_to_json(
    places: Sequence[Place], measured: Mapping[str, Measured] | None = None
) -> list[dict[str, Any]]:
    """Return places as JSON's types, per sample and for the client's side; cf. `format_profile`."""
    return [
        {
            "cut": place.cut,
            "through": place.through,
            "params": place.client_params,
            "flops_forward": place.client_flops_forward,
            "flops_backward": place.client_flops_backward,
            "activation_shape": list(place.activation_shape),
            "activation_elements": place.activation_elements,
            "activation_bytes": place.activation_bytes,
            "gradient_bytes": place.activation_bytes,
            "saved_bytes": place.saved_bytes,
            **_times_to_json(place, measured),
        }
        for place in places
    ]


def _times_to_json(place: Place, measured: Mapping[str, Measured] | None) -> dict[str, float]:
    if measured is None:
        return {}
    took = measured[place.through]
    return {"forward_s": took.forward_s, "backward_s": took.backward_s}
