"""torchax, as this library needs it: https://github.com/google/torchax runs PyTorch's operators on JAX arrays.

What differs from its own environment:

- torchax 0.0.13 names 22 overloads of operators that PyTorch 2.13 no longer has (dimensions by name) while it registers
  its own; they get placeholders, which nothing calls.
- What depends on no parameter and no token (positions, masks, rotary tables) is computed at once, while the module is
  traced. So Python code may look at it, and it becomes a constant of the trace.
- What cannot be traced is a `JpruneError` that names the operator.
"""

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch

from jprune.errors import JpruneError


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Overloads of operators that PyTorch does not have are placeholders."""
    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    def looked_up(self: Any, name: str) -> Any:
        try:
            return original(self, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return object()

    packet.__getattr__ = looked_up  # type: ignore[method-assign]
    try:
        yield
    finally:
        packet.__getattr__ = original  # type: ignore[method-assign]


with warnings.catch_warnings(), _lenient():
    warnings.simplefilter("ignore")
    import torchax.tensor
    from torchax.ops import mappings
    from torchax.tensor import OperatorNotFound, Tensor
    from torchax.view import View


def _type_as(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return self.to(other.dtype)


Tensor.type_as = _type_as  # torchax's own changes the tensor itself
View.type_as = _type_as  # has none


class Environment(torchax.tensor.Environment):
    """Computes at once what depends on no tracer, and takes tensors of PyTorch's, which modules hold, as constants."""

    def dispatch(self, func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        """One operator."""
        tensors = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        own = [v for v in tensors if isinstance(v, View | Tensor)]
        if own and len(own) < len(tensors):
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, self._taken, (args, kwargs))
        for value in own:
            source = value.source_jax() if isinstance(value, View) else value.jax()
            if isinstance(source, jax.core.Tracer):
                return super().dispatch(func, types, args, kwargs)
        with jax.ensure_compile_time_eval():
            return super().dispatch(func, types, args, kwargs)

    def _taken(self, value: torch.Tensor) -> torch.Tensor:
        return value if isinstance(value, View | Tensor) else constant(value)

    def _should_use_torchax_tensor(self, device: Any) -> bool:
        """Whether what a module makes is ours, wherever it says that it should lie."""
        return True


@functools.cache
def environment() -> Environment:
    """The one environment of this process."""
    with _lenient():  # it registers more when it is made
        made = Environment()
    _register(made)
    return made


def torch_dtype(dtype: Any) -> torch.dtype:
    """PyTorch's dtype of JAX's."""
    return mappings.j2t_dtype(jax.numpy.dtype(dtype))


def jax_dtype(dtype: torch.dtype) -> Any:
    """JAX's dtype of PyTorch's."""
    return mappings.t2j_dtype(dtype)


def tensor(value: Any) -> torch.Tensor:
    """A JAX array, or a tracer, as a tensor."""
    return Tensor(value, environment())


def constant(value: torch.Tensor) -> torch.Tensor:
    """A tensor of PyTorch's as one of JAX's, also while something is traced."""
    with jax.ensure_compile_time_eval():
        return tensor(environment().t2j_copy(value.detach()))


@contextlib.contextmanager
def running() -> Iterator[None]:
    """PyTorch's operators are JAX's: types are promoted as PyTorch does, and float32 means float32."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
        torch.no_grad(),
        environment(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what goes wrong in a trace into a JpruneError that says which operator, and where."""
    try:
        yield
    except JpruneError:
        raise
    except OperatorNotFound as error:
        name = str(error).removeprefix("Operator with name ").removesuffix(" has no lowering")
        raise JpruneError(
            f"{what} cannot be traced: its operator {name}, at {_where(error)}, has no counterpart in torchax"
        ) from error
    except jax.errors.JAXTypeError as error:
        raise JpruneError(
            f"{what} cannot be traced: at {_where(error)} its Python code asks for values that are not known before "
            f"the model runs ({type(error).__name__})"
        ) from error
    except Exception as error:
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise JpruneError(f"{what} cannot be traced: {type(error).__name__} at {_where(error)}: {words}") from error


def _where(error: BaseException) -> str:
    """The innermost line of transformers that an error came through: file, line and code."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/transformers/" in f.filename] or list(frames)
    last = inside[-1]
    return f"{last.filename.rpartition('/')[2]}:{last.lineno} ({last.line})"


def _register(made: Any) -> None:
    """Operators that transformers' models use and torchax lacks."""
