"""Two domains of counting, of which one is rare: what runs over several domains are tested with."""

import json

import numpy as np

from jprune.pipeline.options import DynamicLoading
from jprune.train.shearing.dynamic_loading import Reweighing


def counting(first, step, n=40, length=12):
    """Windows of a language of its own 48 tokens, in which every token says the next."""
    start = np.random.default_rng(first).integers(0, 48, (n, 1))
    return (first + (start + step * np.arange(length)) % 48).astype(np.int32)


DATA = {"much": counting(0, 1), "little": counting(48, 5)}
OPTIONS = {"data": DATA, "proportions": {"much": 0.9, "little": 0.1}, "evaluate_every": 2}
LOADING = DynamicLoading(reference_losses={"much": 1.0, "little": 1.0}, reweighing=Reweighing(step_size=0.5))


def series(out, name):
    """(step, value) of a metric, where it was measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]
