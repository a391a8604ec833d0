"""What the experts of a block do with the tokens that they are sent, seen while the block runs."""

import functools
from collections.abc import Callable

from jprune.annotations import Array, Float
from jprune.models import experts
from jprune.models.decoder import Params
from jprune.structured.experts import Use, use


@functools.lru_cache(maxsize=64)
def block_use(block: Callable) -> Callable[..., tuple[Float[Array, "B L d"], Use | None]]:
    """f(params, x): the output of a block function, and the use of its experts, None where it has none."""

    def run(params: Params, x: Float[Array, "B L d"]) -> tuple[Float[Array, "B L d"], Use | None]:
        with experts.watched() as seen:
            y = block(params, x)
        total: Use | None = None
        for one in seen:
            numbers, weights, norms = (part.reshape(-1, part.shape[-1]) for part in (*one.routes, one.norms))
            own = use(numbers, weights, norms, one.experts)
            total = own if total is None else total.merge(own)
        return y, total

    return run
