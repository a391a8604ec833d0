"""What is told of rounds that are done, from the records of their halves."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jprune.anatomy.kernels import prunable
from jprune.pipeline.recipe import chosen_kernels
from jprune.pipeline.registry import name_of
from jprune.pipeline.rounds.job import RoundsJob
from jprune.runs.report import RunReport, perplexity_of
from jprune.runs.stopwatch import peak_memory_bytes
from jprune.trees import Sparsity, count_zeros

Records = Sequence[Mapping[str, Any]]
"""The record of the tuned model of every round; that of the pruned model is part of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One round that is done."""

    sparsity: float
    """The sparsity that was asked for."""
    zeros: int
    """Zeros in the prunable parameters."""
    steps: int
    """Steps of training."""
    first_loss: float
    """Loss of the first step of training, in nats a token."""
    last_loss: float
    """Loss of the last step of training, in nats a token."""
    perplexity_pruned: float | None
    """Perplexity before training."""
    perplexity_tuned: float | None
    """Perplexity after training."""
    prune_seconds: float
    tune_seconds: float

    @classmethod
    def from_records(
        cls, sparsity: float, zeros: int, pruned: Mapping[str, Any] | None, tuned: Mapping[str, Any]
    ) -> "Round":
        """A round from the records of its two halves; there is none of the first if nothing was pruned."""
        measured = tuned.get("perplexity", {})
        return cls(
            sparsity=sparsity,
            zeros=zeros,
            steps=tuned["steps"],
            first_loss=tuned["loss"]["first"],
            last_loss=tuned["loss"]["last"],
            perplexity_pruned=measured.get("before"),
            perplexity_tuned=measured.get("after"),
            prune_seconds=pruned["seconds"]["total"] if pruned else 0.0,
            tune_seconds=tuned["seconds"]["total"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneAndTuneReport(RunReport):
    """The result of all rounds. Its seconds are those of all rounds, those before a resume included."""

    pruner: str
    tuning: str
    sparsity: Sparsity
    rounds: tuple[Round, ...]

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only runs in rounds have."""
        return {
            "method": "prune-and-tune",
            "pruner": self.pruner,
            "tuning": self.tuning,
            "sparsity": self.sparsity.json(),
            "rounds": [dataclasses.asdict(each) for each in self.rounds],
        }

    @classmethod
    def from_record(cls, contents: Mapping[str, Any], out: Path) -> "PruneAndTuneReport":
        """The report of an earlier run, from its record."""
        return cls(
            **cls.common_fields(contents, out),
            pruner=contents["pruner"],
            tuning=contents["tuning"],
            sparsity=Sparsity.from_json(contents["sparsity"]),
            rounds=tuple(Round(**each) for each in contents["rounds"]),
        )


def report_of(job: RoundsJob, records: Records, out: Path) -> PruneAndTuneReport:
    """The report on all rounds, from their records."""
    shapes = job.checkpoint.shapes
    counted = prunable(job.checkpoint, chosen_kernels(job.checkpoint, job.recipe))
    zeros, done, halves = 0, [], []
    for sparsity, tuned in zip(job.sparsities, records, strict=True):
        pruned = _pruned(sparsity, tuned)
        if pruned is None:
            zeros = sum(count_zeros(np.asarray(job.checkpoint.read(path))) for path in counted)
        else:
            zeros = pruned["sparsity"]["zeros"]
        done.append(Round.from_records(sparsity, zeros, pruned, tuned))
        halves += [tuned] if pruned is None else [pruned, tuned]
    notices = [*(job.evaluation.notices if job.evaluation else ()), *(n for half in halves for n in half["notices"])]
    size = sum(int(np.prod(shapes[path].shape)) for path in counted)
    return PruneAndTuneReport(
        out=out,
        pruner=name_of(job.method),
        tuning=name_of(job.tuning),
        sparsity=Sparsity(zeros, size, job.checkpoint.parameters),
        rounds=tuple(done),
        before=perplexity_of(halves[0], "before"),
        after=perplexity_of(halves[-1], "after"),
        seconds=_seconds(done),
        peak_memory_bytes=max(peak_memory_bytes(), *(half["peak_memory_bytes"] for half in halves)),
        notices=tuple(dict.fromkeys(notices)),
    )


def contents_of(
    job: RoundsJob, records: Records, report: PruneAndTuneReport, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of jprune.json: of the data and the machine, and of the kernels at the last pruning, too."""
    tuned = records[-1]
    pruned = _pruned(job.sparsities[-1], tuned)
    return {
        **report.json(),
        "recipe": {"method": "prune-and-tune", **job.described(), "data": job.batches.source},
        "run": settings,
        "model": job.checkpoint.described(),
        **{name: tuned[name] for name in ("data", "dtype", "versions", "device", "peak_device_memory_bytes")},
        **{name: pruned and pruned[name] for name in ("calibration", "kernels")},
        "evaluation": job.evaluation and job.evaluation.described(),
        "notices": list(report.notices),
    }


def _pruned(sparsity: float, tuned: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record of the pruning in a round, if there was one."""
    return tuned["model"]["record"] if sparsity > 0 else None


def _seconds(rounds: Sequence[Round]) -> dict[str, float]:
    prune, tune = sum(r.prune_seconds for r in rounds), sum(r.tune_seconds for r in rounds)
    return {"total": round(prune + tune, 3), "prune": round(prune, 3), "tune": round(tune, 3)}
