"""The server's ends of the links to its clients: what is compressed, and remembered for that."""

from collections.abc import Sequence
from functools import partial

from flwr.app import RecordDict
from torch import Tensor

from flsplit.client_parts import ClientPart
from flsplit.client_parts.by_example import Memory
from flsplit.client_parts.compression import (
    PLACES,
    Compression,
    Packed,
    compressing,
)
from flsplit.message.arrays import to_tensor
from flsplit.message.packing import put_packed, unpacked
from flsplit.storage import State


class Links:
    """What is packed on its way to clients, and unpacked when it comes."""

    def __init__(self) -> None:
        self.parts: dict[str, Compression] = {}  # by record, what the round's plan says
        self._memory: dict[str, dict[str, Memory]] = {}

    def follow(self, parts: Sequence[ClientPart]) -> None:
        """Do as the client parts of a round's plan say."""
        found = {record: compressing(parts, record) for record in PLACES}
        self.parts = {record: part for record, part in found.items() if part}

    def pack(self, client: str, record: str, content: RecordDict) -> None:
        """Pack a record of a message, if the plan says so and it is there."""
        part = self.parts.get(record)
        if part is None or record not in content:
            return
        packed = {
            key: part.pack(to_tensor(array, field=record), self._memory_of(client, record, key))
            for key, array in content.array_records[record].items()
        }
        put_packed(content, record, packed)

    def unpack(self, client: str, record: str, content: RecordDict) -> RecordDict:
        """Return what a client answered, with a record unpacked that the plan says is packed.

        ProtocolError if it can't be.
        """
        part = self.parts.get(record)
        if part is None:
            return content
        return unpacked(content, record, partial(self._unpacked, client, part, record))

    def _unpacked(
        self, client: str, part: Compression, record: str, key: str, packed: Packed
    ) -> Tensor:
        # Of local steps the key begins with the step; what is remembered is the value's.
        return part.unpack(packed, self._memory_of(client, record, key.partition(":")[2]))

    def _memory_of(self, client: str, record: str, value: str) -> Memory:
        return self._memory.setdefault(client, {}).setdefault(f"{record}:{value}", {})

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
