"""What stands in for the server's blocks at the clients of FSL-SAGE and CSE-FSL."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class SequenceHead(nn.Module):
    """A few causal blocks, and logits of every position.

    Parameters
    ----------
    shape : tuple of int
        Of one row of smashed data: positions, width.
    num_tokens : int
        The vocabulary.
    num_blocks : int
        The authors' GPT-2-medium has 3 of its 24 blocks here; 0 leaves the head alone. They begin
        with small weights, as GPT-2's do, and so does the head if there is nothing better.
    """

    def __init__(self, shape: tuple[int, ...], num_tokens: int, num_blocks: int) -> None:
        super().__init__()
        width = shape[-1]
        heads = next(number for number in (4, 2, 1) if width % number == 0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, smashed: Tensor) -> Tensor:
        """Return logits ``(b, T, num_tokens)`` of smashed data ``(b, T, width)``."""
        hidden = smashed.to(self.head.weight.dtype)
        mask = nn.Transformer.generate_square_subsequent_mask(
            hidden.shape[1], device=hidden.device, dtype=hidden.dtype
        )
        with sdpa_kernel(SDPBackend.MATH):  # alignment differentiates twice
            for block in self.blocks:
                hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


def auxiliary_like(
    model: nn.Module, num_blocks: int
) -> Callable[[tuple[int, ...], int], SequenceHead]:
    """Return what builds auxiliary models whose head begins as a model's last layer.

    In the authors' code it is the token embedding of a model that was trained before. With a head
    as it was drawn, an auxiliary model's gradients begin by pointing nowhere. Only the server has
    that layer, and it sends its clients the auxiliary model.
    """
    weight = model.get_output_embeddings().weight.detach().clone()  # type: ignore[operator]

    def build(shape: tuple[int, ...], num_tokens: int) -> SequenceHead:
        found = SequenceHead(shape, num_tokens, num_blocks)
        found.head.load_state_dict({"weight": weight})
        return found

    return build


def next_token(output: object, labels: Tensor) -> Tensor:
    """Return the mean loss of the next tokens, of a model's output or of an auxiliary model's.

    Models of transformers compute this if they are given labels. Clients of decoupled methods
    need it as a function, so that the same goes to both sides.
    """
    logits = output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]
    following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
