"""`auto` stands for a command that one could have typed: what it chooses, and what it leaves as it is."""

import json
import typing

import pytest

from jprune.cli.main import _parse
from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured
from jprune.pipeline.auto import Auto, Quality, decided
from jprune.pipeline.oneshot.run import prune_model
from jprune.pipeline.recipe import Recipe

PATTERNS = [Unstructured(0.3), Unstructured(0.5), Unstructured(0.6), Unstructured(0.7), Unstructured(0.9), NM(2, 4)]
QUALITIES = typing.get_args(Quality)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_command_that_is_printed_is_what_is_done(quality, pattern):
    method, recipe, chosen = decided(Auto(quality=quality), Recipe(pattern=pattern))
    words = chosen.command.split()[1:]
    typed = _parse(" ".join(words[:2]), ["demo", *words[2:]])
    assert typed.method == method
    assert typed.details["reconstruct"] == recipe.reconstruct
    assert chosen.why


def test_better_costs_more():
    """A block of LLaMA's shape."""
    for pattern in PATTERNS:
        costs = [Auto(quality=quality).chosen(pattern).method.flops(4096, 4096) for quality in QUALITIES]
        assert costs == sorted(costs)


def test_what_the_user_gives_stays():
    _, recipe, chosen = decided(Auto(quality="best"), Recipe(pattern=Unstructured(0.7), reconstruct=2))
    assert recipe.reconstruct == 2
    assert "--reconstruct" not in chosen.command


def test_a_quality_that_is_none():
    with pytest.raises(JpruneError, match="quality is one of fast, balanced, best; got 'good'"):
        Auto(quality="good")


def test_the_record_says_what_was_chosen(tiny_model, token_file, tmp_path):
    """And makes the same again, without auto."""
    options = {"pattern": Unstructured(0.5), "calibration": token_file()}
    report = prune_model(tiny_model(), tmp_path / "out", method=Auto(quality="fast"), **options)
    assert report.method == "sparsegpt"
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["chosen"] == report.chosen == Auto(quality="fast").chosen(options["pattern"]).json()
    assert record["recipe"]["refit"] == Auto(quality="fast").chosen(options["pattern"]).method.refit
