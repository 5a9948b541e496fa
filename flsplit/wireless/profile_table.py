"""A profile as a table and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from flsplit.wireless.measure import Measured
from flsplit.wireless.profile import Place

_HEADER = ("cut", "params", "forward", "backward", "activation", "elements", "kbit", "kept")
_UNITS = ("", "", "MFLOP", "MFLOP", "shape", "", "", "KiB")


def format_profile(places: Sequence[Place], measured: Mapping[str, Measured] | None = None) -> str:
    """Return places, as `ModelProfile.rows` returns them, as a table, with measured times by cut.

    Per sample and for the client's side: parameters, 10^6 FLOPs forward and backward, the smashed
    data's shape, elements and 1000 bits, and what is kept for the backward pass (1024 bytes).
    """
    rows: list[tuple[str, ...]] = [_HEADER, _UNITS]
    for place in places:
        rows.append(
            (
                place.cut,
                f"{place.client_params:,}",
                f"{place.client_flops_forward / 1e6:,.3f}",
                f"{place.client_flops_backward / 1e6:,.3f}",
                "x".join(map(str, place.activation_shape)),
                f"{place.activation_elements:,}",
                f"{8 * place.activation_bytes / 1e3:,.1f}",
                f"{place.saved_bytes / 1024:,.1f}",
            )
        )
    if measured is not None:
        took = [measured[place.through] for place in places]
        times = [(f"{1e3 * t.forward_s:.3f}", f"{1e3 * t.backward_s:.3f}") for t in took]
        more = [("forward", "backward"), ("ms", "ms"), *times]
        rows = [(*row, *extra) for row, extra in zip(rows, more, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


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
            "gradient_bytes": place.gradient_bytes,
            "saved_bytes": place.saved_bytes,
            **({} if measured is None else vars(measured[place.through])),
        }
        for place in places
    ]
