"""A text that grows token by token: what of it may be shown already, and where it ends."""

from collections.abc import Callable, Sequence


class Continuation:
    """The text of tokens that come one by one, up to the first string that is to stop it.

    Attributes:
      tokens: all that came.
      text: what they say, without the string that stopped it and what lies behind.
      stopped: whether such a string came.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        """`decode` makes a text of tokens; empty strings in `stop` stop nothing."""
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = [term for term in stop if term]
        self._shown = 0

    def add(self, token: int) -> str:
        """Takes a token; returns what can be shown since the last time.

        Half a character waits for its rest, and what a string to stop at may begin with waits until it does not.
        """
        self.tokens.append(token)
        text = self._decode(self.tokens)
        ends = [at for term in self._stop if (at := text.find(term)) >= 0]
        self.stopped = bool(ends)
        self.text = text[: min(ends)] if ends else text
        return (
            "" if not ends and text.endswith("\ufffd") else self._show(len(self.text) - (0 if ends else self._open()))
        )

    def rest(self) -> str:
        """What was not shown yet, where no further token comes."""
        return self._show(len(self.text))

    def _open(self) -> int:
        """The length of the longest end of the text with which a string to stop at begins."""
        lengths = (n for term in self._stop for n in range(1, len(term)) if self.text.endswith(term[:n]))
        return max(lengths, default=0)

    def _show(self, upto: int) -> str:
        shown = self.text[self._shown : upto]
        self._shown = max(self._shown, upto)
        return shown
