"""The errors that users are meant to read."""


class JpruneError(ValueError):
    """What the user gave does not fit; the message says what was expected, what came, where, and what to do."""


class UsageError(JpruneError):
    """Words on the command line that do not make a command; exit status 2."""
