"""The one error that users are meant to read."""


class JpruneError(ValueError):
    """What the user gave does not fit; the message says what was expected, what came, where, and what to do."""
