"""A PyTorch Llama of transformers as a JAX function, by torchax: kernels are [out, in], by their names in PyTorch."""

from unittest import mock

import jax
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

OVERLOAD = torch._ops.OpOverloadPacket.__getattr__


def overload(packet, name):
    """An operator's overload, or a placeholder where PyTorch has it no more: torchax registers some of these."""
    try:
        return OVERLOAD(packet, name)
    except AttributeError:
        if name.startswith("__"):
            raise
        return f"{packet}.{name}"


with mock.patch.object(torch._ops.OpOverloadPacket, "__getattr__", overload):
    import torchax
    from torchax.interop import JittableModule, jax_view, torch_view

    ENVIRONMENT = torchax.default_env()


def made():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    with torch.no_grad():
        truth = model(torch.tensor(np.asarray(tokens))).logits.numpy()
    with ENVIRONMENT:
        module = JittableModule(model.to("jax"))
    buffers = jax_view(module.buffers)

    def logits(params, tokens):
        with ENVIRONMENT:
            arguments = torch_view((params, buffers, tokens))
            return jax_view(module.functional_call("forward", *arguments).logits)

    params = jax_view(module.params)
    np.testing.assert_allclose(logits(params, tokens), truth, atol=1e-5)
    return logits, params, (tokens,)
