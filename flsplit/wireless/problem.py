"""What there is to plan: a fleet, a model, a method, and the cuts that devices have memory for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flsplit.cut import CutError
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.phases import Method, Phase, Training, Where, Work
from flsplit.wireless.profile import ModelProfile, Place
from flsplit.wireless.units import with_unit

_MOST_SHOWN = 3  # devices that an error names


@dataclass(frozen=True)
class Excluded:
    """A place where a model can't be cut, because devices lack memory."""

    place: Place
    devices: tuple[str, ...]  # who lacks it
    needed_bytes: int  # what training would take
    memory_bytes: tuple[float, ...]  # what these devices have

    def text(self) -> str:
        """Say what is needed and who has less."""
        needed = with_unit(self.needed_bytes, "B")
        have = [with_unit(one, "B") for one in self.memory_bytes]
        if needed in have:  # by rounding
            needed, have = f"{self.needed_bytes} B", [f"{one:.0f} B" for one in self.memory_bytes]
        pairs = zip(self.devices, have, strict=True)
        shown = [f"{name} ({size})" for name, size in pairs][:_MOST_SHOWN]
        rest = len(self.devices) - len(shown)
        more = f" and {rest} more" if rest else ""
        return f"needs {needed}, more than device {', '.join(shown)}{more} may use"


@dataclass(frozen=True)
class Problem:
    """A fleet, a model and a method of training."""

    fleet: Fleet
    profile: ModelProfile
    method: Method
    training: Training

    @property
    def is_allocated(self) -> bool:
        """Whether there are subchannels and powers to choose."""
        return self.fleet.radio is not None and not self.in_turn

    @cached_property
    def in_turn(self) -> bool:
        """Whether devices always send in turn, each with the whole band to itself."""
        links = (Where.UPLINK, Where.DOWNLINK)
        phases = self.phases(self.all_places[0])
        turns = [p.in_turn for p in phases if any(s.where in links for s in p.stages)]
        return bool(turns) and all(turns)

    @property
    def all_places(self) -> tuple[Place, ...]:
        """Where the method could cut: the model's end if devices train all of it."""
        return (self.profile.end,) if self.method.whole_model else self.profile.places

    @cached_property
    def excluded(self) -> tuple[Excluded, ...]:
        """Places that exceed some device's memory."""
        found, training, method = [], self.training, self.method
        for place in self.all_places:
            needed = place.client_memory_bytes(training.batch_size, training.optimizer_slots)
            needed += method.kind.device_memory_bytes(self._work(place), **method.arguments)
            if short := [one for one in self.fleet.devices if one.memory_bytes < needed]:
                names, have = zip(*((one.name, one.memory_bytes) for one in short), strict=True)
                found.append(Excluded(place, names, needed, have))
        return tuple(found)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Places that every device has the memory for; CutError if there is none."""
        out = {one.place.cut: one for one in self.excluded}
        places = tuple(place for place in self.all_places if place.cut not in out)
        if not places:
            least = min(out.values(), key=lambda one: one.needed_bytes)
            raise CutError(
                f"no cut of {self.profile.model} fits into the devices' memory: even "
                f"{least.place.cut!r} {least.text()}"
            )
        return places

    @property
    def note(self) -> str:
        """What to know of what is charged; empty where there is nothing to say."""
        return self.method.kind.plan_note(**self.method.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """The strategy's arguments in a run's configuration, so that it trains as planned."""
        sizes = {"batch-size": self.training.batch_size, "local-steps": self.training.steps}
        return {key.replace("_", "-"): value for key, value in self.method.given.items()} | sizes

    def phases(self, place: Place) -> tuple[Phase, ...]:
        """Return what a round consists of if the model is cut at a place."""
        return self.method.phases(self._work(place))

    def _work(self, place: Place) -> Work:
        return Work(self.profile, place, self.fleet.num_devices, self.training)
