"""What a device says about its power, temperature, clock and throttling.

Everything is read from files under a root folder ("/" on a device) or from Raspberry Pi's vcgencmd.
What is not there, or may not be read, is an Absent with the reason; nothing here raises.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

INTERVAL_S = 0.1
_VCGENCMD_TIMEOUT_S = 2.0
# Bits of `vcgencmd get_throttled`: now, and since the start (raspberrypi.com/documentation).
_THROTTLED_NOW = {
    0: "voltage too low",
    1: "clock limited",
    2: "throttled",
    3: "soft temperature limit",
}
_SINCE_START = 16


@dataclass(frozen=True)
class Absent:
    """A sensor that could not be read, and why."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class PowerSensor(Protocol):
    """name, and joules used between two readings; the first call starts and gives 0."""

    name: str

    def joules(self) -> float: ...


class Rapl:
    """Energy counters of the CPU packages (Intel and AMD), in microjoules.

    A counter starts anew at max_energy_range_uj; readings must be closer together than that, which
    is about a minute at 100 W or more.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        """zones: folders with energy_uj and max_energy_range_uj."""
        self.name = "RAPL, CPU packages"
        self.zones = tuple(zones)
        self._last: list[int] | None = None

    def joules(self) -> float:
        now = [int((zone / "energy_uj").read_text()) for zone in self.zones]
        last, self._last = self._last, now
        if last is None:
            return 0.0
        used = 0
        for zone, before, after in zip(self.zones, last, now, strict=True):
            wrap = int((zone / "max_energy_range_uj").read_text()) if after < before else 0
            used += after - before + wrap
        return used / 1e6


class Gauge:
    """Watts read now and then, between two readings by the trapezoidal rule."""

    def __init__(
        self,
        name: str,
        watts: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.watts, self._clock = name, watts, clock
        self._last: tuple[float, float] | None = None

    def joules(self) -> float:
        watts = self.watts()
        now = self._clock(), watts
        last, self._last = self._last, now
        return 0.0 if last is None else (now[0] - last[0]) * (last[1] + watts) / 2


def find_power(
    root: Path = Path("/"), vcgencmd: str = "vcgencmd"
) -> tuple[PowerSensor | None, list[Absent]]:
    """The first that can be read of the Pi's PMIC, an INA on the board, RAPL; and what cannot."""
    absent: list[Absent] = []
    finders = (partial(_find_pmic, vcgencmd), partial(_find_ina, root), partial(_find_rapl, root))
    for find in finders:
        found = find()
        if not isinstance(found, Absent):
            return found, absent
        absent.append(found)
    return None, absent


def _find_rapl(root: Path) -> PowerSensor | Absent:
    what = "power by RAPL"
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    # intel-rapl:0:0 is a part of intel-rapl:0; a zone psys would hold the packages once more.
    packages = [z for z in zones if z.name.count(":") == 1 and _text(z / "name") != "psys"]
    if not packages:
        return Absent(what, "not there (no intel-rapl in sys/class/powercap)")
    return _tried(what, Rapl(packages))


def _find_ina(root: Path) -> PowerSensor | Absent:
    what = "power by an INA monitor"
    channels: list[tuple[str, Callable[[], float]]] = []
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if not _text(folder / "name").startswith("ina"):
            continue
        for current in sorted(folder.glob("curr[0-9]*_input")):
            number = current.name.removeprefix("curr").removesuffix("_input")
            volts, power = folder / f"in{number}_input", folder / f"power{number}_input"
            label = _text(folder / f"in{number}_label")
            if volts.exists():
                channels.append((label, partial(_product_watts, volts, current)))
            elif power.exists():
                channels.append((label, partial(_microwatts, power)))
    if not channels:
        return Absent(what, "not there (no ina* with a current in sys/class/hwmon)")
    # On a Jetson the channel VDD_IN is the board's whole input, which holds all others.
    whole = [c for c in channels if c[0] == "VDD_IN"]
    channels = whole or channels
    labels = " + ".join(label or "a channel without a name" for label, _ in channels)
    return _tried(what, Gauge(f"INA, {labels}", lambda: sum(watts() for _, watts in channels)))


def _product_watts(volts: Path, current: Path) -> float:
    """Of files with millivolts and milliamperes."""
    return _int(volts) * _int(current) / 1e6


def _microwatts(power: Path) -> float:
    return _int(power) / 1e6


def _find_pmic(vcgencmd: str) -> PowerSensor | Absent:
    what = "power by the Raspberry Pi's PMIC"

    def watts() -> float:
        return pmic_watts(_vcgencmd(vcgencmd, "pmic_read_adc"))

    return _tried(what, Gauge("PMIC, sum of its rails", watts))


def pmic_watts(text: str) -> float:
    """Sum of current x voltage over the rails in the output of `vcgencmd pmic_read_adc`.

    It leaves out what the PMIC does not feed: USB devices, a fan, losses before it. ValueError
    when no rail has both.
    """
    found = re.findall(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]", text, re.M)
    values = {(name, unit): float(value) for name, unit, value in found}
    rails = [name for name, unit in values if unit == "A" and (name, "V") in values]
    if not rails:
        raise ValueError("vcgencmd pmic_read_adc shows no rails")
    return sum(values[name, "A"] * values[name, "V"] for name in rails)


def _tried(what: str, sensor: PowerSensor) -> PowerSensor | Absent:
    try:
        sensor.joules()
        return sensor
    except PermissionError as error:
        return Absent(what, f"no permission to read {error.filename} (run as root)")
    except (OSError, ValueError) as error:
        return Absent(what, _reason(error))


@dataclass(frozen=True)
class Condition:
    """A moment's state of the device.

    temperatures_c: degrees Celsius by zone. throttled: what limits the clock, in words.
    throttle_count: thermal throttle events of all x86 cores since the start, None if not counted.
    """

    temperatures_c: dict[str, float]
    throttled: list[str]
    throttle_count: int | None
    absent: list[Absent] = field(default_factory=list)


def condition(root: Path = Path("/"), vcgencmd: str = "vcgencmd") -> Condition:
    absent: list[Absent] = []
    temperatures: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        try:
            name = _text(zone / "type") or zone.name
            # Two zones may have one type.
            key = name if name not in temperatures else f"{name} ({zone.name})"
            temperatures[key] = _int(zone / "temp") / 1000
        except (OSError, ValueError):
            continue  # a zone that is switched off cannot be read
    if not temperatures:
        absent.append(Absent("temperature", "not there (no readable zone in sys/class/thermal)"))

    throttled: list[str] = []
    count: int | None = None
    reasons = []
    try:
        throttled = throttled_words(_vcgencmd(vcgencmd, "get_throttled"))
    except (OSError, ValueError) as error:
        reasons.append(_reason(error))
    try:
        # A package's count is repeated at each of its cores; a core's own is not.
        cpus = (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
        counts = [_int(f) for cpu in cpus for f in cpu.glob("thermal_throttle/core_throttle_count")]
        if counts:
            count = sum(counts)
        else:
            reasons.append("no thermal_throttle in sys/devices/system/cpu")
    except (OSError, ValueError) as error:
        reasons.append(_reason(error))
    if len(reasons) == 2:
        absent.append(Absent("throttling", "; ".join(reasons)))
    return Condition(temperatures, throttled, count, absent)


def throttled_words(text: str) -> list[str]:
    """What `throttled=0x50005` says. ValueError when it is not of that form."""
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", text)
    if not found:
        raise ValueError("vcgencmd get_throttled gave no number")
    bits = int(found.group(1), 16)
    now = [word for bit, word in _THROTTLED_NOW.items() if bits >> bit & 1]
    before = [
        f"{word} since the start"
        for bit, word in _THROTTLED_NOW.items()
        if bits >> (bit + _SINCE_START) & 1 and not bits >> bit & 1
    ]
    return now + before


def clock_share(root: Path = Path("/")) -> float | Absent:
    """The fastest CPU's clock now as a share of its maximum; while idle it says little."""
    shares = []
    try:
        for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
            most = _int(folder / "cpuinfo_max_freq")
            if most > 0:
                shares.append(_int(folder / "scaling_cur_freq") / most)
    except (OSError, ValueError) as error:
        return Absent("clock", _reason(error))
    if not shares:
        return Absent("clock", "not there (no cpufreq in sys/devices/system/cpu)")
    return max(shares)


class Sampler:
    """Reads power and clock in a thread while its `with` block runs.

    Afterwards: joules (None without a sensor or when it failed on the way), seconds,
    clock_share (mean over the readings, None when absent) and absent.
    """

    def __init__(
        self,
        sensor: PowerSensor | None,
        root: Path = Path("/"),
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.joules: float | None = None
        self.seconds = 0.0
        self.clock_share: float | None = None
        self.absent: list[Absent] = []
        self._sensor, self._root, self._interval_s = sensor, root, interval_s
        self._clocks: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = 0.0

    def __enter__(self) -> Sampler:
        if self._sensor is not None:
            try:
                self._sensor.joules()  # what was used before is not this block's
                self.joules = 0.0
            except (OSError, ValueError) as error:
                self._fail(error)
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        self._read_power()  # what was used since the thread's last reading
        if self._clocks:
            self.clock_share = sum(self._clocks) / len(self._clocks)

    def _run(self) -> None:
        while True:
            clock = clock_share(self._root)
            if isinstance(clock, Absent):
                if clock not in self.absent:
                    self.absent.append(clock)
            else:
                self._clocks.append(clock)
            if self._stop.wait(self._interval_s):
                return
            self._read_power()

    def _read_power(self) -> None:
        if self._sensor is None or self.joules is None:
            return
        try:
            self.joules += self._sensor.joules()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        assert self._sensor is not None
        self.joules = None
        self.absent.append(Absent(f"power by {self._sensor.name}", _reason(error)))


def _vcgencmd(program: str, what: str) -> str:
    """OSError when it is not there or fails."""
    if shutil.which(program) is None:
        raise FileNotFoundError(2, "vcgencmd is not there (it is on a Raspberry Pi)")
    try:
        done = subprocess.run(
            [program, what],
            capture_output=True,
            text=True,
            check=False,
            timeout=_VCGENCMD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"vcgencmd {what} did not answer") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:120]
        raise OSError(f"vcgencmd {what} failed ({said or done.returncode})")
    return done.stdout


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"no permission to read {error.filename} (run as root)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _int(path: Path) -> int:
    return int(path.read_text())
