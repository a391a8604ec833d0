"""gpt-oss and DeepSeek-V3, all the way on both roads: each command goes on with the result of the one before."""

import numpy as np
import pytest

pytest.importorskip("torch")
import bridged
import hf_families as hf
import torch

from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.methods import SparseGPT
from jprune.models import generate
from jprune.patterns import NM
from jprune.pipeline import prune_model
from jprune.pipeline.shrink.run import shrink_model
from jprune.structured.experts import RemoveExperts

TOKENS = hf.tokens(16, batch=5)
MIXTURES = {
    "GptOss-0": {"num_local_experts": 5},
    "DeepseekV3-1": {"n_routed_experts": 8, "q_lora_rank": 12, "v_head_dim": 8},  # in two groups, after a dense layer
}


@pytest.fixture(params=MIXTURES)
def source(request, tmp_path):
    """A random model, saved by transformers."""
    family, architecture, variant = hf.VARIANTS[request.param]
    options = hf.sizes(family) | variant | MIXTURES[request.param]
    return hf.save(hf.model(architecture, options), tmp_path / "source")


def perplexity(folder):
    """As transformers computes it."""
    logits = torch.from_numpy(hf.logits(bridged.theirs(folder), TOKENS))[:, :-1]
    return float(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(TOKENS[:, 1:]).long().flatten()).exp()
    )


def sparse(model, out):
    """Pruned to 2:4, and what it was measured before and after."""
    options = {"calibration": TOKENS, "expert_tokens": 0, "evaluate": TOKENS}
    return prune_model(model, out, method=SparseGPT(), pattern=NM(2, 4), **options)


def check(folder):
    """Transformers loads a folder, computes our logits, and continues text with our tokens."""
    checkpoint, theirs = load(folder), bridged.theirs(folder)
    np.testing.assert_allclose(bridged.logits(checkpoint, TOKENS), hf.logits(theirs, TOKENS), atol=1e-4)
    prompt = TOKENS[0, :5]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(torch.tensor(prompt).long()[None], **options)[0, 5:].tolist()
    assert generate.generate(checkpoint.config, checkpoint.params(), prompt.tolist(), max_tokens=8) == wanted


def test_pruned_then_fewer_experts(source, tmp_path):
    report = sparse(source, tmp_path / "sparse")
    fewer = shrink_model(
        tmp_path / "sparse", tmp_path / "fewer", method=RemoveExperts(remove=2), calibration=TOKENS, evaluate=TOKENS
    )
    measured = [report.before, report.after, fewer.before, fewer.after]
    truth = [perplexity(folder) for folder in (source, *(tmp_path / name for name in ("sparse", "sparse", "fewer")))]
    assert [each.value for each in measured] == pytest.approx(truth, rel=1e-4)
    for name in ("sparse", "fewer"):
        check(tmp_path / name)


def test_through_the_module(source, tmp_path, monkeypatch):
    """What it can do gives transformers' numbers, and what it cannot is refused."""
    other = bridged.opened(source, monkeypatch)
    report = sparse(other, tmp_path / "sparse")
    assert [report.before.value, report.after.value] == pytest.approx(
        [perplexity(folder) for folder in (source, tmp_path / "sparse")], rel=1e-4
    )
    check(tmp_path / "sparse")
    with pytest.raises(JpruneError, match=r"PyTorch's module: .* cannot be made smaller"):
        shrink_model(other, tmp_path / "fewer", method=RemoveExperts(remove=2), calibration=TOKENS)
    assert not (tmp_path / "fewer").exists()
