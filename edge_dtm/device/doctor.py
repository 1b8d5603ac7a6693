"""Is this machine, and the llama.cpp on it, fit to run a model; and what to do where it is not."""

from __future__ import annotations

import platform
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_dtm.core.machine import default_threads, file_system_of, meminfo, read_text, room
from edge_dtm.device import checks
from edge_dtm.device.checks import Finding
from edge_dtm.device.cpu import Build, Cpu, read_cpu
from edge_dtm.device.first_decode import try_first_decode
from edge_dtm.device.inputs import is_gguf
from edge_dtm.device.sensors import vcgencmd
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.gguf_header import TensorInfo, check_gguf, need, read_header

SCHEMA_VERSION = 1
_LEVELS = ("error", "warning", "note", "ok")


def examine(path: Path | None, n_ctx: int, root: Path = Path("/")) -> list[Finding]:
    """All findings, worst first. path: a bundle, packed or not, or a GGUF, whose types and memory
    are looked at too, with a context of n_ctx tokens. root: where proc and sys are.

    EdgeDtmError or OSError when path is none of these.
    """
    cpu = read_cpu(root)
    findings = list(checks.user_space(platform.machine(), struct.calcsize("P")))
    build, refusal = try_first_decode()
    if build is not None:
        findings += checks.versions(build)
    if refusal:
        what, _, command = refusal.partition("rebuild it here: ")
        why = "no model can run before this is mended"
        findings.append(Finding("error", what.rstrip(" ;:"), why, command))
    elif build is not None:
        findings += checks.kernels(build, cpu)
        findings.append(Finding("ok", "a small model decodes", "as F16, Q8_0 and Q4_0"))
    findings += checks.cores(root, default_threads())
    findings += checks.governor(root)
    findings += checks.throttling(vcgencmd("get_throttled"))
    findings += checks.swap(meminfo(root))
    if path is not None:
        findings += _model(path, n_ctx, root, build, cpu)
    return sorted(findings, key=lambda finding: _LEVELS.index(finding.level))


def to_json(findings: Sequence[Finding], cpu: Cpu) -> dict[str, Any]:
    """The report of `doctor --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "edge-dtm doctor",
        "cpu": {"machine": cpu.machine, "name": cpu.name, "features": sorted(cpu.features)},
        "passed": not errors(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def errors(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def matrices_of(path: Path) -> list[TensorInfo]:
    """The matrices of a GGUF that decoding reads whole."""
    tensors = read_header(path).tensors
    # Of an embedding table one row a token is read, unless it is the output matrix, too.
    untied = any(t.name == "output.weight" for t in tensors)
    return [t for t in tensors if t.is_matrix and not (untied and t.name == "token_embd.weight")]


def _model(path: Path, n_ctx: int, root: Path, build: Build | None, cpu: Cpu) -> Iterator[Finding]:
    """What a bundle or a GGUF asks of this machine."""
    from edge_dtm.formats.archive import open_bundle
    from edge_dtm.formats.bundle import MODEL

    with ExitStack() as stack:
        if path.is_dir():
            path /= MODEL
        elif not is_gguf(path):
            place = Path(tempfile.gettempdir()).resolve()
            free = shutil.disk_usage(place).free
            system = file_system_of(place, read_text(root / "proc/mounts"))
            findings = list(checks.disk(path.stat().st_size, free, place, system))
            yield from findings
            if errors(findings):
                return
            path = stack.enter_context(open_bundle(path)).path(MODEL)
        check_gguf(path)
        settings = RunSettings(threads=1, parallel_sequences=1)
        yield from checks.fits(need(path, settings, n_ctx), room(root))
        if build is not None and build.features:
            yield from checks.types(matrices_of(path), build, cpu)
