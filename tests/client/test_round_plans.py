"""The plan of a round differs from client to client: batch sizes of each step, steps, rates."""

import operator

import pytest
import torch
from carry.threaded import ThreadedGrid
from driving import Drive, RefusedError, some_gradient
from flwr.app import ArrayRecord
from reference import (
    CUT,
    LR,
    MOMENTUM,
    SEED,
    assert_bit_equal,
    fresh,
    make_parts,
    noisy_net,
    normed_net,
    plain_net,
    run_split,
    split_app,
    weights_of,
    whole_of,
    whole_step,
)
from tampering import TamperedGrid, of_client

from flsplit import LocalGrid, SessionSettings
from flsplit.errors import ConfigError
from flsplit.message.arrays import to_array
from flsplit.message.types import STEP
from flsplit.seeds import derive_seed
from flsplit.strategies import CSEFSL, PSL, SequentialSL

CACHE = pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])


def order(epoch, size, client="0"):
    rng = torch.Generator().manual_seed(derive_seed(SEED, "data", client, epoch))
    return torch.randperm(size, generator=rng)


def drive_of(build=plain_net, size=8, *, cache=True):
    app = split_app(build, make_parts([size], build), optimizer=MOMENTUM)
    return Drive(app, build, cache=cache)


def planned(cls, overrides):
    """A strategy that gives clients other plans, by round."""

    class Planned(cls):
        def train_round(self, round_):
            round_.overrides |= overrides(round_.plan.server_round)
            return super().train_round(round_)

    return Planned


# --- the client ------------------------------------------------------------------------------


@CACHE
def test_batches_of_planned_sizes_come_from_one_permutation_after_another(cache):
    """8 examples, 3 + 4 + 0 + 6 of them: the last batch has the one left and 5 of epoch 1."""
    drive = drive_of(cache=cache)
    inputs, labels = make_parts([8])[0].tensors
    stream = torch.cat([order(0, 8), order(1, 8)])
    reply, start = drive.begin(batch_sizes=(3, 4, 0, 6), lr=0.0), 0
    assert reply.num_steps == 4
    front = fresh(plain_net).front
    for step, size in enumerate((3, 4, 0, 6)):
        rows = stream[start : start + size]
        assert torch.equal(reply.labels, labels[rows])
        assert len(reply.smashed) == size
        if size:
            assert torch.equal(reply.smashed, front(inputs[rows]))
        start += size
        gradient = some_gradient(step, reply) if size else None
        reply = drive.step(step + 1, gradient) if step < 3 else None
    drive.finish(3, gradient)
    # The next round goes on there, in batches of 2 and by the old rule: an epoch ends with its own.
    labelled = drive.begin(batch_size=2, local_steps=2)
    assert torch.equal(labelled.labels, labels[order(1, 8)[5:7]])
    assert torch.equal(drive.step(1, None).labels, labels[order(1, 8)[7:]])


@CACHE
def test_in_a_step_that_is_sat_out_nothing_moves(cache):
    drive = drive_of(normed_net, cache=cache)
    before = drive.train_round(some_gradient)
    reply = drive.begin(batch_sizes=(0, 0))
    assert reply.smashed.shape == (0,)
    assert reply.labels.dtype == torch.int64
    drive.step(1, None)
    after = drive.finish(1, None)
    assert_bit_equal(after.segment, before.segment)  # BatchNorm's buffers, too
    for index, values in before.optimizer.items():
        assert_bit_equal(after.optimizer[index], values)


def test_a_batch_larger_than_the_data_goes_over_it_more_than_once():
    drive = drive_of(size=3)
    _, labels = make_parts([3])[0].tensors
    reply = drive.begin(batch_sizes=(7,))
    assert torch.equal(reply.labels, labels[torch.cat([order(e, 3) for e in range(3)])[:7]])


@CACHE
def test_other_batch_sizes_in_every_round_leave_no_example_out(cache):
    """20 examples: rounds of 2 x 4, 3 x 2, then the 6 that are left of the epoch."""
    drive = drive_of(size=20, cache=cache)
    _, labels = make_parts([20])[0].tensors
    seen = []
    for size, steps in ((4, 2), (2, 3), (6, 1)):
        reply = drive.begin(batch_size=size, local_steps=steps)
        for step in range(steps):
            seen.append(reply.labels)
            reply = drive.step(step + 1, None) if step + 1 < steps else None
        drive.finish(steps - 1, None)
    assert torch.equal(torch.cat(seen), labels[order(0, 20)])


def test_sizes_below_zero_are_refused():
    with pytest.raises(RefusedError, match=r"'batch-sizes' is \[2, -1\], expected sizes of 0 or"):
        drive_of().begin(batch_sizes=(2, -1))


# --- a run -----------------------------------------------------------------------------------


@CACHE
def test_one_client_is_bit_equal_to_training_the_whole_model(cache):
    parts, sizes = make_parts([14], noisy_net), (3, 5, 0, 4)
    cls = planned(PSL, lambda _: {"0": {"batch_sizes": sizes}})
    result = run_split(
        cls, noisy_net, parts, optimizer=MOMENTUM, rounds=2, cache=cache, share_client_segments=True
    )
    model = fresh(noisy_net)
    own = MOMENTUM(model.parameters(), lr=LR)
    stream, start = torch.cat([order(0, 14), order(1, 14)]).tolist(), 0
    for server_round in (1, 2):
        for step, size in enumerate(sizes):
            rows = stream[start : start + size]
            start += size
            where = {"name": "0", "server_round": server_round, "step": step}
            if rows:
                whole_step(model, [own], parts[0], rows, **where)
    assert_bit_equal(whole_of(result), dict(model.state_dict()))
    for entry in result.history:
        assert (entry.rows, entry.steps) == (12, 3)
        assert entry.traffic.logical["activations-up"] == 12 * 3 * 4 * 4 * 4
        assert entry.traffic.logical["labels-up"] == 12 * 8
        assert entry.traffic.logical["gradients-down-unicast"] == 12 * 3 * 4 * 4 * 4


def test_clients_have_their_own_sizes_steps_and_rates():
    parts = make_parts([8, 8, 8])
    plans = {"0": {"batch_sizes": (2, 0, 4)}, "1": {"local_steps": 1, "batch_size": 8}}
    cls = planned(PSL, lambda _: plans | {"2": {"lr": 0.0}})
    result = run_split(cls, plain_net, parts, rounds=1, share_client_segments=True)
    (entry,) = result.history
    assert entry.left_out == []
    assert (entry.rows, entry.steps) == (2 + 4 + 8 + 4 + 4, 3)
    assert entry.traffic.logical["activations-up"] == entry.rows * 6 * 4
    first = fresh(plain_net).state_dict()
    moved = {
        name: not torch.equal(weights_of(record)["front.0.weight"], first["front.0.weight"])
        for name, record in result.client_segments.items()
    }
    assert moved == {"0": True, "1": True, "2": False}


def test_the_clock_is_told_the_rows_that_were_there():
    told = []

    class Clock:
        def exchanged(self, exchange, started):
            told.append({name: errand.legs for name, errand in exchange.errands.items()})

        def stepped(self, uploads, forward_rows, backward_rows, logit_rows, started):
            told.append((list(uploads), forward_rows))

        def end_round(self):
            return 1.0

    class Timed(planned(PSL, lambda _: {"0": {"batch_sizes": (2, 0)}, "1": {"batch_size": 4}})):
        def train_round(self, round_):
            round_.clients.clock = Clock()
            finished = super().train_round(round_)
            round_.clients.clock = None
            return finished

    run_split(Timed, plain_net, make_parts([8, 8]), rounds=1)
    rows = operator.attrgetter("forward_rows", "backward_rows", "step")
    legs = [{name: [*map(rows, of)] for name, of in x.items()} for x in told if isinstance(x, dict)]
    assert legs == [
        {"0": [(2, 0, 0)], "1": [(4, 0, 0)]},
        {"0": [(0, 2, None)], "1": [(4, 4, 1)]},
        {"0": [(0, 0, None)], "1": [(0, 4, None)]},
    ]
    assert [x for x in told if isinstance(x, tuple)] == [([("0", 0), ("1", 0)], 6), ([("1", 1)], 4)]


@pytest.mark.parametrize("cls", [PSL, SequentialSL])
def test_a_step_that_all_sit_out_is_no_step_of_the_server(cls):
    parts = make_parts([8, 8])
    planning = planned(cls, lambda _: {name: {"batch_sizes": (2, 0, 2)} for name in "01"})
    (entry,) = run_split(planning, plain_net, parts, rounds=1).history
    assert entry.left_out == []
    assert entry.rows == 8
    assert entry.steps == (2 if cls is PSL else 4)


@pytest.mark.parametrize("carrier", ["cache", "no cache", "session"])
def test_local_steps_are_planned_as_well(carrier):
    parts = make_parts([8, 8])
    app = split_app(plain_net, parts)
    grid = {
        "cache": lambda: LocalGrid(app, 2, progress=False),
        "no cache": lambda: LocalGrid(app, 2, cache=False, progress=False),
        "session": lambda: ThreadedGrid(app, 2),
    }[carrier]()
    cls = planned(CSEFSL, lambda _: {"0": {"batch_sizes": (0, 3, 0, 2, 1)}})
    strategy = cls(
        model=fresh(plain_net), cut=CUT, seed=SEED, batch_size=4, upload_every=1, server_lr=LR,
        session=SessionSettings(join_timeout=20.0, grace=2.0),
    )  # fmt: skip
    initial = ArrayRecord(fresh(plain_net).state_dict())
    result = strategy.start(grid, initial, num_rounds=2, timeout=30.0)
    for entry in result.history:
        assert entry.left_out == []
        assert (entry.rows, entry.steps) == (6 + 8, 3 + 2)
        assert entry.traffic.logical["activations-up"] == 14 * 6 * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "the plan of client '1': field 'batch-size' is 0, expected at least 1"),
        ({"batch_sizes": (1, -1)}, r"client '1': field 'batch-sizes' is \[1, -1\], expected sizes"),
        ({"batch_sizes": 4}, "the plan of client '1': .*int"),
        ({"lr": "fast"}, r"field 'lr' is 'fast' \(str\), expected a float"),
        ({"batchsize": 4}, "a plan has no field 'batchsize' .it has server_round"),
        ({"local_epochs": 0}, "local-epochs and local-steps are both 0"),
    ],
)
def test_a_plan_that_cannot_be_followed(changes, said):
    cls = planned(PSL, lambda _: {"1": changes})
    with pytest.raises(ConfigError, match=said):
        run_split(cls, plain_net, make_parts([4, 4]))


def rows(count):
    def edit(request, reply):
        reply.content["smashed-data"]["0"] = to_array(torch.zeros(count, 6))
        reply.content["labels"]["0"] = to_array(torch.zeros(count, dtype=torch.int64))
        return reply

    return edit


@pytest.mark.parametrize(
    ("step", "count", "said"),
    [
        (0, 3, "smashed-data: 3 rows came, at most 2 were planned"),
        (0, 0, "smashed-data: shape is (0, 6), expected one row or more"),
        (1, 1, "smashed-data: 1 rows came, at most 0 were planned"),
        (2, 5, "smashed-data: 5 rows came, at most 4 were planned"),
    ],
)
def test_rows_that_were_not_planned_are_refused(step, count, said):
    edit = of_client("1", STEP, rows(count), step=step)
    cls = planned(PSL, lambda _: {"1": {"batch_sizes": (2, 0, 4)}})
    result = run_split(
        cls, plain_net, make_parts([12, 12]), rounds=1, wrap=lambda grid: TamperedGrid(grid, edit)
    )
    (left,) = result.history[0].left_out
    assert (left.client, left.step) == ("1", step)
    assert said in left.reason
