"""Routing against transformers' routers, of all kinds that there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.models.routing import Routing, route, sent, spread

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXPERTS, PER_TOKEN = 12, 3
CASES = {
    "all groups": {"n_group": 1, "topk_group": 1},
    "two of four groups": {"n_group": 4, "topk_group": 2},
    "scaled": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "not normalised": {"n_group": 3, "topk_group": 1, "norm_topk_prob": False},
}


def compare(router, routing, correction=None):
    """Of a torch router that has the identity for a kernel, so that its input is its logits."""
    logits = np.random.default_rng(0).normal(size=(50, EXPERTS)).astype(np.float32)
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS))
        _, weights, experts = router(torch.from_numpy(logits))
    order = np.argsort(-weights.numpy(), axis=-1)  # theirs are not sorted
    want = np.zeros((50, EXPERTS), np.float32)
    np.put_along_axis(want, experts.numpy(), weights.numpy(), axis=-1)
    routes = jax.jit(lambda logits: route(logits, routing, correction))(logits)
    assert routes.experts.shape == order.shape
    np.testing.assert_allclose(spread(routes, EXPERTS), want, rtol=1e-5)
    np.testing.assert_array_equal(sent(routes, EXPERTS), want > 0)


@pytest.mark.parametrize("case", CASES)
def test_sigmoids_with_a_correction(case):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    options = {"routed_scaling_factor": 1.0, "norm_topk_prob": True} | CASES[case]
    config = transformers.DeepseekV3Config(
        hidden_size=EXPERTS, n_routed_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, **options
    )
    router = DeepseekV3TopkRouter(config)
    correction = np.random.default_rng(1).normal(size=EXPERTS).astype(np.float32)
    router.e_score_correction_bias.copy_(torch.from_numpy(correction))
    routing = Routing(
        per_token=PER_TOKEN,
        scores="sigmoid",
        normalise=options["norm_topk_prob"],
        scale=options["routed_scaling_factor"],
        groups=options["n_group"],
        groups_per_token=options["topk_group"],
        group_best=2,
    )
    compare(router, routing, jnp.asarray(correction))


@pytest.mark.parametrize("groups", [None, 4])
def test_softmax_in_groups(groups):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = transformers.DeepseekV2Config(
        hidden_size=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        num_attention_heads=3,
        n_group=groups,
        topk_group=groups and 2,
        topk_method="group_limited_greedy" if groups else "greedy",
        routed_scaling_factor=16.0,
    )
    routing = Routing(per_token=PER_TOKEN, scale=16.0, groups=groups or 1, groups_per_token=2 if groups else 1)
    compare(DeepseekV2TopkRouter(config), routing)


def test_softmax_of_the_chosen_is_the_softmax_of_all_normalised():
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter

    config = transformers.GraniteMoeConfig(
        hidden_size=EXPERTS, num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, num_attention_heads=3
    )
    compare(GraniteMoeTopKRouter(config), Routing(per_token=PER_TOKEN, normalise=True))
