"""Every refusal names the thing, says what is wrong with it and what to do."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.cut import (
    CrossingError,
    CutError,
    EmptySegmentError,
    SharedStateError,
    UnknownCutError,
    UntraceableError,
    UnusedStateError,
    cuts,
    split,
)


class Between(nn.Module):
    """Two layers with something between them that the subclass says."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.plain = torch.ones(4)
        self.calls = 0

    def forward(self, x):
        return self.last(self.between(self.first(x)))

    def between(self, x):
        raise NotImplementedError


class AsksTraining(Between):
    def between(self, x):
        return x * 2 if self.training else x


class ComparesTraining(Between):
    def between(self, x):
        return x * 2 if self.training == True else x  # noqa: E712


class Branches(Between):
    def between(self, x):
        return x * 2 if x.sum() > 0 else x


class Loops(Between):
    def between(self, x):
        for row in x:
            x = x + row
        return x


class ShapeAsNumber(Between):
    def between(self, x):
        return x * int(x.shape[0])


class MakesZeros(Between):
    def between(self, x):
        return x + torch.zeros(4)


class DrawsTorch(Between):
    def between(self, x):
        return x * torch.rand(1).item()


class DrawsPython(Between):
    def between(self, x):
        return x * random.random()


class DrawsNumPy(Between):
    def between(self, x):
        return x * np.random.rand()  # noqa: NPY002


class PlainTensor(Between):
    def between(self, x):
        return x * self.plain


class Counts(Between):
    def between(self, x):
        self.calls += 1
        return x


class Keeps(Between):
    def between(self, x):
        self.kept = x
        return x


class NoGradient(Between):
    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return self.last(x)


class Autocasts(Between):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.first(x)
        return self.last(x)


class MakesLayer(Between):
    def between(self, x):
        return nn.ReLU()(x)


class SwitchesMode(Between):
    def between(self, x):
        self.last.eval()
        return x


class OwnTrain(Between):
    def between(self, x):
        return x

    def train(self, mode=True):
        super().train(mode)
        self.first.eval()
        return self


class ExtraState(Between):
    def between(self, x):
        return x

    def get_extra_state(self):
        return {"version": 1}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AsksTraining, "branches on self.training"),
        (ComparesTraining, "branches on self.training"),
        (Branches, "branches on a value that depends on its input"),
        (Loops, "loops over a value"),
        (ShapeAsNumber, "TypeError"),
        (MakesZeros, "computes a tensor that doesn't depend on its input.*register_buffer"),
        (DrawsTorch, "computes a tensor that doesn't depend on its input"),
        (DrawsPython, "draws a random number"),
        (DrawsNumPy, "draws a random number"),
        (PlainTensor, "neither a parameter nor a buffer.*register_buffer"),
        (Counts, "sets the attribute 'calls'"),
        (Keeps, "sets the attribute 'kept'"),
        (NoGradient, "switches gradients or autocast"),
        (Autocasts, "switches gradients or autocast"),
        (MakesLayer, "ReLU that is not a submodule"),
        (SwitchesMode, "sets the attribute 'training'"),
        (OwnTrain, r"overrides train\(\)"),
        (ExtraState, r"overrides get_extra_state\(\)"),
    ],
)
class TestForwardsThatATraceWouldChange:
    def test_are_refused_around_the_cut(self, kind, reason):
        with pytest.raises(
            UntraceableError, match=rf"the model \({kind.__name__}\).*{reason}"
        ) as e:
            split(kind(), "first")
        assert "OrderedDict(client=front, server=back)" in str(e.value)

    def test_are_refused_by_name_further_in(self, kind, reason):
        with pytest.raises(UntraceableError, match=rf"'1' \({kind.__name__}\).*{reason}"):
            split(nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 2)), "1.first")

    def test_are_left_alone_elsewhere(self, kind, reason):
        model = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 2))
        assert split(model, "0").cut == "0"
        assert split(model, "1").cut == "1"

    def test_show_up_whole_among_the_cuts(self, kind, reason):
        model = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 2))
        if kind in (DrawsTorch, Branches):  # need values to run
            with pytest.raises(CutError, match=r"can't be profiled.*on the meta device"):
                cuts(model, (4,))
            return
        assert [point.cut for point in cuts(model, (4,))] == ["0", "1"]

    def test_are_not_changed_by_the_attempt(self, kind, reason):
        model = kind()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        with pytest.raises(UntraceableError):
            split(model, "first")
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


class Plain(Between):
    def between(self, x):
        return functional.relu(x)


@pytest.mark.parametrize("where", ["", "1"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_hooks_around_the_cut_are_refused(where, register):
    model = nn.Sequential(nn.Linear(4, 4), Plain())
    getattr(model.get_submodule(where), register)(lambda *args: None)
    with pytest.raises(UntraceableError, match=r"has hooks .*wouldn't fire"):
        split(model, "1.first")


def test_hooks_elsewhere_fire():
    model = Plain()
    fired = []
    model.last.register_forward_hook(lambda *args: fired.append(True))
    halves = split(model, "first")
    halves.server(halves.client(torch.ones(2, 4)))
    assert fired == [True]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_compiled_modules_are_refused_around_the_cut_only():
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(UntraceableError, match="compiled by TorchScript"):
        split(script, "0")
    model = nn.Sequential(script, nn.Linear(4, 2))
    with pytest.raises(UntraceableError, match=r"'0' .*compiled by TorchScript"):
        split(model, "0.0")
    halves = split(model, "0")
    batch = torch.ones(2, 4)
    assert torch.equal(halves.server(halves.client(batch)), model(batch))


class TestUnknownCuts:
    def test_nearest_names_first_and_no_more_than_needed(self, torchvision_models):
        with pytest.raises(UnknownCutError, match=r"no submodule 'layer2\.11'") as error:
            split(torchvision_models.resnet18(), "layer2.11")
        message = str(error.value)
        assert "nearest names are 'layer2.1'" in message
        assert "'avgpool', 'fc'" in message
        assert "flsplit.cuts" in message
        assert len(message) < 500

    def test_the_model_itself_is_no_cut(self):
        with pytest.raises(UnknownCutError, match="no submodule ''"):
            split(Plain(), "")

    def test_a_container_that_is_never_called(self):
        class Blocks(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                return x

        with pytest.raises(UnknownCutError, match=r"never calls 'blocks' \(ModuleList\)"):
            split(Blocks(), "blocks")
        assert [point.cut for point in cuts(Blocks(), (4,))] == ["blocks.0"]

    def test_a_module_called_twice(self, torchvision_models):
        with pytest.raises(UnknownCutError, match=r"calls 'layer1.0.relu' 2 times.*'maxpool'"):
            split(torchvision_models.resnet18(), "layer1.0.relu")


class TestCrossing:
    def test_a_residual_block_names_what_crosses_and_the_nearest_clean_cuts(
        self, torchvision_models
    ):
        with pytest.raises(CrossingError) as error:
            split(torchvision_models.resnet18(), "layer1.1.conv1")
        message = str(error.value)
        assert "the output of 'layer1.0'; the output of 'layer1.1.conv1'" in message
        assert "'layer1.0' (before it) and 'layer1.1' (after it)" in message

    def test_numbers_cross_too(self, torchvision_models):
        model = torchvision_models.vit_b_16(image_size=32)
        with pytest.raises(CrossingError) as error:
            split(model, "conv_proj")
        assert "item 0 of .shape of the model's input" in str(error.value)
        assert "The nearest clean cuts are 'encoder.dropout' (after it)" in str(error.value)

    def test_a_skip_around_the_cut(self):
        class Skip(Between):
            def forward(self, x):
                return self.last(x) + self.first(x)

        with pytest.raises(CrossingError, match=r"result of add\(\)|the model's input"):
            split(Skip(), "last")
        assert cuts(Skip(), (4,)) == []

    def test_an_unused_output(self):
        class Drops(Between):
            def forward(self, x):
                self.first(x)
                return self.last(x)

        with pytest.raises(CrossingError, match="the model's input"):
            split(Drops(), "first")


class TestState:
    def test_tied_weights_across_the_cut(self):
        model = Plain()
        model.last.weight = model.first.weight
        with pytest.raises(SharedStateError, match=r"'first.weight = last.weight' on both sides"):
            split(model, "first")
        assert cuts(model, (4,)) == []

    def test_tied_weights_on_one_side_are_fine(self):
        model = nn.Sequential(nn.Linear(4, 4), Plain())
        model[1].last.weight = model[1].first.weight
        halves = split(model, "0")
        assert {"1.first.weight", "1.last.weight"} <= halves.server.state_dict().keys()
        assert cuts(model, (4,))[0].server_params == 24  # one 4 x 4 weight, two biases

    def test_a_module_called_before_and_after_the_cut(self):
        class Again(Between):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            def forward(self, x):
                return self.last(self.norm(self.first(self.norm(x))))

        with pytest.raises(SharedStateError, match=r"'norm\.weight', 'norm\.bias'"):
            split(Again(), "first")

    def test_a_persistent_buffer_on_both_sides(self):
        class Mask(Between):
            def __init__(self):
                super().__init__()
                self.register_buffer("mask", torch.ones(4))

            def forward(self, x):
                return self.last(self.first(x * self.mask) * self.mask)

        with pytest.raises(SharedStateError, match=r"'mask'.*persistent=False"):
            split(Mask(), "first")

    def test_modules_that_forward_never_uses(self):
        model = Plain()
        model.spare = nn.Linear(4, 4)
        with pytest.raises(UnusedStateError, match=r"never uses 'spare.weight', 'spare.bias'"):
            split(model, "first")
        assert cuts(model, (4,)) == []

    def test_spare_modules_inside_a_whole_module_are_fine(self):
        inner = Plain()
        inner.spare = nn.Linear(4, 4)
        model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))
        assert [(point.cut, point.client_params) for point in cuts(model, (4,))] == [
            ("0", 20),
            ("1", 80),
        ]
        assert "1.spare.weight" in split(model, "0").server.state_dict()

    def test_spare_modules_without_state_are_fine(self):
        model = Plain()
        model.spare = nn.Identity()
        assert split(model, "first").cut == "first"

    def test_nothing_left_for_the_server(self):
        with pytest.raises(EmptySegmentError, match=r"after 'last'.*cut earlier"):
            split(Plain(), "last")


class TestSignatures:
    def test_two_inputs(self):
        class Two(Between):
            def forward(self, x, y):
                return self.last(self.first(x) + y)

        with pytest.raises(UntraceableError, match=r"forward\(x, y\) of the model \(Two\)"):
            split(Two(), "first")

    def test_several_outputs(self):
        class Several(Between):
            def forward(self, x):
                x = self.first(x)
                return {"hidden": x, "logits": self.last(x)}

        with pytest.raises(UntraceableError, match=r"\(Several\) returns several values"):
            split(Several(), "first")

    def test_a_constant_output(self):
        class Constant(Between):
            def forward(self, x):
                self.last(self.first(x))
                return self.plain

        with pytest.raises(UntraceableError, match=r"\(Constant\).*neither a parameter nor"):
            split(Constant(), "first")


def test_every_refusal_is_a_value_error():
    assert issubclass(CutError, ValueError)


def test_failed_attempts_leave_torch_as_it_was():
    call = nn.Module.__call__
    with pytest.raises(CutError):
        split(Branches(), "first")
    assert nn.Module.__call__ is call
    assert copy.deepcopy(Plain())(torch.ones(1, 4)).shape == (1, 4)
