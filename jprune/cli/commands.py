"""The commands: each a dataclass whose fields are its options, with a `run` that returns what ``--json`` prints."""

import collections
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from jprune import patterns, trees
from jprune.checkpoints import Checkpoint, huggingface, load, orbax, record
from jprune.cli import display
from jprune.errors import JpruneError, UsageError
from jprune.methods import Method
from jprune.patterns import NM, Pattern, Scope, Unstructured
from jprune.pipeline import plan_run, prune_model
from jprune.pipeline.output import new_folder
from jprune.pipeline.plan import Plan, matmul_kernels, prunable
from jprune.pipeline.report import Progress, Report
from jprune.pipeline.run import activation_dtype, count_zeros, evaluation_windows, parse_dtype

Format = Literal["hf", "orbax"]
_SIZES = ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "context", "tied")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    model: tyro.conf.Positional[str]
    """Hugging Face hub id, local folder, .safetensors or .gguf file, Orbax folder, or "demo", which is
    SmolLM2-135M-Instruct."""
    json: bool = False
    """Make the last line of stdout one JSON object, and print nothing else there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(_Command):
    """Prune a model."""

    method: Method
    out: Path | None = None
    """Folder of the result; it appears when everything is done."""
    sparsity: float | None = None
    """Share of zeros, in [0, 1)."""
    per: Scope | None = None
    """Where weights compete for --sparsity: among the inputs of each output, in blocks of 128 inputs, or in the whole
    kernel. By default as the method's authors do."""
    pattern: str | None = None
    """N:M, such as 2:4, keeps N of every M consecutive inputs; instead of --sparsity."""
    calibration: str = "pydoc"
    """Calibration text: pydoc, a text file, .jsonl, .jsonl.gz, .parquet, .npy of token ids, or hf:DATASET."""
    samples: int | None = None
    """Calibration windows. By default 128, or 64 for the demo model."""
    sequence_length: int | None = None
    """Tokens a window. By default 2048 or the model's context, or 512 for the demo model."""
    seed: int = 0
    """Of the choice of calibration windows."""
    where: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Regular expression over kernel paths; prune only what one of them finds."""
    skip: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Regular expression over kernel paths; leave alone what one of them finds."""
    override: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """REGEX=PATTERN: another sparsity or N:M for what the expression finds; the last that finds a kernel counts."""
    dtype: str | None = None
    """Of the activations: float32, bfloat16 or float16. By default float32 on CPU, else what the weights have."""
    format: Format = "hf"
    """Of the result: hf (safetensors, for every Hugging Face loader) or orbax."""
    evaluate: str | None = None
    """Text whose perplexity is measured before and after, named as for --calibration."""
    plan: bool = False
    """Print what would be done, and touch nothing."""
    overwrite: bool = False
    """Replace --out if an earlier run wrote it."""
    recipe: Path | None = None
    """TOML or JSON file with options, or the jprune.json of an earlier run; the command line counts more."""

    def run(self) -> dict[str, Any]:
        """Prunes, or prints the plan."""
        options: dict[str, Any] = {
            "method": self.method,
            "pattern": self._pattern(),
            "calibration": self.calibration,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "where": self.where,
            "skip": self.skip,
            "overrides": dict(_override(text) for text in self.override),
            "dtype": self.dtype,
        }
        if self.plan:
            return self._show_plan(plan_run(self.model, **options))
        if self.out is None:
            raise UsageError("give --out DIR for the result (or --plan to see what would be done)")
        with display.progress() as progress:
            report = prune_model(
                self.model,
                self.out,
                format=self.format,
                evaluate=self.evaluate,
                overwrite=self.overwrite,
                progress=progress,
                **options,
            )
        for notice in report.notices:
            print(notice, file=sys.stderr)
        if not self.json:
            _print_report(report)
        return report.json()

    def _pattern(self) -> Pattern:
        if (self.sparsity is None) == (self.pattern is None):
            raise UsageError("give either --sparsity S, such as 0.5, or --pattern N:M, such as 2:4")
        if self.sparsity is not None:
            return Unstructured(self.sparsity, self.per)
        pattern = patterns.parse(self.pattern or "")
        if not isinstance(pattern, NM):
            raise JpruneError(f"--pattern is N:M, such as 2:4; for a share of zeros give --sparsity {self.pattern}")
        if self.per is not None:
            raise UsageError(f"--per {self.per} goes with --sparsity; the pattern {pattern} is per output")
        return pattern

    def _show_plan(self, plan: Plan) -> dict[str, Any]:
        result = {
            "method": self.method.__class__.__name__.lower(),
            "kernels": [
                {"path": k.path, "shape": k.shape, "pattern": str(k.pattern), "zeros": k.zeros} for k in plan.kernels
            ],
            "sparsity": {"expected": plan.sparsity.achieved, **dataclasses.asdict(plan.sparsity)},
            "calibration_tokens": plan.tokens,
            "flops": plan.flops,
            "peak_memory_bytes": plan.peak_memory_bytes,
            "time_class": plan.time_class,
        }
        if not self.json:
            rows = [(k.path, k.shape, str(k.pattern), k.zeros) for k in plan.kernels]
            display.table(["kernel", "shape", "pattern", "zeros"], rows)
            print(f"\n{len(plan.kernels)} kernels, expected sparsity {plan.sparsity}")
            print(f"{plan.tokens} calibration tokens, about {plan.flops / 1e12:.3g} TFLOP: {plan.time_class}")
            print(f"peak memory about {plan.peak_memory_bytes / 1e9:.2g} GB")
            print("nothing was touched")
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPerplexity(_Command):
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

        checkpoint = load(self.model)
        dtype = activation_dtype(checkpoint, self.dtype)
        windows = evaluation_windows(checkpoint, self.text, length=self.sequence_length, count=self.windows)
        with display.progress() as show:
            result = perplexity(
                checkpoint,
                windows.tokens,
                dtype=dtype,
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
class Generate(_Command):
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
class Convert(_Command):
    """Write a model in another format or dtype."""

    out: Path
    """Folder of the result."""
    format: Format = "hf"
    """hf (safetensors) or orbax."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16. By default what they have."""
    overwrite: bool = False
    """Replace --out if jprune wrote it."""

    def run(self) -> dict[str, Any]:
        """Converts, tensor by tensor where the format allows."""
        checkpoint = load(self.model)
        dtype = None if self.dtype is None else parse_dtype(self.dtype)
        dtypes = {path: dtype or shape.dtype for path, shape in checkpoint.shapes.items()}
        with new_folder(self.out, overwrite=self.overwrite, source=checkpoint.source) as folder:
            contents = {"converted_from": checkpoint.source, "fingerprint": checkpoint.fingerprint()}
            if self.format == "hf":
                with huggingface.Writer(folder, checkpoint, dtypes) as writer:
                    for path in checkpoint.shapes:
                        writer.write(path, checkpoint.read(path))
                record.write(folder, contents)
            else:
                params = {path: checkpoint.read(path).astype(dtypes[path], copy=False) for path in checkpoint.shapes}
                orbax.save(folder, checkpoint, trees.unflatten(params), contents)
        if not self.json:
            print(f"written to {self.out}")
        return {"out": str(self.out), "format": self.format, "parameters": _parameters(checkpoint)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(_Command):
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
            total_parameters=_parameters(checkpoint),
        )
        config = dataclasses.asdict(checkpoint.config)
        result = {
            "family": checkpoint.hf_config.get("model_type", checkpoint.config.architecture),
            "architecture": checkpoint.config.architecture,
            "parameters": sparsity.total_parameters,
            "prunable_parameters": sparsity.prunable_parameters,
            "zeros": sparsity.zeros,
            "sparsity": sparsity.achieved,
            "config": {
                k: config[k]
                for k in ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "context", "tied")
            },
            "dtypes": sorted({s.dtype.name for s in checkpoint.shapes.values()}),
            "kernels": rows,
        }
        if not self.json:
            self._show(result, sparsity)
        return result

    def _show(self, result: dict[str, Any], sparsity: trees.Sparsity) -> None:
        print(f"{result['architecture']} ({result['family']}), {', '.join(result['dtypes'])}")
        print(", ".join(f"{name} {value}" for name, value in result["config"].items()))
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


def satisfied(matrix: np.ndarray) -> list[str]:
    """The N:M patterns among 1:2, 1:4, 2:4, 4:8 that the zeros of ``[d_in, d_out]`` satisfy."""
    if not count_zeros(matrix):
        return []
    fits = []
    for n, m in ((1, 2), (1, 4), (2, 4), (4, 8)):
        if len(matrix) % m == 0 and (np.count_nonzero(matrix.reshape(-1, m, matrix.shape[1]), axis=1) <= n).all():
            fits.append(f"{n}:{m}")
    return fits


def _override(text: str) -> tuple[str, Pattern]:
    regex, equals, pattern = text.rpartition("=")
    if not equals or not regex:
        raise UsageError(f"--override {text!r} is not REGEX=PATTERN, such as 'mlp/down=0.3' or 'blocks/0/=2:4'")
    return regex, patterns.parse(pattern)


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(shape.shape)) for shape in checkpoint.shapes.values())


def _print_report(report: Report) -> None:
    print(f"{report.method} {report.pattern}: sparsity {report.sparsity}")
    if report.before and report.after:
        after = report.after
        print(
            f"perplexity ({after.windows} windows of {after.sequence_length} tokens): "
            f"{report.before.value:.3f} before, {after.value:.3f} after"
        )
    parts = ", ".join(
        f"{name} {value:.1f}" for name, value in report.seconds.items() if name != "total" and value >= 0.05
    )
    print(f"{report.seconds['total']:.1f} s ({parts}); peak memory {report.peak_memory_bytes / 1e9:.2f} GB")
    print(f"written to {report.out}")
