"""Patterns: what they accept, what they count, how they read and print."""

import pytest

from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured, parse


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(JpruneError, match=r"sparsity must be in \[0, 1\).*got"):
        Unstructured(sparsity)


def test_unknown_scope():
    pattern = Unstructured(0.5)
    object.__setattr__(pattern, "per", "row")  # the type checker of the tests stops the constructor
    with pytest.raises(JpruneError, match='"output", "block" or "kernel"; got \'row\''):
        pattern.__post_init__()


@pytest.mark.parametrize(("n", "m"), [(3, 2), (4, 4), (0, 4), (-1, 4), (2, 0)])
def test_nm_out_of_range(n, m):
    with pytest.raises(JpruneError, match=f"0 < N < M; got {n}:{m}"):
        NM(n, m)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 4:8 ", NM(4, 8)),
        ("0.5", Unstructured(0.5)),
        ("0", Unstructured(0.0)),
        ("1e-1", Unstructured(0.1)),
    ],
)
def test_parse(text, pattern):
    assert parse(text) == pattern


@pytest.mark.parametrize("text", ["", "half", "2:4:8", "2:", "3:2", "1.0", "-1", "nan", "inf", "50%"])
def test_parse_refuses(text):
    with pytest.raises(JpruneError):
        parse(text)


def test_zeros_are_exact():
    assert Unstructured(0.5, "output").zeros(7, 3) == 3 * 3
    assert Unstructured(0.5, "kernel").zeros(7, 3) == 10
    assert Unstructured(0.5, "block").zeros(7, 3) == 10
    assert Unstructured(0.0, "kernel").zeros(7, 3) == 0
    assert NM(1, 4).zeros(8, 3) == 18
    assert NM(2, 3).zeros(9, 5) == 15


def test_among_only_fills_what_is_open():
    assert Unstructured(0.5).among("block") == Unstructured(0.5, "block")
    assert Unstructured(0.5, "kernel").among("block") == Unstructured(0.5, "kernel")


def test_nm_that_does_not_divide_says_what_does():
    NM(2, 4).check(12)
    with pytest.raises(JpruneError, match=r"blocks/0/q: 4:8 needs .* divisible by 8, it has 12; .*\[4\] fit"):
        NM(4, 8).check(12, "blocks/0/q")
    with pytest.raises(JpruneError, match="it has 7; use an unstructured sparsity"):
        NM(2, 4).check(7)
    Unstructured(0.3).check(7)


def test_printed():
    assert str(NM(2, 4)) == "2:4"
    assert str(Unstructured(0.5)) == "50 %"
    assert str(Unstructured(0.125, "output")) == "12.5 % per output"
    assert NM(1, 4).sparsity == 0.75
