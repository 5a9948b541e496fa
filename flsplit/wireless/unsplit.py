"""The planner's baseline: nothing is split."""

from typing import Any

from flsplit.wireless.phases import BITS, Method, Phase, SaysPhases, Stage, Where, Work, aggregation


class Unsplit(SaysPhases):
    r"""Federated averaging: every device trains the whole model.

    Client forward and backward are ``steps`` times :math:`b F` and :math:`b B` of the whole model
    (FLOPs), then :math:`|w|` (bits) go up from each device and are broadcast.
    """

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        """Return what a round consists of."""
        end, rows = work.profile.end, work.training.steps * work.training.batch_size
        up, down = aggregation(BITS * end.client_bytes)
        local = (
            Stage("client forward", Where.DEVICE, rows * end.client_flops_forward),
            Stage("client backward", Where.DEVICE, rows * end.client_flops_backward),
        )
        return (Phase((*local, *up.stages)), down)


FEDAVG = Method("fedavg", Unsplit, whole_model=True)
"""Whole models, averaged every round."""
