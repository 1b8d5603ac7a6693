"""Is this machine, and the llama.cpp on it, fit to run a model; and what to do where it is not."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads, read_text
from edge_dtm.device.checks import (
    Finding,
    cores,
    disk,
    fits,
    governor,
    kernels,
    page_size,
    swap,
    throttling,
    types,
    user_space,
    versions,
)
from edge_dtm.device.cpu import Build, Cpu, missing_on_cpu, read_cpu
from edge_dtm.device.first_decode import build_in_child, first_decode_in_child
from edge_dtm.device.linux import file_system_of, program_output
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp import memory
from edge_dtm.llamacpp.gguf_header import TensorInfo, check_gguf, read_header

SCHEMA_VERSION = 1
N_CTX = 2048  # as in most of the packaged profiles
Program = Callable[[Sequence[str]], str]


def examine(
    path: Path | None = None,
    n_ctx: int = N_CTX,
    root: Path = Path("/"),
    program: Program = program_output,
) -> list[Finding]:
    """All findings, worst first. path: a bundle, packed or not, or a GGUF, whose types and memory
    are looked at too, with a context of n_ctx tokens. root: where proc and sys are. program: runs a
    system program and returns what it printed.

    EdgeDtmError when path is none of these.
    """
    cpu = read_cpu(root)
    findings = [
        *user_space(platform.machine(), struct.calcsize("P")),
        *page_size(os.sysconf("SC_PAGE_SIZE")),
    ]
    try:
        build = build_in_child()
    except EdgeDtmError as error:
        build = None
        findings.append(_refused("llama.cpp cannot be loaded", error))
    if build is not None:
        findings += versions(build)
        findings += kernels(build, cpu)
        if not missing_on_cpu(build, cpu):
            findings += _first_decode()
    findings += cores(root, default_threads())
    findings += governor(root)
    findings += throttling(program(["vcgencmd", "get_throttled"]))
    findings += swap(read_text(root / "proc/meminfo"))
    if path is not None:
        findings += _model(path, n_ctx, root, build, cpu)
    order = ("error", "warning", "note", "ok")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def to_json(findings: Sequence[Finding], cpu: Cpu) -> dict[str, Any]:
    """The report of `doctor --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "edge-dtm doctor",
        "cpu": {"machine": cpu.machine, "name": cpu.name, "features": sorted(cpu.features)},
        "passed": not errors(findings),
        "findings": [finding.to_json() for finding in findings],
    }


def errors(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def matrices_of(path: Path) -> list[TensorInfo]:
    """The matrices of a GGUF that decoding reads whole."""
    tensors = read_header(path).tensors
    # Of an embedding table one row a token is read, unless it is the output matrix, too.
    untied = any(t.name == "output.weight" for t in tensors)
    return [
        t for t in tensors if len(t.shape) == 2 and not (untied and t.name == "token_embd.weight")
    ]


def _model(path: Path, n_ctx: int, root: Path, build: Build | None, cpu: Cpu) -> list[Finding]:
    """What a bundle or a GGUF asks of this machine."""
    from edge_dtm.formats.bundle import MODEL

    if not path.exists():
        raise EdgeDtmError(f"{path} does not exist: give a bundle or a GGUF file")
    if path.is_dir() or _is_gguf(path):
        return _gguf(path / MODEL if path.is_dir() else path, n_ctx, root, build, cpu)
    from edge_dtm.formats.archive import open_bundle

    place = Path(tempfile.gettempdir()).resolve()
    free = shutil.disk_usage(place).free
    system = file_system_of(place, read_text(root / "proc/mounts"))
    findings = disk(path.stat().st_size, free, place, system)
    if errors(findings):
        return findings
    with open_bundle(path) as bundle:
        return findings + _gguf(bundle.path(MODEL), n_ctx, root, build, cpu)


def _gguf(path: Path, n_ctx: int, root: Path, build: Build | None, cpu: Cpu) -> list[Finding]:
    check_gguf(path)
    needed = memory.need(path, RunSettings(threads=1, parallel_sequences=1), n_ctx)
    findings = fits(needed, machine.room(root))
    if build is not None and build.features:
        findings += types(matrices_of(path), build, cpu)
    return findings


def _first_decode() -> list[Finding]:
    try:
        # The kernels are the same with more threads.
        first_decode_in_child(RunSettings(threads=1))
    except EdgeDtmError as error:
        return [_refused("llama.cpp cannot decode here", error)]
    return [Finding("ok", "a small model decodes", "as F16, Q8_0 and Q4_0")]


def _refused(what: str, error: EdgeDtmError) -> Finding:
    """The error's last part is the command, where it has one."""
    text, _, command = str(error).partition("rebuild it here: ")
    return Finding("error", what, text.rstrip(" ;:") if command else text, command)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    except OSError as error:
        raise EdgeDtmError(f"cannot read {path}: {error.strerror or error}") from None
