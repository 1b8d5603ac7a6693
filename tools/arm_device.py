"""Run edge-dtm of this checkout on an emulated ARM device: llama.cpp's real ARM kernels.

    tools/arm_device pi4 -- edge-dtm verify BUNDLE
    tools/arm_device i8mm --cpu cortex-a72 -- edge-dtm doctor     # a build that this CPU cannot run
    tools/arm_device pi5 --features armv8.2-a+dotprod -- python -c "import llama_cpp"
    tools/arm_device pi5                                          # only make it ready

A device is QEMU in user mode, an arm64 Python 3.11 from Debian packages, the arm64 wheels of what
edge-dtm needs, and llama.cpp cross-compiled from the source distribution of the llama-cpp-python
in constraints.txt. All of it is made on first use (about 6 minutes on two cores) and kept in
arm/<version of llama-cpp-python> of edge-dtm's cache; each part appears whole or not at all, and a
run that was cut off goes on. Neither root nor binfmt is needed.

The command sees the files of this machine, one CPU and one thread. What it says about speed and
memory is about the emulator, not about a device.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import cache_dir

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("edge-dtm", "python")
CROSS = "aarch64-linux-gnu-"
PYTHON = "python3.11"
ROOT_SUITE, ROOT_PACKAGES = "bookworm", (PYTHON, "libstdc++6", "libgomp1")
# The release before has QEMU 7, which shows the host's /proc/cpuinfo and knows no neoverse-v1.
QEMU_SUITE, QEMU_PACKAGE, QEMU_LEAST = "trixie", "qemu-user", 8
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
KEEP_WHEELS_S = 24 * 3600
WHEEL_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")


@dataclass(frozen=True)
class Device:
    """cpu: QEMU's name of the CPU; arch: GCC's -march, which llama.cpp's CPU kernels get."""

    cpu: str
    arch: str


DEVICES = {
    "pi4": Device("cortex-a72", "armv8-a"),
    "pi5": Device("cortex-a76", "armv8.2-a+dotprod+fp16"),
    "i8mm": Device("neoverse-v1", "armv8.6-a+dotprod+fp16+i8mm"),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def need(program: str, package: str) -> str:
    """The program's path. EdgeDtmError with the command that installs it when it is missing."""
    found = shutil.which(program)
    if found is None:
        raise EdgeDtmError(f"{program} was not found: apt-get install {package}")
    return found


def call(words: Sequence[str | Path], log: Path, cwd: Path | None = None) -> None:
    """Run with low priority, output appended to log. EdgeDtmError when it fails."""
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(map(str, words))}\n".encode())
        file.flush()
        done = subprocess.run(
            [str(w) for w in words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            preexec_fn=lambda: os.setpriority(
                os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0))
            ),
            check=False,
        )
    if done.returncode:
        raise EdgeDtmError(
            f"{Path(words[0]).name} failed with exit status {done.returncode}: see the end of {log}"
        )


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name target once it is complete."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.replace(target)


def pinned(name: str) -> str:
    """The version in constraints.txt. EdgeDtmError when it is not there."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        package, _, version = line.partition("==")
        if re.sub("[-_.]+", "-", package).lower() == name:
            return version.strip()
    raise EdgeDtmError(f"constraints.txt has no version of {name}")


def requirements(pyproject: Mapping[str, object], binding: Mapping[str, object]) -> list[str]:
    """What is installed for the device: edge-dtm's plain dependencies and those of llama-cpp-python,
    which itself comes from its source. Both: the table `project` of a pyproject.toml."""
    found = [*_dependencies(pyproject), *_dependencies(binding)]
    return sorted({r for r in found if not r.startswith("llama-cpp-python")})


def _dependencies(project: Mapping[str, object]) -> list[str]:
    listed = project.get("dependencies")
    return [str(item) for item in listed] if isinstance(listed, list) else []


def _project(pyproject: Path) -> dict[str, object]:
    with pyproject.open("rb") as file:
        found = tomllib.load(file)["project"]
    return dict(found)


def debian_mirror() -> str:
    """The Debian mirror of this machine's own apt configuration."""
    need("apt-get", "apt")
    form = "$(ORIGIN)|$(LABEL)|$(SITE)"
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        origin, label, site = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian"):
            return site
    raise EdgeDtmError(
        "apt's sources name no Debian mirror whose lists are there: run apt-get update on a Debian "
        "machine or in a Debian container"
    )


class Apt:
    """apt-get with a state of its own for one suite and architecture; needs no root.

    folder: its state, which may be removed afterwards. EdgeDtmError when the machine has no Debian
    mirror or the lists cannot be fetched.
    """

    def __init__(self, folder: Path, suite: str, architecture: str, log: Path) -> None:
        for part in ("state/lists/partial", "cache/archives/partial", "etc/none"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        # Nothing counts as installed, so that dependencies are fetched down to libc.
        (folder / "status").write_text("")
        signed = f" [signed-by={KEYRING}]" if KEYRING.is_file() else ""
        (folder / "etc/sources.list").write_text(f"deb{signed} {debian_mirror()} {suite} main\n")
        options = {
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "etc/sources.list",
            "Dir::Etc::sourceparts": folder / "etc/none",
            "Dir::Etc::preferencesparts": folder / "etc/none",
            "APT::Architecture": architecture,
            "APT::Architectures::": architecture,
            "APT::Install-Recommends": "false",
            # root's apt drops to a user that may not read the cache.
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
        }
        self._words: list[str | Path] = ["apt-get", "-q", "-y"]
        for name, value in options.items():
            self._words += ["-o", f"{name}={value}"]
        self._archives = folder / "cache/archives"
        self._log = log
        call([*self._words, "update"], log)

    def unpack(self, packages: Sequence[str], target: Path, dependencies: bool) -> None:
        """Fetch the packages and unpack them into target."""
        need("dpkg-deb", "dpkg")
        what = ["install", "--download-only"] if dependencies else ["download"]
        call([*self._words, *what, *packages], self._log, self._archives)
        for file in sorted(self._archives.glob("*.deb")):
            call(["dpkg-deb", "-x", file, target], self._log)


class Maker:
    """Makes the parts of the devices in folder; each method returns what it made or found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "make.log"
        self.source_dir = folder / "source"
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One maker at a time; the lock goes with the process."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def once(self, target: Path, text: str, fill: Callable[[Path], None]) -> Path:
        """target, a folder, made by fill unless it is there."""
        if not target.is_dir():
            say(f"Making an emulated device: {text}")
            with whole_folder(target) as new:
                fill(new)
        return target

    def qemu(self) -> Path:
        """qemu-aarch64 of Debian's package, else of this machine where it is new enough."""
        target = self.folder / "qemu"
        installed = shutil.which("qemu-aarch64")

        def fill(new: Path) -> None:
            need("dpkg", "dpkg")
            machine = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
            self._debian(QEMU_SUITE, machine, [QEMU_PACKAGE], new, dependencies=False)
            for program in (new / "usr/bin").iterdir():
                if program.name != "qemu-aarch64":  # the package has forty other CPUs
                    program.unlink()

        try:
            return self.once(target, "QEMU", fill) / "usr/bin/qemu-aarch64"
        except EdgeDtmError:
            if installed and qemu_version(installed) >= QEMU_LEAST:
                return Path(installed)
            raise

    def root(self) -> Path:
        """A folder with an arm64 Python and all libraries below it."""

        def fill(new: Path) -> None:
            self._debian(ROOT_SUITE, "arm64", ROOT_PACKAGES, new, dependencies=True)

        return self.once(self.folder / "root", "Python for arm64", fill)

    def source(self, version: str) -> Path:
        """The source of llama-cpp-python with that of llama.cpp in vendor/."""

        def fill(new: Path) -> None:
            words = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
            download = new / "download"
            self._pip("download", *words, "--dest", download)
            with tarfile.open(next(download.glob("*.tar.gz"))) as archive:
                for member in archive:
                    # The archive carries a .git, which CMake would ask for versions.
                    member.name = member.name.partition("/")[2]
                    if member.name and member.name.split("/")[0] != ".git":
                        archive.extract(member, new, filter="data")
            shutil.rmtree(download)

        return self.once(self.source_dir, "the source of llama.cpp", fill)

    def wheels(self) -> Path:
        """A folder for PYTHONPATH with what edge-dtm and llama-cpp-python need."""
        wanted = requirements(
            _project(ROOT / "pyproject.toml"), _project(self.source_dir / "pyproject.toml")
        )
        constraints = ROOT / "constraints.txt"
        text = "\n".join(wanted).encode() + constraints.read_bytes()
        target = self.folder / f"wheels-{hashlib.sha256(text).hexdigest()[:12]}"

        def fill(new: Path) -> None:
            platforms = [f"--platform={p}" for p in WHEEL_PLATFORMS]
            only = ["--python-version=3.11", "--only-binary=:all:"]
            self._pip("install", *platforms, *only, "-c", constraints, "--target", new, *wanted)

        found = self.once(target, "wheels for arm64", fill)
        # Of other constraints; what was made today may be in use by another checkout.
        for other in self.folder.glob("wheels-*"):
            if other != found and time.time() - other.stat().st_mtime > KEEP_WHEELS_S:
                shutil.rmtree(other, ignore_errors=True)
        return found

    def libraries(self, arch: str) -> Path:
        """llama.cpp's libraries for one -march. Only libggml-cpu differs between two of them."""

        def fill(new: Path) -> None:
            compiler = need(f"{CROSS}g++", "g++-aarch64-linux-gnu")
            cmake = need("cmake", "cmake")
            build = self.folder / "build"
            options = {
                "CMAKE_BUILD_TYPE": "Release",
                "CMAKE_SYSTEM_NAME": "Linux",
                "CMAKE_SYSTEM_PROCESSOR": "aarch64",
                "CMAKE_C_COMPILER": f"{CROSS}gcc",
                "CMAKE_CXX_COMPILER": compiler,
                "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
                "CMAKE_INSTALL_RPATH": "$ORIGIN",
                "BUILD_SHARED_LIBS": "ON",
                "GGML_NATIVE": "OFF",
                "GGML_CCACHE": "OFF",
                "GGML_CPU_ARM_ARCH": arch,
            }
            for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER"):
                options[f"LLAMA_BUILD_{part}"] = "OFF"
            defined = [f"-D{name}={value}" for name, value in options.items()]
            source = self.source_dir / "vendor/llama.cpp"
            call([cmake, "-S", source, "-B", build, *defined], self.log)
            jobs = str(os.cpu_count() or 1)
            call([cmake, "--build", build, "--target", "llama", "--parallel", jobs], self.log)
            for file in (build / "bin").glob("*.so*"):
                if file.is_symlink():
                    (new / file.name).symlink_to(file.readlink())
                else:
                    shutil.copy2(file, new)

        return self.once(self.folder / f"lib-{arch}", f"llama.cpp for {arch}", fill)

    def _debian(
        self,
        suite: str,
        architecture: str,
        packages: Sequence[str],
        target: Path,
        dependencies: bool,
    ) -> None:
        # Outside target, so that a run that was cut off fetches nothing twice.
        state = self.folder / f"apt-{suite}-{architecture}"
        Apt(state, suite, architecture, self.log).unpack(packages, target, dependencies)
        shutil.rmtree(state)

    def _pip(self, *words: str | Path) -> None:
        if subprocess.run(
            [sys.executable, "-c", "import pip"], capture_output=True, check=False
        ).returncode:
            raise EdgeDtmError(f"{sys.executable} has no pip: activate .venv, or set PYTHON")
        call([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], self.log)


def qemu_version(program: str | Path) -> int:
    """The major version, 0 when it cannot be told."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)", done.stdout)
    return int(found[1]) if found else 0


def write_launchers(folder: Path, qemu: Path, cpu: str, root: Path) -> None:
    """Put `python3` and `edge-dtm` of a device into folder.

    They are scripts of the host: an arm64 program cannot be started by another without binfmt, but
    sys.executable, which is what Python starts its children with, is argv[0].
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = shlex.join([str(qemu), "-cpu", cpu, "-L", str(root)])
    python = (
        f'#!/bin/sh\nexec {program} -0 "$0" {shlex.quote(str(root / "usr/bin" / PYTHON))} "$@"\n'
    )
    code = 'from edge_dtm.cli import main; main(prog_name="edge-dtm")'
    command = f'#!/bin/sh\nexec "$(dirname "$0")/python" -c {shlex.quote(code)} "$@"\n'
    for name, text in (("python", python), ("edge-dtm", command)):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text)
        temporary.chmod(0o755)
        temporary.replace(folder / name)


def environment(root: Path, wheels: Path, source: Path, libraries: Path) -> dict[str, str]:
    """This process's variables with those of a device's Python; the checkout's edge-dtm comes
    first."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    return variables | {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, wheels, source))),
        "PYTHONNOUSERSITE": "1",
        "LLAMA_CPP_LIB_PATH": str(libraries),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }


def prepare(cpu: str, arch: str) -> tuple[Path, dict[str, str]]:
    """(folder of launchers, environment) of a device, made where it is not there yet."""
    version = pinned("llama-cpp-python")
    maker = Maker(cache_dir() / "arm" / version)
    with maker.lock():
        source = maker.source(version)
        libraries = maker.libraries(arch)
        wheels = maker.wheels()
        root = maker.root()
        qemu = maker.qemu()
        launchers = maker.folder / "bin" / cpu
        write_launchers(launchers, qemu, cpu, root)
    return launchers, environment(root, wheels, source, libraries)


def idlest(cpus: Sequence[int]) -> int:
    """The CPU that was idle most in a fifth of a second: a pinned process cannot move later."""
    before = _idle_ticks()
    time.sleep(0.2)
    after = _idle_ticks()
    return max(cpus, key=lambda cpu: after.get(cpu, 0) - before.get(cpu, 0))


def _idle_ticks() -> dict[int, int]:
    """The fourth number behind each CPU's name in /proc/stat (man 5 proc_stat)."""
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return {int(r[0][3:]): int(r[4]) for r in rows if re.fullmatch(r"cpu\d+", r[0])}


def parse(arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """(cpu, arch, command) of a command line; usage errors exit with status 2."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="arm_device",
        usage="%(prog)s {pi4,pi5,i8mm} [--build DEVICE | --features ARCH] [--cpu CPU] "
        "[-- edge-dtm|python ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("device", choices=sorted(DEVICES))
    build = parser.add_mutually_exclusive_group()
    build.add_argument("--build", choices=sorted(DEVICES), help="the llama.cpp of another device")
    build.add_argument(
        "--features", metavar="ARCH", help="a llama.cpp for GCC's -march, e.g. armv8.2-a+dotprod"
    )
    parser.add_argument("--cpu", help="another CPU that QEMU knows, e.g. cortex-a72")
    options = parser.parse_args(arguments[:at])
    if options.features and not re.fullmatch(r"[A-Za-z0-9.+-]+", options.features):
        parser.error(f"{options.features!r} is no architecture: write armv8.2-a+dotprod")
    if options.cpu and not re.fullmatch(r"[A-Za-z0-9.,=_-]+", options.cpu):
        parser.error(f"{options.cpu!r} is no CPU of QEMU: write cortex-a72")
    command = list(arguments[at + 1 :])
    if command and command[0] not in COMMANDS:
        parser.error(f"{command[0]!r} is not on the device: {' and '.join(COMMANDS)} are")
    device = DEVICES[options.device]
    arch = options.features or DEVICES[options.build or options.device].arch
    return options.cpu or device.cpu, arch, command


def main(arguments: Sequence[str]) -> int:
    cpu, arch, command = parse(arguments)
    try:
        launchers, variables = prepare(cpu, arch)
    except (EdgeDtmError, OSError) as error:
        say(f"error: {error}")
        return 1
    if not command:
        return 0
    # A build with features the CPU lacks dies of SIGILL; its core would be that of QEMU.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if hasattr(os, "sched_setaffinity"):
        # One CPU, so that what asks how many there are takes one thread.
        os.sched_setaffinity(0, {idlest(sorted(os.sched_getaffinity(0)))})
    os.execve(launchers / command[0], [str(launchers / command[0]), *command[1:]], variables)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
