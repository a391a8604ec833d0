"""Target shapes: how they are written, which fit, and which is found for a number of parameters."""

import pytest

from jprune.errors import JpruneError
from jprune.structured import shape
from jprune.structured.shape import Shape

LLAMA_2_7B = Shape(layers=32, hidden=4096, heads=32, kv_heads=32, intermediate=11008)
GROUPED = Shape(layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536)


def count(s, vocab=32000, head_dim=128, tied=False):
    """Of a Llama, by hand: embedding and head, then q, k, v, o, gate, up, down and two norms a layer, and a norm."""
    block = 2 * s.hidden * head_dim * (s.heads + s.kv_heads) + 3 * s.hidden * s.intermediate + 2 * s.hidden
    return (1 if tied else 2) * vocab * s.hidden + s.layers * block + s.hidden


def test_parse():
    assert shape.parse("layers=24, hidden=2048,heads=16,intermediate=5504", LLAMA_2_7B) == Shape(
        layers=24, hidden=2048, heads=16, kv_heads=16, intermediate=5504
    )
    assert shape.parse("heads=6", GROUPED).kv_heads == 2
    assert shape.parse("kv_heads=1", GROUPED).heads == 3
    assert shape.parse("heads=6,kv_heads=3", GROUPED).kv_heads == 3
    assert shape.parse(str(GROUPED), LLAMA_2_7B) == GROUPED
    for text, match in [
        ("layer=3", "got 'layer=3'"),
        ("layers", "got 'layers'"),
        ("layers=x", "got 'layers=x'"),
        ("layers=3,layers=4", "twice"),
    ]:
        with pytest.raises(JpruneError, match=match):
            shape.parse(text, LLAMA_2_7B)


def test_numbers():
    assert [shape.number(t) for t in ("1.3B", "370M", "2.5k", "12345")] == [1_300_000_000, 370_000_000, 2500, 12345]
    for text in ("", "B", "-3", "nan", "1e400", "many"):
        with pytest.raises(JpruneError, match="number of parameters"):
            shape.number(text)


@pytest.mark.parametrize("parameters", [370e6, 1.345e9, 2.7e9, 6e9])
def test_all_sizes_shrink_alike(parameters):
    parameters = int(parameters)
    found = shape.solve(LLAMA_2_7B, parameters, count)
    shape.check(found, LLAMA_2_7B)
    assert 0.99 * parameters < count(found) <= parameters
    shares = [getattr(found, name) / getattr(LLAMA_2_7B, name) for name in shape.NAMES]
    assert max(shares) / min(shares) < 1.12
    assert found.hidden % 64 == found.intermediate % 64 == 0


def test_with_few_kv_heads():
    """Three KV heads cannot shrink by a tenth: the rest makes up for it."""
    of = lambda s: count(s, vocab=49152, head_dim=64, tied=True)  # noqa: E731
    assert of(GROUPED) == 134_515_008
    found = shape.solve(GROUPED, 70_000_000, of)
    shape.check(found, GROUPED)
    assert found.heads == 3 * found.kv_heads
    assert 0.97 * 70e6 < of(found) <= 70e6


def test_no_shape():
    with pytest.raises(JpruneError, match="nothing to prune"):
        shape.solve(LLAMA_2_7B, 7_000_000_000, count)
    with pytest.raises(JpruneError, match="too few even for one layer"):
        shape.solve(LLAMA_2_7B, 100_000, count)
