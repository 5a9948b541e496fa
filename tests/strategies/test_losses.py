"""Any loss trains what plain torch trains, and means over batches and clients are exact."""

import copy
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord
from reference import (
    assert_bit_equal,
    assert_close,
    make_parts,
    plain_net,
    run_split,
    weights_of,
    whole_of,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, ModelLoss, client_app
from flsplit.errors import ConfigError, DataError, NotEnoughClientsError
from flsplit.losses import Criterion
from flsplit.strategies import CSEFSL, EPSL, FSLSAGE, GAPSL, PSL, SplitFedV1, SplitFedV2

RNG = torch.Generator().manual_seed(0)
INPUTS, IMAGES = torch.randn(12, 5, generator=RNG), torch.randn(12, 2, 4, 4, generator=RNG)
CLASSES = torch.randint(3, (12,), generator=RNG)
MASKS = torch.randint(3, (12, 4, 4), generator=RNG)
MASKS[:, 0] = 255
TOKENS = torch.randint(3, (12, 5), generator=RNG)


def dense(outputs):
    return lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs))


def pixels():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))


def words():
    return nn.Sequential(nn.Embedding(3, 6), nn.Tanh(), nn.Linear(6, 3))


def flat(logits, tokens):
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def counted(logits, tokens):
    counts = tokens != 2
    each = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return (each * counts.flatten()).sum(), counts.sum()


def of_counted(logits, tokens):
    total, weight = counted(logits, tokens)
    return total / weight


def two_parts(logits, labels):
    return functional.mse_loss(logits[:, 0], labels["far"]) + functional.cross_entropy(
        logits[:, 1:], labels["kind"][0]
    )


class Named(torch.utils.data.Dataset):
    """Inputs with labels that are a dict and a tuple."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return INPUTS[row], {"far": INPUTS[row].sum(), "kind": (CLASSES[row],)}


FLOATS = torch.rand(12, generator=RNG)
KINDS = {
    "class weights": (dense(3), INPUTS, CLASSES, nn.CrossEntropyLoss(torch.tensor([1.0, 20.0, 3]))),
    "smoothing": (dense(3), INPUTS, CLASSES, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "partial": (
        dense(3), INPUTS, CLASSES, partial(functional.cross_entropy, ignore_index=1),
    ),
    "probabilities": (
        dense(3), INPUTS, torch.rand(12, 3, generator=RNG).softmax(1), nn.CrossEntropyLoss(),
    ),
    "masks": (pixels, IMAGES, MASKS, nn.CrossEntropyLoss(ignore_index=255)),
    "tokens": (words, TOKENS, TOKENS.roll(1, 1), flat),
    "sum and weight": (words, TOKENS, TOKENS.roll(1, 1), counted),
    "one logit": (dense(1), INPUTS, (FLOATS > 0.5).float()[:, None], nn.BCEWithLogitsLoss()),
    "flat logit": (
        lambda: nn.Sequential(*dense(1)(), nn.Flatten(0)), INPUTS, (FLOATS > 0.5).float(),
        functional.binary_cross_entropy_with_logits,
    ),
    "multi-label": (
        dense(3), INPUTS, (torch.rand(12, 3, generator=RNG) > 0.5).float(), nn.BCEWithLogitsLoss(),
    ),
    "counts": (
        lambda: nn.Sequential(*dense(1)(), nn.Flatten(0)), INPUTS, CLASSES,
        nn.PoissonNLLLoss(),
    ),
    "regression": (dense(2), INPUTS, INPUTS[:, :2] * 2, nn.HuberLoss()),
    "margins": (dense(3), INPUTS, CLASSES, nn.MultiMarginLoss()),
}  # fmt: skip


def run(strategy, build, parts, loss, rounds=2, **options):
    torch.manual_seed(0)
    model = build()
    app = client_app(
        model=build, cut="1", data=lambda c: parts[c.node_config["partition-id"]], device="cpu"
    )
    settings = {"server_lr": 0.3, "batch_size": 12, "device": "cpu"} | options
    result = strategy(model=model, cut="1", loss=loss, **settings).start(
        LocalGrid(app, len(parts), progress=False), ArrayRecord(model.state_dict()), rounds
    )
    return result, model


def plain(build, inputs, labels, loss, rounds=2):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(rounds):
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_trains_what_torch_trains_and_is_evaluated_as_a_whole(kind):
    """An epoch is one batch, so its order only changes the last bits of sums."""
    build, inputs, labels, loss = KINDS[kind]
    data = TensorDataset(inputs, labels)
    result, _ = run(
        SplitFedV1, build, [(data, data)], loss, evaluate_batch_size=5, fraction_evaluate=1.0
    )
    mean = of_counted if loss is counted else loss
    expected = plain(build, inputs, labels, mean)
    assert_close(weights_of(result.arrays), expected.state_dict(), 1e-5)
    whole = float(mean(expected.eval()(inputs), labels))
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("strategy", [PSL, SplitFedV2, SplitFedV1])
def test_labels_may_be_a_nesting(strategy):
    data = Named()
    result, _ = run(strategy, dense(4), [(data, data)], two_parts, share_client_segments=True)
    labels = {"far": INPUTS.sum(1), "kind": (CLASSES,)}
    expected = plain(dense(4), INPUTS, labels, two_parts)
    found = weights_of(result.arrays)
    assert_close(found, {k: v for k, v in expected.state_dict().items() if k in found}, 1e-5)
    assert result.evaluate_metrics_clientapp[2]["num-examples"] == 12


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_loss_of_an_evaluation_does_not_depend_on_who_holds_what(size):
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 20.0, 3]), ignore_index=2)
    build = dense(3)
    parts = [TensorDataset(INPUTS[:7], CLASSES[:7]), TensorDataset(INPUTS[7:], CLASSES[7:])]
    result, model = run(
        SplitFedV1, build, [(part, part) for part in parts], loss, 1, evaluate_batch_size=size
    )
    model.load_state_dict(result.arrays.to_torch_state_dict())
    right = float(loss(model.eval()(INPUTS), CLASSES))
    scores = result.evaluate_metrics_clientapp[1]
    assert scores["loss"] == pytest.approx(right, rel=1e-5)
    counts = CLASSES != 2
    correct = (model(INPUTS).argmax(1) == CLASSES)[counts].float().mean()
    assert scores["accuracy"] == pytest.approx(float(correct))


class OwnLoss(nn.Module):
    """As a model of transformers: gives its loss where it gets labels."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("strategy", [PSL, SplitFedV2, SplitFedV1])
def test_a_model_may_compute_its_own_loss(strategy):
    torch.manual_seed(0)
    model = OwnLoss()
    whole = copy.deepcopy(model)
    data = TensorDataset(INPUTS, CLASSES)
    app = client_app(model=OwnLoss, cut="body", data=lambda _: (data, data), device="cpu")
    result = strategy(
        model=model, cut="body", loss=ModelLoss(), server_lr=0.3, batch_size=12, device="cpu"
    ).start(LocalGrid(app, 1, progress=False), ArrayRecord(model.state_dict()), 2)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        whole(INPUTS, CLASSES)["loss"].backward()
        optimizer.step()
    found = weights_of(result.arrays)
    assert_close(found, {k: v for k, v in whole.state_dict().items() if k in found}, 1e-5)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] > 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_outputs_its_loss_is_the_first_scalar(order):
    outputs = torch.zeros(4, 3), torch.tensor(2.0)

    assert ModelLoss()(tuple(outputs[i] for i in order), CLASSES[:4]) == 2.0
    with pytest.raises(ConfigError, match="without a loss"):
        ModelLoss()((torch.zeros(4, 3), None), CLASSES[:4])


def test_two_clients_of_such_a_model_are_not_pooled_into_one_mean():
    parts = [TensorDataset(INPUTS[:4], CLASSES[:4]), TensorDataset(INPUTS[4:], CLASSES[4:])]
    results = []
    for build, loss in ((OwnLoss, ModelLoss()), (OwnLoss, lambda out, y: _entropy(out, y))):
        torch.manual_seed(0)
        model = build()
        app = client_app(
            model=build, cut="body", data=lambda c: parts[c.node_config["partition-id"]],
            device="cpu",
        )  # fmt: skip
        strategy = PSL(model=model, cut="body", loss=loss, server_lr=0.3, device="cpu")
        grid = LocalGrid(app, 2, progress=False)
        results.append(strategy.start(grid, ArrayRecord(model.state_dict()), 1))
    assert_bit_equal(weights_of(results[0].arrays), weights_of(results[1].arrays))


def _entropy(out, labels):
    return functional.cross_entropy(out["logits"], labels)


def test_epsl_says_that_it_needs_logits():
    with pytest.raises(ConfigError, match="EPSL aggregates gradients of logits"):
        EPSL(model=OwnLoss(), cut="body", loss=ModelLoss(), phi=0.5)


def test_epsl_says_what_output_it_takes():
    data = TensorDataset(INPUTS, CLASSES)
    app = client_app(model=OwnLoss, cut="body", data=lambda _: data, device="cpu")
    model = OwnLoss()
    strategy = EPSL(model=model, cut="body", loss=_entropy, device="cpu")
    with pytest.raises(DataError, match="one tensor each; the model's output is a dict"):
        strategy.start(LocalGrid(app, 2, progress=False), ArrayRecord(model.state_dict()), 1)


class Uncertain(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, logits, labels):
        return functional.cross_entropy(logits, labels) * torch.exp(-self.log_variance)


def test_a_loss_that_would_have_to_be_trained_is_refused_by_name():
    data = TensorDataset(INPUTS, CLASSES)
    with pytest.raises(ConfigError, match=r"loss has parameters of its own \(log_variance\)"):
        run(PSL, dense(3), [data], Uncertain())


def test_what_a_loss_counts():
    criterion = Criterion(
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 4.0]), ignore_index=0), torch.device("cpu")
    )
    loss, count = criterion(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2]))
    assert float(loss) == pytest.approx(torch.log(torch.tensor(3.0)).item())
    assert count == (10.0, 0, 3)


# --- torch's own losses are seen wherever they are called ------------------------------------


def shifted(logits, tokens):
    """As causal language models do."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "expected"),
    [
        (flat, torch.eye(3)[TOKENS], TOKENS, (60, 60, 60)),
        (shifted, torch.eye(3)[TOKENS], torch.full((12, 5), -100), (0, 0, 0)),
        (
            lambda z, y: functional.nll_loss(z.log_softmax(1), y, ignore_index=1),
            torch.eye(3)[CLASSES], CLASSES, (int((CLASSES != 1).sum()),) * 3,
        ),
        (
            lambda z, y: functional.binary_cross_entropy_with_logits(z[:, 0], y),
            torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([1.0, 0.0, 0.0]), (3, 2, 3),
        ),
        (functional.cross_entropy, torch.zeros(2, 3, 4), torch.full((2, 3, 4), 1 / 3), (8, 0, 0)),
        (
            lambda z, y: functional.cross_entropy(z, y) + z.pow(2).mean(),
            torch.eye(3)[CLASSES], CLASSES, (12, 12, 12),
        ),
        (
            lambda z, y: (functional.cross_entropy(z, y, reduction="sum"), len(y) / 2),
            torch.eye(3)[CLASSES], CLASSES, (6, 12, 12),
        ),
        (
            lambda z, y: functional.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 4.0])),
            torch.eye(3), torch.tensor([0, 2, 2], dtype=torch.uint8), (9, 2, 3),
        ),
        (  # a last batch of one row
            lambda z, y: functional.binary_cross_entropy_with_logits(z.squeeze(), y.squeeze()),
            torch.tensor([[1.0]]), torch.tensor([1.0]), (1, 1, 1),
        ),
        (
            lambda z, y: torch.vmap(functional.cross_entropy)(z, y).mean(),
            torch.eye(3)[CLASSES], CLASSES, (12, 12, 12),
        ),
        (functional.multi_margin_loss, torch.eye(3)[CLASSES], CLASSES, (12, 12, 12)),
        (functional.mse_loss, INPUTS, INPUTS, (12, 0, 0)),
    ],
)  # fmt: skip
def test_what_is_counted_whatever_wraps_a_loss(loss, logits, labels, expected):
    assert Criterion(loss, torch.device("cpu"))(logits, labels)[1] == expected


@pytest.mark.parametrize("loss", [flat, shifted, functional.multi_margin_loss])
def test_a_label_out_of_range_is_said_before_torch_computes(loss):
    """On a GPU torch would end the process."""
    labels = CLASSES.clone() if loss is functional.multi_margin_loss else TOKENS.clone()
    labels[-1] = 3
    logits = torch.zeros(*labels.shape, 3)
    with pytest.raises(DataError, match="label 3 is out of range: the model has 3 classes"):
        Criterion(loss, torch.device("cpu"))(logits, labels)


def test_a_model_that_computes_its_own_loss_is_evaluated_over_what_counts():
    """Its mean leaves ignored labels out, of which batches have different numbers."""
    labels = CLASSES.clone()
    labels[:5] = -100
    data, scores = TensorDataset(INPUTS, labels), []
    for size in (4, 12):
        torch.manual_seed(0)
        model = OwnLoss()
        app = client_app(model=OwnLoss, cut="body", data=lambda _: (data, data), device="cpu")
        result = SplitFedV1(
            model=model, cut="body", loss=ModelLoss(), server_lr=0.3, batch_size=12,
            evaluate_batch_size=size, device="cpu",
        ).start(LocalGrid(app, 1, progress=False), ArrayRecord(model.state_dict()), 1)  # fmt: skip
        scores.append(result.evaluate_metrics_clientapp[1])
    model.load_state_dict(result.arrays.to_torch_state_dict())
    output = model.eval()(INPUTS, labels)
    right = (output["logits"].argmax(1) == labels)[5:].float().mean()
    for one in scores:
        assert one["loss"] == pytest.approx(output["loss"].item(), rel=1e-5)
        assert one["accuracy"] == pytest.approx(right.item())


def test_a_losss_tensors_go_where_the_segment_is():
    loss = partial(functional.cross_entropy, weight=torch.ones(3), ignore_index=2)
    moved = Criterion(loss, torch.device("meta"))._loss
    assert moved.keywords["weight"].device.type == "meta"
    assert moved.keywords["ignore_index"] == 2


# --- decoupled methods -----------------------------------------------------------------------


def fixed_auxiliary(shape, num_classes):
    module = nn.Linear(*shape, num_classes)
    nn.init.constant_(module.bias, 0.1)
    module.weight.data = torch.linspace(-1, 1, module.weight.numel()).reshape(3, 6)
    return module


def decoupled(strategy, loss, loss_of_client=None):
    torch.manual_seed(0)
    model, data = dense(3)(), TensorDataset(INPUTS, CLASSES)
    app = client_app(
        model=dense(3), cut="1", data=lambda _: (data, data), device="cpu", loss=loss_of_client,
        auxiliary=fixed_auxiliary,
    )  # fmt: skip
    never = {"align_every": 0} if strategy is FSLSAGE else {}  # it would change the auxiliary model
    return strategy(
        model=model, cut="1", loss=loss, server_lr=0.3, client_lr=0.2, batch_size=12, device="cpu",
        auxiliary=fixed_auxiliary, **never,
    ).start(LocalGrid(app, 1, progress=False), ArrayRecord(model.state_dict()), 1)  # fmt: skip


@pytest.mark.parametrize("strategy", [CSEFSL, FSLSAGE])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([1.0, 20.0, 3.0]), ignore_index=2),
        lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
        lambda z, y: (functional.cross_entropy(z, y, reduction="sum"), 7),
        lambda z, y: functional.mse_loss(z, functional.one_hot(y, 3).float()),
    ],
)
def test_clients_train_with_the_loss_that_was_given(strategy, loss):
    found = weights_of(decoupled(strategy, loss, loss).arrays)
    torch.manual_seed(0)
    model = dense(3)()
    front, auxiliary = model[:2], fixed_auxiliary((6,), 3)
    mean = loss(auxiliary(front(INPUTS)), CLASSES)
    (mean[0] / mean[1] if isinstance(mean, tuple) else mean).backward()
    for name, parameter in front.named_parameters():
        expected = parameter.detach() - 0.2 * parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [CSEFSL, FSLSAGE])
def test_a_client_without_that_loss_is_refused(strategy):
    with pytest.raises(NotEnoughClientsError, match=r"pass the same function as client_app\(loss"):
        decoupled(strategy, nn.CrossEntropyLoss(ignore_index=255))
    with pytest.raises(ConfigError, match="which ModelLoss keeps in the model"):
        strategy(model=OwnLoss(), cut="body", loss=ModelLoss())


def test_a_clients_loss_that_is_not_used_is_warned_about(caplog):
    decoupled(CSEFSL, nn.CrossEntropyLoss(), flat)
    assert "the loss of client_app is not used" in caplog.text


def sharper_in_place(logits, labels):
    return functional.cross_entropy(logits.mul_(2), labels)


def sharper(logits, labels):
    return functional.cross_entropy(logits * 2, labels)


@pytest.mark.parametrize("strategy", [PSL, GAPSL])
def test_a_loss_may_change_its_logits_in_place(strategy):
    parts = make_parts([8, 8, 6])
    found = [
        run_split(strategy, plain_net, parts, loss=loss, share_client_segments=True)
        for loss in (sharper_in_place, sharper)
    ]
    assert_bit_equal(*(whole_of(one) for one in found))
    assert found[0].history.numbers() == found[1].history.numbers()


@pytest.mark.parametrize(
    ("reduction", "times"),
    [("mean", 0), ("sum", 1)],
)
def test_a_sum_is_warned_about_wherever_it_is_taken(reduction, times, caplog, monkeypatch):
    monkeypatch.setattr("flsplit.log._said", set())
    loss = Criterion(
        lambda logits, labels: functional.cross_entropy(logits, labels, reduction=reduction),
        torch.device("cpu"),
    )
    for _ in range(2):
        loss(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]))
    assert caplog.text.count("the loss has reduction='sum', where a mean is expected") == times
