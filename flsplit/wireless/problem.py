"""What there is to plan: a fleet, a model, a method, and the cuts that devices have memory for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flsplit.cut import CutError
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.phases import Method, Phase, Training, Where, Work
from flsplit.wireless.profile import ModelProfile, Place


@dataclass(frozen=True)
class Excluded:
    """A place where a model can't be cut, because devices lack memory."""

    place: Place
    devices: tuple[str, ...]  # who lacks it
    needed_bytes: int  # what training would take


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
            short = tuple(d.name for d in self.fleet.devices if d.memory_bytes < needed)
            if short:
                found.append(Excluded(place, short, needed))
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
                f"{least.place.cut!r} needs {least.needed_bytes / 1e6:.1f} MB, more than "
                f"device {', '.join(least.devices[:5])} may use"
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
