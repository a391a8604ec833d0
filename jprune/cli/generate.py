"""`jprune generate`: prompts, continued."""

import dataclasses
import sys
import time
from typing import Literal

from jprune import texts
from jprune.cli.command import Command, Told
from jprune.cli.flags import Repeated
from jprune.errors import JpruneError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a prompt, or several at once."""

    prompt: Repeated = ()
    """Text to continue, taken as it is (no chat template). Several, each after its own --prompt, are continued
    together, and shown when all are done."""
    max_tokens: int = 64
    """Number of tokens after which to stop."""
    stop: Repeated = ()
    """Text at which a continuation ends, before it; for several, repeat the option."""
    temperature: float = 0.0
    """Temperature of the sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    unpack: bool = False
    """Unpack all kernels of a packed model once: more memory, and less time where no GPU multiplies by them packed."""
    backend: Literal["pallas", "triton"] | None = None
    """Whose kernels multiply by a packed model on an NVIDIA GPU, by default pallas; triton needs jax-triton."""

    def run(self) -> Told:
        """Generates; shows the text of one prompt as it grows."""
        if not self.prompt:
            raise UsageError("there is nothing to continue; give --prompt TEXT")
        from jprune.checkpoints import load
        from jprune.models.continuation import Continuation
        from jprune.models.generate import ENDED, stream_batch
        from jprune.sparse import on_backend, runs_as

        checkpoint = load(self.model)
        tokenizer = checkpoint.tokenizer
        if tokenizer is None:
            raise JpruneError(f"{self.model} has no tokenizer; put its tokenizer.json beside the weights")
        given = [texts.argument(prompt, "--prompt") for prompt in self.prompt]
        stop = [texts.argument(term, "--stop") for term in self.stop]
        if checkpoint.is_packed:
            print(self.spelled(runs_as(unpacked=self.unpack)), file=sys.stderr, flush=True)
        if self.backend is not None and (self.unpack or not checkpoint.is_packed):
            why = "`unpack` unpacks them all" if checkpoint.is_packed else "it has none"
            raise UsageError(f"`backend` is of the packed kernels of {self.model}, and {why}; leave it out")
        start = time.perf_counter()
        params = checkpoint.params(packed=not self.unpack)
        params = params if self.backend is None else on_backend(params, self.backend)
        written = [Continuation(tokenizer.decode, stop) for _ in given]
        for tokens in stream_batch(
            checkpoint.config,
            params,
            [tokenizer.encode(prompt, add_special_tokens=True) for prompt in given],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            eos_id=checkpoint.eos_token_ids,
        ):
            going = [(own, int(token)) for own, token in zip(written, tokens) if token != ENDED and not own.stopped]
            new = "".join([own.add(token) for own, token in going])
            if len(written) == 1 and not self.json:
                print(new, end="", flush=True)
            if all(own.stopped for own, _ in going):
                break
        seconds = round(time.perf_counter() - start, 3)
        found = [{"prompt": prompt, "text": own.text, "tokens": len(own.tokens)} for prompt, own in zip(given, written)]
        if len(found) == 1:
            return Told(found[0] | {"seconds": seconds}, show=lambda: print(written[0].rest()))
        return Told({"continuations": found, "seconds": seconds}, show=lambda: _show(found))


def _show(found: list[dict]) -> None:
    for own in found:
        print(f"{own['prompt']}{own['text']}\n")
