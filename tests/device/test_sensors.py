"""Sensors against faked system files and a faked vcgencmd."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.device import sensors
from edge_dtm.device.power import Gauge, Rapl, Sampler, find_power, pmic_watts
from edge_dtm.device.sensors import Absent, condition

NOWHERE = "no-such-vcgencmd"
# A Raspberry Pi 5's answer, shortened; EXT5V and BATT have a voltage only.
PMIC = """\
     3V7_WL_SW_A current(0)=0.09759370A
     VDD_CORE_A current(7)=1.50000000A
     3V7_WL_SW_V volt(8)=3.70000000V
     VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.14744000V
     BATT_V volt(25)=0.00000000V
"""


def put(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def vcgencmd(tmp_path: Path) -> Callable[[str], str]:
    """Make a vcgencmd whose body is a shell script."""

    def make(body: str) -> str:
        path = tmp_path / "vcgencmd"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


def rapl(root: Path, zone: str, name: str, energy_uj: int) -> None:
    folder = f"sys/class/powercap/{zone}"
    put(root, f"{folder}/name", name)
    put(root, f"{folder}/energy_uj", energy_uj)
    put(root, f"{folder}/max_energy_range_uj", 1_000_000)


def test_rapl_adds_packages_and_passes_a_wrap(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 900_000)
    rapl(tmp_path, "intel-rapl:1", "package-1", 100)
    rapl(tmp_path, "intel-rapl:0:0", "core", 7)
    rapl(tmp_path, "intel-rapl:2", "psys", 7)
    sensor, absent = find_power(tmp_path, NOWHERE)
    assert isinstance(sensor, Rapl)
    assert [z.name for z in sensor.zones] == ["intel-rapl:0", "intel-rapl:1"]
    assert len(absent) == 2
    rapl(tmp_path, "intel-rapl:0", "package-0", 50_000)  # 150,000 further, past the end
    rapl(tmp_path, "intel-rapl:1", "package-1", 250_100)
    assert sensor.joules() == pytest.approx(0.4)
    assert sensor.joules() == 0


@given(st.lists(st.integers(0, 999_999), min_size=1, max_size=20))
def test_rapl_never_loses_energy(steps: list[int]) -> None:
    class Zone:
        energy, size = 0, 1_000_000

        def __truediv__(self, name: str) -> Zone:
            self.asked = name
            return self

        def read_text(self) -> str:
            return str(self.energy % self.size if self.asked == "energy_uj" else self.size)

    zone = Zone()
    sensor = Rapl([zone])  # type: ignore[list-item]
    total = sensor.joules()
    for step in steps:
        zone.energy += step
        total += sensor.joules()
    assert total == pytest.approx(sum(steps) / 1e6)


def test_what_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    secret = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    read_text = Path.read_text

    def refuse(self: Path, *args: object, **options: object) -> str:
        # Root, as whom tests may run, can read everything.
        if self == secret:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    sensor, absent = find_power(tmp_path, NOWHERE)
    assert sensor is None
    assert str(absent[-1]) == f"power by RAPL: no permission to read {secret} (run as root)"


def test_without_anything_all_is_absent(tmp_path: Path) -> None:
    sensor, absent = find_power(tmp_path, NOWHERE)
    assert sensor is None
    assert [a.what.split()[-1] for a in absent] == ["PMIC", "monitor", "RAPL"]
    assert all("not there" in a.reason for a in absent)
    found = condition(tmp_path, NOWHERE)
    assert (found.temperatures_c, found.throttled, found.throttle_count) == ({}, [], None)
    assert [a.what for a in found.absent] == ["temperature", "throttling"]
    clock = sensors.clock_share(tmp_path)
    assert isinstance(clock, Absent) and "not there" in clock.reason


def test_pmic_sums_rails_that_have_both(tmp_path: Path, vcgencmd: Callable[[str], str]) -> None:
    expected = 0.0975937 * 3.7 + 1.5 * 0.8
    assert pmic_watts(PMIC) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no rails"):
        pmic_watts("error=1 error_msg=Command not registered")
    sensor, absent = find_power(tmp_path, vcgencmd(f"cat <<'END'\n{PMIC}END"))
    assert isinstance(sensor, Gauge) and sensor.watts() == pytest.approx(expected)
    assert not absent


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'VCHI initialization failed' >&2; exit 1", "VCHI initialization failed"),
        ("echo 'error=1 error_msg=\"Command not registered\"'", "no rails"),
        ("exit 3", r"failed \(3\)"),
    ],
)
def test_pmic_that_does_not_answer(
    tmp_path: Path, vcgencmd: Callable[[str], str], body: str, reason: str
) -> None:
    sensor, absent = find_power(tmp_path, vcgencmd(body))
    assert sensor is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(absent[0])


def test_jetson_counts_its_input_once(tmp_path: Path) -> None:
    folder = "sys/class/hwmon/hwmon1"
    put(tmp_path, f"{folder}/name", "ina3221")
    for n, (label, mv, ma) in enumerate(
        [("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 300)], start=1
    ):
        put(tmp_path, f"{folder}/in{n}_label", label)
        put(tmp_path, f"{folder}/in{n}_input", mv)
        put(tmp_path, f"{folder}/curr{n}_input", ma)
    put(tmp_path, f"{folder}/in7_input", 99)  # sum of shunt voltages, no channel
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "nvme")
    put(tmp_path, "sys/class/hwmon/hwmon0/curr1_input", 5)
    sensor, _ = find_power(tmp_path, NOWHERE)
    assert isinstance(sensor, Gauge)
    assert sensor.name == "INA, VDD_IN"
    assert sensor.watts() == pytest.approx(6.0)
    put(tmp_path, f"{folder}/in1_label", "other")
    sensor, _ = find_power(tmp_path, NOWHERE)
    assert isinstance(sensor, Gauge) and sensor.watts() == pytest.approx(9.5)


def test_ina_with_power_only(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "ina238")
    put(tmp_path, "sys/class/hwmon/hwmon0/curr1_input", 100)
    put(tmp_path, "sys/class/hwmon/hwmon0/power1_input", 2_500_000)
    sensor, _ = find_power(tmp_path, NOWHERE)
    assert isinstance(sensor, Gauge) and sensor.watts() == pytest.approx(2.5)


def test_gauge_integrates_a_ramp_exactly() -> None:
    now = iter([0.0, 1.0, 3.0, 3.5])
    watts = iter([0.0, 2.0, 6.0, 7.0])  # 2 W/s x t: t² joules
    gauge = Gauge("ramp", lambda: next(watts), lambda: next(now))
    assert sum(gauge.joules() for _ in range(4)) == pytest.approx(3.5**2)


def test_temperatures_throttling_and_clock(tmp_path: Path, vcgencmd: Callable[[str], str]) -> None:
    for n, (kind, temp) in enumerate([("cpu-thermal", 61234), ("cpu-thermal", 40000)]):
        put(tmp_path, f"sys/class/thermal/thermal_zone{n}/type", kind)
        put(tmp_path, f"sys/class/thermal/thermal_zone{n}/temp", temp)
    put(tmp_path, "sys/class/thermal/thermal_zone2/type", "off")  # its temp cannot be read
    cpu = "sys/devices/system/cpu"
    for n, now in enumerate([600_000, 1_800_000]):
        put(tmp_path, f"{cpu}/cpu{n}/cpufreq/scaling_cur_freq", now)
        put(tmp_path, f"{cpu}/cpu{n}/cpufreq/cpuinfo_max_freq", 2_400_000)
        put(tmp_path, f"{cpu}/cpu{n}/thermal_throttle/core_throttle_count", n + 3)
        put(tmp_path, f"{cpu}/cpu{n}/thermal_throttle/package_throttle_count", 50)
    found = condition(tmp_path, vcgencmd("echo throttled=0x50004"))
    assert found.temperatures_c == {"cpu-thermal": 61.234, "cpu-thermal (thermal_zone1)": 40.0}
    # Bit 2 now, bits 16 and 18 since the start; 18 is 2's own.
    assert found.throttled == [
        "the CPU is throttled",
        "the supply voltage is too low since the start",
    ]
    assert found.throttle_count == 7
    assert not found.absent
    assert sensors.clock_share(tmp_path) == pytest.approx(0.75)


@pytest.mark.parametrize("text", ["", "throttled=", "throttled=0xzz"])
def test_throttled_that_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="no number"):
        sensors.throttled(text)


def test_sampler_takes_the_whole_block_and_nothing_before(tmp_path: Path) -> None:
    class Steady:
        """One watt by the wall clock."""

        name = "steady"
        last: float | None = None

        def joules(self) -> float:
            now = time.perf_counter()
            last, self.last = self.last, now
            return 0.0 if last is None else now - last

    steady = Steady()
    steady.joules()
    time.sleep(0.3)
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 1)
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", 2)
    with Sampler(steady, tmp_path, 0.01) as sampler:
        time.sleep(0.1)
    assert sampler.joules is not None
    # One watt, so joules are seconds; the last reading comes after the thread has ended.
    assert 0.1 <= sampler.seconds <= sampler.joules + 1e-3
    assert sampler.joules - sampler.seconds < 0.29
    assert sampler.clock_share == 0.5
    assert not sampler.absent


def test_sampler_says_when_the_sensor_fails_on_the_way(tmp_path: Path) -> None:
    class Failing:
        name = "failing"
        calls = 0

        def joules(self) -> float:
            self.calls += 1
            if self.calls > 2:
                raise OSError(19, "No such device")
            return 1.0

    with Sampler(Failing(), tmp_path, 0.005) as sampler:
        time.sleep(0.1)
    assert sampler.joules is None
    assert Absent("power by failing", "No such device") in sampler.absent
    assert len(sampler.absent) == 2  # the clock once, not at each reading
    with Sampler(None, tmp_path, 0.005) as sampler:
        pass
    assert sampler.joules is None
