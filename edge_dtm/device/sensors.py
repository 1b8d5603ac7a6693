"""What a device says about its temperature, clock and throttling.

Everything is read from files under a root folder ("/" on a device) or from Raspberry Pi's vcgencmd.
What is not there, or may not be read, is an Absent with the reason; nothing here raises.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

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
class Absent:
    """A sensor that could not be read, and why."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


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
            name = read_line(zone / "type") or zone.name
            # Two zones may have one type.
            key = name if name not in temperatures else f"{name} ({zone.name})"
            temperatures[key] = read_int(zone / "temp") / 1000
        except (OSError, ValueError):
            continue  # a zone that is switched off cannot be read
    if not temperatures:
        absent.append(Absent("temperature", "not there (no readable zone in sys/class/thermal)"))

    limits: list[str] = []
    count: int | None = None
    reasons = []
    try:
        now, since = throttled(run_vcgencmd(vcgencmd, "get_throttled"))
        limits = now + [f"{words} since the start" for words in since]
    except (OSError, ValueError) as error:
        reasons.append(reason_of(error))
    try:
        # A package's count is repeated at each of its cores; a core's own is not.
        cpus = (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
        counts = [
            read_int(f) for cpu in cpus for f in cpu.glob("thermal_throttle/core_throttle_count")
        ]
        if counts:
            count = sum(counts)
        else:
            reasons.append("no thermal_throttle in sys/devices/system/cpu")
    except (OSError, ValueError) as error:
        reasons.append(reason_of(error))
    if len(reasons) == 2:
        absent.append(Absent("throttling", "; ".join(reasons)))
    return Condition(temperatures, limits, count, absent)


def throttled(text: str) -> tuple[list[str], list[str]]:
    """(now, since the start and not now) in the output of `vcgencmd get_throttled`.

    ValueError when it is not of the form `throttled=0x50005`.
    """
    match = re.search(r"throttled=0x([0-9a-fA-F]+)", text)
    if not match:
        raise ValueError("vcgencmd get_throttled gave no number")
    bits = int(match[1], 16)
    now = [words for bit, words in _THROTTLED_BITS.items() if bits >> bit & 1]
    since = [words for bit, words in _THROTTLED_BITS.items() if bits >> (bit + 16) & 1]
    return now, [words for words in since if words not in now]


def clock_share(root: Path = Path("/")) -> float | Absent:
    """The fastest CPU's clock now as a share of its maximum; while idle it says little."""
    shares = []
    try:
        for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
            most = read_int(folder / "cpuinfo_max_freq")
            if most > 0:
                shares.append(read_int(folder / "scaling_cur_freq") / most)
    except (OSError, ValueError) as error:
        return Absent("clock", reason_of(error))
    if not shares:
        return Absent("clock", "not there (no cpufreq in sys/devices/system/cpu)")
    return max(shares)


def run_vcgencmd(program: str, what: str) -> str:
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
        words = " ".join((done.stderr or done.stdout).split())[:120]
        raise OSError(f"vcgencmd {what} failed ({words or done.returncode})")
    return done.stdout


def reason_of(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"no permission to read {error.filename} (run as root)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def read_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def read_int(path: Path) -> int:
    return int(path.read_text())
