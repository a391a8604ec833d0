"""`auto` stands for a command that one could have typed: what it chooses, and what it leaves as it is."""

import json
import typing

import pytest

from jprune.cli.main import parse
from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured
from jprune.pipeline.auto import Auto, Quality, decided
from jprune.pipeline.oneshot.run import prune_model
from jprune.pipeline.recipe import Recipe

QUALITIES = typing.get_args(Quality)
RECIPE = Recipe(pattern=Unstructured(0.5))


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_the_command_that_is_printed_is_what_is_done(quality, pattern):
    method, recipe, chosen = decided(Auto(quality=quality), Recipe(pattern=pattern))
    words = chosen.command.split()[1:]
    typed = parse(" ".join(words[:2]), ["demo", *words[2:]])
    assert typed.method == method
    assert recipe == Recipe(pattern=pattern, **typed.details)
    assert chosen.why


def test_better_costs_more():
    """Of a block of LLaMA's shape."""
    chosen = [Auto(quality=quality).chosen(RECIPE) for quality in QUALITIES]
    costs = [each.method.flops(4096, 4096) for each in chosen]
    assert costs == sorted(set(costs))


def test_what_the_user_gives_stays():
    best = Auto(quality="best")
    _, recipe, chosen = decided(best, Recipe(pattern=Unstructured(0.7), allocate="linear"))
    assert recipe.allocate == "linear"
    assert "--allocate" not in chosen.command
    further = Recipe(pattern=Unstructured(0.7), keep_zeros=True)  # zeros that are there cannot be shared out
    assert decided(best, further)[1] == further


def test_a_quality_that_is_none():
    with pytest.raises(JpruneError, match="quality is one of fast, balanced, best; got 'good'"):
        Auto(quality="good")


def test_the_record_says_what_was_chosen(tiny_model, token_file, tmp_path):
    """And makes the same again, without auto."""
    options = {"pattern": Unstructured(0.5), "calibration": token_file()}
    report = prune_model(tiny_model(), tmp_path / "out", method=Auto(quality="fast"), **options)
    assert report.method == "sparsegpt"
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["chosen"] == report.chosen == Auto(quality="fast").chosen(RECIPE).json()
    assert record["recipe"]["refit"] == Auto(quality="fast").chosen(RECIPE).method.refit
