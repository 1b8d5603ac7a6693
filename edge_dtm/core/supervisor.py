"""Runs the command line in a child process, so that its death becomes an error line too.

llama.cpp and ggml end the process on what they do not expect (std::bad_alloc, GGML_ASSERT, an
instruction that the CPU lacks), and Linux does it when memory runs out. Inside the process nobody
can say anything then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_ENDED_BY_USER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BY_LIBRARY = (  # OpenBLAS does so when it gets no memory
    "a library ended edge-dtm; what it said is above: most likely memory ran out, so stop other "
    "programs, or raise the limit"
)
_BY_KILL = (
    "edge-dtm was ended by SIGKILL, which the system sends when memory runs out: stop other "
    "programs, or take a smaller model"
)
_BY_SIGNAL = (
    "llama.cpp ended edge-dtm by {}; what it said is above: memory ran out, the model is broken, or "
    "this build does not fit the machine; edge-dtm doctor tells the last"
)


def shielded(run: Callable[[], object]) -> None:
    """Run it in a child and exit as the child does; with an error line and status 1 if it died.

    What ends this process (Ctrl-C, SIGTERM, kill -9 on Linux) ends the child too.
    """
    parent = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    child = os.fork()
    if not child:
        _die_with(parent)
        # Otherwise ggml starts a debugger to print a backtrace, where one is installed.
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        try:
            run()
        finally:
            os.write(writer, b".")
        sys.exit(0)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGHUP, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        try:
            by_python = os.read(reader, 1)
        except BlockingIOError:  # a process that the child left behind has the other end open
            by_python = b""
        if by_python:
            sys.exit(code)
        print(f"error: {_BY_LIBRARY}", file=sys.stderr)
        sys.exit(1)
    number = signal.Signals(-code)
    if number in _ENDED_BY_USER:
        # So that a shell sees what it expects of such an end.
        signal.signal(number, signal.SIG_DFL)
        os.kill(parent, number)
    text = _BY_KILL if number == signal.SIGKILL else _BY_SIGNAL.format(number.name)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


def _die_with(parent: int) -> None:
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before
            os._exit(1)
