"""Compression: what crosses in fewer bytes, either way; what that loses, the model trains with."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flsplit.client_parts.by_example import MOST_BYTES, Memory, keep, kept
from flsplit.client_parts.client_part import Argument, ClientPart
from flsplit.client_parts.stock import (
    CUT_GRADIENT,
    OUTPUT_GRADIENT,
    OUTPUTS,
    SMASHED,
    check_count,
    check_place,
)
from flsplit.errors import ConfigError, ProtocolError

Pieces = dict[str, Tensor]
"""What a tensor is packed into, by name."""

PLACES = {
    "smashed-data": SMASHED,
    "cut-gradient": CUT_GRADIENT,
    "outputs": OUTPUTS,
    "output-gradient": OUTPUT_GRADIENT,
}
"""What can be compressed, by the messages' records."""

BY_EXAMPLE = "example"
"""The ``feedback`` that knows which example a row is."""


@dataclass(frozen=True)
class Packed:
    """A tensor on its way."""

    pieces: Pieces  # what is sent
    shape: tuple[int, ...]  # the tensor's
    dtype: torch.dtype  # the tensor's


class Compression(ClientPart):
    """Base of parts that pack what crosses a cut, and unpack it at the other end.

    It acts where messages are made: the server (or the client) computes with what was unpacked, and
    the client's gradient goes back as if nothing had been lost (straight through). Auxiliary
    models get smashed data as it is before. Test data is not compressed.

    With ``feedback=True``, what was lost at a place in the batch is added to what is there in the
    next step. Other examples stand there then, so it mends the mean over steps, not an example.
    With ``feedback="example"`` it is added where the same example is sent the next time. The end
    that sends keeps it, and is the client: the server doesn't know which example a row is.

    Attributes
    ----------
    place : str
        ``smashed`` for the way up or ``cut-gradient`` for the way down; at the second cut of a
        U-shaped split ``output-gradient`` and ``outputs``.
    feedback : bool or 'example'
        Whether what was lost is kept for the next step, or for the same example.
    uses_rows : bool
        Whether it must know which examples are in the batch.
    """

    place: str
    feedback: bool | str
    uses_rows: bool

    def __init__(self, place: str, feedback: bool | str) -> None:
        check_place(self, place, *PLACES.values())
        if not isinstance(feedback, bool) and feedback != BY_EXAMPLE:
            raise ConfigError(
                f"client part {self.name!r}: feedback is {feedback!r}, expected a bool or "
                f"{BY_EXAMPLE!r}"
            )
        if feedback == BY_EXAMPLE and place in (CUT_GRADIENT, OUTPUTS):
            raise ConfigError(
                f"client part {self.name!r}: feedback is {BY_EXAMPLE!r} at {place!r}, which the "
                "server sends: it doesn't know which example a row is, expected a bool"
            )
        self.place, self.feedback, self.uses_rows = place, feedback, feedback == BY_EXAMPLE
        self._memory: dict[str, Memory] = {}

    def arguments(self) -> dict[str, Argument]:
        """Return the constructor's arguments; ConfigError also if it left out this class's own."""
        if not hasattr(self, "_memory"):
            raise ConfigError(
                f"client part {self.name!r}: {type(self).__qualname__}.__init__ doesn't call "
                "super().__init__(place, feedback)"
            )
        return super().arguments()

    @abstractmethod
    def encode(self, tensor: Tensor) -> Pieces:
        """Return what a floating-point tensor ``(b, ...)`` (CPU) is packed into."""

    @abstractmethod
    def decode(self, pieces: Pieces, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor that was packed, as near as can be.

        The pieces come from the network: their shapes and values may be anything.

        Raises
        ------
        ProtocolError
            If they can't be what :meth:`encode` returned for this shape.
        """

    def pack(self, tensor: Tensor, memory: Memory, rows: Tensor | None = None) -> Packed:
        """Return a tensor as it is sent.

        Parameters
        ----------
        tensor : torch.Tensor
            ``(b, ...)``, floating point.
        memory : dict of str to torch.Tensor
            What this end remembers; it is changed.
        rows : torch.Tensor, optional
            Which examples these are.

        Raises
        ------
        ConfigError
            If it is not of floating point: a whole number that is a little different is another.
        """
        if not tensor.is_floating_point():
            raise ConfigError(
                f"client part {self.name!r} was given {tensor.dtype}: whole numbers (tokens, "
                "labels, masks) can't be compressed with loss, expected floating point"
            )
        exact = tensor.detach().cpu()
        if not self.feedback:
            return Packed(self.encode(exact), tuple(exact.shape), exact.dtype)
        if self.feedback == BY_EXAMPLE:
            rows = self._known(exact, rows)
            base, times = kept(memory, rows, tuple(exact.shape[1:]))
            exact = exact + base.to(exact.dtype)
            packed = Packed(self.encode(exact), tuple(exact.shape), exact.dtype)
            lost_now = (exact - self.unpack(packed, {})).float()
            keep(memory, rows, lost_now, times + 1, MOST_BYTES)
            return packed
        lost = memory.get("lost")
        if lost is not None and lost.shape[1:] == exact.shape[1:]:
            both = min(len(lost), len(exact))
            exact = torch.cat([exact[:both] + lost[:both].to(exact.dtype), exact[both:]])
        packed = Packed(self.encode(exact), tuple(exact.shape), exact.dtype)
        memory["lost"] = exact - self.unpack(packed, {})
        return packed

    def unpack(self, packed: Packed, memory: Memory) -> Tensor:
        """Return the tensor that was packed; ``memory`` is what this end remembers.

        ProtocolError if the pieces are none of this part's.
        """
        try:
            found = self.decode(packed.pieces, packed.shape)
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
            raise ProtocolError(
                f"packed: {self.name!r} can't unpack a tensor of shape {packed.shape}: {error}"
            ) from error
        if tuple(found.shape) != packed.shape:
            raise ProtocolError(
                f"packed: {self.name!r} unpacked shape {tuple(found.shape)}, not {packed.shape}"
            )
        return found.to(packed.dtype)

    def _known(self, tensor: Tensor, rows: Tensor | None) -> Tensor:
        """Return which examples a tensor's rows are; ConfigError if that isn't known."""
        if rows is None or len(rows) != len(tensor):
            raise ConfigError(
                f"client part {self.name!r} must know which examples are in a batch, one for each "
                f"row: there are {len(tensor)} rows and {0 if rows is None else len(rows)} examples"
            )
        return rows

    def nbytes(self, rows: int, numbers: int, dtype: torch.dtype) -> int:
        """Return how many bytes are sent of a batch; by default ``rows`` times those of one row.

        Parameters
        ----------
        rows, numbers : int
            Rows of the batch, and numbers in each.
        dtype : torch.dtype
            The tensor's.
        """
        pieces = self.encode(torch.zeros(1, numbers, dtype=dtype))
        return rows * sum(one.nbytes for one in pieces.values())

    # --- what the client remembers -------------------------------------------------------

    def memory_of(self, value: str) -> Memory:
        """Return what the client remembers of a value that crosses."""
        return self._memory.setdefault(value, {})

    def forget(self) -> None:
        """Remember nothing: a step was lost on the way, and both ends may differ."""
        self._memory.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what the client remembers."""
        return {
            f"{value}\n{name}": tensor
            for value, memory in self._memory.items()
            for name, tensor in memory.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that."""
        self._memory = {}
        for key, tensor in state.items():
            value, _, name = key.rpartition("\n")
            self._memory.setdefault(value, {})[name] = tensor


def expect(pieces: Pieces, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """Return a piece, which must be of a shape and, if given, a dtype; ProtocolError if not."""
    piece = pieces.get(name)
    if piece is None or tuple(piece.shape) != shape or (dtype and piece.dtype != dtype):
        found = "none" if piece is None else f"{piece.dtype} of shape {tuple(piece.shape)}"
        wanted = f"{dtype or 'a tensor'} of shape {shape}"
        raise ProtocolError(f"packed: piece {name!r} is {found}, expected {wanted}")
    return piece


class Int8(Compression):
    """Send a byte for each number: 256 steps from a row's least number to its greatest.

    Parameters
    ----------
    place : {'smashed', 'cut-gradient', 'outputs', 'output-gradient'}
        What is sent so.
    feedback : bool or 'example'
        As in :class:`Compression`.
    """

    name = "int8"

    def __init__(self, place: str = SMASHED, feedback: bool | str = True) -> None:
        super().__init__(place, feedback)

    def encode(self, tensor: Tensor) -> Pieces:
        """Return the steps, and each row's least number and the size of a step."""
        flat = tensor.float().reshape(len(tensor), -1)
        low, high = flat.aminmax(dim=1, keepdim=True) if flat.numel() else (flat[:, :1],) * 2
        step = (high - low) / 255
        steps = ((flat - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 255)
        return {"steps": steps.to(torch.uint8), "low": low, "step": step}

    def decode(self, pieces: Pieces, shape: tuple[int, ...]) -> Tensor:
        """Return the nearest of the 256 numbers for each."""
        b, n = shape[0], math.prod(shape[1:])
        steps = expect(pieces, "steps", (b, n), torch.uint8)
        low, step = (expect(pieces, name, (b, 1), torch.float32) for name in ("low", "step"))
        return (low + steps * step).reshape(shape)


class HalfPrecision(Compression):
    """Send two bytes for each number: float16, or bfloat16, which has float32's range.

    Parameters
    ----------
    place : {'smashed', 'cut-gradient', 'outputs', 'output-gradient'}
        What is sent so.
    dtype : {'float16', 'bfloat16'}
        What is sent. What is too large for float16 is sent as its largest number.
    feedback : bool or 'example'
        As in :class:`Compression`.
    """

    name = "half"

    def __init__(
        self, place: str = SMASHED, dtype: str = "float16", feedback: bool | str = False
    ) -> None:
        super().__init__(place, feedback)
        if dtype not in ("float16", "bfloat16"):
            raise ConfigError(
                f"client part 'half': dtype is {dtype!r}, expected 'float16' or 'bfloat16'"
            )
        self.dtype = dtype

    def encode(self, tensor: Tensor) -> Pieces:
        """Return the numbers, rounded."""
        dtype = getattr(torch, self.dtype)
        most = min(torch.finfo(dtype).max, torch.finfo(tensor.dtype).max)
        return {"numbers": tensor.clamp(-most, most).to(dtype)}

    def decode(self, pieces: Pieces, shape: tuple[int, ...]) -> Tensor:
        """Return them."""
        return expect(pieces, "numbers", shape, getattr(torch, self.dtype))


class TopK(Compression):
    """Send the share of each row's numbers that are largest, and a bit for each that says which.

    The rest counts as 0. In float32 that takes share + 1/32 of the bytes.

    Parameters
    ----------
    share : float
        How many of a row's numbers are sent, above 0 and at most 1.
    place : {'smashed', 'cut-gradient', 'outputs', 'output-gradient'}
        What is sent so.
    feedback : bool or 'example'
        As in :class:`Compression`.
    """

    name = "top-k"

    def __init__(
        self, share: float = 0.1, place: str = SMASHED, feedback: bool | str = False
    ) -> None:
        super().__init__(place, feedback)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(
                f"client part 'top-k': share is {share!r}, expected a number above 0, at most 1"
            )
        self.share = share

    def encode(self, tensor: Tensor) -> Pieces:
        """Return the largest numbers of each row in their order, and the bits."""
        flat = tensor.reshape(len(tensor), -1)
        chosen = flat.abs().topk(self._count(flat.shape[1]), dim=1).indices.sort(dim=1).values
        mask = torch.zeros(flat.shape, dtype=torch.bool).scatter_(1, chosen, True)
        bits = torch.from_numpy(np.packbits(mask.numpy(), axis=1))
        return {"numbers": flat.gather(1, chosen), "bits": bits}

    def decode(self, pieces: Pieces, shape: tuple[int, ...]) -> Tensor:
        """Return them, each at its place, and 0 elsewhere."""
        b, n = shape[0], math.prod(shape[1:])
        k = self._count(n)
        numbers = expect(pieces, "numbers", (b, k), None)
        bits = expect(pieces, "bits", (b, -(-n // 8)), torch.uint8)
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=n)).bool()
        if not bool((mask.sum(1) == k).all()):
            raise ProtocolError(f"packed: 'bits' must choose {k} numbers of each row")
        return torch.zeros(b, n, dtype=numbers.dtype).masked_scatter_(mask, numbers).reshape(shape)

    def _count(self, n: int) -> int:
        return min(n, max(1, round(self.share * n)))


class LowRank(Compression):
    """Send a batch as the product of two thin matrices: its ``rank`` largest singular vectors.

    A batch of b rows with n numbers takes rank (b + n) / (b n) of the bytes.

    Parameters
    ----------
    rank : int
        How many; a batch with fewer rows is sent exactly.
    place : {'smashed', 'cut-gradient', 'outputs', 'output-gradient'}
        What is sent so.
    feedback : bool or 'example'
        As in :class:`Compression`.
    """

    name = "low-rank"

    def __init__(self, rank: int = 4, place: str = SMASHED, feedback: bool | str = False) -> None:
        super().__init__(place, feedback)
        check_count(self, "rank", rank)
        self.rank = rank

    def encode(self, tensor: Tensor) -> Pieces:
        """Return the factors."""
        u, s, v = torch.linalg.svd(tensor.float().reshape(len(tensor), -1), full_matrices=False)
        return {"left": u[:, : self.rank] * s[: self.rank], "right": v[: self.rank]}

    def nbytes(self, rows: int, numbers: int, dtype: torch.dtype) -> int:
        """Return the bytes of both factors, in float32."""
        return 4 * min(self.rank, rows, numbers) * (rows + numbers)

    def decode(self, pieces: Pieces, shape: tuple[int, ...]) -> Tensor:
        """Return their product."""
        b, n = shape[0], math.prod(shape[1:])
        rank = min(self.rank, b, n)
        left = expect(pieces, "left", (b, rank), torch.float32)
        return (left @ expect(pieces, "right", (rank, n), torch.float32)).reshape(shape)


class Difference(Int8):
    """Send how smashed data differs from that of the same example the last time, a byte each.

    AQ-SGD (Wang et al. 2022, https://arxiv.org/abs/2206.01299): as training settles, differences
    and with them errors get smaller. An example is sent in :class:`Int8` when it is new. Both ends
    keep the smashed data of the examples, and the server is told which example each row is: its
    index in the client's data, and how often it was sent. That must agree at both ends.

    Parameters
    ----------
    most_bytes : int
        How much each end keeps of a client's value that crosses, 4 bytes a number. Beyond that,
        what was sent longest ago is forgotten, and sent as new.
    """

    name = "difference"

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(SMASHED, feedback=False)
        check_count(self, "most_bytes", most_bytes)
        self.most_bytes, self.uses_rows = most_bytes, True

    def nbytes(self, rows: int, numbers: int, dtype: torch.dtype) -> int:
        """Return the bytes of differences, and of two int32 beside each row."""
        return super().nbytes(rows, numbers, dtype) + 8 * rows

    def pack(self, tensor: Tensor, memory: Memory, rows: Tensor | None = None) -> Packed:
        """Return the difference, which examples these are, and how often each was sent."""
        rows = self._known(tensor, rows)
        base, times = kept(memory, rows, tuple(tensor.shape[1:]))
        packed = super().pack(tensor.detach().cpu() - base.to(tensor.dtype), {})
        pieces = packed.pieces | {"rows": rows.int(), "times": times}
        found = base + super().unpack(packed, {}).float()
        keep(memory, rows, found, times + 1, self.most_bytes)
        return Packed(pieces, packed.shape, packed.dtype)

    def unpack(self, packed: Packed, memory: Memory) -> Tensor:
        """Return the smashed data: what was kept of these examples, and the difference."""
        b = packed.shape[0]
        rows = expect(packed.pieces, "rows", (b,), torch.int32).long()
        said = expect(packed.pieces, "times", (b,), torch.int32)
        if b and not 0 <= int(rows.min()) <= int(rows.max()) < MOST_ROWS:
            raise ProtocolError(f"packed: 'rows' must be numbers from 0 and below {MOST_ROWS}")
        base, times = kept(memory, rows, packed.shape[1:])
        base[said == 0] = 0.0  # the client begins anew
        if not torch.equal(said[said > 0], times[said > 0]):
            raise ProtocolError("packed: the client and the server remember other smashed data")
        found = base + super().unpack(packed, {}).float()
        keep(memory, rows, found, said + 1, self.most_bytes)
        return found.to(packed.dtype)


MOST_ROWS = 10**6
"""Examples of one client that ``difference`` can tell apart."""


def compressing(parts: Sequence[ClientPart], record: str) -> Compression | None:
    """Return the part that packs the record of this name, None if there is none.

    ConfigError if there are two.
    """
    place = PLACES[record]
    found = [one for one in parts if isinstance(one, Compression) and one.place == place]
    if len(found) > 1:
        names = " and ".join(repr(one.name) for one in found)
        raise ConfigError(f"client parts {names} both compress at {place!r}: one of them can")
    return found[0] if found else None
