"""What experts do with the calibration text: one pass of the model, block by block, that outlives an interruption.

What is known of a layer is marked in the run folder as soon as the layer is done. The hidden states behind it are
saved beside the marks, as often as that costs little of the time, so that a run goes on from there. One block's weights
are in memory, and the hidden states of the text as far as there is room.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune import devices
from jprune.annotations import Int32
from jprune.checkpoints import Checkpoint
from jprune.evaluate.expert_use import block_use
from jprune.models import decoder
from jprune.models.batching import windows_at_once
from jprune.runs import memory
from jprune.runs.activations import Batches, Room, Specs
from jprune.runs.background import Background
from jprune.runs.folder import RunFolder, read_mark, write_mark
from jprune.runs.report import Progress
from jprune.structured.experts import Use

SHARE = 0.1
"""Of the time, that saving hidden states may take."""


class ExpertsLeft(NamedTuple):
    """What stays of a layer's experts, and why."""

    layer: int
    kept: tuple[int, ...]
    """Their numbers in the original, ascending."""
    scores: tuple[float, ...]
    """Of all experts of the layer."""
    tokens: tuple[int, ...] | None
    """How many tokens each was sent, where that was looked at."""

    @classmethod
    def from_json(cls, own: Mapping[str, Any]) -> "ExpertsLeft":
        """Of a layer, as the record of a result has it."""
        tokens = own["tokens"] if own["tokens"] is None else tuple(own["tokens"])
        return cls(own["layer"], tuple(own["kept"]), tuple(own["scores"]), tokens)


def layers_with_experts(checkpoint: Checkpoint) -> dict[int, int]:
    """How many experts there are, by the number of the layer."""
    config = checkpoint.config
    return {i: config.layer(i).experts for i in range(config.layers) if config.has_experts(i)}


def use_of_experts(
    checkpoint: Checkpoint,
    tokens: Int32[np.ndarray, "n L"],
    *,
    dtype: DTypeLike,
    folder: RunFolder,
    tell: Callable[[Progress], None],
) -> dict[int, Use]:
    """What the experts of every layer do with n windows of text, by the number of the layer.

    Args:
      checkpoint: the model.
      tokens: the windows.
      dtype: of the activations.
      folder: keeps what is known.
      tell: called often; may raise KeyboardInterrupt.
    """
    return _Pass(checkpoint, tokens, dtype, folder, tell).all()


def unseen(experts: Sequence[ExpertsLeft]) -> tuple[str, ...]:
    """A notice, if experts stay that no token was sent to: nothing is known of them."""
    found = [(own.layer, e) for own in experts if own.tokens is not None for e in own.kept if own.tokens[e] == 0]
    if not found:
        return ()
    layer, expert = found[0]
    return (
        f"{len(found)} experts that stay were sent no token of the text (such as expert {expert} of layer {layer}): "
        "more `examples` tell more",
    )


class _Pass:
    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: np.ndarray,
        dtype: DTypeLike,
        folder: RunFolder,
        tell: Callable[[Progress], None],
    ):
        self.checkpoint, self.tokens, self.dtype = checkpoint, tokens, dtype
        self.folder, self.tell = folder, tell
        where = devices.replicated(devices.one_device())
        length, at_once = tokens.shape[1], windows_at_once(tokens.shape[1])
        counts = [min(at_once, len(tokens) - start) for start in range(0, len(tokens), at_once)]
        shapes = [(count, length, checkpoint.config.d_model) for count in counts]
        self.specs: Sequence[Specs] = [
            (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where),) for shape in shapes
        ]
        room = int(memory.SHARE * memory.free()) // 2  # the rest is for a block's weights
        on_cpu = jax.default_backend() == "cpu"
        self.room = Room(device=room if on_cpu else 0, host=0 if on_cpu else room)
        self.saved_at, self.cost = time.monotonic(), 0.0

    def all(self) -> dict[int, Use]:
        seen = {}
        for i in layers_with_experts(self.checkpoint):
            if (known := self.folder.marked(f"experts/{i}")) is not None:
                seen[i] = Use(**{name: np.asarray(values) for name, values in known.items()})
        missing = [i for i in layers_with_experts(self.checkpoint) if i not in seen]
        if missing:
            start, hidden = self.begin(missing[0])
            for i in range(start, missing[-1] + 1):
                use, hidden = self.block(i, hidden, last=i == missing[-1])
                if use is not None:
                    seen[i] = use
                    self.folder.mark(f"experts/{i}", {name: values.tolist() for name, values in vars(use).items()})
        return seen

    def path(self, index: int) -> Path:
        """The file of the hidden states before a block."""
        return self.folder.hidden / f"{index:05}.bin"

    def begin(self, index: int) -> tuple[int, Batches]:
        """The last block not behind this one before which the hidden states are known, and these."""
        for i in range(index, 0, -1):
            checksums = read_mark(self.path(i).with_suffix(".json"))
            saved = Batches(self.specs, self.room, self.path(i))
            if checksums and saved.intact(checksums):
                return i, saved
        config, first = self.checkpoint.config, Batches(self.specs, self.room, self.path(0))
        params = jax.tree.map(jnp.asarray, {"embed": self.checkpoint.params("embed")})
        start = 0
        for j, (x,) in enumerate(self.specs):
            embed = _on(decoder.embed(config), x.sharding)
            first.put(j, (embed(params, self.tokens[start : start + x.shape[0]]).astype(self.dtype),))
            start += x.shape[0]
        return 0, first

    def block(self, index: int, hidden: Batches, *, last: bool) -> tuple[Use | None, Batches]:
        """What the experts of a block do, if it has some, and the hidden states behind it, if there is more to do."""
        layers = self.checkpoint.config.layers
        params = jax.tree.map(jnp.asarray, self.checkpoint.params(f"blocks/{index}"))
        run = _on(block_use(decoder.block(self.checkpoint.config, index)), self.specs[0][0].sharding)
        save = not last and time.monotonic() - self.saved_at >= self.cost / SHARE
        total: Use | None = None
        with Background() as writing:
            after = Batches(self.specs, self.room, self.path(index + 1), writing if save else None)
            for j in range(len(self.specs)):
                self.tell(Progress(index + j / len(self.specs), layers, f"block {index}: experts", "importance"))
                (x,) = hidden.take(j)
                y, use = run(params, x)
                if use is not None:
                    use = jax.tree.map(lambda sums: np.asarray(sums, np.float64), use)
                    total = use if total is None else total.merge(use)
                if not last:
                    after.put(j, (y,))
        if not hidden.saved:
            hidden.drop()
        if save:
            self.keep(index + 1, after)
        self.tell(Progress(index + 1.0, layers, f"block {index}: done", "importance"))
        return total, after

    def keep(self, index: int, hidden: Batches) -> None:
        """Marks saved hidden states as whole, and removes those before them."""
        write_mark(self.path(index).with_suffix(".json"), hidden.synced())
        self.saved_at, self.cost = time.monotonic(), hidden.seconds
        for file in self.folder.hidden.glob("*.*"):
            if file.stem.isdecimal() and int(file.stem) < index:
                file.unlink()


@functools.lru_cache(maxsize=64)
def _on(function: Callable, sharding: Any) -> Callable:
    return jax.jit(function, out_shardings=sharding)
