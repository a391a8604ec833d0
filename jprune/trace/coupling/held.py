"""The Python numbers that a function holds, and the function with some of them replaced.

A module with its sizes written in cannot be traced at other sizes, but a copy of it can, in which ``num_heads`` is
another number. What a function holds are its closure, defaults and globals that are numbers, the fields of a Linen
module or of any object that it is a method of, the arguments of a `functools.partial`, and what these hold in turn.
Literals in code are not held. Nothing is changed in place.
"""

import copy
import dataclasses
import enum
import functools
import math
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Key = tuple[str, float]
"""A held number: its name (of the variable, field or dictionary key) and its value."""
Swap = Callable[[str, Any], Any]

_ARGUMENT = "an argument"
_MOST = 4000  # objects that are looked at
_NOT_SIZES = {"index", "outer_index", "num_leaves", "num_attributes", "parent", "name", "axis", "in_axes", "out_axes"}
_LIBRARIES = {"jax", "numpy", "flax", "optax", "equinox", "haiku", "einops", "functools", "torch", "torchax"}
_LEFT = (
    type,
    enum.Enum,
    types.ModuleType,
    types.BuiltinFunctionType,
    np.ndarray,
    np.dtype,
    jax.Array,
    str,
    bytes,
    bool,
)


def numbers(f: Any) -> tuple[Key, ...]:
    """All finite numbers that f holds."""
    found: dict[Key, None] = {}

    def note(name: str, value: Any) -> Any:
        if math.isfinite(value):
            found[name, float(value)] = None
        return value

    _Copy(note)(f, _ARGUMENT)
    return tuple(found)


def replaced(f: Any, new: Mapping[Key, int]) -> Any:
    """A copy of f that holds other numbers; f may be any object."""

    def swap(name: str, value: Any) -> Any:
        key = name, float(value)
        return type(value)(new[key]) if key in new else value

    return _Copy(swap)(f, _ARGUMENT) if new else f


class _Copy:
    """Copies what holds a number that `swap` changes; all else is shared with the original."""

    def __init__(self, swap: Swap):
        self.swap = swap
        self.done: dict[int, Any] = {}
        self.alive: list[Any] = []  # an id stands for an object as long as this lives
        self.left = _MOST

    def __call__(self, x: Any, name: str) -> Any:
        if type(x) in (int, float) or isinstance(x, np.integer | np.floating):
            return x if name in _NOT_SIZES else self.swap(name, x)
        if isinstance(x, np.ndarray | jax.Array) and not isinstance(x, jax.core.Tracer) and x.ndim == 0:
            if jnp.issubdtype(x.dtype, jnp.number):
                self.swap(name, float(x))  # told, but not replaced
            return x
        if x is None or isinstance(x, _LEFT) or self.left <= 0:
            return x
        if id(x) not in self.done:
            self.left -= 1
            self.done[id(x)] = x
            self.alive.append(x)
            self.done[id(x)] = self.copied(x, name)
        return self.done[id(x)]

    def copied(self, x: Any, name: str) -> Any:
        if isinstance(x, types.FunctionType):
            return self.function(x)
        if isinstance(x, types.MethodType):
            owner = self(x.__self__, name)
            return x if owner is x.__self__ else types.MethodType(x.__func__, owner)
        if isinstance(x, functools.partial):
            func, args, keywords = self(x.func, name), self(x.args, name), self(x.keywords, name)
            same = func is x.func and args is x.args and keywords is x.keywords
            return x if same else functools.partial(func, *args, **keywords)
        if isinstance(x, list | tuple):
            return self.row(x, name)
        if isinstance(x, Mapping):
            items = {k: self(v, str(k)) for k, v in x.items()}
            if all(items[k] is v for k, v in x.items()):
                return x
            try:
                return type(x)(items)  # type: ignore[call-arg]
            except TypeError:
                return x
        if hasattr(x, "__wrapped__") and callable(x):  # as jax.jit makes them
            inner = self(x.__wrapped__, name)
            return x if inner is x.__wrapped__ else inner
        return (
            self.object(x, name) if dataclasses.is_dataclass(x) or isinstance(getattr(x, "__dict__", None), dict) else x
        )

    def row(self, x: Any, name: str) -> Any:
        named = len(x) == 2 and isinstance(x[0], str)  # (key, value)
        items = [self(item, x[0] if named else name) for item in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)

    def function(self, x: types.FunctionType) -> types.FunctionType:
        library = str(x.__globals__.get("__name__", "")).split(".")[0] in _LIBRARIES
        names = () if library else sorted(_names(x.__code__) & x.__globals__.keys())
        used = {n: x.__globals__[n] for n in names}
        cells = tuple(types.CellType() for _ in x.__closure__ or ())
        scope = dict(x.__globals__)
        made = types.FunctionType(x.__code__, scope, x.__name__, x.__defaults__, cells or None)
        made.__kwdefaults__, made.__dict__ = x.__kwdefaults__, dict(x.__dict__)
        self.done[id(x)] = made  # a function may be in its own closure
        new = {n: self(v, n) for n, v in used.items() if _is_own(v)}
        changed = any(new[n] is not used[n] for n in new)
        scope.update(new)
        for n, old, cell in zip(x.__code__.co_freevars, x.__closure__ or (), cells):
            try:
                value = old.cell_contents
            except ValueError:  # not assigned yet
                continue
            cell.cell_contents = self(value, n)
            changed |= cell.cell_contents is not value
        if x.__defaults__:
            last = x.__code__.co_varnames[: x.__code__.co_argcount][-len(x.__defaults__) :]
            made.__defaults__ = tuple(self(v, n) for n, v in zip(last, x.__defaults__))
            changed |= any(a is not b for a, b in zip(made.__defaults__, x.__defaults__))
        if x.__kwdefaults__:
            made.__kwdefaults__ = {n: self(v, n) for n, v in x.__kwdefaults__.items()}
            changed |= any(made.__kwdefaults__[n] is not v for n, v in x.__kwdefaults__.items())
        return made if changed else x

    def object(self, x: Any, name: str) -> Any:
        """An object with attributes; what its constructor derives from them is derived anew where that is known.

        The attribute `value` of a wrapper, as nnx.Static is one, has the name of the wrapper.
        """
        fields = [f.name for f in dataclasses.fields(x) if f.init] if dataclasses.is_dataclass(x) else []
        linen = hasattr(x, "clone") and fields  # its other attributes are of the module's machinery
        names = fields if linen else dict.fromkeys((*fields, *getattr(x, "__dict__", ())))
        old = {n: getattr(x, n) for n in names if n not in _NOT_SIZES and hasattr(x, n)}
        changed = {n: new for n, value in old.items() if (new := self(value, name if n == "value" else n)) is not value}
        if not changed:
            return x
        if linen:
            return x.clone(**changed)
        if fields and changed.keys() <= set(fields):
            try:
                return dataclasses.replace(x, **changed)
            except Exception:  # a constructor of its own: whatever it raises, a copy does
                pass
        try:
            made = copy.copy(x)
        except Exception:  # locks, files, devices: whatever cannot be copied stays as it is
            return x
        if made is x:  # there is but one of it
            return x
        for n, value in changed.items():
            object.__setattr__(made, n, value)
        return made


def _names(code: types.CodeType) -> set[str]:
    """Names of globals in a code object and in those of the functions it makes."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


def _is_own(value: Any) -> bool:
    """Whether a global is a thing of the user's, which may hold numbers, and no function of a library."""
    if not hasattr(value, "__code__") and not hasattr(value, "__wrapped__"):
        return True
    root = str(getattr(value, "__module__", "")).split(".")[0]
    return root not in _LIBRARIES and root not in sys.stdlib_module_names
