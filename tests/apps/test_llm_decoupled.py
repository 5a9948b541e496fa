"""FSL-SAGE and CSE-FSL on sequences: auxiliary models with logits of every position."""

import pytest
import torch
from llm.auxiliary import SequenceHead, next_token
from llm.models import load_base
from llm.server_app import strategy_of
from llm_runs import config_of, new_model, save_tiny, trained


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def test_the_loss_is_the_models_own(tiny):
    model = load_base(config_of(tiny))
    ids = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = labels[2] = -100
    output = model(input_ids=ids, labels=labels)
    assert torch.equal(next_token(output, labels), output.loss)
    assert torch.equal(next_token(output.logits, labels), output.loss)


def test_no_position_of_an_auxiliary_model_sees_a_later_one():
    head = SequenceHead((5, 8), 11, num_blocks=2).eval()
    smashed = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    other = smashed.clone()
    other[:, 3:] *= -1  # a constant would be taken away by the norms
    assert head(smashed).shape == (2, 5, 11)
    assert torch.equal(head(smashed)[:, :3], head(other)[:, :3])
    assert not torch.allclose(head(smashed)[:, 3:], head(other)[:, 3:])


def test_a_head_begins_as_the_models_last_layer(tiny):
    config = config_of(tiny, strategy="fsl-sage")
    model = new_model(config)
    (weight,) = (p for name, p in model.named_parameters() if name.endswith("save.default.weight"))
    trained = weight.detach().clone().mul_(2)
    weight.data.copy_(trained)
    auxiliary = strategy_of(config, model).auxiliary((5, 16), 257)
    weight.data.zero_()  # what happens to the model later is nothing to it
    assert torch.equal(auxiliary.head.weight, trained)
    assert torch.count_nonzero(auxiliary.blocks[0].linear1.bias) == 0


def test_alignment_brings_emulated_gradients_nearer_to_the_true_ones(tiny):
    alignment = "align-every = 1, align-epochs = 80, auxiliary-lr = 0.02"
    arguments = f"{{{alignment}, buffer-size = 8, upload-every = 2}}"
    config = config_of(
        tiny, strategy="fsl-sage", strategy_args=arguments, learning_rate=0.001, local_steps=4
    )
    history = trained(config, 2)[0].history
    assert [entry.left_out for entry in history] == [[], []]
    found = history[1].metrics
    assert found["cosine-after-alignment"] > found["cosine-before-alignment"] + 0.1
    assert found["alignment-diverged"] == 0
    # two uploads of 4 sequences of 16 positions, of 2 clients; nothing comes down
    assert history[1].traffic.logical["activations-up"] == 2 * 2 * 4 * 16 * 16 * 4
    assert history[1].traffic.logical["gradients-down-unicast"] == 0


def test_clients_of_cse_fsl_train_auxiliary_models_of_sequences(tiny):
    config = config_of(tiny, strategy="cse-fsl", strategy_args="{upload-every = 1}")
    history = trained(config, 2)[0].history
    assert [entry.left_out for entry in history] == [[], []]
    assert history[1].evaluation["loss"] < history[0].evaluation["loss"]
