"""llama.cpp's first decode, in a child process, since a wrong build may crash when it is imported.

python -m edge_dtm.device.first_decode
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import scratch_folder
from edge_dtm.device.cpu import Build, missing_on_cpu, parse_system_info, read_cpu, rebuild_command
from edge_dtm.formats.record import RunSettings

CHILD_TIMEOUT_S = 900.0  # a Pi needs seconds; an emulated one minutes
# What a program does to itself.
_CRASHES = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGTRAP", "SIGABRT")


def first_decode_in_child() -> Build:
    """Let a child decode for the first time, so that a build that crashes does not take us along.

    What llama.cpp was built with. EdgeDtmError as try_first_decode says it.
    """
    build, refusal = try_first_decode()
    if build is None or refusal:
        raise EdgeDtmError(refusal)
    return build


def try_first_decode() -> tuple[Build | None, str]:
    """(what llama.cpp was built with, why it cannot decode here).

    A child decodes a prompt and single tokens with the small model of `probe_model` as F16, Q8_0
    and Q4_0, whose kernels are the ones that differ between builds. The build is None where the
    child could not say it, and the reason empty where all is well.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", "edge_dtm.device.first_decode"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=CHILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None, (
            f"llama.cpp did not finish its first decode within {CHILD_TIMEOUT_S:g} s: stop what "
            f"keeps the CPU busy, or rebuild it here: {rebuild_command()}"
        )
    build = None
    for line in child.stdout.splitlines():
        if line.startswith('{"system_info"'):
            answer = json.loads(line)
            build = parse_system_info(answer["system_info"], answer["version"])
    cpu = read_cpu()
    if build is not None and (missing := missing_on_cpu(build, cpu)):
        return build, (
            f"llama.cpp was built with {', '.join(missing)}, which this CPU ({cpu.name}) does not "
            f"have: rebuild it here: {rebuild_command(build.version)}"
        )
    return build, _reason_of_end(child.returncode, child.stderr, build)


def _reason_of_end(returncode: int, stderr: str, build: Build | None) -> str:
    """Why the child did not do what it was asked, empty where it did."""
    if returncode == 0 and build is not None:
        return ""
    last_line = " ".join((stderr.strip().splitlines() or [""])[-1].split())
    if last_line.startswith("error: "):
        return last_line.removeprefix("error: ")
    when = "when it was loaded" if build is None else "in its first decode"
    rebuild = f"rebuild it here: {rebuild_command(build.version if build else '')}"
    # A shell between us and the child turns the signal into 128 and its number.
    number = -returncode if returncode < 0 else returncode - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"llama.cpp failed {when} ({last_line or f'exit status {returncode}'}): {rebuild}"
    if name not in _CRASHES:
        return (
            f"llama.cpp was ended {when} by {name}, which comes from outside, or from the system "
            "when memory runs out: stop other programs and start again"
        )
    why = "it was built for another CPU" if name == "SIGILL" else "the build is broken"
    return (
        f"llama.cpp died of {name} {when} on this machine ({read_cpu().name}): {why}"
        f"{f' ({last_line})' if last_line else ''}; {rebuild}"
    )


def main() -> None:
    """What the child does: say what llama.cpp is, then decode."""
    import resource

    # The crash is expected; nobody wants its core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from edge_dtm.llamacpp.llama import runtime_info
    from edge_dtm.llamacpp.runner import LlamaRunner

    try:
        info = runtime_info()
    except (ImportError, OSError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise EdgeDtmError(
            f"llama-cpp-python cannot be loaded ({words}): rebuild it here: {rebuild_command()}"
        ) from None
    answer = {"system_info": info["system_info"], "version": info["llama_cpp_python"]}
    print(json.dumps(answer), flush=True)
    settings = RunSettings(threads=1, parallel_sequences=1)
    with scratch_folder() as folder:
        for path in _small_models(folder):
            with LlamaRunner(path, settings, 32) as llama:
                llama.time_decoding(16, 2)


def _small_models(folder: Path) -> list[Path]:
    """probe_model's GGUF as F16, Q8_0 and Q4_0."""
    from llama_cpp import llama_cpp as lib

    from edge_dtm.llamacpp import probe_model

    paths = [folder / f"{name}.gguf" for name in ("F16", "Q8_0", "Q4_0")]
    probe_model.write(paths[0])
    for path in paths[1:]:
        params = lib.llama_model_quantize_default_params()
        params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{path.stem}")
        params.nthread = 1
        code = lib.llama_model_quantize(
            str(paths[0]).encode(), str(path).encode(), ctypes.byref(params)
        )
        if code:
            raise EdgeDtmError(f"llama.cpp cannot quantize a small model to {path.stem} ({code})")
    return paths


if __name__ == "__main__":
    try:
        main()
    except EdgeDtmError as error:
        sys.exit(f"error: {error}")
