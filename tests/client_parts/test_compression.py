"""Compression: what is lost, what crosses, what is remembered, and what comes from liars."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from reference import (
    LR,
    WrappedGrid,
    assert_bit_equal,
    assert_close,
    epoch_batches,
    fresh,
    make_parts,
    normed_net,
    plain_net,
    run_split,
    split_app,
    weights_of,
    whole_of,
)
from torch import nn

from flsplit import LocalGrid
from flsplit.client_parts import (
    Clip,
    Difference,
    HalfPrecision,
    Int8,
    LowRank,
    Noise,
    TopK,
    describe_parts,
)
from flsplit.client_parts.compression import Packed
from flsplit.errors import ConfigError, ProtocolError
from flsplit.message.arrays import to_array
from flsplit.message.packing import PACKED, unpacked
from flsplit.strategies import EPSL, FSLSAGE, PSL, SplitFedV2

ROWS = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
ALL = [
    Int8(),
    HalfPrecision(),
    TopK(0.3),
    LowRank(2),
    Int8("cut-gradient"),
    TopK(0.3, "cut-gradient"),
]


def there_and_back(part, tensor):
    return part.unpack(part.pack(tensor, {}), {})


# --- one tensor ------------------------------------------------------------------------------


def test_a_byte_each_is_off_by_half_a_step():
    packed = Int8(feedback=False).pack(ROWS, {})
    found = Int8().unpack(packed, {})
    step = (ROWS.flatten(1).amax(1) - ROWS.flatten(1).amin(1)) / 255
    assert ((found - ROWS).abs().flatten(1).amax(1) <= step * 0.501).all()
    assert sum(one.nbytes for one in packed.pieces.values()) == 5 * (21 + 8)


def test_what_has_256_steps_is_exact():
    rows = torch.stack([torch.arange(256.0) * 0.5 - 3, torch.full((256,), 2.0)])
    assert torch.equal(there_and_back(Int8(), rows), rows)


def test_two_bytes_each():
    assert torch.equal(there_and_back(HalfPrecision(), ROWS), ROWS.half().float())
    assert torch.equal(
        there_and_back(HalfPrecision(dtype="bfloat16"), ROWS), ROWS.bfloat16().float()
    )
    assert there_and_back(HalfPrecision(), torch.tensor([[1e6]])).item() == 65504


def test_the_largest_by_hand():
    rows = torch.tensor([[1.0, -5, 2, 0, 3, -1, 0, 0, 4, 0], [0.0] * 9 + [7]])
    packed = TopK(0.3).pack(rows, {})
    expected = torch.tensor([[0.0, -5, 0, 0, 3, 0, 0, 0, 4, 0], [0.0] * 9 + [7]])
    assert torch.equal(TopK(0.3).unpack(packed, {}), expected)
    # 3 of 10 numbers in 4 bytes, and 10 bits in 2.
    assert sum(one.nbytes for one in packed.pieces.values()) == 2 * (3 * 4 + 2)


def test_low_rank_is_the_truncated_decomposition():
    packed = LowRank(2).pack(ROWS, {})
    u, s, v = np.linalg.svd(ROWS.flatten(1).numpy(), full_matrices=False)
    expected = torch.from_numpy((u[:, :2] * s[:2]) @ v[:2]).reshape(ROWS.shape)
    torch.testing.assert_close(LowRank(2).unpack(packed, {}), expected)
    assert sum(one.nbytes for one in packed.pieces.values()) == 4 * 2 * (5 + 21)
    torch.testing.assert_close(there_and_back(LowRank(9), ROWS), ROWS)


def test_what_was_lost_is_sent_later():
    """With feedback the sum of what arrives stays within one step's error of the sum sent."""
    for part in (TopK(0.3, feedback=True), LowRank(1, feedback=True), Int8()):
        memory, sent, came = {}, torch.zeros_like(ROWS), torch.zeros_like(ROWS)
        for _ in range(20):
            packed = part.pack(ROWS, memory)
            sent, came = sent + ROWS, came + part.unpack(packed, {})
        torch.testing.assert_close(sent - came, memory["lost"], atol=1e-4, rtol=0)
        assert (sent - came).norm() < 6 * ROWS.norm()  # without it: 20 times one step's


def test_a_smaller_batch_takes_what_is_lost_of_its_rows():
    part, memory = TopK(0.3, feedback=True), {}
    part.pack(ROWS, memory)
    lost = memory["lost"].clone()
    packed = part.pack(torch.zeros(2, 3, 7), memory)
    assert torch.equal(part.unpack(packed, {}) + memory["lost"], lost[:2])


def test_differences_to_the_last_time():
    part, here, there = Difference(), {}, {}
    rows = torch.tensor([3, 0, 7, 1, 4])
    drift = torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    first = part.unpack(part.pack(ROWS, here, rows), there)
    assert torch.equal(first, there_and_back(Int8(), ROWS))
    again = torch.tensor([7, 3, 1, 0, 9])  # one that is new among them
    order = torch.tensor([2, 0, 3, 1, 4])
    second = part.unpack(part.pack((ROWS + drift)[order], here, again), there)
    error = (second - (ROWS + drift)[order]).abs().flatten(1).amax(1)
    coarse = (first - ROWS).abs().flatten(1).amax(1)[order]
    assert (error[:4] < coarse[:4] / 5).all()  # steps of what drifted, not of what there is
    assert torch.equal(here["base"], there["base"])
    assert here["times"].tolist() == there["times"].tolist()


def test_ends_that_remember_different_things_say_so():
    part, here = Difference(), {}
    rows = torch.arange(5)
    part.pack(ROWS, here, rows)
    with pytest.raises(ProtocolError, match="remember other smashed data"):
        part.unpack(part.pack(ROWS, here, rows), {})
    part.unpack(part.pack(ROWS, {}, rows), there := {})  # a client that begins anew
    assert there["times"].tolist() == [1] * 5


@pytest.mark.parametrize("part", ALL, ids=lambda one: f"{one.name}-{one.place}")
def test_whole_numbers_are_refused(part):
    with pytest.raises(ConfigError, match=r"was given torch.int64: whole numbers"):
        part.pack(torch.ones(2, 3, dtype=torch.int64), {})


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Int8("gradients"), "place is 'gradients', expected 'smashed', 'cut-gradient', "),
        (lambda: Int8(feedback=1), "feedback is 1"),
        (lambda: HalfPrecision(dtype="int8"), "dtype is 'int8'"),
        (lambda: TopK(0), "share is 0"),
        (lambda: TopK(1.5), "share is 1.5"),
        (lambda: LowRank(0), "rank is 0"),
        (lambda: describe_parts([Int8(), Clip(1.0), TopK()]), "'int8' and 'top-k' both compress"),
    ],
)
def test_what_is_refused(make, error):
    with pytest.raises(ConfigError, match=error):
        make()
    describe_parts([Int8(), TopK(place="cut-gradient")])


# --- what comes from liars -------------------------------------------------------------------


def lie(part, **pieces):
    packed = part.pack(ROWS, {}, torch.arange(5))
    return Packed({**packed.pieces, **pieces}, packed.shape, packed.dtype)


@pytest.mark.parametrize(
    ("part", "lies"),
    [
        (Int8(), {"steps": torch.zeros(5, 21)}),
        (Int8(), {"steps": torch.zeros(5, 20, dtype=torch.uint8)}),
        (Int8(), {"low": torch.zeros(5, 1, dtype=torch.int64)}),
        (HalfPrecision(), {"numbers": torch.zeros(5, 3, 7)}),
        (TopK(0.3), {"bits": torch.full((5, 3), 255, dtype=torch.uint8)}),
        (TopK(0.3), {"numbers": torch.zeros(5, 7)}),
        (LowRank(2), {"right": torch.zeros(3, 21)}),
        (Difference(), {"rows": torch.zeros(4, dtype=torch.int32)}),
        (Difference(), {"rows": torch.arange(5, dtype=torch.int32) - 1}),
        (Difference(), {"rows": torch.arange(5, dtype=torch.int32) + 10**6}),
        (Difference(), {"times": torch.ones(5, dtype=torch.int32)}),
        (Difference(), {"times": torch.zeros(5)}),
    ],
)
def test_pieces_that_do_not_fit_are_refused(part, lies):
    with pytest.raises(ProtocolError, match="packed"):
        part.unpack(lie(part, **lies), {})


@pytest.mark.parametrize("part", [*ALL, Difference()], ids=lambda one: one.name)
def test_pieces_that_are_missing_are_refused(part):
    packed = lie(part)
    for name in packed.pieces:
        rest = {key: one for key, one in packed.pieces.items() if key != name}
        with pytest.raises(ProtocolError, match=f"piece '{name}' is none"):
            part.unpack(Packed(rest, packed.shape, packed.dtype), {})
    for shape in ((5, 3, 8), (4, 3, 7), (5,), (0, 3, 7), (5, 0)):
        with pytest.raises(ProtocolError, match="packed"):
            part.unpack(Packed(packed.pieces, shape, packed.dtype), {})


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("float32 1000000 1000000", "a tensor of 4000000000000 bytes"),
        ("int64 5 3 7", "expected a floating-point dtype"),
        ("float99 5", "dtype is 'float99'"),
        ("float32", "1 to 16 sizes"),
        ("float32 -1", "1 to 16 sizes"),
        ("float32 ²", "1 to 16 sizes"),
        (5, "expected a str"),
    ],
)
def test_what_is_said_of_pieces_is_checked(said, error):
    arrays = ArrayRecord()
    arrays["0|numbers"] = to_array(torch.zeros(5, 3, 7).half())
    content = RecordDict({"smashed-data": arrays, PACKED: ConfigRecord({"0": said})})
    with pytest.raises(ProtocolError, match=error):
        unpacked(content, "smashed-data", lambda _, packed: HalfPrecision().unpack(packed, {}))
    content[PACKED] = ConfigRecord({"1": "float32 5 3 7"})
    with pytest.raises(ProtocolError, match="no pieces of '1'"):
        unpacked(content, "smashed-data", lambda _, packed: HalfPrecision().unpack(packed, {}))


# --- whole runs ------------------------------------------------------------------------------

PARTS = make_parts([12, 8])


def run(parts, cls=PSL, build=plain_net, data=PARTS, **options):
    shared = {"share_client_segments": True} if cls is PSL else {}
    return run_split(cls, build, data, client_parts=parts, **(shared | options))


class Wire(WrappedGrid):
    """Keeps what crossed: records by their names, of each message."""

    def __init__(self, inner):
        super().__init__(inner)
        self.sent, self.came = [], []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.sent += [message.content for message in messages]
        replies = self.inner.send_and_receive(messages, timeout=timeout)
        self.came += [reply.content for reply in replies]
        return replies


def bytes_of(contents, name):
    return sum(len(array.data) for one in contents if name in one for array in one[name].values())


def test_a_compression_that_loses_nothing_changes_nothing():
    plain, packed = run([]), run([TopK(1.0), TopK(1.0, "cut-gradient")])
    assert_bit_equal(whole_of(packed), whole_of(plain))


@pytest.mark.parametrize("part", [*ALL, Difference()], ids=lambda one: f"{one.name}-{one.place}")
def test_bytes_on_the_wire_shrink_and_are_counted(part):
    wires = []

    def wrap(grid):
        wires.append(Wire(grid))
        return wires[-1]

    found, plain = run([part], wrap=wrap), run([], wrap=wrap)
    up, down = part.place == "smashed", part.place == "cut-gradient"
    names = {"activations-up": "smashed-data", "gradients-down-unicast": "cut-gradient"}
    for category, name in names.items():
        counted = [
            sum(entry.traffic.logical[category] for entry in one.history) for one in (found, plain)
        ]
        seen = [bytes_of(one.came if up else one.sent, name) for one in wires]
        if (category == "activations-up") == up:
            assert counted == seen
            # Rows of 6 floats: 24 bytes, against 6 and 8 (int8), 12, 8 and 1, 2 (b + 6) / b * 4.
            assert counted[0] < counted[1] or isinstance(part, (LowRank, Difference))
        else:
            assert counted[0] == counted[1]
    assert found.history[-1].loss != plain.history[-1].loss or down


def test_int8_is_a_quarter_of_the_bytes():
    with_int8 = run([Int8()], build=normed_net, data=make_parts([12, 8], normed_net))
    plain = run([], build=normed_net, data=make_parts([12, 8], normed_net))
    one, other = (r.history[0].traffic.logical["activations-up"] for r in (with_int8, plain))
    assert one == other // 4 + 8 * 20  # a least number and a step for each of 20 rows


def test_what_arrives_is_what_the_server_computes_with():
    """One step of PSL by hand: straight through at the client, packed gradients down."""
    data = PARTS[:1]
    up, down = Int8(feedback=False), TopK(0.5, "cut-gradient")
    found = whole_of(run([up, down], data=data, rounds=1, batch_size=12))
    model = fresh(plain_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    inputs, labels = data[0].tensors
    (rows,) = next(epoch_batches(12, "0", 12))
    smashed = model.front(inputs[rows])
    leaf = there_and_back(up, smashed.detach()).requires_grad_()
    nn.functional.cross_entropy(model.head(model.middle(leaf)), labels[rows]).backward()
    smashed.backward(there_and_back(down, leaf.grad))
    optimizer.step()
    assert_close(found, model.state_dict(), 1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        [Noise(0.1), Int8(), TopK(0.3, "cut-gradient", feedback=True)],
        [Clip(1.0), Difference(), Int8("cut-gradient")],
        [TopK(0.3, feedback="example"), Int8("cut-gradient")],
    ],
    ids=["feedback", "difference", "by example"],
)
def test_a_client_that_is_built_anew_computes_the_same(parts):
    cached, anew = run(parts, rounds=3), run(parts, rounds=3, cache=False)
    assert_bit_equal(whole_of(anew), whole_of(cached))


@pytest.mark.parametrize(
    "part",
    [TopK(0.3, feedback=True), TopK(0.3, feedback="example"), Difference()],
    ids=["feedback", "by example", "difference"],
)
def test_a_resumed_run_goes_on_with_what_was_remembered(tmp_path, part):
    down = Int8("cut-gradient")

    def start(rounds, name="b", *, resume=False):
        def wrap(_):
            app = split_app(plain_net, PARTS)
            return LocalGrid(app, 2, progress=False, state_dir=tmp_path / name / "clients")

        return run(
            [part, down], cls=SplitFedV2, rounds=rounds, wrap=wrap, resume=resume,
            checkpoint_dir=str(tmp_path / name / "server"),
        )  # fmt: skip

    whole = start(4, "a")
    start(2)
    resumed = start(4, resume=True)
    assert_bit_equal(weights_of(resumed.arrays), weights_of(whole.arrays))


def test_local_steps_are_compressed_where_they_go_up():
    found, plain = run([Int8()], cls=FSLSAGE), run([], cls=FSLSAGE)
    one, other = (r.history[0].traffic.logical["activations-up"] for r in (found, plain))
    assert one < other
    assert run([Difference()], cls=FSLSAGE, rounds=3).history[-1].loss > 0


def test_shared_gradients_are_each_clients_own_when_they_are_packed():
    found = run([Int8("cut-gradient")], cls=EPSL, phi=1.0)
    traffic = found.history[0].traffic.logical
    assert traffic["gradients-down-broadcast"] == 0
    assert traffic["gradients-down-unicast"] > 0


def test_a_client_that_lost_a_step_begins_anew_with_differences():
    """Client 1 is left out in the middle of round 1 and sends whole smashed data in round 2."""

    class Loses(Wire):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            if sum("smashed-data" in one for one in self.came) == 4:  # the second step's
                return replies[:1]
            return replies

    found = run([Difference()], rounds=3, wrap=Loses)
    assert [[one.client for one in entry.left_out] for entry in found.history] == [["1"], [], []]


def test_pieces_of_another_part_leave_a_client_out():
    class Lies(Wire):
        lied = False

        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            for reply in replies:
                if "smashed-data" in reply.content and not self.lied:
                    self.lied = True
                    arrays = ArrayRecord()
                    arrays["0|numbers"] = to_array(torch.zeros(4, 6))
                    reply.content["smashed-data"] = arrays
            return replies

    (entry, *_) = run([Int8()], wrap=Lies).history
    assert "packed: piece 'steps' is none" in entry.left_out[0].reason
