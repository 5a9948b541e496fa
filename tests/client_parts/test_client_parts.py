"""Client parts: found, sent, refused, and the same numbers on every carrier."""

import json

import pytest
import torch
from carry.threaded import ThreadedGrid
from client.driving import Drive, RefusedError, some_gradient
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
    plain_net,
    split_app,
    weights_of,
)

from flsplit import LocalGrid, SessionSettings
from flsplit.client_parts import (
    ClientPart,
    Clip,
    Compression,
    Noise,
    Proximal,
    describe_parts,
    make_part,
)
from flsplit.client_parts import finding as finding_module
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.run import make_strategy
from flsplit.strategies import CSEFSL, FSLSAGE, PSL, SequentialSL, SplitFedV1

SIZES = (11, 8, 6)


class Feedback(ClientPart):
    """Sends one decimal only, and adds what was left out to the next step's: it has a state."""

    name = "feedback"

    def __init__(self, decay: float = 1.0) -> None:
        self.decay = decay
        self.left, self.steps = torch.zeros(()), 0

    def smashed(self, where, smashed):
        wanted = smashed + self.decay * self.left
        sent = smashed + (wanted.round(decimals=1) - smashed).detach()
        self.left, self.steps = (wanted - sent).detach().mean(), self.steps + 1
        return sent

    def state_dict(self):
        return {"left": self.left, "steps": self.steps}

    def load_state_dict(self, state):
        self.left, self.steps = state["left"], state["steps"]


class Counting(ClientPart):
    """Forgets to say what it remembers."""

    name = "counting"

    def __init__(self) -> None:
        self.seen = {}


class LateCounting(ClientPart):
    name = "late-counting"

    def gradients(self, where, parameters):
        self.count = getattr(self, "count", 0) + 1


class Halve(ClientPart):
    """Halves the cut-layer gradient, on the server or on the client."""

    name = "halve"

    def __init__(self, on_server: bool) -> None:
        self.on_server = on_server

    def cut_gradient(self, where, gradient):
        return gradient if self.on_server else gradient / 2

    def down(self, where, cut_gradient):
        return cut_gradient / 2 if self.on_server else cut_gradient


class PeekLess(ClientPart):
    """A loss of inputs and smashed data, and what it may look at."""

    name = "peek-less"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, where, inputs, smashed, labels):
        assert len(inputs) == len(smashed) == len(labels)
        return self.weight * (smashed.flatten(1).mean(1) * inputs.flatten(1).mean(1)).sum()


class Wrong(ClientPart):
    name = "wrong"

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def smashed(self, where, smashed):
        if self.hook == "detached":
            return smashed.detach().clamp(-1, 1)
        return smashed[:1] if self.hook == "smashed" else smashed

    def cut_gradient(self, where, gradient):
        return None if self.hook == "cut-gradient" else gradient

    def loss(self, where, inputs, smashed, labels):
        return smashed.sum(1) if self.hook == "loss" else None

    def state_dict(self):
        return {"seen": [1, 2]} if self.hook == "state" else {}


OWN = [Feedback, Counting, LateCounting, Halve, PeekLess, Wrong]
PARTS = [
    Clip(1.5), Noise(0.1), Feedback(0.5), PeekLess(0.1), Clip(0.02, "batch", "cut-gradient"),
    Noise(0.001, "cut-gradient"), Clip(1.0, "batch", "gradients"), Noise(0.01, "gradients"),
    Proximal(0.1),
]  # fmt: skip

CARRIERS = {
    "cache": lambda app: LocalGrid(app, len(SIZES), progress=False),
    "no cache": lambda app: LocalGrid(app, len(SIZES), cache=False, progress=False),
    "session": lambda app: ThreadedGrid(app, len(SIZES)),
}


def train(cls, parts, carrier="cache", rounds=3, grid=None, build=noisy_net, own=OWN, **options):
    data = make_parts(SIZES, build)
    app = split_app(build, data, data, optimizer=MOMENTUM, client_parts=own)
    strategy = cls(
        model=fresh(build), cut=CUT, server_lr=LR, server_optimizer=MOMENTUM, seed=SEED,
        batch_size=4, client_parts=parts, session=SessionSettings(join_timeout=20.0, grace=2.0),
        **options,
    )  # fmt: skip
    initial = ArrayRecord(fresh(build).state_dict())
    grid = grid(app) if grid else CARRIERS[carrier](app)
    return strategy.start(grid, initial, num_rounds=rounds, timeout=30.0)


def outcome(result):
    return result.history.numbers(), {k: v.numpy().tobytes() for k, v in result.arrays.items()}


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PSL, SplitFedV1, SequentialSL, FSLSAGE, CSEFSL])
def test_every_carrier_gives_the_same_numbers(cls):
    # Over a session, server and clients of a decoupled method compute at the same time; here they
    # are threads of one process, whose random layers would draw from each other's generator.
    options = {"upload_every": 2, "build": plain_net} if cls in (FSLSAGE, CSEFSL) else {}
    results = {name: outcome(train(cls, PARTS, name, **options)) for name in CARRIERS}
    assert results["cache"] == results["no cache"] == results["session"]
    assert results["cache"] != outcome(train(cls, [], **options))
    assert all(entry["left-out"] == [] for entry in results["cache"][0])


def test_no_parts_are_what_there_was_before():
    assert outcome(train(PSL, [])) == outcome(train(PSL, [Noise(0.0), Proximal(0.0)]))


def test_what_goes_up_of_local_steps_is_clipped(monkeypatch):
    from flsplit.message.local_steps import LocalRequest

    longest, check = [], LocalRequest.check

    def watch(request, reply):
        check(request, reply)
        longest.extend(float(x.flatten(1).norm(dim=1).max()) for x, _ in reply.uploads.values())

    monkeypatch.setattr(LocalRequest, "check", watch)
    train(CSEFSL, [Clip(0.5)], upload_every=1)
    assert len(longest) == 3 * (3 + 2 + 2)
    assert max(longest) == pytest.approx(0.5)


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    def run(name, rounds, resume=False):
        folder = tmp_path / name
        return train(
            SplitFedV1, PARTS, rounds=rounds, checkpoint_dir=str(folder / "server"), resume=resume,
            grid=lambda app: LocalGrid(
                app, len(SIZES), progress=False, state_dir=folder / "clients"
            ),
        )  # fmt: skip

    run("b", 2)
    assert outcome(run("b", 4, resume=True)) == outcome(run("a", 4))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_forward_pass_that_is_undone_leaves_a_parts_state_alone(cache):
    ends = []
    for disturbed in (False, True):
        data = make_parts([8])
        app = split_app(plain_net, data, data, client_parts=OWN)
        drive = Drive(app, plain_net, cache=cache)
        reply = drive.begin(client_parts=describe_parts([Feedback()]))
        for step in (1, 2):
            if disturbed:
                drive.evaluate()  # the forward pass that awaits its gradient is computed again
            gradient = some_gradient(step - 1, reply)
            end = drive.finish(1, gradient) if step == 2 else None
            reply = drive.step(1, gradient) if step == 1 else reply
        ends.append(end.segment)
    assert_bit_equal(*ends)


# --- on the way down -------------------------------------------------------------------------


def test_the_server_edits_what_goes_down():
    on_server, on_client = (
        train(PSL, [Halve(on_server=where)], build=plain_net, share_client_segments=True)
        for where in (True, False)
    )
    assert outcome(on_server) == outcome(on_client)
    for name, segment in on_server.client_segments.items():
        assert_bit_equal(weights_of(segment), weights_of(on_client.client_segments[name]))
    assert outcome(on_server) != outcome(train(PSL, [], build=plain_net))


# --- found and sent --------------------------------------------------------------------------


def test_a_part_is_sent_as_name_class_and_arguments():
    sent = json.loads(describe_parts([Clip(2.0, per="batch"), PeekLess(1)]))
    assert sent[0] == {
        "name": "clip", "class": "flsplit.client_parts.stock:Clip",
        "arguments": {"norm": 2.0, "per": "batch", "place": "smashed"},
    }  # fmt: skip
    assert sent[1]["arguments"] == {"weight": 1}
    assert describe_parts([]) == ""


class Entry:
    def __init__(self, cls):
        self.name, self.cls = cls.name, cls

    def load(self):
        return self.cls


@pytest.fixture
def installed(monkeypatch):
    """Let the classes of this file be installed."""
    found = {cls.name: Entry(cls) for cls in OWN}

    def entry_points(*, group, name=None):
        assert group == "flsplit.client_parts"
        if name is None:
            return type("All", (), {"names": set(found)})
        return [found[name]] if name in found else []

    monkeypatch.setattr(finding_module, "entry_points", entry_points)


def test_an_installed_part_is_found_by_name(installed):
    by_entry_point = train(PSL, [PeekLess(0.5)], own=[])
    assert outcome(by_entry_point) == outcome(train(PSL, [PeekLess(0.5)]))
    assert make_part({"name": "peek-less", "weight": 2}).weight == 2


def test_a_part_that_no_client_has_ends_the_run_and_says_what_provides_it():
    with pytest.raises(NotEnoughClientsError) as caught:
        train(PSL, [PeekLess(0.5)], own=[])
    said = str(caught.value)
    assert "client '0' has no client part 'peek-less', which the run needs (it has clip" in said
    assert "install there what provides " in said
    assert "test_client_parts:PeekLess, in the entry-point group flsplit.client_parts" in said


def test_a_table_of_names_and_arguments():
    strategy = make_strategy(
        "psl",
        '{client-parts = ["clip", {name = "noise", sigma = 0.1, place = "cut-gradient"}]}',
        model=plain_net(),
        cut=CUT,
    )
    clip, noise = strategy.options.client_parts
    assert (type(clip), clip.norm, clip.per) == (Clip, 1.0, "sample")
    assert (type(noise), noise.sigma, noise.place) == (Noise, 0.1, "cut-gradient")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('{client-parts = "clip"}', "client-parts is 'clip', expected a list as"),
        ("{client-parts = [3]}", "client part is 3, expected a name or a table"),
        (
            '{client-parts = ["clap"]}',
            r"there is no client part 'clap' \(there are clip, difference, ",
        ),
        ('{client-parts = ["noise"]}', "client part 'noise': .*missing 1 required .*'sigma'"),
        (
            '{client-parts = [{name = "clip", nrm = 1}]}',
            "'clip' has no argument 'nrm' .it has norm",
        ),
    ],
)
def test_a_table_that_cannot_be_used(table, said):
    with pytest.raises(ConfigError, match=said):
        make_strategy("psl", table, model=plain_net(), cut=CUT)


class Shy(ClientPart):
    name = "shy"

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma


class Nameless(ClientPart):
    pass


class Misspelt(ClientPart):
    name = "misspelt"

    def smashed_data(self, where, smashed):
        return smashed + 100


class Sign(Compression):
    name = "sign"

    def __init__(self, place: str = "smashed") -> None:
        self.place, self.feedback = place, False

    def encode(self, tensor):
        return {"sign": tensor > 0}

    def decode(self, pieces, shape):
        return pieces["sign"].float()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Counting(), "client part 'counting' keeps 'seen' beside its arguments but has no state_d"),
        (Shy(1.0), "client part 'shy': sigma is None, expected a number, .* of this name"),
        (Nameless(), "client part Nameless has no name"),
        (Misspelt(), "'misspelt' .Misspelt. has none of the hooks .*; did you mean 'smashed'"),
        (Sign(), r"'sign': Sign.__init__ doesn't call super\(\).__init__\(place, feedback\)"),
        (Noise, "client_parts: one of them is .*Noise.*, expected a ClientPart"),
        ("noise", "client_parts: one of them is 'noise', expected a ClientPart"),
    ],
)
def test_a_part_that_cannot_be_sent_is_refused_at_the_start(part, said):
    with pytest.raises(ConfigError, match=said):
        PSL(model=plain_net(), cut=CUT, client_parts=[part])


def test_more_parts_than_anybody_needs():
    with pytest.raises(ConfigError, match="client_parts: at most 32"):
        PSL(model=plain_net(), cut=CUT, client_parts=[Noise(0.1)] * 33)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        (LateCounting(), "client part 'late-counting' keeps 'count' beside its arguments but has"),
        (
            Wrong("detached"),
            "'wrong': smashed returned a detached tensor, through which no gradient would come",
        ),
        (
            Wrong("smashed"),
            r"'wrong': smashed returned a Tensor of shape \(1, 6\), expected a tens",
        ),
        (Wrong("cut-gradient"), r"'wrong': cut_gradient returned a NoneType, expected a tensor"),
        (Wrong("loss"), r"'wrong': loss returned a Tensor of shape \(4,\), expected a scalar"),
        (Wrong("state"), r"'wrong': state_dict\(\)\['seen'\] is a list, expected a tensor, a num"),
    ],
)
def test_a_part_that_does_what_it_must_not_is_named(part, said, cache):
    drive = Drive(split_app(plain_net, make_parts([8]), client_parts=OWN), plain_net, cache=cache)
    with pytest.raises(RefusedError, match=said):
        drive.train_round(some_gradient, client_parts=describe_parts([part]))


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", "[" * 5000, "{}", "[]", "[1]", '["clip"]', '[{"name": "clip"}]',
        '[{"name": 1, "class": "", "arguments": {}}]',
        '[{"name": "clip", "class": "", "arguments": []}]',
        '[{"name": "clip", "class": "", "arguments": {"norm": [1]}}]',
        json.dumps([{"name": "noise", "class": "", "arguments": {"sigma": 0.1}}] * 40),
        "[" + " " * 9000 + "]",
    ],
)  # fmt: skip
def test_a_plan_whose_parts_are_malformed_changes_nothing(text):
    drive = Drive(split_app(plain_net, make_parts([8])), plain_net)
    drive.train_round(some_gradient)
    before = drive.train_round(lambda step, reply: None).segment
    with pytest.raises(RefusedError, match="ProtocolError: field 'client-parts' is"):
        drive.begin(client_parts=text)
    drive.round -= 1
    assert_bit_equal(drive.finish().segment, before)


def test_classes_for_a_client_app_are_looked_at():
    with pytest.raises(ConfigError, match=r"client_parts: one of them is .*Noise obj.*, expec"):
        split_app(plain_net, make_parts([8]), client_parts=[Noise(0.1)])
