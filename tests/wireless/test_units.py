import pytest

from flsplit.errors import ConfigError
from flsplit.wireless import units


@pytest.mark.parametrize(
    ("quantity", "text", "value"),
    [
        (units.POWER, "30 dBm", 1.0),
        (units.POWER, "-30dBm", 1e-6),
        (units.POWER, "200 mW", 0.2),
        (units.POWER_DENSITY, "-174 dBm/Hz", 10**-20.4),
        (units.FREQUENCY, "10 MHz", 1e7),
        (units.GAIN, "20 dB", 100.0),
        (units.DISTANCE, "0.2 km", 200.0),
        (units.SPEED, "1.5e1 GFLOP/s", 1.5e10),
        (units.RATE, "2 MB/s", 16e6),
        (units.RATE, "2 Mbit/s", 2e6),
        (units.SIZE, "2 GiB", 2 * 1024**3),
        (units.SIZE, "2 GB", 2e9),
    ],
)
def test_quantities_become_si_units(quantity, text, value):
    assert quantity.parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 Mhz", r"unit 'Mhz' of '5 Mhz' is unknown; did you mean 'MHz'\?"),
        ("5 parsecs", "unit 'parsecs'"),
        ("5", "'5' has no unit"),
        (5, "5 has no unit, expected a frequency for instance '5 MHz'"),
        ("fast", "'fast' is not a frequency"),
    ],
)
def test_what_is_no_quantity_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        units.FREQUENCY.parse(text)


def test_decibels():
    assert units.from_decibels(13.0) == pytest.approx(10 * 1.9952623)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (5152, "5.152 kB"), (79.31e6, "79.31 MB"), (2e9, "2 GB")],
)
def test_values_are_written_with_a_unit_that_shows_them(value, text):
    assert units.with_unit(value, "B") == text
