"""The annotations of arrays: jaxtyping's where it is installed; elsewhere only the kind of array is left of them.

So what works on functions and pytrees needs jax, optax and numpy alone. Every module takes them from here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import (
        Array,
        Bool,
        DTypeLike,
        Float,
        Float64,
        Int,
        Int8,
        Int32,
        Integer,
        Key,
        Shaped,
        UInt,
        UInt8,
    )
else:
    try:
        from jaxtyping import Bool, Float, Float64, Int, Int8, Int32, Integer, Key, Shaped, UInt, UInt8
    except ImportError:

        class Shaped:
            """``Shaped[Array, "d_in d_out"]`` is Array."""

            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Float64 = Int = Int8 = Int32 = Integer = Key = UInt = UInt8 = Shaped

    def __getattr__(name: str) -> Any:
        """JAX's own types; not imported above, because who annotates NumPy's arrays does without JAX."""
        if name == "Array":
            from jax import Array as value
        elif name == "DTypeLike":
            from jax.typing import DTypeLike as value
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return value


__all__ = [
    "Array",
    "Bool",
    "DTypeLike",
    "Float",
    "Float64",
    "Int",
    "Int8",
    "Int32",
    "Integer",
    "Key",
    "Shaped",
    "UInt",
    "UInt8",
]
