"""Which values a key of config.json may have: those that cannot be taken for another by mistake.

A null is not a missing key. Where it would silently mean something else (false, for a key that is true by default) it
is refused, as transformers does; a word is no truth value, and a NaN is no number.
"""

import math
from typing import Any

_NULLABLE = (
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_key_value_heads",
    "num_kv_heads",
    "q_lora_rank",
)
"""Keys that have a default and mean something else as null: no window, no cap, as many as there are query heads,
queries straight from the residual stream."""


def fits(key: str, value: Any, default: Any) -> bool:
    """Whether a value can be that of a key with this default."""
    if value is None:
        return not default or key in _NULLABLE
    if isinstance(default, bool):
        return value in (True, False)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return True
