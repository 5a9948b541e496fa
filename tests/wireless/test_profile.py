"""ResNet-18 as `flsplit profile` shows it, against a table worked out layer by layer."""

import pytest
import torch
from torch import nn

from flsplit.cut import CutError
from flsplit.vision import load_torchvision
from flsplit.wireless import profile_model
from flsplit.wireless.measure import effective_flops, measure

# cut, parameters, FLOPs forward, elements of the activation; 2 FLOPs per multiply-accumulate
RESNET18_64 = [
    ("conv1", 9_536, 19_267_584, 65_536),
    ("maxpool", 9_536, 19_267_584, 16_384),
    ("layer1.0", 83_520, 57_016_320, 16_384),
    ("layer1.1", 157_504, 94_765_056, 16_384),
    ("layer2.0", 387_648, 124_125_184, 8_192),
    ("layer2.1", 683_072, 161_873_920, 8_192),
    ("layer3.0", 1_602_112, 191_234_048, 4_096),
    ("layer3.1", 2_782_784, 228_982_784, 4_096),
    ("layer4.0", 6_455_872, 258_342_912, 2_048),
    ("layer4.1", 11_176_512, 296_091_648, 2_048),
    ("fc", 11_180_103, 296_098_816, 7),
]


def rows_of(model, shape):
    return [
        (row.cut, row.client_params, row.client_flops_forward, row.activation_elements)
        for row in profile_model(model, shape).summary()
    ]


def resnet18(classes):
    return load_torchvision().models.resnet18(num_classes=classes)


def cifar_stem(classes):
    model = resnet18(classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def test_resnet18_at_64():
    assert rows_of(resnet18(7), (3, 64, 64)) == RESNET18_64


def test_resnet18_at_32():
    rows = rows_of(resnet18(10), (3, 32, 32))
    assert rows[:-1] == [
        (cut, params, flops // 4, elements // 4)
        for cut, params, flops, elements in RESNET18_64[:-1]
    ]
    last = 2 * 512 * 10
    assert rows[-1] == ("fc", 11_181_642, RESNET18_64[-2][2] // 4 + last, 10)


def test_resnet18_with_a_stem_for_cifar():
    rows = {row[0]: row[1:] for row in rows_of(cifar_stem(10), (3, 32, 32))}
    assert list(rows) == [row[0] for row in RESNET18_64 if row[0] != "maxpool"]
    stem = 2 * 3 * 9 * 64 * 32 * 32
    block, first_of_stage = 150_994_944, 117_440_512
    assert rows["conv1"] == (1_856, stem, 65_536)
    assert rows["layer1.1"][1:] == (stem + 2 * block, 65_536)
    assert rows["layer2.1"][1:] == (stem + 3 * block + first_of_stage, 32_768)
    assert rows["layer3.1"][1:] == (stem + 4 * block + 2 * first_of_stage, 16_384)
    assert rows["layer4.1"][1:] == (stem + 5 * block + 3 * first_of_stage, 8_192)
    assert rows["fc"] == (11_173_962, stem + 5 * block + 3 * first_of_stage + 2 * 512 * 10, 10)


def test_resnet18_at_224():
    rows = {row[0]: row[1:] for row in rows_of(resnet18(7), (3, 224, 224))}
    assert round(rows["fc"][1] / 1e6, 1) == 3627.1
    stages = [rows[f"layer{stage}.1"][2] for stage in (1, 2, 3, 4)]
    assert stages == [200_704, 100_352, 50_176, 25_088]


def test_rows_say_which_places_they_stand_for(resnet18):
    conv1, maxpool, *_ = resnet18.summary()
    assert (conv1.cut, conv1.through) == ("conv1", "relu")
    assert (maxpool.cut, maxpool.through) == ("maxpool", "maxpool")
    every = [row.cut for row in resnet18.rows(every=True)]
    assert every[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert every[-2:] == ["avgpool", "fc"]
    assert resnet18.end.server_params == 0


def test_backward_and_bytes_by_hand():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    first = profile_model(model, (4,)).places[0]
    assert first.client_flops_forward == 2 * 4 * 8
    assert first.client_flops_backward == 2 * first.client_flops_forward
    assert first.server_flops_backward == 2 * 2 * 8 * 2
    assert first.activation_bytes == 4 * 8
    assert first.client_bytes == 4 * (4 * 8 + 8)
    # a linear layer keeps its input for the backward pass
    assert first.saved_bytes == 4 * 4
    # parameters, gradients and one slot, and 10 inputs
    assert first.client_memory_bytes(10, optimizer_slots=1) == 3 * first.client_bytes + 10 * 16


def test_a_name_that_is_no_cut(resnet18):
    with pytest.raises(CutError, match="can't be cut after 'layer9'"):
        resnet18.place("layer9")


def test_measuring(resnet18):
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 2))
    profile = profile_model(model, (64,))
    measured = measure(model, profile, batch_size=4, repeats=2)
    assert list(measured) == [place.cut for place in (*profile.places, profile.end)]
    assert all(one.forward_s > 0 for one in measured.values())
    assert effective_flops(profile, measured) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_models_that_fail_in_training_mode_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), Fussy()

        def forward(self, x):
            return self.second(self.first(x))

    class Fussy(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

        def forward(self, x):
            if self.training:
                raise RuntimeError("not in training")
            return super().forward(x)

    with pytest.raises(CutError, match=r"training mode .* not in training"):
        profile_model(Odd(), (2,))
    assert torch.is_grad_enabled()
