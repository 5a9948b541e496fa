"""Every refusal names the thing, says what is wrong with it and what to do; the rest is exact."""

import copy
import random
from collections import deque
from functools import lru_cache, partial
from itertools import count, cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from zoo_step import assert_exact

from flsplit.cut import (
    Crossing,
    CrossingError,
    CutError,
    EmptySegmentError,
    ExampleError,
    SharedStateError,
    UnknownCutError,
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
        return functional.relu(x)


class AsksTraining(Between):
    def between(self, x):
        return x * 2 if self.training else x


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


class PlainTensor(Between):
    def between(self, x):
        return x * self.plain


class Autocasts(Between):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.first(x)
        return self.last(x.float())


class MakesLayer(Between):
    def between(self, x):
        return nn.ReLU()(x)


class SwitchesMode(Between):
    def between(self, x):
        self.last.eval()
        return x


class OwnTrain(Between):
    def train(self, mode=True):
        super().train(mode)
        self.first.eval()
        return self


class BranchesBefore(Between):
    """The branch is on the client's side, and the server has to take the same."""

    def forward(self, x):
        x = self.first(x)
        x = -x if x.sum() > 0 else x
        return self.last(self.between(x))


class ScalesBefore(Between):
    def forward(self, x):
        scale = self.first(x).abs().max().item()
        return self.last(self.between(self.first(x))) * scale


@pytest.mark.parametrize(
    "kind",
    [
        AsksTraining, Branches, Loops, ShapeAsNumber, MakesZeros, DrawsTorch, PlainTensor,
        Autocasts, MakesLayer, SwitchesMode, OwnTrain, BranchesBefore,
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_forward_may_do_around_the_cut(kind, inside):
    model, cut = (nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 2)), "1.first")
    if not inside:
        model, cut = kind(), "first"
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert_exact(model, cut, (torch.randn(5, 4),))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_numbers_of_the_clients_part_cross_beside_the_trace():
    model = ScalesBefore()
    assert_exact(model, "first#2", (torch.randn(5, 4),))
    halves = split(model, "first#2", torch.randn(5, 4))
    one, other = halves.client(torch.randn(5, 4)), halves.client(torch.randn(5, 4))
    assert isinstance(one, Crossing)
    assert one.trace.digest == other.trace.digest
    assert one.trace.numbers != other.trace.numbers


def test_a_new_way_through_forward_is_looked_at_first():
    halves = split(copy.deepcopy(model := BranchesInFront()), "last", torch.ones(3, 4))
    traces = set()
    for sign in (1, -1, 1):
        data = sign * 10 * torch.sign(model.first.weight.sum(0)) * torch.rand(3, 4)
        crossing = halves.client(data)
        traces.add(crossing.trace.digest)
        assert torch.equal(halves.server(crossing), model(data))
    assert len(traces) == 2


class BranchesInFront(Between):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        x = x.sigmoid() if x.sum() > 0 else x.tanh()
        return self.head(self.last(x))


class DrawsPython(Between):
    def forward(self, x):
        return self.last(self.first(x * random.random()))


class DrawsNumPy(Between):
    def forward(self, x):
        return self.last(self.first(x * np.random.rand()))  # noqa: NPY002


class Counts(Between):
    def between(self, x):
        self.calls += 1
        return x


class NoGradient(Between):
    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return self.last(x)


class Remembers(Between):
    kept = None

    def between(self, x):
        if self.kept is None:
            self.kept = x.detach().tanh().mean(0)
        return x * self.kept


class HookAfterTheCut(Between):
    """A hook on a value that was used before the hook was there: no rule sees it."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        y = self.middle(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 2)
        return self.last(x + y)


class ExtraState(Between):
    def get_extra_state(self):
        return {"version": 1}


@pytest.mark.parametrize(
    ("kind", "cut", "reason"),
    [
        (DrawsPython, "first", "draws a random number in Python"),
        (DrawsNumPy, "first", "draws a random number in Python or NumPy"),
        (Counts, "first", "counts in 'calls'"),
        (NoGradient, "first", "'first' lies in a region without gradients"),
        (Remembers, "first", "keeps a value .* from one batch for the next"),
        (HookAfterTheCut, "middle", "computes something else: .* differs"),
    ],
)
def test_what_the_other_side_cannot_repeat_is_refused(kind, cut, reason):
    model = kind()
    with pytest.raises(CutError, match=reason):
        split(model, cut, torch.randn(3, 4))


def kept_tensor(**options):
    def register(module):
        module.register_buffer("kept", torch.zeros(4), **options)

    return register


def kept(make):
    return lambda module: setattr(module, "kept", make())


def counted(module, x):
    module.kept = module.kept + 1
    return x + module.kept


CHANGES = {
    "float": (kept(float), counted),
    "list": (kept(list), lambda module, x: module.kept.append(1)),
    "dict": (kept(dict), lambda module, x: module.kept.update(calls=len(module.kept) + 1)),
    "nested": (kept(lambda: {"a": [0]}), lambda module, x: module.kept["a"].append(1)),
    "queue": (kept(deque), lambda module, x: module.kept.append(1)),
    "object": (kept(SimpleNamespace), lambda m, x: vars(m.kept).update(n=len(str(vars(m.kept))))),
    "array": (kept(lambda: np.zeros(5000)), lambda module, x: np.add.at(module.kept, 2000, 1)),
    "Random": (kept(random.Random), lambda module, x: x * module.kept.random()),
    "NumPy": (kept(np.random.default_rng), lambda module, x: x * module.kept.random()),
    "torch": (kept(torch.Generator), lambda m, x: x + torch.rand(4, generator=m.kept)),
    "count": (kept(count), lambda module, x: x * next(module.kept)),
    "cycle": (kept(lambda: cycle([1, 2])), lambda module, x: x * next(module.kept)),
    "iterator": (kept(lambda: iter(range(99))), lambda module, x: x * next(module.kept)),
    "tensor": (kept(lambda: torch.zeros(4)), lambda module, x: x + module.kept.add_(1)),
    "other tensor": (kept(lambda: torch.zeros(4)), counted),
    "tensor in list": (kept(lambda: [torch.zeros(4)]), lambda m, x: x + m.kept[0].add_(1)),
    "buffer": (kept_tensor(persistent=False), lambda module, x: x + module.kept.add_(1)),
    "other buffer": (kept_tensor(persistent=False), counted),
}


def keeping(prepare, change):
    class Keeping(Between):
        def __init__(self):
            super().__init__()
            prepare(self)

        def between(self, x):
            changed = change(self, x)
            return changed if isinstance(changed, torch.Tensor) else x

    return nn.Sequential(nn.Linear(4, 4), Keeping(), nn.Linear(4, 4))


@pytest.mark.parametrize("cut", ["0", "1"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_forward_changes_outside_the_state_dict_is_refused_by_name(what, cut):
    with pytest.raises(CutError, match=r"forward (counts in|changes) '1.kept'.*register_buffer"):
        split(keeping(*CHANGES[what]), cut, torch.randn(3, 4))


def cached(module, x):
    if module.kept is None or len(module.kept) < len(x):
        module.kept = torch.arange(len(x), dtype=x.dtype)
    return x + module.kept[: len(x), None]


def shown(module, x):
    module.kept = functional.dropout(x)


STAYS = {
    "persistent buffer": (kept_tensor(), lambda module, x: x + module.kept.add_(1)),
    "constant buffer": (kept_tensor(persistent=False), lambda module, x: x + module.kept),
    "what is made once": (kept(lambda: None), cached),
    "what nobody reads": (kept_tensor(persistent=False), shown),
    "features": (kept(lambda: torch.zeros(4)), shown),
    "what begins anew": (kept(list), lambda module, x: setattr(module, "kept", [x.sum()])),
    "NaN": (kept(lambda: float("nan")), lambda module, x: x),
    "what can't be told": (kept(lambda: {"f": lambda x: x}), lambda m, x: m.kept["f"](x)),
}


@pytest.mark.parametrize("cut", ["0", "1"])
@pytest.mark.parametrize("what", STAYS)
def test_what_carries_nothing_from_batch_to_batch_is_no_state(what, cut):
    split(keeping(*STAYS[what]), cut, torch.randn(3, 4))


def doubled(layer, x):
    return layer(x) * 2


class Held(Between):
    """Calls its last layer by a function that the subclass makes."""

    def __init__(self):
        super().__init__()
        self.call = self.make()

    def forward(self, x):
        return self.call(self.first(x))


class ByClosure(Held):
    def make(self):
        return lambda x: self.last(x)


class ByMethodInClosure(Held):
    def make(self):
        call = self.last.forward
        return lambda x: call(x)


class ByDefault(Held):
    def make(self):
        return lambda x, weight=self.last.weight: x @ weight


class ByPartialOfClosure(Held):
    def make(self):
        return partial(lambda x: self.last(x))


class ByCache(Held):
    def make(self):
        return lru_cache(self.last)


class ByMethod(Held):
    def make(self):
        return self.through

    def through(self, x):
        return self.last(x)


class ByPartial(Held):
    def make(self):
        return partial(doubled, self.last)


class ByTeacher(Held):
    """A frozen module that is no part of the model may be held."""

    def make(self):
        teacher = nn.Linear(4, 4).requires_grad_(False)
        return lambda x: x + teacher(x)

    def forward(self, x):
        return self.last(super().forward(x))


@pytest.mark.parametrize("kind", [ByClosure, ByMethodInClosure, ByDefault, ByPartialOfClosure])
def test_a_function_that_holds_a_part_of_the_model_is_refused_by_name(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind())
    expected = r"the function in '1.call' holds '1\S*' of the model by itself.* Write a method"
    with pytest.raises(CutError, match=expected):
        split(model, "0")
    with pytest.raises(CutError, match=expected):
        split(model, "0", torch.randn(2, 4))
    with pytest.raises(CutError, match=expected):
        cuts(model, (4,))


def test_a_cache_of_a_layer_is_refused():
    with pytest.raises(CutError, match="the function in 'call' holds 'last' of the model"):
        split(ByCache(), "first")


@pytest.mark.parametrize("kind", [ByMethod, ByPartial, ByTeacher])
def test_functions_that_are_copied_with_the_model_are_fine(kind):
    assert_exact(kind(), "first", (torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_forward_hook", "forward hook"),
        ("register_forward_pre_hook", "forward pre-hook"),
        ("register_full_backward_hook", "backward hook"),
    ],
)
def test_a_hook_that_holds_the_model_is_refused_by_name(register, kind):
    class Hooked(Between):
        def __init__(self):
            super().__init__()
            getattr(self.last, register)(lambda *args: None if self.training else args[-1])

    with pytest.raises(CutError, match=f"a {kind} of 'last' holds Hooked of the model"):
        split(Hooked(), "first")


def test_a_hook_may_be_a_method():
    class Hooked(Between):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 4)
            self.last.register_forward_hook(self.add)

        def add(self, module, args, output):
            return output + self.extra(output)

    assert_exact(Hooked(), "first", (torch.randn(2, 4),))


@pytest.mark.parametrize("where", ["", "1"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_fire_on_their_side(where, register):
    model = nn.Sequential(nn.Linear(4, 4), Between())
    getattr(model.get_submodule(where), register)(lambda *args: None)
    assert_exact(model, "1.first", (torch.randn(3, 4),))


def test_a_hook_may_change_what_the_cut_layer_returns():
    model = Between()
    model.first.register_forward_hook(lambda module, args, output: output * 2)
    assert_exact(model, "first", (torch.randn(3, 4),))


def test_hooks_elsewhere_fire():
    model = Between()
    fired = []
    model.last.register_forward_hook(lambda *args: fired.append(True))
    halves = split(model, "first")
    smashed = halves.client(torch.ones(2, 4))
    fired.clear()
    halves.server(smashed)
    assert fired == [True]


def test_a_model_may_keep_the_handle_of_a_hook():
    """As models of transformers do, when they compute layers again in the backward."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert_exact(model, "0", (torch.randn(2, 4),))


class GivesToACheckpoint(nn.Module):
    """A mask is made before the cut, given to the checkpoint around it, and used after it."""

    def __init__(self):
        super().__init__()
        self.front, self.both, self.head = nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.Linear(4, 2)

    def forward(self, x):
        rows = self.front(x)
        mask = (rows > 0).to(rows.dtype)
        return self.head(checkpoint(self.both, rows, mask, use_reentrant=False) * mask)


def test_a_cut_inside_a_checkpoint_that_keeps_what_crosses_is_refused():
    with pytest.raises(CrossingError, match="cut after the checkpoint"):
        assert_exact(GivesToACheckpoint(), "both", (torch.randn(2, 4),))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_compiled_modules_may_lie_around_the_cut_but_not_be_cut():
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(CutError, match="compiled by TorchScript"):
        split(script, "0")
    model = nn.Sequential(script, nn.Linear(4, 2))
    with pytest.raises(CutError, match=r"never calls '0.0'"):
        split(model, "0.0")
    halves = split(model, "0")
    batch = torch.ones(2, 4)
    assert torch.equal(halves.server(halves.client(batch)), model(batch))
    assert list(halves.client.state_dict()) == list(model.state_dict())[:4]


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
            split(Between(), "")

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
        model = torchvision_models.resnet18()
        with pytest.raises(UnknownCutError, match=r"calls 'layer1.0.relu' 2 times.*'maxpool'"):
            split(model, "layer1.0.relu")
        with pytest.raises(UnknownCutError, match=r"calls 'layer1.0.relu' 2 times"):
            split(model, "layer1.0.relu#3")
        with pytest.raises(UnknownCutError, match="which call it is"):
            split(model, "layer1.0.relu#x")

    def test_the_call_may_be_said(self, torchvision_models):
        model = torchvision_models.resnet18(num_classes=5)
        assert_exact(model, "layer1.0.relu#2", (torch.randn(2, 3, 32, 32),))


class TestCrossing:
    def test_a_residual_block_sends_two_tensors(self, torchvision_models):
        model, data = torchvision_models.resnet18(num_classes=5), torch.randn(2, 3, 32, 32)
        crossing = split(model, "layer1.1.conv1", data).client(data)
        assert [v.shape for v in crossing.values.values()] == [(2, 64, 8, 8)] * 2
        assert_exact(model, "layer1.1.conv1", (data,))

    def test_an_input_is_refused_by_name_unless_it_is_shared(self):
        class Skip(Between):
            def forward(self, x, extra):
                return self.last(self.first(x)) + extra

        example = (torch.randn(2, 4), torch.randn(2, 4))
        with pytest.raises(CrossingError, match=r"the input 'extra' \(2, 4\).*share=\('extra',\)"):
            split(Skip(), "first", example)
        assert_exact(Skip(), "first", example, share=("extra",))

    def test_what_is_made_of_an_input_alone_is_refused_with_a_cut_that_works(self):
        class Mask(Between):
            def forward(self, x):
                mask = x > 0
                return self.last(self.first(x) * mask)

        with pytest.raises(CrossingError, match=r"made of the input 'x' alone.*'last'|near it"):
            split(Mask(), "first", torch.randn(2, 4))

    def test_a_server_without_the_trace_says_that_it_needs_it(self):
        halves = split(BranchesInFront(), "last", torch.ones(3, 4))
        with pytest.raises(CrossingError, match="needs the client's Crossing"):
            halves.server(torch.ones(3, 4))

    def test_smashed_data_that_fits_no_input(self, torchvision_models):
        model = torchvision_models.vit_b_16(image_size=32, num_classes=3)
        halves = split(model, "encoder.dropout")
        with pytest.raises(ExampleError, match=r"shape \(2, 7, 768\) came, and no input"):
            halves.server(torch.ones(2, 7, 768))


class TestState:
    def test_tied_weights_across_the_cut(self):
        model = Between()
        model.last.weight = model.first.weight
        with pytest.raises(SharedStateError, match=r"'first.weight = last.weight' on both sides"):
            split(model, "first")
        assert cuts(model, (4,)) == []

    def test_frozen_weights_may_be_tied_across_the_cut(self):
        model = Between()
        model.last.weight = model.first.weight
        model.first.weight.requires_grad_(False)
        assert_exact(model, "first", (torch.randn(2, 4),))
        client, server = split(model, "first").divide(model.state_dict())
        assert "first.weight" in client
        assert {"first.weight", "last.weight"} <= server.keys()

    def test_tied_weights_on_one_side_are_fine(self):
        model = nn.Sequential(nn.Linear(4, 4), Between())
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

    def test_a_constant_buffer_may_be_on_both_sides(self):
        class Mask(Between):
            def __init__(self):
                super().__init__()
                self.register_buffer("mask", torch.ones(4))

            def forward(self, x):
                return self.last(self.first(x * self.mask) * self.mask)

        assert_exact(Mask(), "first", (torch.randn(2, 4),))

    def test_modules_that_forward_never_uses_are_the_servers(self):
        model = Between()
        model.spare = nn.Linear(4, 4)
        assert_exact(model, "first", (torch.randn(2, 4),))
        assert "spare.weight" in split(model, "first").server.state_dict()

    def test_spare_modules_inside_a_whole_module_stay_there(self):
        inner = Between()
        inner.spare = nn.Linear(4, 4)
        model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))
        points = [(p.cut, p.client_params) for p in cuts(model, (4,))]
        assert points == [("0", 20), ("1.first", 40), ("1.last", 80)]
        assert "1.spare.weight" in split(model, "0").server.state_dict()
        assert "1.spare.weight" in split(model, "1").client.state_dict()

    def test_nothing_left_for_the_server(self):
        with pytest.raises(EmptySegmentError, match=r"after 'last'.*cut earlier"):
            split(Between(), "last")

    def test_state_of_a_modules_own(self):
        with pytest.raises(CutError, match="state dict in a way of its own"):
            split(ExtraState(), "first")


class TestSignatures:
    def test_without_an_example_one_tensor_is_tried(self):
        class Two(Between):
            def forward(self, x, y):
                return self.last(self.first(x) + y)

        with pytest.raises(ExampleError, match=r"give split.. an example"):
            split(Two(), "first")

    def test_an_input_to_share_that_forward_does_not_have(self):
        for share in (("msk",), "msk"):
            with pytest.raises(CutError, match=r"share has 'msk', but the inputs .* are 'x'"):
                split(Between(), "first", torch.randn(2, 4), share=share)
            with pytest.raises(CutError, match="share has 'msk'"):
                cuts(Between(), (4,), share=share)

        class Anything(Between):
            def forward(self, x, **more):
                return super().forward(x)

        split(Anything(), "first", torch.randn(2, 4), share="msk")

    def test_several_outputs(self):
        class Several(Between):
            def forward(self, x):
                x = self.first(x)
                return {"hidden": x, "logits": self.last(x)}

        assert_exact(Several(), "first", (torch.randn(2, 4),))

    def test_labels_that_only_the_server_has(self):
        class Own(Between):
            def forward(self, x, labels=None):
                logits = self.last(self.between(self.first(x)))
                return logits if labels is None else functional.cross_entropy(logits, labels)

        model, x, y = Own(), torch.randn(3, 4), torch.tensor([0, 1, 2])
        halves = split(model, "first", x)
        assert torch.equal(halves.server(halves.client(x), labels=y), model(x, labels=y))


def test_a_random_number_that_another_thread_draws_is_none_of_forwards():
    """It draws in the second of the forwards that are looked at, and in no other."""
    forwards = []

    class Disturbed(Between):
        def forward(self, x):
            forwards.append(x)
            if len(forwards) == 2:
                random.random()
            return self.last(self.first(x))

    split(Disturbed(), "first", torch.randn(2, 4))
    assert len(forwards) > 2


class Keeps(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.register_buffer("seen", first)

    def forward(self, x):
        unseen = self.seen is None or not self.seen.numel()
        self.seen = x.detach().mean() if unseen else 0.9 * self.seen + 0.1 * x.detach().mean()
        return x - self.seen


@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_buffer_that_forward_makes_needs_a_first_value(cut):
    def build(first):
        return nn.Sequential(nn.Linear(4, 4), Keeps(first), nn.Linear(4, 2))

    with pytest.raises(CutError, match=r"the buffer '1.seen', which was None: .* first value"):
        split(build(None), cut)
    assert_exact(build(torch.empty(0)), cut, (torch.randn(3, 4),))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("cut", ["first", "second"])
def test_a_forward_that_moves_frozen_parameters_is_refused(cut, in_place):
    class Averages(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
            self.slow = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x):
            x = self.first(x)
            moved = 0.9 * self.slow.weight.detach() + 0.1 * self.second.weight.detach()
            if in_place:
                with torch.no_grad():
                    self.slow.weight.copy_(moved)
            else:
                self.slow.weight.data = moved
            return self.third(self.second(x + self.slow(x)))

    with pytest.raises(CutError, match=r"changes the frozen parameter 'slow.weight' .*buffer"):
        split(Averages(), cut, torch.randn(3, 4))


def test_every_refusal_is_a_value_error():
    assert issubclass(CutError, ValueError)


def test_failed_attempts_leave_torch_as_it_was():
    model, call = NoGradient(), nn.Module.__call__
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(CutError):
        split(model, "first")
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
