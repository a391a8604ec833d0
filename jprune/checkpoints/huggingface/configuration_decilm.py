"""The configuration class of a DeciLM folder, which vLLM imports with --trust-remote-code. Written by jprune.

Beside transformers' Llama keys there is `block_configs`: for each layer `attention.n_heads_in_group` (query heads that
share a key/value head) and `ffn.intermediate_size`. jprune itself never imports this file; it only copies it.
"""

from transformers import PretrainedConfig


class Block(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(PretrainedConfig):
    """The keys of config.json as attributes.

    Not a LlamaConfig: that wants num_attention_heads to divide hidden_size, and heads have a size of their own here.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        # Set at the end, since transformers 5 would validate them before the keys that they need are there; there
        # rope_scaling is a property, an old name of rope_parameters.
        rope = {key: kwargs.pop(key) for key in ("rope_theta", "rope_scaling", "rope_parameters") if key in kwargs}
        super().__init__(**kwargs)
        for key, value in rope.items():
            if not isinstance(getattr(type(self), key, None), property):
                setattr(self, key, value)
        self.block_configs = [Block(block) for block in block_configs or ()]
