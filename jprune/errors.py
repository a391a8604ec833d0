"""The errors that users are meant to read."""


class JpruneError(ValueError):
    """What the user gave does not fit; the message says what was expected, what came, where, and what to do.

    It calls options by their names in Python, in backquotes; the command line makes flags of them.
    """


class UsageError(JpruneError):
    """Words on the command line that do not make a command; exit status 2."""


class UnknownOption(JpruneError, TypeError):
    """A keyword that a function does not take: a `TypeError`, as Python's own, that names the nearest one it takes."""
