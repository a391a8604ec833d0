"""All commands but `prune`: dataclasses whose fields are their options; `run` returns what ``--json`` prints."""

import collections
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.anatomy.kernels import matmul_kernels, prunable
from jprune.checkpoints import formats, load, record
from jprune.checkpoints.dtypes import activation_dtype, parse_dtype
from jprune.cli import display
from jprune.cli.command import Command, OnDevices
from jprune.data.for_model import evaluation_windows
from jprune.errors import JpruneError
from jprune.models.config import LAYER_SIZES, describe
from jprune.pipeline.oneshot.journal import count_zeros
from jprune.runs import processes
from jprune.runs.output import new_folder
from jprune.runs.report import Progress

_SIZES = ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "context", "tied")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPerplexity(OnDevices):
    """Perplexity of a model on a text, by the standard protocol: windows that do not overlap."""

    text: str = "pydoc"
    """pydoc, a text file, .jsonl, .jsonl.gz, .parquet, .npy of token ids, or hf:DATASET."""
    sequence_length: int | None = None
    """Tokens a window. By default 2048 or the model's context."""
    windows: int | None = None
    """Take only the first so many."""
    dtype: str | None = None
    """Of the computation: float32, bfloat16 or float16. By default float32 on CPU, else what the weights have."""

    def run(self) -> dict[str, Any]:
        """Measures."""
        from jprune.evaluate.perplexity import perplexity

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
        for notice in windows.notices:
            print(notice, file=sys.stderr)
        if not self.json:
            print(f"perplexity {result.value:.4f} on {self.text}, {result.windows} windows of {result.sequence_length}")
        return {
            "perplexity": result.value,
            "tokens": result.tokens,
            "sequence_length": result.sequence_length,
            "windows": result.windows,
            "text": self.text,
            "sha256": windows.sha256,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a prompt."""

    prompt: str
    """The text to continue, taken as it is (no chat template)."""
    max_tokens: int = 64
    """Stop after so many tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the sampling."""

    def run(self) -> dict[str, Any]:
        """Generates; shows the text as it grows."""
        from jprune.models.generate import stream

        checkpoint = load(self.model)
        tokenizer = checkpoint.tokenizer
        if tokenizer is None:
            raise JpruneError(f"{self.model} has no tokenizer; put its tokenizer.json beside the weights")
        prompt = tokenizer.encode(self.prompt, add_special_tokens=True)
        start = time.perf_counter()
        tokens: list[int] = []
        shown = ""
        for token in stream(
            checkpoint.config,
            checkpoint.params(),
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
        if not self.json:
            print(text[len(shown) :])
        seconds = time.perf_counter() - start
        return {"prompt": self.prompt, "text": text, "tokens": len(tokens), "seconds": round(seconds, 3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Write a model in another format or dtype."""

    out: Path
    """Folder of the result."""
    format: formats.Format = "hf"
    """hf (safetensors, for every Hugging Face loader), jprune (the same, also where layers differ in size, for jprune),
    decilm (DeciLMForCausalLM, for vLLM, with key/value heads and feed-forward widths by layer), or orbax."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16. By default what they have."""
    overwrite: bool = False
    """Replace --out if jprune wrote it."""

    def run(self) -> dict[str, Any]:
        """Converts, tensor by tensor where the format allows."""
        checkpoint = load(self.model)
        dtype = None if self.dtype is None else parse_dtype(self.dtype)
        dtypes = {path: dtype or shape.dtype for path, shape in checkpoint.shapes.items()}
        formats.check(checkpoint, self.format)
        with new_folder(self.out, overwrite=self.overwrite, source=checkpoint.source) as folder:
            notices = formats.write(folder, checkpoint, format=self.format, dtypes=dtypes)
            contents = {"converted_from": checkpoint.source, "fingerprint": checkpoint.fingerprint()}
            record.write(folder, contents)
        for notice in notices:
            print(notice, file=sys.stderr)
        if not self.json:
            print(f"written to {self.out}")
        return {
            "out": str(self.out),
            "format": self.format,
            "parameters": checkpoint.parameters,
            "notices": list(notices),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Command):
    """What a model is: family, sizes, parameters, zeros, and the patterns that its zeros satisfy."""

    def run(self) -> dict[str, Any]:
        """Reads every kernel of the blocks once."""
        checkpoint = load(self.model)
        found = matmul_kernels(checkpoint)
        rows = []
        for path in prunable(checkpoint):
            matrix = np.asarray(trees.to_matrix(jnp.asarray(checkpoint.read(path)), found[path][1].in_axes))
            rows.append(
                {
                    "path": path,
                    "shape": checkpoint.shapes[path].shape,
                    "parameters": matrix.size,
                    "zeros": count_zeros(matrix),
                    "patterns": satisfied(matrix),
                }
            )
        sparsity = trees.Sparsity(
            zeros=sum(row["zeros"] for row in rows),
            prunable_parameters=sum(row["parameters"] for row in rows),
            total_parameters=checkpoint.parameters,
        )
        config = dataclasses.asdict(checkpoint.config)
        result = {
            "family": checkpoint.hf_config.get("model_type", checkpoint.config.architecture),
            "architecture": checkpoint.config.architecture,
            "parameters": sparsity.total_parameters,
            "prunable_parameters": sparsity.prunable_parameters,
            "zeros": sparsity.zeros,
            "sparsity": sparsity.achieved,
            "config": {name: config[name] for name in _SIZES},
            "layers": describe(checkpoint.config)["layers"],
            "dtypes": sorted({s.dtype.name for s in checkpoint.shapes.values()}),
            "kernels": rows,
        }
        if not self.json:
            self._show(result, sparsity)
        return result

    def _show(self, result: dict[str, Any], sparsity: trees.Sparsity) -> None:
        print(f"{result['architecture']} ({result['family']}), {', '.join(result['dtypes'])}")
        differ = LAYER_SIZES if any(layer != result["layers"][0] for layer in result["layers"]) else ()
        print(", ".join(f"{name} {value}" for name, value in result["config"].items() if name not in differ))
        if differ:
            for first, last, layer in _runs(result["layers"]):
                here = f"layers {first} to {last}" if last > first else f"layer {first}"
                print(f"{here}: {', '.join(f'{name} {value}' for name, value in layer.items())}")
        print(f"{sparsity.total_parameters:,} parameters, {sparsity.prunable_parameters:,} prunable")
        print(f"zeros: {sparsity}\n")
        kinds = collections.defaultdict(list)
        for row in result["kernels"]:
            kinds[row["path"].split("/", 2)[2], row["shape"]].append(row)
        display.table(
            ["kernel", "shape", "blocks", "zeros %", "in every block"],
            [
                (
                    name,
                    shape,
                    len(rows),
                    f"{100 * sum(r['zeros'] for r in rows) / sum(r['parameters'] for r in rows):.2f}",
                    ", ".join(sorted(set.intersection(*(set(r["patterns"]) for r in rows)))) or "-",
                )
                for (name, shape), rows in kinds.items()
            ],
        )


def _runs(layers: list[dict[str, int]]) -> list[tuple[int, int, dict[str, int]]]:
    """Consecutive layers of equal sizes: (first, last, sizes)."""
    runs: list[tuple[int, int, dict[str, int]]] = []
    for i, layer in enumerate(layers):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], i, layer)
        else:
            runs.append((i, i, layer))
    return runs


def satisfied(matrix: np.ndarray) -> list[str]:
    """The N:M patterns among 1:2, 1:4, 2:4, 4:8 that the zeros of ``[d_in, d_out]`` satisfy."""
    if not count_zeros(matrix):
        return []
    fits = []
    for n, m in ((1, 2), (1, 4), (2, 4), (4, 8)):
        if len(matrix) % m == 0 and (np.count_nonzero(matrix.reshape(-1, m, matrix.shape[1]), axis=1) <= n).all():
            fits.append(f"{n}:{m}")
    return fits
