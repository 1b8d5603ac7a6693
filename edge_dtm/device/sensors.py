"""What a device says about its temperature, clock, throttling and power.

All of it is read from files under a root folder ("/" on a device) or from Raspberry Pi's vcgencmd.
What is not there, or may not be read, becomes a sentence with the reason; nothing here raises.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from edge_dtm.core.machine import read_text

INTERVAL_S = 0.1
_VCGENCMD_TIMEOUT_S = 2.0
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled; what has happened since
# the start has the same bits, 16 higher.
_THROTTLED_BITS = {
    0: "the supply voltage is too low",
    1: "the CPU's frequency is capped",
    2: "the CPU is throttled",
    3: "the soft temperature limit is reached",
}


@dataclass(frozen=True)
class Condition:
    """A moment's state of the device.

    temperatures_c: degrees Celsius by zone. throttled: what limits the clock, in words.
    throttle_count: thermal throttle events of all x86 cores since the start, None if not counted.
    absent: what could not be read, and why.
    """

    temperatures_c: dict[str, float]
    throttled: list[str]
    throttle_count: int | None
    absent: list[str]


def condition(root: Path = Path("/")) -> Condition:
    absent = []
    temperatures: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name = read_text(zone / "type").strip() or zone.name
        # Two zones may have one type.
        key = name if name not in temperatures else f"{name} ({zone.name})"
        text = read_text(zone / "temp")
        if text:  # a zone that is switched off cannot be read
            temperatures[key] = int(text) / 1000
    if not temperatures:
        absent.append("temperature: not there (no readable zone in sys/class/thermal)")
    state = throttled(vcgencmd("get_throttled"))
    now, since = state or ([], [])
    # A package's count is repeated at each of its cores; a core's own is not.
    pattern = "cpu[0-9]*/thermal_throttle/core_throttle_count"
    counts = [int(read_text(file)) for file in (root / "sys/devices/system/cpu").glob(pattern)]
    if state is None and not counts:
        absent.append(
            "throttling: not there (neither vcgencmd get_throttled nor thermal_throttle in "
            "sys/devices/system/cpu)"
        )
    limits = now + [f"{words} since the start" for words in since]
    return Condition(temperatures, limits, sum(counts) if counts else None, absent)


def throttled(text: str) -> tuple[list[str], list[str]] | None:
    """(now, since the start and not now) in the output of `vcgencmd get_throttled`.

    None when it is not of the form `throttled=0x50005`.
    """
    match = re.search(r"throttled=0x([0-9a-fA-F]+)", text)
    if match is None:
        return None
    bits = int(match[1], 16)
    now = [words for bit, words in _THROTTLED_BITS.items() if bits >> bit & 1]
    since = [words for bit, words in _THROTTLED_BITS.items() if bits >> (bit + 16) & 1]
    return now, [words for words in since if words not in now]


def clock_share(root: Path) -> float | None:
    """The fastest CPU's clock now as a share of its maximum, which says little while idle."""
    shares = []
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        names = ("scaling_cur_freq", "cpuinfo_max_freq")
        now, most = (read_text(folder / name).strip() for name in names)
        if now.isdigit() and most.isdigit():
            shares.append(int(now) / int(most))
    return max(shares, default=None)


def vcgencmd(what: str) -> str:
    """What Raspberry Pi's vcgencmd prints, empty when it is not there or does not answer."""
    try:
        return subprocess.run(
            ["vcgencmd", what],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_VCGENCMD_TIMEOUT_S,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Rapl:
    """Energy counters of the CPU packages (Intel and AMD), in microjoules.

    A counter starts anew at max_energy_range_uj; readings must be closer together than that, which
    is about a minute at 100 W or more.
    """

    name = "RAPL, CPU packages"

    def __init__(self, zones: Sequence[Path]) -> None:
        """zones: folders with energy_uj and max_energy_range_uj."""
        self.zones = tuple(zones)
        self._last: list[int] | None = None

    def joules(self) -> float:
        """Used since the last call; the first gives 0."""
        now = [int((zone / "energy_uj").read_text()) for zone in self.zones]
        last, self._last = self._last or now, now
        used = 0
        for zone, before, after in zip(self.zones, last, now, strict=True):
            wrap = int((zone / "max_energy_range_uj").read_text()) if after < before else 0
            used += after - before + wrap
        return used / 1e6


class Gauge:
    """Watts read now and then, between two readings by the trapezoidal rule."""

    def __init__(
        self, name: str, watts: Callable[[], float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.watts, self._clock = name, watts, clock
        self._last: tuple[float, float] | None = None

    def joules(self) -> float:
        """Used since the last call; the first gives 0."""
        watts = self.watts()
        now = self._clock(), watts
        last, self._last = self._last or now, now
        return (now[0] - last[0]) * (last[1] + watts) / 2


PowerSensor = Rapl | Gauge


def find_power(root: Path) -> tuple[PowerSensor | None, list[str]]:
    """The first that can be read of the Pi's PMIC, an INA on the board, RAPL; else why not."""
    sensors: dict[str, Callable[[], PowerSensor]] = {
        "the Raspberry Pi's PMIC": lambda: Gauge("PMIC, sum of its rails", pmic_watts),
        "an INA monitor": partial(_ina, root),
        "RAPL": partial(_rapl, root),
    }
    absent = []
    for name, make in sensors.items():
        try:
            sensor = make()
            sensor.joules()
            return sensor, []
        except (OSError, ValueError) as error:
            absent.append(f"power by {name}: {_reason(error)}")
    return None, absent


def _rapl(root: Path) -> Rapl:
    # intel-rapl:0:0 is a part of intel-rapl:0; a zone psys would hold the packages once more.
    zones = [
        zone
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        if zone.name.count(":") == 1 and read_text(zone / "name").strip() != "psys"
    ]
    if not zones:
        raise ValueError("not there (no intel-rapl in sys/class/powercap)")
    return Rapl(zones)


def _ina(root: Path) -> Gauge:
    channels: list[tuple[str, list[Path]]] = []  # millivolts and milliamperes, or microwatts
    for current in sorted((root / "sys/class/hwmon").glob("hwmon*/curr[0-9]*_input")):
        folder, number = current.parent, current.name.removeprefix("curr").removesuffix("_input")
        if read_text(folder / "name").startswith("ina"):
            volts, power = folder / f"in{number}_input", folder / f"power{number}_input"
            label = read_text(folder / f"in{number}_label").strip() or "a channel without a name"
            channels.append((label, [volts, current] if volts.exists() else [power]))
    if not channels:
        raise ValueError("not there (no ina* with a current in sys/class/hwmon)")
    # On a Jetson the channel VDD_IN is the board's whole input, which holds all others.
    channels = [c for c in channels if c[0] == "VDD_IN"] or channels

    def watts() -> float:
        return sum(prod(int(f.read_text()) for f in files) for _, files in channels) / 1e6

    return Gauge(f"INA, {' + '.join(label for label, _ in channels)}", watts)


def pmic_watts() -> float:
    """Sum of current x voltage over the rails that `vcgencmd pmic_read_adc` shows.

    It leaves out what the PMIC does not feed: USB devices, a fan, losses before it. ValueError
    when no rail has both.
    """
    text = vcgencmd("pmic_read_adc")
    readings = re.findall(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]", text, re.M)
    values = {(name, unit): float(value) for name, unit, value in readings}
    rails = [name for name, unit in values if unit == "A" and (name, "V") in values]
    if not rails:
        raise ValueError("not there (vcgencmd pmic_read_adc shows no rails)")
    return sum(values[name, "A"] * values[name, "V"] for name in rails)


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"no permission to read {error.filename} (run as root)"
    return " ".join(str(error).split())


class Sampler:
    """Reads power and clock in a thread while its `with` block runs, which may be repeated.

    joules (None without a sensor, or when it failed on the way), seconds and clock_shares: of all
    blocks together. failure: of the sensor, empty without.
    """

    def __init__(
        self, sensor: PowerSensor | None, root: Path, interval_s: float = INTERVAL_S
    ) -> None:
        self.joules: float | None = None if sensor is None else 0.0
        self.seconds = 0.0
        self.clock_shares: list[float] = []
        self.failure = ""
        self._sensor, self._root, self._interval_s = sensor, root, interval_s
        self._stop = threading.Event()

    def __enter__(self) -> Sampler:
        self._add_energy(0)  # what was used before is not this block's
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        self._add_energy()  # what was used since the thread's last reading

    def _run(self) -> None:
        while True:
            share = clock_share(self._root)
            if share is not None:
                self.clock_shares.append(share)
            if self._stop.wait(self._interval_s):
                return
            self._add_energy()

    def _add_energy(self, share: int = 1) -> None:
        """What was used since the last reading."""
        if self._sensor is not None and self.joules is not None:
            try:
                self.joules += share * self._sensor.joules()
            except (OSError, ValueError) as error:
                self.joules = None
                self.failure = f"power by {self._sensor.name}: {_reason(error)}"
