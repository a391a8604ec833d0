"""What the package raises for a user's mistake."""


class FormatError(ValueError):
    """A kernel, mask or packed array that does not fit: what was expected, what came, and what to do next."""
