"""Parts of a round of local steps: in which order they are asked for and taken."""

from flsplit.message.local_steps import LocalReply, LocalRequest
from flsplit.run.ahead import AHEAD, FurtherParts


class FakeRound:
    """Answers what is asked of it, but for one client that is lost from a step on."""

    def __init__(self, lost: str = "", lost_from: int = 0) -> None:
        self.seen: list[str] = []
        self._lost, self._lost_from = lost, lost_from

    def send_local(self, requests):
        [(name, request)] = requests.items()
        self.seen.append(f"ask {name} for {request.step}")
        return name, request

    def receive_local(self, sent):
        name, request = sent
        self.seen.append(f"take {name} {request.step}")
        if name == self._lost and request.step >= self._lost_from:
            return {}
        return {name: reply_to(name, request.step, request.end(NUM_STEPS[name]))}


NUM_STEPS = {"0": 12, "1": 8}


def reply_to(name: str, step: int, done: int) -> LocalReply:
    return LocalReply(
        client=name, server_round=1, step=step, uploads={}, num_examples=1,
        num_steps=NUM_STEPS[name], steps_done=done, rows=[], seconds=0.0,
    )  # fmt: skip


def further(round_: FakeRound) -> FurtherParts:
    first = {name: reply_to(name, 0, 1) for name in NUM_STEPS}
    return FurtherParts(
        round_,
        first,
        lambda step, num_steps: LocalRequest(server_round=1, step=step, stop=step + 1),
    )


def test_parts_are_asked_for_and_taken_part_by_part_and_by_client_within_a_part():
    round_ = FakeRound()
    taken = [name for replies in further(round_) for name in replies]

    in_turns = [f"{name} for {step}" for step in range(1, 1 + AHEAD) for name in "01"]
    assert round_.seen[: 2 * AHEAD] == [f"ask {one}" for one in in_turns]
    assert taken == ["0", "1"] * 7 + ["0"] * 4


def test_a_reply_is_there_before_the_next_client_s_is_waited_for():
    round_ = FakeRound()
    replies = iter(further(round_))
    del round_.seen[:]

    assert list(next(replies)) == ["0"]
    assert round_.seen == ["take 0 1", f"ask 0 for {1 + AHEAD}"]
    assert list(next(replies)) == ["1"]
    assert round_.seen[2:] == ["take 1 1", f"ask 1 for {1 + AHEAD}"]


def test_a_lost_client_is_asked_for_nothing_more_and_the_other_goes_on():
    round_ = FakeRound(lost="1", lost_from=3)
    taken = [name for replies in further(round_) for name in replies]

    assert taken == ["0", "1"] * 2 + ["0"] * 9
    asked = [one for one in round_.seen if one.startswith("ask 1")]
    assert asked == [f"ask 1 for {step}" for step in range(1, 1 + AHEAD + 2)]
