"""FSL-SAGE: what it computes, against a twin and by hand; what it sends; what it refuses."""

import logging
import time

import pytest
import torch
from carry.threaded import ThreadedGrid
from flwr.app import ArrayRecord
from reference import (
    CUT,
    LR,
    MOMENTUM,
    NUM_CLASSES,
    OPTIMIZERS,
    SEED,
    assert_bit_equal,
    assert_close,
    fresh,
    make_parts,
    noisy_net,
    plain_net,
    run_split,
    split_app,
    weights_of,
)
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset
from twins.fsl_sage import Twin
from twins.recording import assert_same_run

from flsplit import LocalGrid, SessionSettings
from flsplit.auxiliary import emulated_gradient
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.log import logger
from flsplit.losses import Criterion
from flsplit.run.ahead import AHEAD
from flsplit.seeds import seeded
from flsplit.server.segment import ServerSegment
from flsplit.strategies import CSEFSL, FSLSAGE
from flsplit.strategies.fsl_sage import AlignedAuxiliary, UploadBuffer, true_gradient

SIZES = (20, 13, 9)  # 5, 4 and 3 batches of 4
ROW = (6,)  # the plain net's smashed data
FLOAT = 4
SEGMENT = (8 * 6 + 6) * FLOAT
AUXILIARY = (6 * NUM_CLASSES + NUM_CLASSES) * FLOAT
EPOCHS = 5
CROSS_ENTROPY = Criterion(nn.functional.cross_entropy, torch.device("cpu"))
TWO = {"upload_every": 2, "align_every": 2, "align_epochs": EPOCHS, "align": "before_round"}


def sage(build=plain_net, sizes=SIZES, rounds=3, cls=FSLSAGE, **options):
    parts = make_parts(sizes, build)
    return run_split(cls, build, parts, rounds=rounds, **({**TWO, **options}))


def warnings_of(caplog):
    return {one.getMessage() for one in caplog.records if one.levelno == logging.WARNING}


@pytest.fixture
def log(caplog):
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- the twin --------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["before_round", "in_round"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_agrees_with_the_twin_step_by_step(align, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    twin = Twin(
        plain_net, make_parts(SIZES), ROW, NUM_CLASSES, optimizer, epochs=EPOCHS,
        in_round=align == "in_round",
    )  # fmt: skip
    found = assert_same_run(FSLSAGE, twin, 5, **TWO | {"align": align})

    for entry, losses in zip(found.history, twin.losses, strict=True):
        assert entry.steps == len(losses)
        mean = sum(loss * rows for loss, rows in losses) / entry.rows
        assert entry.loss == pytest.approx(mean, abs=1e-6)
    aligned = [e.round for e in found.history if "cosine-after-alignment" in e.metrics]
    assert aligned == ([1, 3, 5] if align == "in_round" else [3, 5])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_authors_order_agrees_with_a_twin_of_their_loop(optimizer):
    """Three unequal clients; the server learns between one client's alignment and the next's."""
    twin = Twin(
        plain_net, make_parts(SIZES), ROW, NUM_CLASSES, OPTIMIZERS[optimizer], epochs=EPOCHS,
        authors=True,
    )  # fmt: skip
    theirs = TWO | {"align": "in_round", "order": "clients", "align_guard": False}
    found = assert_same_run(FSLSAGE, twin, 5, **theirs)

    for entry, losses in zip(found.history, twin.losses, strict=True):
        assert entry.steps == len(losses)
    aligned = [e.round for e in found.history if "cosine-after-alignment" in e.metrics]
    assert aligned == [1, 3, 5]


def test_the_order_of_uploads_makes_a_difference():
    batches, clients = (sage(align="in_round", order=order) for order in ("batches", "clients"))

    weights, others = weights_of(batches.arrays), weights_of(clients.arrays)
    assert any(not torch.allclose(weights[name], others[name], atol=1e-6) for name in weights)
    assert batches.history.bytes_so_far() == clients.history.bytes_so_far()


def test_clients_in_turn_without_alignments_are_the_twins_loop_too():
    twin = Twin(plain_net, make_parts(SIZES), ROW, NUM_CLASSES, SGD, authors=True, cse=True)

    found = run_split(
        CSEFSL, plain_net, make_parts(SIZES), rounds=3, upload_every=2, order="clients"
    )

    assert_close(weights_of(found.arrays), twin.train(3), 1e-6)


def test_alignment_stands_in_the_round_by_default():
    defaults = FSLSAGE(model=fresh(plain_net), cut=CUT, device="cpu")

    assert (defaults.align, defaults.order, defaults.align_guard) == ("in_round", "batches", True)


def test_a_small_buffer_forgets_the_oldest_samples():
    found = sage(buffer_size=5)
    twin = Twin(plain_net, make_parts(SIZES), ROW, NUM_CLASSES, SGD, buffer_size=5, epochs=EPOCHS)

    assert_close(weights_of(found.arrays), twin.train(3), 1e-6)


def test_the_buffer_is_first_in_first_out():
    buffer = UploadBuffer(5)
    for start in (0, 3, 6):
        rows = torch.arange(start, start + 3)
        buffer.add(rows.float().unsqueeze(1), rows)

    assert buffer.labels.tolist() == [4, 5, 6, 7, 8]
    assert buffer.smashed.flatten().tolist() == [4, 5, 6, 7, 8]


# --- by hand ---------------------------------------------------------------------------------


def linear_case(b=5, d=4, c=3):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(c, d, generator=rng, dtype=torch.float64)
    bias = torch.randn(c, generator=rng, dtype=torch.float64)
    smashed = torch.randn(b, d, generator=rng, dtype=torch.float64)
    labels = torch.randint(c, (b,), generator=rng)
    module = nn.Linear(d, c).double()
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module, weight, bias, smashed, labels


def test_the_emulated_gradient_of_a_linear_auxiliary_is_the_hand_derivation():
    module, weight, bias, smashed, labels = linear_case()

    found = emulated_gradient(module, smashed, labels, CROSS_ENTROPY)

    # L = mean NLL of softmax(W s + a), so dL/ds_j = Wᵀ (p_j - y_j) / b.
    p = torch.softmax(smashed @ weight.T + bias, 1)
    errors = p - nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(found, errors @ weight / len(labels), rtol=1e-12, atol=1e-12)


def test_an_alignment_step_of_a_linear_auxiliary_is_the_hand_derivation():
    module, weight, bias, smashed, labels = linear_case()
    lr, (b, d), c = 0.1, smashed.shape, 3
    server = nn.Linear(d, c).double()
    segment = ServerSegment(
        server, loss=nn.functional.cross_entropy, optimizer=SGD, lr=0.1, device=torch.device("cpu")
    )
    own = AlignedAuxiliary(module, SGD, lr, b, CROSS_ENTROPY)
    own.buffer.add(smashed, labels)

    own.align(segment, epochs=1, seed=0)

    # With e_j = p_j - y_j, ĝ_j = Wᵀ e_j / b and r_j = ĝ_j - z_j, the error is E = Σ_j ‖r_j‖².
    #   through Wᵀ:  dE/dW ∋ 2/b Σ_j e_j r_jᵀ
    #   through p_j: with u_j = 2/b · W r_j and J_j = diag(p_j) - p_j p_jᵀ (symmetric),
    #                dE/d(W s_j + a) = J_j u_j,  so  dE/dW ∋ Σ_j J_j u_j s_jᵀ,  dE/da = Σ_j J_j u_j
    y = nn.functional.one_hot(labels, c).double()
    p_server = torch.softmax(smashed @ server.weight.T + server.bias, 1)
    z = (p_server - y) @ server.weight / b
    p = torch.softmax(smashed @ weight.T + bias, 1)
    d_weight, d_bias = torch.zeros(c, d).double(), torch.zeros(c).double()
    for j in range(b):
        e = p[j] - y[j]
        r = weight.T @ e / b - z[j]
        jacobian = torch.diag(p[j]) - torch.outer(p[j], p[j])
        ju = jacobian @ (2 / b * weight @ r)
        d_weight += 2 / b * torch.outer(e, r) + torch.outer(ju, smashed[j])
        d_bias += ju
    torch.testing.assert_close(module.weight, weight - lr * d_weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.bias, bias - lr * d_bias, rtol=1e-12, atol=1e-12)


def noisy_server():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def segment_of(module):
    return ServerSegment(
        module, loss=nn.functional.cross_entropy, optimizer=SGD, lr=0.1, device=torch.device("cpu")
    )


def test_targets_are_of_the_server_in_training_mode_and_nothing_of_it_changes():
    """With BatchNorm and dropout, where evaluation mode has other gradients."""
    _, _, _, smashed, labels = linear_case()
    smashed, module = smashed.float(), noisy_server()
    segment = segment_of(module)
    segment.module.eval()
    before = {name: one.clone() for name, one in module.state_dict().items()}

    torch.manual_seed(7)
    found = true_gradient(segment, smashed, labels)

    # BatchNorm with the batch's own statistics, and dropout's mask as torch draws it.
    s = smashed.clone().requires_grad_()
    norm, first, _, last = module
    normed = (s - s.mean(0)) / (s.var(0, unbiased=False) + norm.eps).sqrt()
    torch.manual_seed(7)
    mask = nn.functional.dropout(torch.ones(len(s), 8), 0.5)
    logits = last(first(normed) * mask)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), s)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_bit_equal(dict(module.state_dict()), before)


# --- options of the alignment ------------------------------------------------------------------


def aligned(lr=0.05, optimizer=SGD, epochs=3, module=None, **options):
    """Return the linear case's auxiliary model after an alignment, and its outcome."""
    own, _, _, smashed, labels = linear_case()
    auxiliary = AlignedAuxiliary(module or own, optimizer, lr, len(labels), CROSS_ENTROPY)
    auxiliary.buffer.add(smashed, labels)
    torch.manual_seed(1)
    outcome = auxiliary.align(segment_of(nn.Linear(4, 3).double()), epochs, 0, **options)
    return auxiliary.module, outcome


def test_mini_batches_as_large_as_the_buffer_are_the_whole_buffer():
    whole, larger = aligned(), aligned(batch_size=5)

    assert_bit_equal(dict(whole[0].state_dict()), dict(larger[0].state_dict()))


def test_a_mini_batch_is_fitted_on_the_scale_of_the_buffer():
    """One row at a time and one epoch, by hand: ĝ is of that row's loss over all five."""
    found, _ = aligned(batch_size=1, epochs=1, lr=0.1, guard=False)

    module, _, _, smashed, labels = linear_case()
    torch.manual_seed(1)
    server = nn.Linear(4, 3).double()
    s = smashed.clone().requires_grad_()
    (targets,) = torch.autograd.grad(nn.functional.cross_entropy(server(s), labels), s)
    with seeded(0):
        order = torch.randperm(5)
    for row in order.tolist():
        s = smashed[row].clone().requires_grad_()
        loss = nn.functional.cross_entropy(module(s), labels[row]) / 5
        (emulated,) = torch.autograd.grad(loss, s, create_graph=True)
        error = (emulated - targets[row]).pow(2).sum()
        gradients = torch.autograd.grad(error, (module.weight, module.bias))
        with torch.no_grad():
            module.weight -= 0.1 * gradients[0]
            module.bias -= 0.1 * gradients[1]
    torch.testing.assert_close(found.weight, module.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.bias, module.bias, rtol=1e-12, atol=1e-12)


def test_without_a_guard_a_worse_model_stays():
    (kept, guarded), (moved, free) = aligned(lr=50.0), aligned(lr=50.0, guard=False)
    assert free.error_after > free.error_before

    assert (guarded.diverged, free.diverged) == (True, False)
    torch.testing.assert_close(kept.weight, linear_case()[1], rtol=0, atol=0)
    assert not torch.equal(moved.weight, kept.weight)


def test_the_auxiliary_rate_may_follow_the_rounds():
    rates = {1: 1e-3, 3: 1e-2}
    always, scheduled, never = (
        sage(align="in_round", auxiliary_lr=rate)
        for rate in (1e-3, lambda server_round: rates[server_round], 0.0)
    )

    first = [one.history[0].metrics["cosine-after-alignment"] for one in (always, scheduled)]
    assert first[0] == first[1]
    third = [one.history[2].metrics["cosine-after-alignment"] for one in (always, scheduled, never)]
    assert len(set(third)) == 3


def test_a_rate_of_a_round_that_can_not_be_used_is_refused():
    with pytest.raises(ConfigError, match="learning rate of round 1 is -1"):
        sage(align="in_round", auxiliary_lr=lambda server_round: -1.0)


# --- against CSE-FSL, and across carriers ----------------------------------------------------


@pytest.mark.parametrize("build", [plain_net, noisy_net])
def test_without_alignment_it_is_cse_fsl_without_averaging_and_learning(build):
    never = sage(build, align_every=0, drop_last=True)
    other = run_split(
        CSEFSL, build, make_parts(SIZES, build), rounds=3, drop_last=True, upload_every=2,
        auxiliary_lr=0.0, average_auxiliary=False,
    )  # fmt: skip

    assert_bit_equal(weights_of(never.arrays), weights_of(other.arrays))
    for one, two in zip(never.history, other.history, strict=True):
        assert (one.loss, one.accuracy) == (two.loss, two.accuracy)
        assert one.traffic.logical == two.traffic.logical


CASES = {
    "sage": (FSLSAGE, TWO),
    "sage, first stage": (FSLSAGE, TWO | {"auxiliary": "first-stage", "buffer_size": 6}),
    "sage in round": (FSLSAGE, TWO | {"align": "in_round"}),
    "sage as its authors": (
        FSLSAGE,
        TWO | {"align": "in_round", "order": "clients", "align_batch_size": 4},
    ),
    "cse": (CSEFSL, {"upload_every": 2}),
    "cse, first stage": (CSEFSL, {"upload_every": 2, "auxiliary": "first-stage"}),
    "cse apart": (CSEFSL, {"upload_every": 2, "average_auxiliary": False}),
}


@pytest.mark.parametrize("case", ["sage, first stage", "cse apart"])
def test_rebuilt_clients_give_the_same_numbers(case):
    cls, options = CASES[case]
    parts = make_parts(SIZES, noisy_net)
    live, rebuilt = (
        run_split(
            cls, noisy_net, parts, tests=parts, rounds=3, optimizer=MOMENTUM, drop_last=True,
            cache=cache, **options,
        )
        for cache in (True, False)
    )  # fmt: skip

    assert live.history.numbers() == rebuilt.history.numbers()
    assert_bit_equal(weights_of(live.arrays), weights_of(rebuilt.arrays))


def checkpointed(cls, folder, *, num_rounds, resume=False, cache=True, **options):
    parts = make_parts(SIZES, noisy_net)
    model = fresh(noisy_net)
    strategy = cls(
        model=model, cut=CUT, server_lr=LR, server_optimizer=MOMENTUM, batch_size=4, seed=SEED,
        device="cpu", drop_last=True, checkpoint_dir=str(folder / "server"), resume=resume,
        **options,
    )  # fmt: skip
    app = split_app(noisy_net, parts, parts, optimizer=MOMENTUM)
    grid = LocalGrid(app, len(SIZES), state_dir=folder / "clients", cache=cache, progress=False)
    return strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=num_rounds)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(case, tmp_path):
    cls, options = CASES[case]
    whole = checkpointed(cls, tmp_path / "a", num_rounds=3, **options)
    checkpointed(cls, tmp_path / "b", num_rounds=2, cache=False, **options)
    resumed = checkpointed(cls, tmp_path / "b", num_rounds=3, resume=True, **options)

    assert resumed.history.numbers() == whole.history.numbers()
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))


def test_a_client_that_lost_its_state_gets_segment_and_auxiliary_again(tmp_path):
    options = TWO | {"auxiliary": "linear"}
    checkpointed(FSLSAGE, tmp_path, num_rounds=2, **options)
    for path in (tmp_path / "clients" / "1").iterdir():
        path.unlink()
    resumed = checkpointed(FSLSAGE, tmp_path, num_rounds=3, resume=True, **options)

    assert [entry.restarted for entry in resumed.history] == [[], [], ["1"]]
    assert resumed.history[-1].left_out == []


class InParts(FSLSAGE):
    """Asks for the steps up to an upload at a time, as over a session."""

    def _overlaps(self, round_):
        return True


@pytest.mark.parametrize(("align", "cache"), [("before_round", True), ("in_round", False)])
def test_steps_in_parts_give_the_same_numbers(align, cache):
    options = {"build": noisy_net, "drop_last": True, "align": align, "optimizer": MOMENTUM}
    whole = sage(**options)
    parts = sage(cls=InParts, cache=cache, **options)

    assert parts.history.numbers() == whole.history.numbers()
    assert_bit_equal(weights_of(parts.arrays), weights_of(whole.arrays))


def test_clients_are_asked_for_further_parts_before_the_server_works_on_the_first():
    taken, seen = [], []

    class Watched(InParts):
        def step(self, step):
            seen.append(len(taken))
            super().step(step)

    def count(message, context, call_next):
        if message.metadata.message_type == "train.local":
            taken.append(context.node_config["partition-id"])
        return call_next(message, context)

    options = {
        "align": "before_round",
        "batch_size": 1,
        "upload_every": 1,
        "rounds": 1,
        "app_options": {"mods": [count]},
    }
    run_split(Watched, plain_net, make_parts((8, 8)), **options)

    ahead = 2 * (1 + AHEAD)  # two clients' first parts and those asked for before the first step
    assert seen == [ahead] * 2 + [min(ahead + 1 + done, 2 * 8) for done in range(2 * 7)]


class Watch:
    """A clock that notes whose exchange began when, and when it was told."""

    def __init__(self):
        self.seen = []

    def exchanged(self, exchange, started):
        self.seen.append((tuple(exchange.errands), started, time.perf_counter()))

    def stepped(self, uploads, **rows_and_start):
        pass

    def aligned(self, rows, epochs, started):
        pass

    def end_round(self):
        return 0.0


def test_a_client_s_part_begins_when_its_own_last_part_has_ended(monkeypatch):
    watch = Watch()
    monkeypatch.setattr("flsplit.run.execute.make_clock", lambda *_: watch)
    options = {"align": "before_round", "batch_size": 1, "upload_every": 1, "rounds": 1}
    run_split(InParts, plain_net, make_parts((8, 8)), **options)

    mine, others = (
        [times for names, *times in watch.seen if names == (client,)][-7:] for client in "10"
    )
    for (_, ended), (began, _), (_, other_ended) in zip(mine, mine[1:], others[1:], strict=False):
        assert ended < began < other_ended  # what the other takes is not waited for


class FailsOnce(TensorDataset):
    """Can't be read for a moment."""

    reads_left = 7  # one for the shape, a batch of 4, and 2 of the next batch

    def __getitem__(self, index):
        self.reads_left -= 1
        if self.reads_left == 0:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_a_client_that_fails_with_parts_under_way_is_left_out_once_and_comes_back():
    parts = make_parts(SIZES)
    parts[0] = FailsOnce(*parts[0].tensors)

    result = run_split(InParts, plain_net, parts, rounds=2, **TWO)

    first, second = result.history
    [lost] = first.left_out
    assert (lost.client, lost.step) == ("0", 1)
    assert "the disk is gone" in lost.reason
    assert first.steps == 1 + 2 + 2  # its first upload, and all of the two others
    assert second.left_out == []
    assert second.steps == 3 + 2 + 2


# --- the ledger ------------------------------------------------------------------------------


def test_logical_bytes_of_a_round_are_the_formula():
    """Σ_i 2|x_c| + 1{l | t}|x_a| + Σ bytes(s_n) of the uploads; labels apart."""
    history = sage(rounds=3, fraction_evaluate=0.0).history

    rows = 12 + 8 + 5  # batches 0, 2, 4 of 20 rows; 0, 2 of 13; 0, 2 of 9, the last one ragged
    for t, entry in enumerate(history):
        logical = dict(entry.traffic.logical)
        labels = logical.pop("labels-up")
        initial = logical.pop("auxiliary-down") if t == 0 else 0
        aligned = t > 0 and t % 2 == 0
        formula = 3 * 2 * SEGMENT + 3 * aligned * AUXILIARY + rows * 6 * FLOAT
        assert sum(logical.values()) == formula
        assert labels == rows * 8
        assert initial == (3 * AUXILIARY if t == 0 else 0)


def test_cosines_and_memory_are_in_the_ledger():
    history = sage(sizes=(40, 40), rounds=5, align_epochs=200, auxiliary_lr=0.01).history

    for entry in history:
        assert -1 <= entry.metrics["auxiliary-cosine"] <= 1
        needed, whole = (
            entry.metrics[f"{what}-memory-bytes"] for what in ("client", "whole-model")
        )
        assert 0 < needed < whole
    aligned = [entry.metrics for entry in history if "cosine-before-alignment" in entry.metrics]
    assert len(aligned) == 2
    assert all(m["cosine-after-alignment"] > m["cosine-before-alignment"] for m in aligned)


def test_the_clients_memory_is_what_follows_from_the_shapes():
    metrics = sage(sizes=(20,), rounds=1).history[0].metrics

    # State: a segment of 54 numbers with gradients, an auxiliary model of 21 numbers. Kept for
    # backward: the input (4 x 8) and tanh's output (4 x 6); the auxiliary's input (4 x 6),
    # log-softmax (4 x 3), labels (4 x 8 bytes), the loss's total weight (4 bytes).
    segment = (2 * 54 + 4 * 8 + 4 * 6) * FLOAT
    auxiliary = (21 + 4 * 6 + 4 * 3 + 1) * FLOAT + 4 * 8
    assert metrics["client-memory-bytes"] == pytest.approx(segment + auxiliary, abs=4 * 6 * FLOAT)


# --- auxiliary models ------------------------------------------------------------------------


def small_mlp(shape, num_classes):
    return nn.Sequential(nn.Linear(shape[0], 7), nn.ReLU(inplace=True), nn.Linear(7, num_classes))


def test_the_user_can_give_the_auxiliary_model():
    result = sage(rounds=1, auxiliary=small_mlp, app_options={"auxiliary": small_mlp})

    size = (6 * 7 + 7 + 7 * NUM_CLASSES + NUM_CLASSES) * FLOAT
    assert result.history[0].traffic.logical["auxiliary-down"] == 3 * size
    assert result.history[0].left_out == []


def test_the_first_stage_is_the_servers_with_a_head_of_its_own():
    strategy = FSLSAGE(model=fresh(noisy_net), cut=CUT, auxiliary="first-stage", device="cpu")
    strategy.begin_run()
    strategy._row, strategy._classes = (3, 4, 4), NUM_CLASSES

    auxiliary = strategy.new_auxiliary()

    like = fresh(noisy_net).middle.state_dict()
    assert {k: v.shape for k, v in auxiliary[0].state_dict().items()} == {
        k: v.shape for k, v in like.items()
    }
    assert auxiliary(torch.zeros(2, 3, 4, 4)).shape == (2, NUM_CLASSES)


# --- bad input -------------------------------------------------------------------------------


def test_q_that_never_fires_again_is_a_warning_with_the_numbers(log):
    sage(rounds=1, upload_every=50)

    found = [one for one in warnings_of(log) if "upload_every" in one]
    assert len(found) == 1
    assert "is 50, but 3 clients" in found[0]
    assert "client '0' takes 5" in found[0]


def test_l_that_never_fires_is_a_warning_with_the_numbers(log):
    sage(rounds=2, align_every=7)
    assert any("align_every is 7" in one and "2 rounds" in one for one in warnings_of(log))


def test_no_alignment_on_purpose_is_no_warning(log):
    sage(rounds=1, align_every=0)
    assert not any("align_every" in one for one in warnings_of(log))


def test_an_auxiliary_model_that_does_not_fit_the_smashed_data_is_refused():
    def wrong(shape, num_classes):
        return nn.Linear(shape[0] + 1, num_classes)

    with pytest.raises(Exception, match=r"can't take smashed data of shape \(1, 6\)"):
        sage(auxiliary=wrong, app_options={"auxiliary": wrong})


def test_an_auxiliary_model_with_other_classes_is_refused():
    def wrong(shape, num_classes):
        return nn.Linear(shape[0], num_classes + 1)

    with pytest.raises(Exception, match=r"expected logits of shape \(1, 3\)"):
        sage(auxiliary=wrong, app_options={"auxiliary": wrong})


def test_a_client_app_without_the_auxiliary_function_says_what_to_do():
    with pytest.raises(NotEnoughClientsError, match=r"client_app\(auxiliary=…\)"):
        sage(auxiliary=small_mlp)


def test_an_auxiliary_function_that_only_the_client_app_has_is_a_warning(log):
    sage(rounds=1, app_options={"auxiliary": small_mlp})
    assert any("asks for 'linear'; pass the same function" in one for one in warnings_of(log))


def test_a_client_with_another_auxiliary_model_is_refused():
    def other(shape, num_classes):
        return nn.Linear(shape[0], num_classes)

    with pytest.raises(NotEnoughClientsError, match="auxiliary model from the server"):
        sage(auxiliary=small_mlp, app_options={"auxiliary": other})


@pytest.mark.parametrize("auxiliary_lr", [1e12, 1e30])
def test_an_alignment_that_diverges_leaves_the_auxiliary_as_it_was(auxiliary_lr, log):
    diverged = sage(auxiliary_lr=auxiliary_lr, align_epochs=3)
    never = sage(align_every=0)

    for entry in diverged.history:
        assert entry.metrics.get("alignment-diverged", 1.0) == 1.0
    assert "alignment-diverged" in diverged.history[2].metrics
    assert diverged.history[2].traffic.logical["auxiliary-down"] == 0
    assert any("diverged" in one for one in warnings_of(log))
    assert_bit_equal(weights_of(diverged.arrays), weights_of(never.arrays))


def test_a_client_with_less_than_one_batch_trains_on_what_it_has():
    result = sage(sizes=(20, 3), rounds=3)
    assert all(entry.left_out == [] for entry in result.history)
    assert result.history[0].rows == 12 + 3


def test_a_client_with_less_than_one_batch_and_drop_last_is_left_out_with_the_numbers():
    result = sage(sizes=(20, 3), rounds=2, drop_last=True)
    assert [one.client for one in result.history[0].left_out] == ["1"]
    assert "3 examples, fewer than batch-size = 4" in result.history[0].left_out[0].reason


def test_a_buffer_smaller_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match="buffer_size is 3, smaller than a batch"):
        sage(buffer_size=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("upload_every", 0),
        ("align_every", -1),
        ("align_epochs", 0),
        ("align", "sometimes"),
        ("align_batch_size", -1),
        ("align_guard", 1),
        ("order", "alphabetical"),
        ("auxiliary", "quadratic"),
        ("auxiliary", 3),
        ("auxiliary_lr", float("nan")),
        ("auxiliary_optimizer", "adam"),
        ("overlap", 1),
    ],
)
def test_options_that_cannot_be_used_are_refused(option, value):
    with pytest.raises(ConfigError, match=option):
        sage(**{option: value})


# --- sessions --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sage", "sage in round", "sage as its authors", "cse"])
def test_a_session_where_uploads_stream_up_gives_the_same_numbers(case):
    """Over a stream with the server at work meanwhile; the plain net draws no random numbers."""
    cls, options = CASES[case]

    def run(make_grid):
        model = fresh(plain_net)
        strategy = cls(
            model=model, cut=CUT, server_lr=LR, batch_size=4, seed=SEED, device="cpu",
            session=SessionSettings(join_timeout=20.0, grace=2.0), **options,
        )  # fmt: skip
        parts = make_parts(SIZES)
        grid = make_grid(split_app(plain_net, parts, parts), len(SIZES))
        return grid, strategy.start(
            grid, ArrayRecord(model.state_dict()), num_rounds=3, timeout=30.0
        )

    threaded, streamed = run(ThreadedGrid)
    threaded.join()
    _, local = run(lambda app, n: LocalGrid(app, n, progress=False))

    assert streamed.history.numbers() == local.history.numbers()
    assert_bit_equal(weights_of(streamed.arrays), weights_of(local.arrays))
    assert len(threaded.pushed) == len(SIZES)  # one Flower message per host, and the stream
