"""Models and cuts that `make zoo` compares with the uncut model; a tenth of them in `make test`.

Each case is a function that returns a model, so that a case that would end the interpreter can run
in a process of its own, and its cuts, arguments and what may be shared.
"""

from dataclasses import dataclass, field
from typing import Any

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


X = (torch.randn(4, 4, generator=torch.Generator().manual_seed(1)),)
IDS = torch.tensor([[3, 4, 5, 0, 0], [1, 2, 3, 4, 5], [2, 9, 0, 0, 0]])
IMAGE = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)),)
BATCH = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}

OWN = {
    "unet": Case(UNet, ["d1", "d2", "d2.0", "mid", "u2"], (torch.randn(2, 1, 16, 16),)),
    "graph": Case(Graph, ["l1"], (torch.randn(6, 5), torch.rand(6, 6)), refused=("l1",)),
    "graph, shared": Case(Graph, ["l1"], (torch.randn(6, 5), torch.rand(6, 6)), share=("adj",)),
    "lstm": Case(lambda: Recurrent(False), ["e", "a"], (IDS,)),
    "lstm, packed": Case(lambda: Recurrent(True), ["e", "a"], (IDS,), share=("x",)),
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
    "autocast": Case(
        around(lambda m, x: m.c(m.b(m.a(x))).float()), ["a", "b"], X, double=False
    ),
    "complex": Case(
        around(lambda m, x: m.c(torch.fft.irfft(torch.fft.rfft(m.a(x)), n=4) + m.b(x))), ["b"], X
    ),
}  # fmt: skip

QUICK = ["unet", "branches", "experts", "lstm, packed"]


def torchvision_cases():
    from flsplit.vision import load_torchvision

    tv = load_torchvision().models
    names = {
        "resnet18": ["conv1", "layer1.0.conv1", "layer2.0.downsample", "layer4.1.relu#2"],
        "densenet121": ["features.denseblock1.denselayer4"],
        "mnasnet0_5": ["layers.8"],
        "efficientnet_b0": ["features.3"],
        "swin_t": ["features.1"],
        "convnext_tiny": ["features.1"],
    }
    cases = {
        name: Case(lambda name=name: getattr(tv, name)(num_classes=5), cuts, IMAGE, double=False)
        for name, cuts in names.items()
    }
    cases["googlenet"] = Case(
        lambda: tv.googlenet(num_classes=5, init_weights=False), ["inception3a"], IMAGE,
        double=False,
    )  # fmt: skip
    cases["deeplab"] = Case(
        lambda: tv.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
        ["backbone.layer1"], IMAGE, double=False,
    )  # fmt: skip
    return cases


def transformers_cases():
    from flsplit.vision import load_torchvision

    load_torchvision()
    import timm
    import transformers as t
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    batch, shared = {"input_ids": ids, "attention_mask": mask}, ("attention_mask",)
    small = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 100, "n_positions": 32,
             "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 32}  # fmt: skip

    def gpt2(**more):
        return t.GPT2LMHeadModel(t.GPT2Config(**small, **more))

    def frozen_gpt2():
        model = gpt2()
        model.transformer.wte.weight.requires_grad_(False)
        return model

    def lora():
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["c_attn"],
                            task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
        return get_peft_model(gpt2(), config)

    def t5():
        config = t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=100,
                            decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
        model = t.T5ForConditionalGeneration(config)
        model.shared.weight.requires_grad_(False)
        return model

    labelled = {**batch, "labels": ids}
    both = (*shared, "labels")
    bert = {**size, "vocab_size": 100, "num_labels": 3}
    llama = {**size, "vocab_size": 100, "num_key_value_heads": 2}
    vit = {**size, "image_size": 32, "patch_size": 8, "num_labels": 3}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    h0, h1 = "transformer.h.0", "transformer.h.1.mlp"
    cases = {
        "gpt2, tied": Case(gpt2, [h0], (), batch, shared, refused=(h0,)),
        "gpt2, frozen": Case(frozen_gpt2, [h0], (), batch, shared),
        "gpt2": Case(lambda: gpt2(tie_word_embeddings=False), ["transformer.drop", h0, h1], (),
                     batch, shared),
        "gpt2, mask not shared": Case(lambda: gpt2(tie_word_embeddings=False), [h0], (), batch,
                                      refused=(h0,)),
        "gpt2, no mask": Case(lambda: gpt2(tie_word_embeddings=False), [h0], (),
                              {"input_ids": ids}),
        "gpt2, labels": Case(lambda: gpt2(tie_word_embeddings=False), [h0], (), labelled, both),
        "gpt2, lora": Case(lora, [f"base_model.model.{h0}"], (), batch, shared),
        "bert": Case(lambda: t.BertForSequenceClassification(t.BertConfig(**bert)),
                     ["bert.embeddings", "bert.encoder.layer.0"], (), batch, shared),
        "llama": Case(lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama)),
                      ["model.embed_tokens", "model.layers.0", "model.layers.1.self_attn"], (),
                      batch, shared),
        "vit": Case(lambda: t.ViTForImageClassification(t.ViTConfig(**vit)), ["vit.embeddings"], (),
                    pixels),
        "t5": Case(t5, ["encoder", "encoder.block.0"], (), labelled, both),
    }  # fmt: skip
    image = (torch.randn(2, 3, 224, 224),)
    for name, cut in [
        ("convnext_atto", "stages.0"),
        ("vit_tiny_patch16_224", "blocks.1"),
        ("mobilenetv3_small_050", "blocks.1"),
    ]:
        cases[f"timm {name}"] = Case(
            lambda name=name: timm.create_model(name, num_classes=5), [cut], image, double=False
        )
    return cases
