"""Prints cut points."""

from collections.abc import Sequence

from flsplit.cut.points import CutPoint, SmashedValue

_HEADER = (
    "cut",
    "client params",
    "server params",
    "client MFLOP",
    "server MFLOP",
    "smashed data",
    "elements",
    "KiB",
)


def format_cuts(points: Sequence[CutPoint]) -> str:
    """Return cut points as a table in plain text, one line each under a header.

    MFLOP (10**6) and KiB (1024 bytes) are of one sample's forward pass and of all that crosses;
    elements are of what gets a gradient.
    """
    rows = [_HEADER, *(_row(point) for point in points)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(_line(row, widths) for row in rows)


def _row(point: CutPoint) -> tuple[str, ...]:
    return (
        point.cut,
        f"{point.client_params:,}",
        f"{point.server_params:,}",
        f"{point.client_flops / 1e6:,.3f}",
        f"{point.server_flops / 1e6:,.3f}",
        " + ".join(map(_short, point.smashed)),
        f"{point.smashed_elements:,}",
        f"{point.smashed_bytes / 1024:,.1f}",
    )


def _short(value: SmashedValue) -> str:
    return f"{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}".strip()


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest])
