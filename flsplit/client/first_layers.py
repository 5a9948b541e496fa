"""A client's layers up to the cut, or to the first of two: what they give for its inputs."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.client.batches import refused_keywords
from flsplit.cut import CutError
from flsplit.cut.smashed import Smashed
from flsplit.errors import DataError, SegmentMismatchError, at
from flsplit.nested import as_arguments, tensors_of, to_device
from flsplit.untrained import Buffers, keeping_buffers


class FirstLayers:
    """The layers of a client's segment that come before the server's."""

    def __init__(
        self,
        segment: nn.Module,
        cut: str,
        client: str,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self._segment, self._cut, self._client = segment, cut, client
        self._device, self._autocast = device, autocast
        self.buffers = Buffers(segment)
        self.trains = False
        """Whether the segment is known to be in training mode: to set it walks over all modules."""

    def train(self) -> None:
        """Set the segment to training mode."""
        self._segment.train()
        self.trains = True

    def eval(self) -> None:
        """Set the segment to evaluation mode."""
        self._segment.eval()
        self.trains = False

    def __call__(self, inputs: Any) -> Smashed:
        """Return the smashed data of inputs.

        DataError or SegmentMismatchError if the layers can't take the inputs.
        """
        dtype = self._autocast
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Tensor):
            args = (inputs.to(self._device),)
        else:
            args, kwargs = as_arguments(to_device(inputs, self._device))
        try:
            with torch.autocast(self._device.type, dtype=dtype) if dtype else nullcontext():
                smashed: Smashed = self._segment(*args, **kwargs)
        except CutError as error:
            at(f"client {self._client!r}", error)
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise self._explain(error, inputs) from error
        if isinstance(smashed, Tensor) and not (
            smashed.is_floating_point() or smashed.is_complex()
        ):
            raise SegmentMismatchError(
                f"the smashed data at {self._cut!r} is {smashed.dtype}, expected floating point"
            )
        return smashed

    def evaluated(self, inputs: Any) -> Smashed:
        """Return the smashed data in evaluation mode; nothing changes, whatever forward does."""
        self.eval()
        with keeping_buffers(self._segment):
            return self(inputs)

    def _explain(self, error: Exception, inputs: Any) -> Exception:
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(inputs)]
        shapes = ", ".join(f"shape {shape} and dtype {dtype}" for shape, dtype in kinds)
        if "more than 1 value per channel" in str(error):
            return DataError(
                f"client {self._client!r}: BatchNorm can't train on a batch of one (inputs of "
                f"{shapes}); use another batch-size, or drop-last to leave out the ragged last one"
            )
        if isinstance(inputs, Mapping) and "keyword argument" in str(error):
            return refused_keywords(inputs, self._client, error)
        return SegmentMismatchError(
            f"client {self._client!r}: the client segment can't take inputs of {shapes}: {error}"
        )
