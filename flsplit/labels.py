"""What class labels must be."""

from torch import Tensor

from flsplit.errors import DataError


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise DataError if class labels (integers, beside logits ``(b, C, ...)``) are out of range.

    On a GPU torch would end the process instead of raising. ``-100``, torch's index for labels
    to ignore, passes.
    """
    is_class_index = not labels.is_floating_point() and logits.ndim == labels.ndim + 1
    if not is_class_index or labels.numel() == 0:
        return
    num_classes = logits.shape[1]
    wrong = (labels >= num_classes) | ((labels < 0) & (labels != -100))
    if bool(wrong.any()):
        raise DataError(
            f"label {int(labels[wrong][0])} is out of range: the model has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
