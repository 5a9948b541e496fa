"""What an end of a link keeps of single examples, so many bytes at most."""

import torch
from torch import Tensor

Memory = dict[str, Tensor]
"""What one end of a link remembers of a tensor from step to step."""

MOST_BYTES = 2**30
"""Of one client's value that crosses, unless a part says otherwise."""


def kept(memory: Memory, rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return what is kept of some examples, and how often it came; 0 of those not kept."""
    base = torch.zeros(len(rows), *shape)
    times = torch.zeros(len(rows), dtype=torch.int32)
    if "rows" in memory and memory["base"].shape[1:] == shape:
        same = rows[:, None] == memory["rows"][None, :]
        new, old = same.nonzero(as_tuple=True)
        base[new], times[new] = memory["base"][old], memory["times"][old]
    return base, times


def keep(memory: Memory, rows: Tensor, base: Tensor, times: Tensor, most_bytes: int) -> None:
    """Keep something of examples; what came longest ago goes where there is no room.

    Of an example that is twice among them the last counts. All that is done follows from what was
    kept before: two ends that keep the same go on to do so.
    """
    last = torch.tensor(list({row: i for i, row in enumerate(rows.tolist())}.values()))
    last = last.to(torch.int64)  # of no row, too
    rows, base, times = rows[last], base[last], times[last]
    if "rows" in memory and memory["base"].shape[1:] == base.shape[1:]:
        rest = ~torch.isin(memory["rows"], rows)
        rows = torch.cat([memory["rows"][rest], rows])
        base = torch.cat([memory["base"][rest], base])
        times = torch.cat([memory["times"][rest], times])
    of_one = 4 * base[:1].numel() + 12  # float32, int64, int32
    oldest = max(0, len(rows) - max(1, most_bytes // of_one))
    memory.update(rows=rows[oldest:], base=base[oldest:], times=times[oldest:])
