"""Experts of transformers' modules as products that calibration can see.

transformers lets a module's experts be computed in several ways (`experts_implementation`). Its own either send tokens
where a loop over values that are not known before the model runs says, or gather a copy of an expert's weights for
every token. Here every expert computes all tokens, with the inputs of those that it is not sent set to zero: what an
expert reads is what it was sent, and its kernels are one axis of a product, as in `jprune.models.modules.Experts`.
"""

from typing import Any

import torch

NAME = "jprune"
"""What transformers is told."""


def forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Of tokens [S, d_in], with the experts [S, k] of each and their weights [S, k]: what they give, [S, d_in]."""
    chosen = top_k_index[..., None] == torch.arange(self.num_experts)  # [S, k, experts]
    weights = (chosen * top_k_weights[..., None]).sum(1)  # [S, experts]
    sent = chosen.any(1).transpose(0, 1)[..., None]  # [experts, S, 1]
    first = "gate_up_proj" if self.has_gate else "up_proj"
    hidden = _linear(self, first, torch.where(sent, hidden_states[None], 0))
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    found = _linear(self, "down_proj", torch.where(sent, hidden, 0))  # a bias would make it more than zero
    if self.has_post_expert_norm:
        found = self.post_expert_norm(found)
    mixed = (found * weights.transpose(0, 1)[..., None]).sum(0)
    return mixed.to(hidden_states.dtype)


def _linear(self: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """[experts, S, d_in] -> [experts, S, d_out]."""
    weight = getattr(self, name)
    found = torch.bmm(x, weight if self.is_transposed else weight.transpose(1, 2))
    return found + getattr(self, f"{name}_bias")[:, None] if self.has_bias else found


def register() -> None:
    """Makes it known to transformers, under `NAME`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
