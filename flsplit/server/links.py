"""The server's ends of the links to its clients: what is compressed, and remembered for that."""

from collections.abc import Sequence
from functools import partial

from flwr.app import RecordDict
from torch import Tensor

from flsplit.client_parts import ClientPart
from flsplit.client_parts.compression import Compression, Memory, Packed, compressing
from flsplit.message.arrays import to_tensor
from flsplit.message.packing import put_packed, unpacked
from flsplit.storage import State

_UP, _DOWN = "smashed-data", "cut-gradient"


class Links:
    """What is packed on its way to clients, and unpacked when it comes."""

    def __init__(self) -> None:
        self.up: Compression | None = None  # what compresses smashed data
        self.down: Compression | None = None  # and cut-layer gradients
        self._memory: dict[str, dict[str, Memory]] = {}

    def follow(self, parts: Sequence[ClientPart]) -> None:
        """Do as the client parts of a round's plan say."""
        self.up, self.down = compressing(parts, _UP), compressing(parts, _DOWN)

    def pack(self, client: str, content: RecordDict) -> None:
        """Pack the cut-layer gradients in a message, if the plan says so."""
        part = self.down
        if part is None or _DOWN not in content:
            return
        packed = {
            key: part.pack(to_tensor(array, field=_DOWN), self._memory_of(client, f"{_DOWN}:{key}"))
            for key, array in content.array_records[_DOWN].items()
        }
        put_packed(content, _DOWN, packed)

    def unpack(self, client: str, content: RecordDict) -> RecordDict:
        """Return what a client answered, with its smashed data unpacked.

        ProtocolError if it can't be.
        """
        if self.up is None:
            return content
        return unpacked(content, _UP, partial(self._unpacked, client, self.up))

    def _unpacked(self, client: str, part: Compression, key: str, packed: Packed) -> Tensor:
        # Of local steps the key begins with the step; what is remembered is the value's.
        return part.unpack(packed, self._memory_of(client, f"{_UP}:{key.partition(':')[2]}"))

    def _memory_of(self, client: str, value: str) -> Memory:
        return self._memory.setdefault(client, {}).setdefault(value, {})

    def state_dict(self) -> State:
        """Return what is remembered, by client and value."""
        return {
            client: {value: dict(one) for value, one in values.items() if one}
            for client, values in self._memory.items()
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a :meth:`state_dict`."""
        self._memory = {
            client: {value: dict(one) for value, one in values.items()}
            for client, values in state.items()
        }
