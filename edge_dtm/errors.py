"""The one exception whose message is meant for the person at the terminal."""


class EdgeDtmError(Exception):
    """One line that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 1. What cannot be printed,
    such as names out of a hostile file, is escaped: it stays one line and moves no cursor.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
