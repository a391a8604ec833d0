"""The options of commands that train: their data, as one source or as domains, and what they are measured on."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import tyro

from jprune.errors import UsageError
from jprune.pipeline.training.domains import DynamicLoading
from jprune.train.shearing.dynamic_loading import Reweighing

_NAMED = re.compile(r"^([\w.-]+)=(.+)$", re.DOTALL)
"""A path with "=" in the name of its file has a folder before it: ./a=b.txt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What is trained and measured on."""

    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Training data: pydoc, a text file, .jsonl, .jsonl.gz, .parquet (text, or records of instructions), .npy of token
    ids, or hf:DATASET. Or NAME=SOURCE, as often as there are domains to draw from."""
    proportions: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=SHARE,...: the domains' weights at the beginning. By default their numbers of windows."""
    dynamic_loading: bool = False
    """Draw more from domains whose losses lag behind their references, as LLM-Shearing does."""
    reference_loss: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=LOSS,...: what dynamic loading compares the domains' losses with, in nats a token."""
    reference: str | None = None
    """A model to measure the reference losses of, instead."""
    loading_step_size: float = 1.0
    """How strongly differences of losses count in dynamic loading."""
    loading_smoothing: float = 1e-4
    """Share of the domains' weights that dynamic loading deals out equally."""
    loading_clip: bool = False
    """A domain that is better than its reference counts as equal to it, as in LLM-Shearing's paper."""
    sequence_length: int | None = None
    """Tokens a window. By default 2048 for text and 256 for instructions, or the model's context (256 for the demo
    model)."""
    windows: int | None = None
    """Take only the first so many windows or records of the data (of each domain)."""
    train_on_prompt: bool = False
    """Of instructions, learn the prompts too."""
    evaluate: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text whose perplexity is measured before and after, or instructions, named as for --data. Or NAME=SOURCE: what a
    domain's loss is measured on; by default windows are held out of its own data."""
    evaluate_length: int | None = None
    """Tokens a window of it. By default 2048 or the model's context (512 for the demo model)."""
    evaluate_windows: int | None = None
    """Take only the first so many windows of it; hold out so many of each domain (by default one in 20, at most
    256)."""
    evaluate_every: int | None = None
    """Measure its loss, or the domains', every so many steps; the best state becomes the result. With dynamic loading
    by default after each twentieth."""

    def training_data(self) -> dict[str, Any]:
        """The options by their names in Python.

        Raises:
          UsageError: no data, or words that do not fit together.
        """
        if not self.data:
            raise UsageError("give --data SOURCE, or --data NAME=SOURCE for each of several domains")
        return {
            "data": _sources("--data", self.data),
            "proportions": _numbers("--proportions", self.proportions),
            "dynamic_loading": self._loading(),
            "sequence_length": self.sequence_length,
            "windows_at_most": self.windows,
            "train_on_prompt": self.train_on_prompt,
            "evaluate": _sources("--evaluate", self.evaluate),
            "evaluate_length": self.evaluate_length,
            "evaluate_windows": self.evaluate_windows,
        }

    def _loading(self) -> DynamicLoading | None:
        losses = _numbers("--reference-loss", self.reference_loss)
        reweighing = Reweighing(
            step_size=self.loading_step_size, smoothing=self.loading_smoothing, clip=self.loading_clip
        )
        if self.dynamic_loading:
            return DynamicLoading(reference_losses=losses, reference=self.reference, reweighing=reweighing)
        if losses is not None or self.reference is not None or reweighing != Reweighing():
            raise UsageError("--reference-loss, --reference and --loading-... need --dynamic-loading")
        return None


def _sources(flag: str, words: tuple[str, ...]) -> str | dict[str, str] | None:
    """One source, or sources by name; None if there are none."""
    named = [_NAMED.match(word) for word in words]
    if not any(named):
        if len(words) > 1:
            raise UsageError(f"{flag} is given {len(words)} times; name the domains: {flag} NAME={words[0]} ...")
        return words[0] if words else None
    if not all(named):
        plain = next(word for word, found in zip(words, named) if not found)
        raise UsageError(f"{flag} {plain} has no name, and others have: {flag} NAME={plain}")
    return _once(flag, [(found[1], found[2]) for found in named if found])


def _numbers(flag: str, words: tuple[str, ...]) -> dict[str, float] | None:
    """Numbers by name, of words such as a=1,b=2; None if there are none."""
    pairs = []
    for part in (part for word in words for part in word.split(",")):
        name, _, value = part.partition("=")
        try:
            pairs.append((name.strip(), float(value)))
        except ValueError:
            raise UsageError(f"{flag} is NAME=NUMBER,NAME=NUMBER,...; got {part!r}") from None
    return _once(flag, pairs) if pairs else None


def _once(flag: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise UsageError(f"{flag} names {name!r} twice")
        result[name] = value
    return result
