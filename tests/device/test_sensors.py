"""Sensors against faked system files and a faked vcgencmd."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.boards import put

from edge_dtm.device import sensors
from edge_dtm.device.sensors import Gauge, Rapl, Sampler, condition, find_power, pmic_watts

# A Raspberry Pi 5's answer, shortened; EXT5V and BATT have a voltage only.
PMIC = """\
     3V7_WL_SW_A current(0)=0.09759370A
     VDD_CORE_A current(7)=1.50000000A
     3V7_WL_SW_V volt(8)=3.70000000V
     VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.14744000V
     BATT_V volt(25)=0.00000000V
"""


Answer = Callable[[str], None]


@pytest.fixture
def vcgencmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Have a program of that name on the path, which prints a text."""

    def make(text: str) -> None:
        path = tmp_path / "vcgencmd"
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
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
    sensor, absent = find_power(tmp_path)
    assert isinstance(sensor, Rapl) and not absent
    assert [z.name for z in sensor.zones] == ["intel-rapl:0", "intel-rapl:1"]
    rapl(tmp_path, "intel-rapl:0", "package-0", 50_000)  # 150,000 further, past the end
    rapl(tmp_path, "intel-rapl:1", "package-1", 250_100)
    assert sensor.joules() == pytest.approx(0.4)
    assert sensor.joules() == 0


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
    sensor, absent = find_power(tmp_path)
    assert sensor is None
    assert absent[-1] == f"power by RAPL: no permission to read {secret} (run as root)"


def test_without_anything_all_is_absent(tmp_path: Path) -> None:
    sensor, absent = find_power(tmp_path)
    assert sensor is None and len(absent) == 3
    state = condition(tmp_path)
    assert (state.temperatures_c, state.throttled, state.throttle_count) == ({}, [], None)
    assert [text.partition(":")[0] for text in state.absent] == ["temperature", "throttling"]
    assert all(": not there" in text for text in absent + state.absent)
    assert sensors.clock_share(tmp_path) is None


def test_pmic_sums_rails_that_have_both(tmp_path: Path, vcgencmd: Answer) -> None:
    vcgencmd(PMIC)
    sensor, _ = find_power(tmp_path)
    assert isinstance(sensor, Gauge)
    assert sensor.watts() == pytest.approx(0.0975937 * 3.7 + 1.5 * 0.8)
    vcgencmd("error=1 error_msg=Command not registered")
    with pytest.raises(ValueError, match="no rails"):
        pmic_watts()


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
    sensor, _ = find_power(tmp_path)
    assert isinstance(sensor, Gauge)
    assert sensor.name == "INA, VDD_IN"
    assert sensor.watts() == pytest.approx(6.0)
    put(tmp_path, f"{folder}/in1_label", "other")
    sensor, _ = find_power(tmp_path)
    assert isinstance(sensor, Gauge) and sensor.watts() == pytest.approx(9.5)


def test_ina_with_power_only(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "ina238")
    put(tmp_path, "sys/class/hwmon/hwmon0/curr1_input", 100)
    put(tmp_path, "sys/class/hwmon/hwmon0/power1_input", 2_500_000)
    sensor, _ = find_power(tmp_path)
    assert isinstance(sensor, Gauge) and sensor.watts() == pytest.approx(2.5)


def test_gauge_integrates_a_ramp_exactly() -> None:
    now = iter([0.0, 1.0, 3.0, 3.5])
    watts = iter([0.0, 2.0, 6.0, 7.0])  # 2 W/s x t: t² joules
    gauge = Gauge("ramp", lambda: next(watts), lambda: next(now))
    assert sum(gauge.joules() for _ in range(4)) == pytest.approx(3.5**2)


def test_temperatures_throttling_and_clock(tmp_path: Path, vcgencmd: Answer) -> None:
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
    vcgencmd("throttled=0x50004")
    state = condition(tmp_path)
    assert state.temperatures_c == {"cpu-thermal": 61.234, "cpu-thermal (thermal_zone1)": 40.0}
    # Bit 2 now, bits 16 and 18 since the start; 18 is 2's own.
    assert state.throttled == [
        "the CPU is throttled",
        "the supply voltage is too low since the start",
    ]
    assert state.throttle_count == 7
    assert not state.absent
    assert sensors.clock_share(tmp_path) == pytest.approx(0.75)


@pytest.mark.parametrize("text", ["", "throttled=", "throttled=0xzz"])
def test_throttled_that_is_no_number(text: str) -> None:
    assert sensors.throttled(text) is None


def test_sampler_takes_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    steady = Gauge("steady", lambda: 1.0)  # one watt, so joules are seconds
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 1)
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", 2)
    sampler = Sampler(steady, tmp_path, 0.01)
    for _ in range(2):
        steady.joules()
        time.sleep(0.3)
        with sampler:
            time.sleep(0.1)
    # The last reading comes after the thread has ended.
    assert sampler.joules is not None and 0.2 <= sampler.seconds <= sampler.joules + 2e-3
    assert sampler.joules - sampler.seconds < 0.29
    assert set(sampler.clock_shares) == {0.5} and not sampler.failure


def test_sampler_says_when_the_sensor_fails_on_the_way(tmp_path: Path) -> None:
    watts = iter([1.0, 1.0])

    def read() -> float:
        for value in watts:
            return value
        raise OSError("No such device")

    with Sampler(Gauge("failing", read), tmp_path, 0.005) as sampler:
        time.sleep(0.1)
    assert sampler.joules is None
    assert sampler.failure == "power by failing: No such device"
    with Sampler(None, tmp_path, 0.005) as sampler:
        pass
    assert sampler.joules is None and not sampler.clock_shares
