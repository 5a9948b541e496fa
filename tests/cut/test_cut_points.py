"""`cuts` lists the clean cuts with their costs."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.cut import CutError, CutPoint, cuts, format_cuts, split
from flsplit.cut.points import SmashedValue

# After each cut of ResNet-18 on 3 x 64 x 64 inputs with 7 classes: cumulative forward MFLOP,
# cumulative parameters, elements of the smashed data.
RESNET18_64 = {
    "relu": (19.268, 9536, 65536),
    "maxpool": (19.268, 9536, 16384),
    "layer1.0": (57.016, 83520, 16384),
    "layer1.1": (94.765, 157504, 16384),
    "layer2.0": (124.125, 387648, 8192),
    "layer2.1": (161.874, 683072, 8192),
    "layer3.0": (191.234, 1602112, 4096),
    "layer3.1": (228.983, 2782784, 4096),
    "layer4.0": (258.343, 6455872, 2048),
    "layer4.1": (296.092, 11176512, 2048),
}
RESNET18_CUTS = ["conv1", "bn1", *RESNET18_64, "avgpool"]


def mflop(flops):
    return round(flops / 1e6, 3)


def by_name(points):
    return {point.cut: point for point in points}


def test_resnet18_on_64_x_64(torchvision_models):
    points = cuts(torchvision_models.resnet18(num_classes=7), (3, 64, 64))
    assert [point.cut for point in points] == RESNET18_CUTS
    for name, (flops, params, elements) in RESNET18_64.items():
        point = by_name(points)[name]
        assert mflop(point.client_flops) == flops, name
        assert point.client_params == params, name
        assert point.smashed_elements == elements, name
        assert mflop(point.client_flops + point.server_flops) == 296.099
        assert point.client_params + point.server_params == 11180103


def test_resnet18_on_32_x_32_is_a_quarter(torchvision_models):
    points = by_name(cuts(torchvision_models.resnet18(num_classes=10), (3, 32, 32)))
    for name, (flops, _, elements) in RESNET18_64.items():
        assert points[name].client_flops / 1e6 == pytest.approx(flops / 4, abs=2e-4), name
        assert points[name].smashed_elements == elements // 4, name
    point = points["layer2.1"]
    assert mflop(point.client_flops) == 40.468
    assert point.smashed_elements == 2048
    assert round((point.client_flops + point.server_flops) / 1e6, 2) == 74.03
    assert point.client_params + point.server_params == 11181642


def test_resnet18_with_the_stem_for_cifar(torchvision_models):
    model = torchvision_models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    points = by_name(cuts(model, (3, 32, 32)))
    assert points["relu"].client_params == 1856
    assert mflop(points["relu"].client_flops) == 3.539
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    flops = [mflop(points[name].client_flops) for name in ["relu", *blocks]]
    gained = [round(after - before, 3) for before, after in pairwise(flops)]
    assert gained == pytest.approx([150.995] * 2 + [117.441, 150.995] * 3, abs=1.5e-3)
    elements = [points[f"layer{stage}.1"].smashed_elements for stage in (1, 2, 3, 4)]
    assert elements == [65536, 32768, 16384, 8192]
    point = points["layer1.1"]
    assert round((point.client_flops + point.server_flops) / 1e6, 1) == 1110.8
    assert point.client_params + point.server_params == 11173962


def test_attention_is_counted(small_vit):
    points = by_name(cuts(small_vit(), (3, 32, 32)))
    tokens, width, hidden = 5, 64, 128
    projections = 2 * tokens * width * (3 * width + width)
    attention = 2 * 2 * tokens * tokens * width
    mlp = 2 * 2 * tokens * width * hidden
    layer = projections + attention + mlp
    patches = 2 * 4 * (3 * 16 * 16) * width
    for index in range(3):
        point = points[f"encoder.layers.encoder_layer_{index}"]
        assert point.client_flops == patches + (index + 1) * layer
        assert point.smashed_shape == (tokens, width)


def test_vit_b_16_at_its_full_size(torchvision_models):
    model = torchvision_models.vit_b_16()
    points = cuts(model, (3, 224, 224))
    assert len(points) == 15  # patches, embeddings, 12 layers, norm
    assert points[0].smashed_elements == 196 * 768
    assert points[1].smashed_elements == 197 * 768


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(36, 10),
    )


def test_a_small_network_by_hand():
    assert cuts(small_cnn(), (1, 8, 8)) == [
        CutPoint(
            name,
            40,
            370,
            2 * 4 * 36 * 9,
            2 * 360,
            (SmashedValue(shape, torch.float32, 4 * elements, learns=True),),
        )
        for name, shape, elements in [
            ("0", (4, 6, 6), 144),
            ("1.0", (4, 6, 6), 144),
            ("1.1", (4, 3, 3), 36),
            ("2", (36,), 36),
        ]
    ]


def test_a_batch_says_the_same_as_a_shape():
    assert cuts(small_cnn(), torch.zeros(5, 1, 8, 8)) == cuts(small_cnn(), (1, 8, 8))


def test_types_come_from_the_parameters_or_the_batch():
    assert cuts(small_cnn().half(), (1, 8, 8))[0].smashed_dtype == torch.float16
    tokens = torch.zeros(2, 6, dtype=torch.long)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 2))
    assert [(point.cut, point.smashed_shape) for point in cuts(model, tokens)] == [
        ("0", (6, 4)),
        ("1", (24,)),
    ]


def test_places_without_a_gradient_or_a_batch_dimension_are_left_out():
    class Fold(nn.Module):
        def forward(self, x):
            return x.flatten(0, 1)

    class Unfold(nn.Module):
        def forward(self, x):
            return x.unflatten(0, (-1, 3)).mean(1)

    model = nn.Sequential(Fold(), nn.Linear(4, 4), Unfold(), nn.Linear(4, 2))
    assert [point.cut for point in cuts(model, (3, 4))] == ["2"]


def test_everything_that_split_takes_is_listed_under_some_name(small_vit):
    model = small_vit(num_layers=2)
    listed = {point.cut for point in cuts(model, (3, 32, 32))}
    taken = set()
    for name, _ in model.named_modules():
        try:
            crossing = split(model, name).client(torch.zeros(2, 3, 32, 32))
        except CutError:
            continue
        if isinstance(crossing, torch.Tensor):
            taken.add(name)
    assert listed <= taken
    # The innermost name of several for the same place is listed.
    assert taken - listed == {"encoder", "encoder.layers"}


def test_the_model_is_neither_changed_nor_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cuts(model, (4,))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model[0]._forward_hooks


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(CutError, match=r"samples of shape \(1, 12, 12\)"):
        cuts(small_cnn(), (1, 12, 12))
    with pytest.raises(CutError, match="at least one sample"):
        cuts(small_cnn(), torch.zeros(0, 1, 8, 8))
    with pytest.raises(CutError, match=r"example_input is \(3, -1\)"):
        cuts(small_cnn(), (3, -1))


def test_lazy_parameters_are_refused():
    with pytest.raises(CutError, match="lazy parameters: run it on one batch first"):
        cuts(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), (3,))


def test_the_table_is_aligned():
    lines = format_cuts(cuts(small_cnn(), (1, 8, 8))).splitlines()
    assert lines[0].split("  ")[0].strip() == "cut"
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[3].split()) == "1.1 40 370 0.003 0.001 4x3x3 float32 36 0.1"
    assert format_cuts([]).startswith("cut")


class Masked(nn.Module):
    """Attention over four tokens, with a mask that forward looks into."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids, mask):
        x = self.embed(ids)
        wide = mask[:, None, None, :].bool() if not mask.bool().all() else None
        for part in (self.block, nn.Identity()):
            q = part(x).unflatten(-1, (2, 4)).transpose(1, 2)
            x = functional.scaled_dot_product_attention(q, q, q, attn_mask=wide)
            x = x.transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


def test_a_model_that_looks_into_a_mask_is_counted_by_hand():
    """Its attention is 2 heads · 2 products of (4, 4) with (4, 4) matrices, twice."""
    tokens = {"ids": torch.zeros(3, 4, dtype=torch.int64), "mask": torch.eye(3, 4)}
    assert [point.cut for point in cuts(Masked(), tokens)] == []
    embed, block = cuts(Masked(), tokens, share=("mask",))
    attention, linear, head = 2 * 2 * 2 * 4 * 4 * 4, 2 * 4 * 8 * 8, 2 * 8 * 2
    assert (embed.client_flops, embed.server_flops) == (0, linear + 2 * attention + head)
    assert (block.client_flops, block.server_flops) == (linear, 2 * attention + head)
    for point in (embed, block):
        smashed, mask = point.smashed
        assert (smashed.shape, smashed.learns) == ((4, 8), True)
        assert (mask.nbytes, mask.learns) == (4 * mask.dtype.itemsize, False)
        assert point.gradient_bytes == 4 * 4 * 8
        assert point.smashed_bytes == 4 * 4 * 8 + mask.nbytes


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(9, 2)

    def forward(self, x):
        first = self.first(x)
        return self.last(torch.cat([first, self.second(first)], dim=1))


def test_several_tensors_may_cross():
    assert [point.cut for point in cuts(Skipping(), (3,))] == ["first"]
    first, second = cuts(Skipping(), (3,), several=True)
    assert (first.smashed_elements, second.smashed_elements) == (4, 9)
    assert {one.shape for one in second.smashed} == {(4,), (5,)}
    assert second.client_params == 3 * 4 + 4 + 4 * 5 + 5
    assert "4 float32 + 5 float32" in format_cuts([second])
