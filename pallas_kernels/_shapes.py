"""jaxtyping's shape annotations where it is installed; a GPU machine with only jax and numpy does without them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Shaped
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Shaped
    except ImportError:
        from jax import Array

        class _Unchecked:
            def __class_getitem__(cls, item):
                return Any

        Bool = Float = Int = Shaped = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Shaped"]
