"""The one exception whose message is meant for the person at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LIMIT = 1000  # characters; some messages list every problem of a file


class EdgeDtmError(Exception):
    """One line that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 1. A message may quote a
    file that somebody else wrote, so what a terminal would not print, or would obey, is spelled
    out, and the middle of a long one is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


@contextmanager
def os_errors(what: str) -> Iterator[None]:
    """An OSError within becomes an EdgeDtmError that begins with what failed."""
    try:
        yield
    except OSError as error:
        raise EdgeDtmError(f"{what}: {error.strerror or error}") from None


def _one_line(message: str) -> str:
    if len(message) > _LIMIT:
        message = f"{message[: _LIMIT * 2 // 3]} [...] {message[-_LIMIT // 4 :]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)[:_LIMIT]
