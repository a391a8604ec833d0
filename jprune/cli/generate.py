"""`jprune generate`: a prompt, continued."""

import dataclasses
import sys
import time

from jprune import texts
from jprune.cli.command import Command, Told
from jprune.errors import JpruneError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a prompt."""

    prompt: str
    """Text to continue, taken as it is (no chat template)."""
    max_tokens: int = 64
    """Number of tokens after which to stop."""
    temperature: float = 0.0
    """Temperature of the sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    unpack: bool = False
    """Unpack all kernels of a packed model once: more memory, and less time where no GPU multiplies by them packed."""

    def run(self) -> Told:
        """Generates; shows the text as it grows."""
        from jprune.checkpoints import load
        from jprune.models.generate import stream
        from jprune.sparse import runs_as

        checkpoint = load(self.model)
        tokenizer = checkpoint.tokenizer
        if tokenizer is None:
            raise JpruneError(f"{self.model} has no tokenizer; put its tokenizer.json beside the weights")
        given = texts.argument(self.prompt, "--prompt")
        prompt = tokenizer.encode(given, add_special_tokens=True)
        if checkpoint.is_packed:
            print(self.spelled(runs_as(unpacked=self.unpack)), file=sys.stderr, flush=True)
        start = time.perf_counter()
        tokens: list[int] = []
        shown = ""
        for token in stream(
            checkpoint.config,
            checkpoint.params(packed=not self.unpack),
            prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            eos_id=checkpoint.eos_token_ids,
        ):
            tokens.append(token)
            text = tokenizer.decode(tokens)
            if not self.json and not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[len(shown) :], end="", flush=True)
                shown = text
        text = tokenizer.decode(tokens)
        seconds = round(time.perf_counter() - start, 3)
        found = {"prompt": given, "text": text, "tokens": len(tokens), "seconds": seconds}
        return Told(found, show=lambda: print(text[len(shown) :]))
