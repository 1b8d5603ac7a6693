"""llama.cpp's first decode, in a child process, since a wrong build may crash when it is imported.

python -m edge_dtm.device.first_decode info
python -m edge_dtm.device.first_decode decode '{"threads": 4}' [MODEL.gguf]
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.scratch import Scratch
from edge_dtm.device.child import child_main, json_lines, last_line, run_child
from edge_dtm.device.cpu import (
    Build,
    Cpu,
    missing_on_cpu,
    parse_system_info,
    read_cpu,
    rebuild_command,
)
from edge_dtm.formats.record import RunSettings

CHILD_TIMEOUT_S = 900.0  # a Pi needs seconds; an emulated one minutes

# What a program does to itself, and what that says about llama.cpp.
_CRASHES = {
    "SIGILL": "it was built for another CPU",
    "SIGSEGV": "the build is broken, or was made for another machine",
    "SIGBUS": "a file or library cannot be read whole, or the build is broken",
    "SIGFPE": "the build is broken",
    "SIGTRAP": "the build is broken",
    "SIGABRT": "it gave up",
}


def require_runnable(build: Build, cpu: Cpu | None = None) -> None:
    """EdgeDtmError when llama.cpp was built with features that this CPU lacks.

    cpu: this machine's when None.
    """
    cpu = read_cpu() if cpu is None else cpu
    if missing := missing_on_cpu(build, cpu):
        raise EdgeDtmError(
            f"llama.cpp was built with {', '.join(missing)}, which this CPU ({cpu.name}) does not "
            f"have: rebuild it here: {rebuild_command(build.version)}"
        )


def build_in_child() -> Build:
    """What the installed llama.cpp says, asked in a child, which a wrong build may kill.

    EdgeDtmError when it cannot be imported or kills the child.
    """
    done = _run(["info"], CHILD_TIMEOUT_S)
    return _finished(done, _build_of(done.stdout))


def first_decode_in_child(
    settings: RunSettings, path: Path | None = None, timeout_s: float = CHILD_TIMEOUT_S
) -> Build:
    """Let a child decode for the first time, so that a build that crashes does not take us along.

    A prompt and single tokens, through the small model of `probe_model` as F16, Q8_0 and Q4_0,
    whose kernels are the ones that differ between builds, and through the GGUF at path if given.
    Returns what llama.cpp was built with. EdgeDtmError when features are missing on this CPU, and
    when the child dies of a signal, fails, or takes longer than timeout_s seconds.
    """
    words = ["decode", json.dumps(settings.to_json())]
    done = _run(words if path is None else [*words, str(path)], timeout_s)
    build = _build_of(done.stdout)
    if build is not None:
        # Before the death is looked at: it says why.
        require_runnable(build)
    return _finished(done, build)


def _run(words: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return run_child("edge_dtm.device.first_decode", words, timeout_s)
    except subprocess.TimeoutExpired:
        raise EdgeDtmError(
            f"llama.cpp did not finish its first decode within {timeout_s:g} s: stop what keeps "
            f"the CPU busy, or rebuild it here: {rebuild_command()}"
        ) from None
    except OSError as error:
        raise EdgeDtmError(
            f"{sys.executable} could not be started for a first decode "
            f"({error.strerror or error}): activate the environment edge-dtm is installed in"
        ) from None


def _build_of(stdout: str) -> Build | None:
    """What the child said of its build before anything else, None when it did not come so far."""
    for answer in json_lines(stdout):
        if "system_info" in answer:
            return parse_system_info(str(answer["system_info"]), str(answer.get("version", "")))
    return None


def _finished(done: subprocess.CompletedProcess[str], build: Build | None) -> Build:
    """The build of a child that did all it was asked. EdgeDtmError otherwise."""
    _require_alive(done.returncode, done.stderr, build)
    if build is None or not any(answer.get("done") for answer in json_lines(done.stdout)):
        raise EdgeDtmError(
            "llama.cpp answered nothing in its first decode: rebuild it here: "
            + rebuild_command(build.version if build else "")
        )
    return build


def _require_alive(returncode: int, stderr: str, build: Build | None) -> None:
    """EdgeDtmError unless a child ended by itself and well."""
    if returncode == 0:
        return
    last = last_line(stderr)
    if last.startswith("error: "):
        raise EdgeDtmError(last.removeprefix("error: "))
    when = "when it was loaded" if build is None else "in its first decode"
    rebuild = f"rebuild it here: {rebuild_command(build.version if build else '')}"
    # A shell between us and the child turns the signal into 128 and its number.
    number = -returncode if returncode < 0 else returncode - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        reason = last or f"exit status {returncode}"
        raise EdgeDtmError(f"llama.cpp failed {when} ({reason}): {rebuild}") from None
    if name not in _CRASHES:
        raise EdgeDtmError(
            f"llama.cpp was ended {when} by {name}, which comes from outside, or from the system "
            "when memory runs out: stop other programs and start again"
        )
    why = _CRASHES[name] + (f" ({last})" if last and name == "SIGABRT" else "")
    raise EdgeDtmError(
        f"llama.cpp died of {name} {when} on this machine ({read_cpu().name}): {why}; {rebuild}"
    )


def _decode_here(words: Sequence[str]) -> None:
    """What the child does: say what llama.cpp is, then decode."""
    import resource

    # The crash is expected; nobody wants its core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from edge_dtm.llamacpp.gguf_header import check_gguf
    from edge_dtm.llamacpp.llama import runtime_info
    from edge_dtm.llamacpp.runner import LlamaRunner

    try:
        info = runtime_info()
    except ImportError as error:
        raise EdgeDtmError(
            f"llama-cpp-python cannot be imported ({error}): pip install llama-cpp-python"
        ) from None
    except (OSError, RuntimeError) as error:
        # How llama_cpp reports a shared library that is missing or for another machine.
        raise EdgeDtmError(
            f"llama-cpp-python cannot be loaded ({' '.join(str(error).split())}): rebuild it here: "
            + rebuild_command()
        ) from None
    answer = {"system_info": info["system_info"], "version": info["llama_cpp_python"]}
    print(json.dumps(answer), flush=True)
    if words[0] == "decode":
        # One sequence is fed, so that memory for more would be for nothing.
        settings = replace(RunSettings.from_json(json.loads(words[1])), parallel_sequences=1)

        def decode(path: Path) -> None:
            with LlamaRunner(path, settings, 32) as llama:
                llama.time_decoding(16, 2)

        with Scratch("edge-dtm", Path(tempfile.gettempdir())) as folder:
            for path in _small_models(folder):
                decode(path)
        for given in words[2:]:
            check_gguf(Path(given))
            decode(Path(given))
    print(json.dumps({"done": True}), flush=True)


def _small_models(folder: Path) -> list[Path]:
    """probe_model's GGUF as F16, Q8_0 and Q4_0."""
    from llama_cpp import llama_cpp as lib

    from edge_dtm.llamacpp import probe_model

    source = folder / "F16.gguf"
    probe_model.write(source)
    paths = [source]
    for name in ("Q8_0", "Q4_0"):
        params = lib.llama_model_quantize_default_params()
        params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
        params.nthread = 1
        target = folder / f"{name}.gguf"
        code = lib.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
        if code:
            raise EdgeDtmError(f"llama.cpp cannot quantize a small model to {name} (code {code})")
        paths.append(target)
    return paths


if __name__ == "__main__":
    child_main(_decode_here)
