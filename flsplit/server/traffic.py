"""What the messages of an exchange carry, in bytes, by the ledger's categories."""

from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, RecordDict

from flsplit.account.ledger import Traffic
from flsplit.message.arrays import nbytes
from flsplit.message.evaluate import EvaluateRequest
from flsplit.message.finish import FinishRequest
from flsplit.message.local import LocalRequest
from flsplit.message.parts import Backward
from flsplit.message.shape import ShapeRequest
from flsplit.message.step import StepRequest
from flsplit.server.checks import Request

_SEGMENTS = {"arrays": "client-segments-{}", "optimizer": "optimizer-{}"}
_TRAINING = {"smashed-data": "activations-up", "labels": "labels-up"} | _SEGMENTS
_CATEGORIES: dict[type[Request], dict[str, str]] = {  # by record name
    StepRequest: _TRAINING,
    FinishRequest: _TRAINING,
    LocalRequest: _TRAINING | {"auxiliary": "auxiliary-{}"},
    ShapeRequest: {},
    EvaluateRequest: {"smashed-data": "evaluation-up", "labels": "evaluation-up"} | _SEGMENTS,
}


class Meter:
    """Counts what requests and replies carry.

    Parameters
    ----------
    sends : bool
        Whether anything goes over a wire.
    """

    def __init__(self, *, sends: bool) -> None:
        self._sends = sends

    def count_down(self, request: Request, content: RecordDict, traffic: Traffic) -> None:
        """Count what goes to a client; gradient rows that clients share are counted apart."""
        self._count(request, content, "down", traffic)
        for array in content.array_records.get("cut-gradient", ArrayRecord()).values():
            own = nbytes(array) - _shared_bytes(getattr(request, "backward", None))
            traffic.add("gradients-down-unicast", own, self._wire_bytes(array))

    def count_up(self, request: Request, content: RecordDict, traffic: Traffic) -> None:
        """Count what a client answers."""
        self._count(request, content, "up", traffic)

    def _count(self, request: Request, content: RecordDict, way: str, traffic: Traffic) -> None:
        for key, category in _CATEGORIES[type(request)].items():
            for array in content.array_records.get(key, ArrayRecord()).values():
                traffic.add(category.format(way), nbytes(array), self._wire_bytes(array))

    def _wire_bytes(self, array: Array) -> int:
        return len(array.data) if self._sends else 0


def broadcast_bytes(requests: Iterable[Request]) -> int:
    """Return the bytes of the gradient rows that all clients of the step share."""
    sizes = [_payload_bytes(getattr(request, "backward", None)) for request in requests]
    return max(sizes, default=0)


def _shared_bytes(backward: Backward | None) -> int:
    if backward is None or backward.gradient is None:
        return 0
    return backward.gradient[: backward.shared_rows].nbytes


def _payload_bytes(backward: Backward | None) -> int:
    """Return what the shared rows take on a broadcast channel; a repeated row is sent once."""
    shared = _shared_bytes(backward)
    if backward is None or not backward.repeated or not shared:
        return shared
    return shared // backward.shared_rows
