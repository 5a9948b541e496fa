from pathlib import Path

import pytest

from flsplit.errors import ConfigError
from flsplit.wireless import load_fleet

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "fleet.toml"

LINKS = """
[server]
compute = "1 TFLOP/s"

[[devices]]
name = "pi"
count = 2
compute = "5 GFLOP/s"
uplink = "1 MB/s"
downlink = "10 Mbit/s"

[[devices]]
name = "phone"
compute = ["20 GFLOP/s", "30 GFLOP/s"]
uplink = "2 MB/s"
downlink = "4 MB/s"
memory = "1 GiB"
"""


def write(tmp_path, text):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def test_the_example():
    fleet = load_fleet(EXAMPLE)
    assert [device.name for device in fleet.devices] == ["0", "1", "2", "3", "4"]
    assert all(16e9 <= device.compute_flops <= 25.6e9 for device in fleet.devices)
    assert fleet.radio.num_subchannels == 20
    assert fleet.radio.antenna_gain == pytest.approx(10.0)
    assert load_fleet(EXAMPLE) == fleet  # drawn from the seed
    assert (load_fleet(EXAMPLE).gains == fleet.gains).all()


def test_links(tmp_path):
    fleet = load_fleet(write(tmp_path, LINKS))
    assert [device.name for device in fleet.devices] == ["pi-0", "pi-1", "phone"]
    assert fleet.radio is None
    assert fleet.devices[0].uplink_bps == 8e6
    assert fleet.devices[0].downlink_bps == 1e7
    assert fleet.devices[2].memory_bytes == 1024**3
    assert 20e9 <= fleet.devices[2].compute_flops <= 30e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('power = "1.5 W"', 'powr = "1.5 W"', r"no key 'powr'; did you mean 'power'\?"),
        ("[server]", "[srver]", r"no key 'srver'; did you mean 'server'\?"),
        ("subchannels = 20", "subchanels = 20", r"\[radio\] has no key 'subchanels'; did you mean"),
        ('"1.5 W"', '"1.5 V"', "power: the unit 'V' of '1.5 V' is unknown"),
        ('"1.5 W"', "1.5", "power: 1.5 has no unit, expected a power"),
        ('"1.5 W"', '"-1.5 W"', "device '0': power is -1.5 W, expected more than 0"),
        ('"1.5 W"', '"0 W"', "device '0': power is 0 W, expected more than 0"),
        ('"1.5 W"', '"4000 dBm"', "power: '4000 dBm' is too large for a power"),
        ('"1.5 W"', '"1e400 W"', "power: '1e400 W' is too large for a power"),
        ('total-power = "5 W"', 'total-power = "0 W"', "total-power is 0 W"),
        ("subchannels = 20", "subchannels = 4", "4 subchannels for 5 devices"),
        ("subchannels = 20", "subchannels = 2.5", "2.5 is not a whole number"),
        ('["20 m", "200 m"]', '"90000 km"', "device '0' is out of reach: with all its 1.5 W"),
        ('["20 m", "200 m"]', '["200 m", "20 m"]', "the first is greater than the second"),
        ('["20 m", "200 m"]', '["200 m"]', r"expected one value or \[least, greatest\]"),
        ('"160 GFLOP/s"', '"0 GFLOP/s"', "server: compute is 0"),
        ('"mmwave-28ghz"', '"vacuum"', "path loss 'vacuum' is unknown"),
        ('distance = ["20 m", "200 m"]', "", "lacks 'distance'"),
        ('distance = ["20 m", "200 m"]', 'uplink = "1 MB/s"', "lacks 'distance'"),
        ('memory = "2 GiB"', 'uplink = "1 MB/s"', "'uplink', which means nothing with a"),
        ('memory = "2 GiB"', 'memory = "2 GeB"', "unit 'GeB' of '2 GeB' is unknown"),
        ("seed = 1", "seed = -1", "seed: -1 is not a whole number of at least 0"),
        ("count = 5", 'count = 5\nname = "a', "can't be read"),
        ("count = 5", "count = 0", "count: 0 is not a whole number of at least 1"),
        ("[[devices]]", "[devices]", "expected|no \\[\\[devices\\]\\]"),
    ],
)
def test_bad_input(tmp_path, old, new, message):
    text = EXAMPLE.read_text()
    assert old in text
    with pytest.raises(ConfigError, match=message):
        load_fleet(write(tmp_path, text.replace(old, new, 1)))


def test_the_same_name_twice(tmp_path):
    text = LINKS.replace('"phone"', '"pi-1"')
    with pytest.raises(ConfigError, match="several devices are called 'pi-1'"):
        load_fleet(write(tmp_path, text))


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_fleet(tmp_path / "none.toml")
