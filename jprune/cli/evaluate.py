"""`jprune eval TASK`: what a model is measured by."""

import dataclasses

from jprune import counts
from jprune.cli import display
from jprune.cli.command import OnDevices, OnText, Told


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPerplexity(OnText, OnDevices):
    """Perplexity of a model on a text, by the standard protocol: windows that do not overlap."""

    def run(self) -> Told:
        """Measures."""
        import jax.numpy as jnp

        from jprune.checkpoints import load
        from jprune.checkpoints.dtypes import activation_dtype
        from jprune.data.for_model import evaluation_windows
        from jprune.evaluate.perplexity import perplexity
        from jprune.runs import processes
        from jprune.runs.report import Progress

        mesh = self.mesh()
        with processes.run_together():
            checkpoint = load(self.model)
            dtype = activation_dtype(checkpoint, self.dtype)
            windows = evaluation_windows(checkpoint, self.text, length=self.sequence_length, count=self.windows)
        alike = {"the model": checkpoint.fingerprint(), "the text or its windows": windows.sha256}
        processes.check_alike({**alike, "--dtype": jnp.dtype(dtype).name})
        with display.progress() as show:
            result = perplexity(
                checkpoint,
                windows.tokens,
                dtype=dtype,
                mesh=mesh,
                progress=lambda done, total: show(Progress(float(done), total, self.text, "perplexity")),
            )
        found = {
            "perplexity": result.value,
            "tokens": result.tokens,
            "sequence_length": result.sequence_length,
            "windows": result.windows,
            "text": self.text,
            "sha256": windows.sha256,
        }
        line = f"perplexity {result.value:.4f} on {self.text}, {counts.windows(result.windows, result.sequence_length)}"
        return Told(found, tuple(windows.notices), lambda: print(line))
