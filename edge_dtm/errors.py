"""The one exception whose message is meant for the person at the terminal."""


class EdgeDtmError(Exception):
    """One line that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 1.
    """
