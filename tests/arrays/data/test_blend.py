"""Calibration windows of several sources, and of conversations."""

import json

import numpy as np
import pytest

from jprune.data import dialogue, windows
from jprune.data.blend import blend, named, shares
from jprune.data.chat import ChatTemplate
from jprune.data.instructions import Format
from jprune.errors import JpruneError


def test_shares_by_hand():
    assert shares({"a": 0.5, "b": 0.3, "c": 0.2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert shares({"a": 0.5, "b": 0.3, "c": 0.2}, 8) == {"a": 4, "b": 2, "c": 2}, "of 2.4 and 1.6 the second is nearer"
    assert sum(shares({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 128).values()) == 128


def test_a_blend(rng):
    """The first rows of each source, as many as its weight gives, and early ones in the same shares as all."""
    sources = {name: rng.integers(0, 50, (20, 6)) + 100 * i for i, name in enumerate("ab")}
    found = blend(sources, {"a": 3, "b": 1}, 8, lambda spec, n: windows.calibration(spec, None, samples=n))
    of_b = found.tokens[:, 0] >= 100
    assert (found.tokens[~of_b] == sources["a"][:6]).all()
    assert (found.tokens[of_b] == sources["b"][:2]).all()
    assert of_b[:4].sum() == of_b[4:].sum() == 1
    assert found.parts["b"]["proportion"] == 0.25
    assert found.described()["parts"]["a"]["sha256"] == windows.sha256(sources["a"][:6].astype(np.int32))
    equal = blend(sources, None, 8, lambda spec, n: windows.calibration(spec, None, samples=n))
    assert (equal.tokens[:, 0] >= 100).sum() == 4
    assert named({"a": "x.txt", "b": "hf:c4"}) == "a=x.txt,b=hf:c4"


@pytest.mark.parametrize(
    ("proportions", "samples", "why"),
    [
        ({"a": 1}, 8, "`calibration_proportions`: none is given for 'b'"),
        ({"a": 99, "b": 1}, 8, "of 8 calibration windows there is none for b"),
        (None, 0, "number of samples must be at least 1"),
    ],
)
def test_what_does_not_blend(proportions, samples, why):
    rows = {"a": np.ones((4, 6), np.int32), "b": np.ones((4, 6), np.int32)}
    with pytest.raises(JpruneError, match=why):
        blend(rows, proportions, samples, lambda spec, n: windows.calibration(spec, None, samples=n))


class Characters:
    def encode(self, text, add_special_tokens):
        return [1] * add_special_tokens + [ord(c) for c in text]


TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<a>{% endif %}"


def test_conversations(rng):
    """Each window begins with a conversation and goes on with whole ones, all in the template, none of them twice."""
    contents = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(3, 30, 40)]
    talk = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in contents]
    records = [(f"line {i}", {"messages": messages}) for i, messages in enumerate(talk)]
    form = Format(tokenizer=Characters(), length=64, template=ChatTemplate(TEMPLATE, {}), vocab_size=128)
    texts = [f"<u>{text}<a>{text[::-1]}" for text in contents]
    found = dialogue.calibration(records, "chat.jsonl", form, samples=6, seed=3)
    used = []
    for row in found.tokens:
        rest = "".join(map(chr, row))
        while rest:
            own = [t for t in texts if rest.startswith(t)] or [t for t in texts if t.startswith(rest)]
            assert own, rest
            used.append(own[0])
            rest = rest[len(own[0]) :]
    assert len(used) == len(set(used)) > 6
    assert not (found.tokens == dialogue.calibration(records, "chat.jsonl", form, samples=6, seed=4).tokens).all()
    measured = dialogue.evaluation(records, "chat.jsonl", form, count=None)
    whole = "".join(texts)
    assert "".join(map(chr, measured.tokens.ravel())) == whole[: len(whole) // 64 * 64]
    with pytest.raises(JpruneError, match=r"its 40 conversations fill .* windows of 64 tokens, and 99 were asked for"):
        dialogue.calibration(records, "chat.jsonl", form, samples=99, seed=0)
    with pytest.raises(JpruneError, match="and 99 window"):
        dialogue.evaluation(records, "chat.jsonl", form, count=99)
    assert json.dumps(found.described())
