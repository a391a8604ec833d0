"""PyTorch's module of a model without its weights, its decoder layers, and a traced call of it.

The layers are found by structure: of the module lists that no other list holds, those whose members a call runs, the
longest; several of that length (XLM has lists of attentions and of MLPs) are layers together, member by member. Every
equation of the trace carries the number of the layer that made it in its name stack.
"""

import collections
import copy
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
import transformers
from transformers import core_model_loading as loading
from transformers import initialization

from jprune.bridge import experts, scans
from jprune.bridge.environment import constant, environment, explained, jax_dtype, running, tensor, torch_dtype
from jprune.errors import JpruneError

_SCOPE = "jprune_layer_"
_NUMBER = re.compile(r"^((decoder_|attn_|attention_)?(layer|block)_?)?(i|idx|id|index|number|num)$")
"""Attributes in which layers keep their own number."""
_LAYER = re.compile(_SCOPE + r"(\d+)_(\d+)")


class Made(NamedTuple):
    """The module as transformers makes it for one dtype."""

    module: Any
    dtypes: dict[str, Any]
    """JAX's, of every parameter and buffer by PyTorch's name."""
    constants: dict[str, torch.Tensor]
    """The buffers that no file holds."""


class Module:
    """A model of transformers, made from its config alone.

    Args:
        hf_config: the content of config.json.
        source: where it was found, for messages.
        why: why it has no native table, for messages.

    Attributes:
        architecture: the name of its class.
        module: PyTorch's, with parameters on the meta device and buffers as constants.
        shapes: of every parameter, and of every buffer that files may hold, by PyTorch's name.
        aliases: names that stand for another parameter, as those of a tied head.
        buffers: the names of what the module can make itself.
    """

    def __init__(self, hf_config: Mapping[str, Any], source: str, why: str):
        cls, config = _class(hf_config, source, why)
        self.architecture = cls.__name__
        self.what = f"{source}: {self.architecture}"
        transformers.logging.set_verbosity_error()  # it would tell of kernels for GPUs that are not there
        experts.register()
        with explained(self.what):
            self.module = _made(cls, config, torch.float32)
        scans.replace_in(self.module)
        self.config = self.module.config.get_text_config(decoder=True)
        floats = {name: b for name, b in self.module.state_dict(keep_vars=True).items() if b.is_floating_point()}
        first: dict[int, str] = {}
        self.aliases = {}
        for name, value in floats.items():
            if first.setdefault(id(value), name) != name:
                self.aliases[name] = first[id(value)]
        self.shapes = {name: tuple(value.shape) for name, value in floats.items() if name not in self.aliases}
        self.buffers = {name for name, _ in self.module.named_buffers()}
        self._of_list = dict(enumerate(_scoped_lists(self.module)))
        self._by_dtype: dict[Any, Made] = {}
        self._calls: collections.Counter[Any] = collections.Counter()

    def keep(self, names: Iterable[str]) -> None:
        """Of the buffers in `shapes` those that files hold; the others are constants."""
        self.shapes = {n: shape for n, shape in self.shapes.items() if n not in self.buffers or n in set(names)}

    def of_dtype(self, dtype: Any) -> Made:
        """The module of a checkpoint in this dtype.

        Not all of it has that dtype: the module makes some tensors in one of their own, and transformers keeps others
        in float32 by expressions that the class names (`_keep_in_fp32_modules_strict`; for float16
        `_keep_in_fp32_modules` as well). Buffers are computed in float32 and rounded, as transformers does once the
        weights are read.
        """
        if (made := self._by_dtype.get(jnp.dtype(dtype))) is not None:
            return made
        theirs, module = torch_dtype(dtype), self.module
        if theirs != torch.float32:
            with explained(self.what):
                module = _made(type(self.module), copy.deepcopy(self.module.config), theirs)
            _scoped_lists(module)
        plan = module._get_dtype_plan(theirs)
        kept, expressions, _ = loading.build_glob_alternation(list(plan))
        dtypes = {}
        for name, value in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            match = kept.search(name) if plan and value.is_floating_point() else None
            dtypes[name] = value.dtype if match is None else plan[expressions[str(match.lastgroup)]]
        constants = {
            name: constant(value.to(dtypes[name]))
            for name, value in self.module.named_buffers()
            if name not in self.shapes
        }
        made = Made(module, {name: jax_dtype(own) for name, own in dtypes.items()}, constants)
        self._by_dtype[jnp.dtype(dtype)] = made
        return made

    def name_of(self, part: str) -> str | None:
        """PyTorch's name of the weight of a part: "embed" or "head"; None if there is none."""
        owner = self.module.get_input_embeddings() if part == "embed" else self.module.get_output_embeddings()
        weight = getattr(owner, "weight", None)
        for name, value in self.module.state_dict(keep_vars=True).items():
            if value is weight:
                return self.aliases.get(name, name)
        return None

    def traced(self, shape: tuple[int, int], dtype: Any, rows: int | None = None) -> Any:
        """The jaxpr of (parameters by name, tokens of this shape) -> logits in float32.

        Args:
            shape: windows and tokens in each.
            dtype: of the parameters, but for those that stay float32 (`of_dtype`), and so of the computation.
            rows: tokens of the vocabulary that the head knows; all unless given.
        """
        shapes = dict(self.shapes)
        if rows is not None:
            for name, axis in self.by_token().items():
                shapes[name] = (*shapes[name][:axis], rows, *shapes[name][axis + 1 :])
        made = self.of_dtype(dtype)
        params = {name: jax.ShapeDtypeStruct(shape, made.dtypes[name]) for name, shape in shapes.items()}

        def logits(params: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
            given = {**made.constants, **{name: tensor(value) for name, value in params.items()}}
            with running():
                out = torch.func.functional_call(
                    made.module, given, (), {"input_ids": tensor(tokens), "use_cache": False}, tie_weights=True
                )
                return environment().t2j_iso(out.logits).astype(jnp.float32)

        self._calls.clear()
        counted = torch.nn.modules.module.register_module_forward_pre_hook(lambda child, _: self._calls.update([child]))
        with explained(self.what):
            try:
                return jax.make_jaxpr(logits)(params, jax.ShapeDtypeStruct(shape, jnp.int32))
            finally:
                counted.remove()

    def by_token(self) -> dict[str, int]:
        """The parameters of the head that have an axis of the vocabulary, and which."""
        head = self.module.get_output_embeddings()
        found = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if any(value is getattr(head, own, None) for own in ("weight", "bias")):
                found[self.aliases.get(name, name)] = 0
        return found

    def left_alone(self) -> list[str]:
        """Kernels that send tokens to experts or weigh what these give, and those of convolutions along each channel by
        itself, of few parameters that matter much; and those that the last trace called several times, of what comes
        before others and of what comes behind them."""
        modules = dict(self.module.named_modules())
        counts: dict[str, int] = {}  # of experts, by the name of the module that they lie in
        for name, child in modules.items():
            if isinstance(count := getattr(child, "num_experts", None), int) and any(
                value.ndim == 3 and value.shape[0] == count for value in child.parameters(recurse=False)
            ):
                counts[name.rpartition(".")[0]] = count
        found = []
        for name, shape in self.shapes.items():
            owner = name.rpartition(".")[0]
            beside = [counts[outer] for outer in counts if name.startswith(f"{outer}.")]
            routes = bool(beside) and len(shape) == 2 and shape[0] in (1, *beside)
            child = modules.get(owner)
            if routes or isinstance(child, torch.nn.Conv1d) or self._calls[child] > 1:
                found.append(name)
        return found

    @property
    def vocab(self) -> int:
        """Tokens that the embedding knows."""
        return self.config.vocab_size

    def traits(self, lists: tuple[int, ...], layer: int) -> tuple[Any, ...]:
        """What tells a layer from others beside what it computes of a few tokens: numbers and words that its modules
        hold, their buffers, and what the config says layer by layer."""
        found: list[Any] = []
        for number in lists:
            members = self._of_list[number][1]
            for name, child in members[layer].named_modules():
                own = {k: v for k, v in vars(child).items() if isinstance(v, bool | int | float | str | None)}
                own = {k: v for k, v in own.items() if not _NUMBER.search(k)}
                found.append((name, type(child).__name__, tuple(sorted(own.items(), key=str))))
            for name, value in members[layer].named_buffers():
                found.append((name, hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()))
            for key, value in vars(self.config).items():
                if isinstance(value, list | tuple) and len(value) == len(members):
                    found.append((key, str(value[layer])))
        return tuple(found)

    def layer_of(self, equation: Any) -> tuple[int, int] | None:
        """The number of the list and of the layer in it that made an equation of a trace."""
        found = _LAYER.search(str(equation.source_info.name_stack))
        return (int(found[1]), int(found[2])) if found else None

    def list_of(self, number: int) -> tuple[str, int]:
        """The name of a list of layers, and how many it has."""
        name, members = self._of_list[number]
        return name, len(members)


DIFFERENT = ("deepseek_v32", "glm_moe_dsa")
"""Models whose logits were other than transformers': their layers choose the keys that a query sees by scores, of which
many are equal."""


def _class(hf_config: Mapping[str, Any], source: str, why: str) -> tuple[Any, Any]:
    """The class of a causal language model, and its config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kind, named = hf_config.get("model_type"), hf_config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    known = isinstance(kind, str) and kind in NAMES
    content = transformers.PreTrainedConfig._decode_special_floats(dict(hf_config))  # infinities, which JSON has not
    own = bool(known and name) and str(name).lower() == f"{kind}ForCausalLM".replace("_", "").lower()
    if known and named and not own and (not isinstance(named, list) or NAMES[kind] not in named):
        raise JpruneError(
            f"{why}. PyTorch's module cannot stand in: of the model_type {kind!r} transformers has {NAMES[kind]}, and "
            f"the config.json of {source} names {named!r}"
        )
    if kind in DIFFERENT:
        raise JpruneError(
            f"{why}. PyTorch's module cannot stand in: of the model_type {kind!r} what it computes as a JAX function "
            "was found to differ from what it computes in PyTorch (see docs/families.md)"
        )
    with explained(f"{source}: the config.json of a {name or kind}"):
        if known:
            config = transformers.CONFIG_MAPPING[kind].from_dict(content)
            return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
        if name in NAMES.values():  # whose config is a part of another, as of the text of a model of images
            cls = getattr(transformers, str(name))
            return cls, cls.config_class.from_dict(content)
    raise JpruneError(
        f"{why}. PyTorch's module cannot stand in: transformers {transformers.__version__} has no causal language "
        f"model of the model_type {kind!r}"
    )


def _made(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """The module, evaluated (no dropout), with parameters on the meta device; buffers have their values."""
    original, allocate = torch.nn.Module.register_parameter, torch.empty

    def empty(*size: Any, device: Any = None, **options: Any) -> Any:
        return allocate(*size, device="meta" if device is None else device, **options)

    def register_parameter(self: Any, name: str, param: Any) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(self, name, param)

    torch.nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    torch.empty = (
        empty  # of a layer's experts there may be tens of gigabytes, which not even for a moment must be there
    )
    try:
        with initialization.no_init_weights():
            options = {"attn_implementation": "eager", "dtype": dtype}
            if cls._can_set_experts_implementation():
                options["experts_implementation"] = experts.NAME
            module = cls._from_config(config, **options)
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]
        torch.empty = allocate
    module.tie_weights()
    return module.eval()


def _scoped_lists(module: Any) -> list[tuple[str, list[Any]]]:
    """The module lists that no other module list holds, with their members; equations of these carry their numbers."""
    names = [name for name, child in module.named_modules() if isinstance(child, torch.nn.ModuleList) and len(child)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    lists = [(name, list(module.get_submodule(name))) for name in outer]
    for number, (_, members) in enumerate(lists):
        for index, layer in enumerate(members):
            _scoped(layer, f"{_SCOPE}{number}_{index}")
    return lists


def _scoped(layer: Any, name: str) -> None:
    """Notes the name in every equation that a call of the layer makes."""
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(name):
            return original(*args, **kwargs)

    layer.forward = forward
