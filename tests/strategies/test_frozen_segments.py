"""What nobody trains travels once, gets no gradients, and stays bit for bit what it was."""

import pytest
import torch
from reference import (
    MOMENTUM,
    NUM_CLASSES,
    WrappedGrid,
    assert_bit_equal,
    fresh,
    make_parts,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch import nn

from flsplit.strategies import (
    CSEFSL,
    GAPSL,
    PSL,
    SGLR,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)


class Adapted(nn.Module):
    """A frozen layer with a small trainable detour around it, as LoRA has it."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.base = nn.Linear(width_in, width_out).requires_grad_(False)
        self.down, self.up = nn.Linear(width_in, 2, bias=False), nn.Linear(2, width_out, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def adapted_net():
    net = nn.Sequential()
    for name, module in (("front", Adapted(8, 6)), ("middle", Adapted(6, 5))):
        net.add_module(name, module)
    net.add_module("head", nn.Linear(5, NUM_CLASSES))
    return net


def frozen_net():
    net = adapted_net()
    net.front.requires_grad_(False)
    return net


ADAPTER_BYTES, BASE_BYTES = 4 * (8 * 2 + 2 * 6), 4 * (8 * 6 + 6)


@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SplitFedV2, SequentialSL, SGLR, GAPSL])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_after_the_first_round_only_adapters_travel(strategy, cache):
    result = run_split(
        strategy, adapted_net, make_parts([8, 8]), rounds=3, cache=cache, fraction_evaluate=0.0
    )
    assert [entry.left_out for entry in result.history] == [[], [], []]
    first, *later = [entry.traffic.logical for entry in result.history]
    assert first["client-segments-down"] == 2 * (ADAPTER_BYTES + BASE_BYTES)
    hands_over = strategy in (SplitFedV1, SplitFedV2, SequentialSL)
    for logical in later:
        assert logical["client-segments-up"] == hands_over * 2 * ADAPTER_BYTES
        assert logical["client-segments-down"] == hands_over * 2 * ADAPTER_BYTES


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2, SequentialSL])
def test_frozen_weights_stay_as_they_were_bit_for_bit(strategy):
    result = run_split(strategy, adapted_net, make_parts([8, 7, 9]), rounds=3)
    before, after = fresh(adapted_net).state_dict(), weights_of(result.arrays)
    for name in before:
        assert torch.equal(before[name], after[name]) == (".base." in name), name


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("net", [adapted_net, frozen_net])
def test_one_client_is_bit_equal_to_training_the_whole_model(net, cache):
    result = run_split(
        PSL, net, make_parts([14]), optimizer=_of_trainable, share_client_segments=True,
        cache=cache,
    )  # fmt: skip
    weights, _ = train_in_turn(net, make_parts([14]), optimizer=_of_trainable, rounds=2)
    assert_bit_equal(whole_of(result), weights)


def _of_trainable(parameters, lr):
    return MOMENTUM([p for p in parameters if p.requires_grad], lr=lr)


@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SplitFedV2, SequentialSL, SGLR, GAPSL])
def test_a_client_without_anything_to_train_gets_no_gradients(strategy):
    result = run_split(strategy, frozen_net, make_parts([8, 8]), rounds=3)
    for entry in result.history:
        logical = entry.traffic.logical
        assert logical["gradients-down-unicast"] == logical["gradients-down-broadcast"] == 0
        assert logical["client-segments-up"] == 0
        assert (entry.rows, entry.left_out) == (16, [])
    assert result.history[-1].traffic.logical["client-segments-down"] == 0


def test_decoupled_clients_hand_over_adapters_only():
    result = run_split(CSEFSL, adapted_net, make_parts([8, 8]), rounds=2, upload_every=1)
    assert result.history[1].traffic.logical["client-segments-up"] == 2 * ADAPTER_BYTES


def test_a_client_that_lost_its_state_gets_everything_again():
    class Forgetful(WrappedGrid):
        """Takes the clients' states away after the first round."""

        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            if any("server-round" in r and r["server-round"] == 2 and "seed" in r
                   for m in messages for r in m.content.config_records.values()):  # fmt: skip
                for context in self.inner._contexts.values():
                    context.state.clear()
            return self.inner.send_and_receive(messages, timeout=timeout)

    options = {"rounds": 2, "cache": False, "fraction_evaluate": 0.0}
    whole = run_split(SplitFedV2, adapted_net, make_parts([8, 8]), **options)
    lost = run_split(SplitFedV2, adapted_net, make_parts([8, 8]), wrap=Forgetful, **options)
    assert lost.history[1].restarted == ["0", "1"]
    logical = lost.history[1].traffic.logical
    assert logical["client-segments-down"] == 2 * (2 * ADAPTER_BYTES + BASE_BYTES)
    assert lost.history[1].left_out == []
    assert whole.history[0].loss == lost.history[0].loss
