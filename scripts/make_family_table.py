"""Compares every family's logits with transformers' and writes the table of docs/families.md.

    python scripts/make_family_table.py [--out docs/families.md]

For every variant that a family names (`Family.variants`), tied and untied, a model of random weights is made and saved
by transformers, loaded by jprune, and both compute the same 2 x 40 tokens in float32. Runs on a CPU in a few minutes.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "reference"))

import hf_families as hf  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jprune.checkpoints import load  # noqa: E402
from jprune.models import decoder, families  # noqa: E402

PAGE = """# Families

Which models jprune reads, prunes and writes as Hugging Face folders. Every family has a table that maps its tensors to
the decoder's parameters, in both directions bit for bit, and passes one test: the logits are those of transformers,
every kernel is found, generation with a cache equals generation without, every method prunes it. To add one, see
[Add a family](add-a-family.md).

| architecture | what it is | largest difference of a logit |
| --- | --- | --- |
{rows}

The last column is measured by `scripts/make_family_table.py`: random models of two or three layers, with the settings
that the family's test tries, tied and untied heads, 2 x 40 tokens, float32 on a CPU; the logits are of the order of 1.
It was run with jax {jax}, transformers {transformers} and torch {torch}.

What is not supported is refused with the reason: Falcon with ALiBi (Falcon-RW), GPT-2 with cross-attention, OPT without
scales in its norms, OLMoE with clipped queries, DeepSeek-V2 whose experts' weights are normalised, encoders such as
EmbeddingGemma.

Architectures that are not in this table go [the other road](two-roads.md), if they can; the last section says which.

Latent attention (DeepSeek) keeps in its cache the narrow vectors that keys and values are made of. Its heads, of
several widths, and those vectors cannot be made fewer yet; `prune llm-pruner --heads none` takes the channels of MLPs
and experts. Layers that predict the token after next (`num_nextn_predict_layers`) are left out, as in transformers,
with a line that says how much they are.

In mixtures of experts each expert computes the tokens that it was sent, and no other: they are sorted by expert and go
through it in tiles of at most 128 ([how fast](results.md#experts-that-compute-what-they-are-sent)); for a single token
only the kernels of its experts are read. Calibration of one-shot pruning on one device does the same, and each expert's
statistics are sums over its own tiles. What is read instead of run (`observe`, `stages`), and calibration on several
devices or with `--dense-targets`, is the same sum with every expert on every token and zeros where a token is not sent,
which costs `experts / experts_per_token` times as much. [`prune experts`](structured.md#remove-experts) removes whole
experts, `prune layers` layers, and `prune llm-pruner` heads and
[channels inside experts](structured.md#channels-inside-experts).
Of BLOOM it can remove no heads, whose ALiBi slopes follow from their numbers.
"""

OTHERS = "## Every causal language model of transformers"
"""Where the part of the page begins that `scripts/make_bridge_table.py` writes."""


def difference(family: families.Family, architecture: str) -> float:
    """The largest over the family's variants."""
    worst = 0.0
    tokens = np.random.default_rng(1).integers(0, hf.VOCAB, (2, 40)).astype(np.int32)
    for variant in family.variants:
        for tied in (False, True):
            options = hf.sizes(family, layers=3, tied=tied) | variant
            if "layer_types" in variant:
                options["num_hidden_layers"] = len(variant["layer_types"])
            model = hf.model(architecture, options)
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = load(hf.save(model, folder))
                params = checkpoint.params()
            ours = jax.jit(lambda p, config=checkpoint.config: decoder.apply(config, p, tokens))(params)
            worst = max(worst, float(np.abs(np.asarray(ours) - hf.logits(model, tokens)).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    args = parser.parse_args()
    rows = []
    for family in families.FAMILIES:
        module = importlib.import_module(family.config.__module__)
        what = (module.__doc__ or "").splitlines()[0].rstrip(".")
        for architecture in family.architectures:
            worst = difference(family, architecture)
            print(f"{architecture}: {worst:.1e}", flush=True)
            if worst > 1e-4:
                raise SystemExit(f"{architecture} differs from transformers by {worst}")
            rows.append(f"| `{architecture}` | {what} | {worst:.1e} |")
    versions = {"jax": jax.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    before = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
    others = before[before.index(OTHERS) :] if OTHERS in before else ""
    page = PAGE.format(rows="\n".join(rows), **versions)
    args.out.write_text(f"{page}\n{others}" if others else page, encoding="utf-8")


if __name__ == "__main__":
    main()
