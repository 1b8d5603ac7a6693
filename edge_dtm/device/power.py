"""Power sensors of a device: the Raspberry Pi's PMIC, an INA monitor on the board, RAPL."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from edge_dtm.device.sensors import (
    Absent,
    clock_share,
    read_int,
    read_line,
    reason_of,
    run_vcgencmd,
)

INTERVAL_S = 0.1


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
        sensor = find()
        if not isinstance(sensor, Absent):
            return sensor, absent
        absent.append(sensor)
    return None, absent


def _find_rapl(root: Path) -> PowerSensor | Absent:
    what = "power by RAPL"
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    # intel-rapl:0:0 is a part of intel-rapl:0; a zone psys would hold the packages once more.
    packages = [z for z in zones if z.name.count(":") == 1 and read_line(z / "name") != "psys"]
    if not packages:
        return Absent(what, "not there (no intel-rapl in sys/class/powercap)")
    return _tried(what, Rapl(packages))


def _find_ina(root: Path) -> PowerSensor | Absent:
    what = "power by an INA monitor"
    channels: list[tuple[str, Callable[[], float]]] = []
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if not read_line(folder / "name").startswith("ina"):
            continue
        for current in sorted(folder.glob("curr[0-9]*_input")):
            number = current.name.removeprefix("curr").removesuffix("_input")
            volts, power = folder / f"in{number}_input", folder / f"power{number}_input"
            label = read_line(folder / f"in{number}_label")
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
    return read_int(volts) * read_int(current) / 1e6


def _microwatts(power: Path) -> float:
    return read_int(power) / 1e6


def _find_pmic(vcgencmd: str) -> PowerSensor | Absent:
    what = "power by the Raspberry Pi's PMIC"

    def watts() -> float:
        return pmic_watts(run_vcgencmd(vcgencmd, "pmic_read_adc"))

    return _tried(what, Gauge("PMIC, sum of its rails", watts))


def pmic_watts(text: str) -> float:
    """Sum of current x voltage over the rails in the output of `vcgencmd pmic_read_adc`.

    It leaves out what the PMIC does not feed: USB devices, a fan, losses before it. ValueError
    when no rail has both.
    """
    readings = re.findall(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]", text, re.M)
    values = {(name, unit): float(value) for name, unit, value in readings}
    rails = [name for name, unit in values if unit == "A" and (name, "V") in values]
    if not rails:
        raise ValueError("vcgencmd pmic_read_adc shows no rails")
    return sum(values[name, "A"] * values[name, "V"] for name in rails)


def _tried(what: str, sensor: PowerSensor) -> PowerSensor | Absent:
    try:
        sensor.joules()
        return sensor
    except (OSError, ValueError) as error:
        return Absent(what, reason_of(error))


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
        self.absent.append(Absent(f"power by {self._sensor.name}", reason_of(error)))
