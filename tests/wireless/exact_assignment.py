"""The best assignment of few subchannels: a yardstick for what plans find."""

import itertools

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

EXACT_SUBCHANNELS = 10
"""`exact` looks at every subset of the subchannels, so at no more than these."""


def exact(cell, terms):
    """Return the best owners of few subchannels, by a mixed-integer linear program.

    For every device i and subset S of the subchannels there is a variable y_iS of 0 or 1, and its
    time in phase g, t_giS (s), is a constant, so that water-filled rates need no approximation:
    minimise sum_g weight_g T_g, with T_g >= sum_S t_giS y_iS, each device one subset, each
    subchannel at most one device.

    Raises
    ------
    ValueError
        With more than `EXACT_SUBCHANNELS` subchannels.
    """
    num_devices, num_subchannels = cell.shape
    if num_subchannels > EXACT_SUBCHANNELS:
        raise ValueError(
            f"{num_subchannels} subchannels are too many for an exact assignment, which stops at "
            f"{EXACT_SUBCHANNELS}"
        )
    subsets = np.array(list(itertools.product((False, True), repeat=num_subchannels))[1:])
    times = _subset_times(cell, terms, subsets)  # (phases, devices, subsets)
    chosen = _solve(terms.weight, times, subsets)
    owner = np.full(num_subchannels, -1)
    for device, subset in enumerate(chosen):
        owner[subsets[subset]] = device
    owner[owner < 0] = 0  # what nobody needs may go to anybody
    assert len(np.unique(owner)) == num_devices
    return owner


def _subset_times(cell, terms, subsets):
    times = []
    for device in range(cell.shape[0]):
        same = np.full(len(subsets), device)
        every = np.broadcast_to(np.arange(subsets.shape[1]), subsets.shape)
        up, down = cell.up_bps(same, every, subsets), cell.down_bps(same, every, subsets)
        times.append(
            terms.fixed_s[:, device : device + 1]
            + terms.up_bits[:, None] / up
            + terms.down_bits[:, None] / down
            + terms.wide_bits[:, None] / cell.broadcast_bps
        )
    return np.stack(times, axis=1)


def _solve(weight, times, subsets):
    """Return each device's subset. Variables: y by device and subset, then T by phase."""
    phases, devices, count = times.shape
    scale = float(times.max(axis=0).min())  # times near 1 suit the solver's tolerances
    num_y = devices * count
    one_each = np.kron(np.eye(devices), np.ones(count))
    no_sharing = np.tile(subsets.T.astype(float), devices)
    late = np.zeros((phases * devices, num_y + phases))
    for g, device in itertools.product(range(phases), range(devices)):
        row = late[g * devices + device]
        row[device * count : (device + 1) * count] = times[g, device] / scale
        row[num_y + g] = -1.0
    blank = np.zeros((devices, phases)), np.zeros((subsets.shape[1], phases))
    result = milp(
        np.concatenate([np.zeros(num_y), weight]),
        integrality=np.concatenate([np.ones(num_y), np.zeros(phases)]),
        bounds=Bounds(0.0, np.concatenate([np.ones(num_y), np.full(phases, np.inf)])),
        constraints=[
            LinearConstraint(csr_array(np.hstack([one_each, blank[0]])), 1.0, 1.0),
            LinearConstraint(csr_array(np.hstack([no_sharing, blank[1]])), 0.0, 1.0),
            LinearConstraint(csr_array(late), -np.inf, 0.0),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    assert result.success, result.message
    return [int(row.argmax()) for row in result.x[:num_y].reshape(devices, count)]
