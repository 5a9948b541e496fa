"""Models and cuts that `make zoo` compares with the uncut model; a tenth of them in `make test`.

Each case is a function that returns a model, so that a case that would end the interpreter can run
in a process of its own, and its cuts, arguments and what may be shared. Here are models that show
one thing each; those of libraries are in files of their own.
"""

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass
class Case:
    build: Any
    cuts: list[str]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    share: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()  # the cuts that have to end in a CutError
    double: bool = True


class UNet(nn.Module):
    def __init__(self):
        super().__init__()

        def block(a, b):
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
            )

        self.d1, self.d2, self.mid = block(1, 4), block(4, 8), block(8, 8)
        self.u2, self.u1, self.out = block(16, 4), block(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(functional.max_pool2d(a, 2))
        m = self.mid(functional.max_pool2d(b, 2))
        u = self.u2(torch.cat([functional.interpolate(m, scale_factor=2), b], 1))
        u = self.u1(torch.cat([functional.interpolate(u, scale_factor=2), a], 1))
        return self.out(u)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, adj):
        return self.l2(adj @ torch.relu(self.l1(adj @ x)))


class Recurrent(nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.packed, self.e = packed, nn.Embedding(11, 6)
        self.a = nn.LSTM(6, 7, batch_first=True, num_layers=2, dropout=0.2)
        self.b = nn.LSTM(7, 7, batch_first=True, num_layers=2)
        self.o = nn.Linear(7, 3)

    def forward(self, x):
        h = self.e(x)
        if self.packed:
            lengths = (x != 0).sum(1).cpu()
            h = nn.utils.rnn.pack_padded_sequence(
                h, lengths, batch_first=True, enforce_sorted=False
            )
        h, state = self.a(h)
        h, state = self.b(h, state)
        return self.o(state[0][-1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.o = nn.GRUCell(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = self.c(x[:, t], h)
        return self.o(h)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.t, self.o = nn.TransformerEncoder(layer, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.t(self.e(x), src_key_padding_mask=x.eq(0)).mean(1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        if h.sum() > 0:
            h = -h
        scale = h.abs().max().item()
        h = self.b(h) * scale
        if h.mean() > 0:
            h = h * 2
        return self.c(h) / (1 + len(x))


class Noisy(Branching):
    def forward(self, x):
        z = torch.randn(x.shape[0], 4, dtype=x.dtype)
        h = self.a(x) + z
        return self.c(self.b(h) * z)[:, :1] * torch.nonzero(h > 0).shape[0]


class Dicts(Branching):
    def forward(self, batch, scale=1.0):
        h, g = self.a(batch["x"]), self.b(batch["y"])
        return {"logits": self.c(h + g) * scale, "aux": (h, g)}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.r, self.o = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        self.x = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        h = self.e(x)
        w = self.r(h).softmax(-1)
        k, y = w.argmax(-1), torch.zeros_like(h)
        for i, expert in enumerate(self.x):
            j = (k == i).nonzero()[:, 0]
            y = y.index_add(0, j, expert(h[j]) * w[j, i : i + 1])
        return self.o(y)


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0) * 3


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def around(forward, **modules):
    """Return a builder of a model of three layers with a forward of its own."""

    class Around(Branching):
        def __init__(self):
            super().__init__()
            for name, make in modules.items():
                setattr(self, name, make())

    Around.forward = forward
    return Around


def inplace(m, x):
    return m.c(functional.relu_(m.a(x)))


def twice(m, x):
    h = Triple.apply(m.a(x))
    return m.c(m.b(h) + h)


def filled(m, x):
    h = m.a(x)
    g = h.clone()
    g.mul_(2)
    g[:, 0] = 0
    return m.c(m.b(h) + g)


def views(m, x):
    h = m.a(x)
    q, k = h.chunk(2, 1)
    return m.c(torch.cat([k, q], 1) + h)


def sorted_(m, x):
    h = m.a(x)
    h = torch.gather(h, 1, h.argsort(1))
    top = torch.max(h, 1)
    return m.c(m.b(h)) * top.values[:, None] + top.indices[:, None]


def keeps(m, x):
    hs = []
    for layer in (m.a, m.b):
        x = layer(x)
        hs.append(x)
    return m.c(torch.stack(hs).mean(0))


def half(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = m.c(m.b(torch.relu(m.a(x))))
    return h.float()


def loops(m, x):
    h = m.a(x)
    while h.norm() < 20:
        h = h * 2
    return m.c(m.b(h))


def sampled(m, x):
    mean, deviation = m.a(x).chunk(2, 1)
    z = mean + torch.randn_like(mean) * deviation.exp()
    return m.b(torch.cat([z, z], 1)), mean, deviation


def untracked(m, x):
    with torch.no_grad():
        h = torch.relu(m.a(x))
    return m.c(m.b(h))


def drawn(m, x):
    scale = random.random() + 1
    return m.c(m.b(m.a(x)) * scale)


def remembers(m, x):
    m.last = h = m.a(x) + getattr(m, "last", 0)
    return m.c(m.b(h))


def tied(m, x):
    return functional.linear(m.b(m.a(x)), m.a.weight)


def attending(m, x):
    h = m.a(x)[None]
    h = functional.scaled_dot_product_attention(h, h, h)[0]
    return m.c(m.b(h) + h)


def given_and_used(m, x):
    h = m.a(x)
    mask = (h > 0).to(h.dtype)
    return m.c(checkpoint(m.both, h, mask, use_reentrant=False) * mask)


def masked(m, x):
    h = m.a(x)
    g = torch.vmap(lambda row: torch.ones(4, dtype=x.dtype))(h)
    return m.c(m.b(h * g))


def quantized():
    observer = torch.ao.quantization.MovingAverageMinMaxObserver
    return torch.ao.quantization.FakeQuantize(observer, quant_min=0, quant_max=255)


class Answer(NamedTuple):
    scores: Any
    features: Any


X = (torch.randn(4, 4, generator=torch.Generator().manual_seed(1)),)
IDS = torch.tensor([[3, 4, 5, 0, 0], [1, 2, 3, 4, 5], [2, 9, 0, 0, 0]])
BATCH = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}

OWN = {
    "unet": Case(UNet, ["d1", "d2", "d2.0", "mid", "u2"], (torch.randn(2, 1, 16, 16),)),
    "graph": Case(Graph, ["l1"], (torch.randn(6, 5), torch.rand(6, 6)), refused=("l1",)),
    "graph, shared": Case(Graph, ["l1"], (torch.randn(6, 5), torch.rand(6, 6)), share=("adj",)),
    "lstm": Case(lambda: Recurrent(False), ["e", "a"], (IDS,)),
    "lstm, packed": Case(lambda: Recurrent(True), ["e", "a"], (IDS,), share=("x",)),
    "lstm, packed, not shared": Case(
        lambda: Recurrent(True), ["e", "a"], (IDS,), refused=("e",)
    ),
    "gru cell": Case(Cell, ["c#4", "c#5"], (torch.randn(3, 5, 4),), refused=("c#4",)),
    "mask": Case(Masked, ["e", "t.layers.0", "t.layers.1.self_attn"], (IDS,), share=("x",)),
    "mask, not shared": Case(Masked, ["e"], (IDS,), refused=("e",)),
    "branches": Case(Branching, ["a", "b"], X),
    "noise": Case(Noisy, ["a"], X),
    "dicts": Case(Dicts, ["b"], (BATCH,)),
    "experts": Case(Experts, ["e", "r", "x.0"], (torch.randn(16, 4),)),
    "in-place": Case(around(inplace), ["a"], X),
    "function": Case(around(twice), ["a", "b"], X),
    "filled": Case(around(filled), ["a", "b"], X),
    "views": Case(around(views), ["a"], X),
    "sorted": Case(around(sorted_), ["a", "b"], X),
    "kept": Case(around(keeps), ["a"], X),
    "checkpoint": Case(
        around(lambda m, x: m.c(checkpoint(m.b, m.a(x), use_reentrant=False))), ["a", "b"], X,
    ),
    "checkpoint, reentrant": Case(
        around(lambda m, x: m.c(checkpoint(m.b, m.a(x), use_reentrant=True))), ["a", "b"], X,
        refused=("b",),
    ),
    "checkpoint before, reentrant": Case(
        around(lambda m, x: m.c(m.b(checkpoint(m.p, m.a(x), use_reentrant=True))),
               p=lambda: nn.Linear(4, 4)),
        ["b"], X,
    ),
    "scripted": Case(around(lambda m, x: m.c(m.b(m.s(m.a(x)))), s=scripted), ["a", "s", "b"], X,
                     double=False),
    "compiled": Case(
        around(lambda m, x: m.c(m.b(m.s(m.a(x)))),
               s=lambda: torch.compile(nn.Linear(4, 4), backend="aot_eager")),
        ["a", "b"], X,
    ),
    "weight norm": Case(
        around(lambda m, x: m.c(m.w(m.a(x))),
               w=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        ["a", "w"], X,
    ),
    "vmap": Case(around(lambda m, x: m.c(m.b(torch.vmap(torch.sin)(m.a(x))))), ["a"], X),
    "autocast": Case(around(half), ["a", "b"], X, double=False),
    "complex": Case(
        around(lambda m, x: m.c(torch.fft.irfft(torch.fft.rfft(m.a(x)), n=4) + m.b(x))), ["b"], X
    ),
    "complex weights": Case(
        lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat), nn.Tanh(),
                              nn.Linear(4, 2, dtype=torch.cfloat)),
        ["0", "1"], (torch.randn(3, 4, dtype=torch.cfloat),), double=False,
    ),
    "spectral norm": Case(
        around(lambda m, x: m.c(m.w(m.a(x))),
               w=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        ["a", "w"], X,
    ),
    "fake quantization": Case(
        around(lambda m, x: m.c(m.q(m.b(m.p(m.a(x))))), p=quantized, q=quantized),
        ["a", "p", "b"], X, double=False,
    ),
    "transformer": Case(
        lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
        ["encoder.layers.0", "encoder", "decoder.layers.0"],
        (torch.randn(2, 5, 8), torch.randn(2, 4, 8)), share=("tgt",),
    ),
    "siamese": Case(
        around(lambda m, x, y: m.c(m.b(m.a(x) - m.a(y)))), ["a#1", "a#2"], (X[0], X[0] + 1),
        refused=("a#1",),
    ),
    "sparse gradients": Case(
        lambda: nn.Sequential(nn.Embedding(11, 6, sparse=True), nn.Linear(6, 3)), ["0"], (IDS,),
    ),
    "recurrent, both ways": Case(
        lambda: nn.Sequential(nn.Linear(6, 6), nn.GRU(6, 4, bidirectional=True)), ["0"],
        (torch.randn(5, 3, 6),),
    ),
    "named outputs": Case(
        around(lambda m, x: Answer(m.c(m.b(m.a(x))), m.a.weight.sum() + x.sum())), ["b"], X,
        refused=("b",),
    ),
    "named tuple": Case(around(lambda m, x: Answer(m.c(m.b(h := m.a(x))), h)), ["a", "b"], X),
    "attention": Case(around(attending), ["a", "b"], X),
    "loop": Case(around(loops), ["a", "b"], X),
    "sampled": Case(around(sampled), ["a", "b"], X),
    "checkpoint around": Case(
        around(lambda m, x: m.c(checkpoint(lambda x: m.b(m.a(x)), x, use_reentrant=False))),
        ["a"], X, refused=("a",),
    ),
    "checkpoint around, reentrant": Case(
        around(lambda m, x: m.c(checkpoint(lambda x: m.b(m.a(x)), x, use_reentrant=True))),
        ["a"], X, refused=("a",),
    ),
    "checkpoint of what crosses": Case(
        around(given_and_used, both=lambda: nn.Bilinear(4, 4, 4)), ["both"], X, refused=("both",),
    ),
    "vmap, mask": Case(around(masked), ["b"], X, refused=("b",)),
    "vmap, crosses": Case(around(lambda m, x: m.c(m.b(h := torch.vmap(torch.sin)(m.a(x))) + h)),
                          ["b"], X, refused=("b",)),
    "not tracked": Case(around(untracked), ["a"], X, refused=("a",)),
    "drawn by Python": Case(around(drawn), ["a"], X, refused=("a",)),
    "remembers": Case(around(remembers), ["a"], X, refused=("a",)),
    "tied": Case(around(tied), ["a"], X, refused=("a",)),
    "scripted, inside": Case(
        around(lambda m, x: m.c(m.b(m.s(m.a(x)))), s=scripted), ["s.0"], X, double=False,
        refused=("s.0",),
    ),
}  # fmt: skip

QUICK = {
    "own": [
        "unet",
        "branches",
        "experts",
        "lstm, packed",
        "drawn by Python",
    ],
    "transformers": ["gpt2, labels"],
    "peft": ["lora, labels"],
}
