"""The devices, the server, and what lies between them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flsplit.errors import ConfigError
from flsplit.wireless.channel import PATH_LOSSES, Array, shannon_rate_bps, surroundings_of
from flsplit.wireless.units import from_decibels, watts_from_dbm

OUT_OF_REACH_BPS = 1.0  # a device that can't send so much with all its power on the whole band


@dataclass(frozen=True, kw_only=True)
class Device:
    """A client's machine."""

    name: str  # what it is called; a run's client of this name is this device
    compute_flops: float  # FLOP/s that training reaches on it
    memory_bytes: float = float("inf")  # bytes that training may take
    # distance (m) to the base station and greatest transmit power (W); on a radio network
    distance_m: float = 0.0
    power_w: float = 0.0
    uplink_bps: float = 0.0  # measured rates (bit/s); where there are links instead of a radio
    downlink_bps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """The edge server."""

    compute_flops: float  # FLOP/s that training reaches on it


@dataclass(frozen=True, kw_only=True)
class Radio:
    """An OFDMA cell: subchannels that each belong to one device at a time."""

    num_subchannels: int
    subchannel_hz: float  # bandwidth of one, in Hz
    noise_w_per_hz: float = watts_from_dbm(-174.0)  # noise power density, in W/Hz
    antenna_gain: float = 1.0  # gain of both ends' antennas together, without unit
    # power density of the base station on every subchannel, in W/Hz
    downlink_w_per_hz: float = watts_from_dbm(-50.0)
    total_power_w: float = float("inf")  # what all devices together may send, in W
    path_loss: str = "macro-2ghz"  # one of `flsplit.wireless.channel.PATH_LOSSES`
    # standard deviation of shadowing, in dB. Default: that of ``path_loss``.
    shadowing_db: float | None = None
    fading: bool = True  # Rayleigh fading, independent for each device and subchannel


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Devices and a server, with a radio cell or with measured links between them."""

    devices: tuple[Device, ...]
    server: Server
    radio: Radio | None = None  # the cell; None for measured links
    seed: int = 0  # of shadowing, fading and lines of sight

    def __post_init__(self) -> None:
        """Refuse what can't be planned for."""
        if not self.devices:
            raise ConfigError("the fleet has no devices")
        names = [device.name for device in self.devices]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"several devices are called {doubles[0]!r}")
        _positive("server", {"compute": (self.server.compute_flops, "FLOP/s")})
        for device in self.devices:
            quantities = {
                "compute": (device.compute_flops, "FLOP/s"),
                "memory": (device.memory_bytes, "B"),
            }
            if self.radio is None:
                quantities["uplink"] = device.uplink_bps, "bit/s"
                quantities["downlink"] = device.downlink_bps, "bit/s"
            else:
                quantities["distance"] = device.distance_m, "m"
                quantities["power"] = device.power_w, "W"
            _positive(f"device {device.name!r}", quantities)
        if self.radio is not None:
            self._check_radio(self.radio)

    def _check_radio(self, radio: Radio) -> None:
        _positive(
            "radio",
            {
                "subchannel-bandwidth": (radio.subchannel_hz, "Hz"),
                "noise": (radio.noise_w_per_hz, "W/Hz"),
                "antenna-gain": (radio.antenna_gain, "(a ratio)"),
                "downlink": (radio.downlink_w_per_hz, "W/Hz"),
                "total-power": (radio.total_power_w, "W"),
            },
        )
        if radio.num_subchannels < len(self.devices):
            raise ConfigError(
                f"radio: {radio.num_subchannels} subchannels for {len(self.devices)} devices: each "
                "device needs one of its own"
            )
        if radio.path_loss not in PATH_LOSSES:
            known = ", ".join(PATH_LOSSES)
            raise ConfigError(
                f"radio: path loss {radio.path_loss!r} is unknown (there are {known})"
            )
        if radio.shadowing_db is not None and radio.shadowing_db < 0:
            raise ConfigError(f"radio: shadowing is {radio.shadowing_db:g} dB, expected 0 or more")
        self._check_reach(radio)

    def _check_reach(self, radio: Radio) -> None:
        for device, gains in zip(self.devices, self.gains, strict=True):
            best = float(gains.max())
            band = radio.num_subchannels * radio.subchannel_hz
            reached = shannon_rate_bps(band, device.power_w, best, radio.noise_w_per_hz)
            if not reached >= OUT_OF_REACH_BPS:
                raise ConfigError(
                    f"device {device.name!r} is out of reach: with all its {device.power_w:g} W at "
                    f"{device.distance_m:g} m it sends {reached:.3g} bit/s, whatever subchannels "
                    "it gets"
                )

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return len(self.devices)

    @cached_property
    def compute_flops(self) -> Array:
        """The devices' computing speeds, FLOP/s."""
        return np.array([device.compute_flops for device in self.devices])

    @cached_property
    def power_w(self) -> Array:
        """The devices' power budgets, W."""
        return np.array([device.power_w for device in self.devices])

    @cached_property
    def gains(self) -> Array:
        """Channel gains (received by sent power, no unit), shape (devices, subchannels).

        ``antenna gain * 10^(-(path loss + shadowing) / 10) * fading``, with fading of mean 1.
        """
        assert self.radio is not None
        radio, rng = self.radio, np.random.default_rng(self.seed)
        distance_m = np.array([device.distance_m for device in self.devices])
        around = surroundings_of(radio.path_loss, distance_m, rng)
        pairs = zip(around, distance_m, strict=True)
        loss_db = np.array([one.path_loss_db(float(distance)) for one, distance in pairs])
        fixed_db = radio.shadowing_db
        spread_db = [one.shadowing_db if fixed_db is None else fixed_db for one in around]
        loss_db = loss_db + rng.normal(size=self.num_devices) * np.array(spread_db)
        shape = (self.num_devices, radio.num_subchannels)
        fading = rng.exponential(size=shape) if radio.fading else np.ones(shape)
        gains = np.array([from_decibels(-loss) for loss in loss_db])[:, None] * fading
        return radio.antenna_gain * gains

    @cached_property
    def snr_per_watt(self) -> Array:
        """Signal to noise per watt sent (1/W), shape (devices, subchannels): ``g / (B N0)``."""
        assert self.radio is not None
        return self.gains / (self.radio.subchannel_hz * self.radio.noise_w_per_hz)


def _positive(where: str, quantities: dict[str, tuple[float, str]]) -> None:
    for name, (value, unit) in quantities.items():
        if not value > 0:
            raise ConfigError(f"{where}: {name} is {value:g} {unit}, expected more than 0")
