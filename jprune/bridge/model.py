"""A module's parts as functions of parameters by path: the model in blocks that the pipeline takes.

A parameter belongs to the part that reads it: ``embed/...``, ``blocks/3/...``, ``head/...``, and ``unused/...`` if a
call on tokens reads it nowhere (images, tokens further ahead). Below that its path is PyTorch's name, and its layout
PyTorch's own.

Every shape of windows is traced by itself, since masks and loops are made for it; a trace takes about 50 ms a layer.
"""

import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune import trees
from jprune.bridge.cut import Cut, pack, unpack
from jprune.bridge.module import Module
from jprune.bridge.names import Pieces, alone, stored_in
from jprune.errors import JpruneError
from jprune.models.blocks import InBlocks

PyTree = Any
APART = (7, 11)
"""Windows and tokens of the trace in which the axes of both are told from others."""
ROWS = 8
"""Tokens that the head is traced with; it takes others in groups of so many."""
ROAD = "PyTorch's module"


class Model:
    """A model of transformers in blocks.

    Args:
        hf_config, source, why, given: as `jprune.bridge.open_model` takes them.

    Attributes:
        names: PyTorch's name of every parameter by its path.
        stored: where they are stored, by PyTorch's name; None without files.
        in_blocks: the model's functions.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        source: str,
        why: str,
        given: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.module = Module(hf_config, source, why)
        self.stored = None if given is None else stored_in(self.module, given, self.module.what)
        self.module.keep([] if self.stored is None else self.stored.entries)
        self._cuts: dict[Any, Cut] = {}
        self._reference = self._layered(self.module.traced(APART, jnp.float32))
        self.layers = len(self._reference.segments) - 2
        self.names = self._named()
        self._alike = self._grouped()
        self.in_blocks = self._in_blocks()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by path."""
        return {path: self.module.shapes[name] for path, name in self.names.items()}

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know: the road, and what no call on tokens reads."""
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "torchax")
        )
        told = [f"{self.module.architecture} has no table in jprune and is computed by {ROAD} ({versions})"]
        sizes = {path: math.prod(shape) for path, shape in self.shapes.items()}
        unread = [path for path in sizes if path.startswith("unused/")]
        if unread:
            share = sum(sizes[path] for path in unread) / sum(sizes.values())
            told.append(
                f"{share:.1%} of its parameters are read by no call on tokens, first {self.names[unread[0]]}; they "
                "stay as they are"
            )
        return tuple(told)

    def table(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, Pieces]:
        """Where every parameter is stored, and what is in the files beside, by path."""
        assert self.stored is not None
        found = {path: self.stored.entries[name] for path, name in self.names.items()}
        beside = {f"unused/{key.replace('.', '/')}": alone(key, given[key]) for key in self.stored.unread}
        return found | beside

    def cut(self, shape: tuple[int, int], dtype: Any, rows: int | None = None) -> Cut:
        """The model in parts for windows of tokens of this shape, see `Module.traced`."""
        key = shape, jnp.dtype(dtype), rows
        if key not in self._cuts:
            cut = self._cut(self.module.traced(shape, dtype, rows), self._lists, self._reference)
            for layer, first in enumerate(self._alike):
                if cut.text(layer + 1) != cut.text(first + 1):
                    raise JpruneError(
                        f"{self.module.what}: layers {first} and {layer} are alike for {APART[1]} tokens in float32, "
                        f"but not for {shape[1]} in {key[1]}; this cannot be computed yet"
                    )
            if cut.width != self._reference.width:
                raise JpruneError(
                    f"{self.module.what}: what passes between layers has {self._reference.width} numbers a token for "
                    f"{APART[1]} tokens, and {cut.width} for {shape[1]}"
                )
            wider = {c.var.aval.dtype for c in sum(cut.carried, ()) if c.var.aval.dtype.itemsize > key[1].itemsize}
            if wider:
                raise JpruneError(
                    f"{self.module.what}: what passes between layers is in part {', '.join(map(str, wider))}, of which "
                    f"{key[1]} would lose bits; compute in float32"
                )
            self._cuts[key] = cut
        return self._cuts[key]

    def _layered(self, closed: Any) -> Cut:
        """The trace cut at the decoder layers: the lists of layers in which most is computed."""
        counts: dict[int, int] = {}
        for equation in getattr(closed, "jaxpr", closed).eqns:
            if (found := self.module.layer_of(equation)) is not None:
                counts[found[0]] = counts.get(found[0], 0) + 1
        if not counts:
            raise JpruneError(f"{self.module.what}: no list of layers is run when it is called with tokens")
        most = max(counts, key=lambda number: counts[number])
        length = self.module.list_of(most)[1]
        together = tuple(number for number in counts if self.module.list_of(number)[1] == length)
        failure = None
        for lists in dict.fromkeys([together, (most,)]):
            try:
                cut = self._cut(closed, lists, None)
            except JpruneError as error:
                failure = error
            else:
                self._lists = lists
                return cut
        assert failure is not None
        raise failure

    def _cut(self, closed: Any, lists: tuple[int, ...], axes: Cut | None) -> Cut:
        def layer_of(equation: Any) -> int | None:
            found = self.module.layer_of(equation)
            return found[1] if found is not None and found[0] in lists else None

        # In the order of JAX's leaves of a dictionary.
        names = sorted(self.module.shapes)
        return Cut(closed, names, layer_of, self.module.list_of(lists[0])[1], axes, self.module.what)

    def _named(self) -> dict[str, str]:
        """PyTorch's names by path, in the order of the parts."""
        readers: dict[str, list[int]] = {}
        for number, segment in enumerate(self._reference.segments):
            for name in segment.params:
                readers.setdefault(name, []).append(number)
        last = self.layers + 1
        own = {self.module.name_of("head"): "head/kernel", self.module.name_of("embed"): "embed/embedding"}
        own |= {name: "head/bias" for name in self.module.by_token() if name.endswith("bias")}
        by_part: dict[int, dict[str, str]] = {}
        for name in self.module.shapes:
            where = readers.get(name, [last + 1])
            if len(where) > 1 and where != [0, last]:
                raise JpruneError(
                    f"{self.module.what}: the parameter {name} is shared by several layers "
                    f"({', '.join(str(k - 1) for k in where)}), which are pruned one after the other"
                )
            part = where[0]
            start = "embed" if part == 0 else "head" if part == last else "unused"
            if 0 < part < last:
                path = f"blocks/{part - 1}/{self._relative(name, part - 1)}"
            else:
                path = own.get(name, "")
                if not path.startswith(start):
                    path = f"{start}/{name.replace('.', '/')}"
            by_part.setdefault(part, {})[path] = name
        return {path: name for part in sorted(by_part) for path, name in by_part[part].items()}

    def _relative(self, name: str, layer: int) -> str:
        for number in self._lists:
            prefix = self.module.list_of(number)[0]
            if name.startswith(f"{prefix}.{layer}."):
                below = name.removeprefix(f"{prefix}.{layer}.")
                name = below if len(self._lists) == 1 else f"{prefix.rpartition('.')[2]}.{below}"
                break
        return name.replace(".", "/")

    def _grouped(self) -> list[int]:
        """Of every layer the first that it does not differ from."""
        first: dict[Any, int] = {}
        relative = {name: path.split("/", 2)[2] for path, name in self.names.items() if path.startswith("blocks/")}
        found = []
        for layer in range(self.layers):
            params = tuple(relative[name] for name in self._reference.segments[layer + 1].params)
            key = (self._reference.text(layer + 1), params, self.module.traits(self._lists, layer))
            found.append(first.setdefault(key, layer))
        return found

    def _in_blocks(self) -> InBlocks:
        head = self._reference.segments[-1]
        paths = {name: path for path, name in self.names.items()}
        blocks = {layer: self._block(layer) for layer in set(self._alike)}
        parts = dict.fromkeys(paths[name].split("/")[0] for name in head.params)
        config = self.module.config
        return InBlocks(
            road=ROAD,
            architecture=self.module.architecture,
            vocab=self.module.vocab,
            d_model=self._reference.width,
            context=getattr(config, "max_position_embeddings", None) or CONTEXT,
            tied="head/kernel" not in self.names,
            embed=self._embed,
            blocks=tuple(blocks[first] for first in self._alike),
            head=self._head,
            head_parts=tuple(parts),
            head_of=self._head_of,
            dtype_of=lambda path, dtype: self.module.of_dtype(dtype).dtypes[self.names[path]],
            left_alone=re.compile(
                "|".join(["^head/", *(f"^{re.escape(paths[n])}$" for n in self.module.left_alone())])
            ),
        )

    def _embed(self, params: PyTree, tokens: jax.Array) -> jax.Array:
        values = self._values(params, "")
        dtype = min((value.dtype for value in values.values()), key=lambda own: own.itemsize)  # some stay float32
        windows, length = tokens.shape
        cut = self.cut((windows, length), dtype)
        own = cut.segments[0]
        found = own.run(self._cast(values, own.params, dtype), [tokens])
        return pack(found, cut.carried[0], (windows, length), cut.width, dtype)

    def _block(self, layer: int) -> Callable[..., jax.Array]:
        def block(params: PyTree, x: jax.Array) -> jax.Array:
            windows, length, _ = x.shape
            cut = self.cut((windows, length), x.dtype)
            own = cut.segments[layer + 1]
            values = self._values(params, f"blocks/{layer}/")
            found = own.run(self._cast(values, own.params, x.dtype), unpack(x, cut.carried[layer]))
            return pack(found, cut.carried[layer + 1], (windows, length), cut.width, x.dtype)

        return block

    def _head(self, params: PyTree, x: jax.Array) -> jax.Array:
        values = self._values(params, "")
        by_token = self.module.by_token()
        rows = next((values[name].shape[axis] for name, axis in by_token.items()), None)
        cut = self.cut((1, ROWS), x.dtype, rows)
        own, carried = cut.segments[-1], cut.carried[-1]
        given = self._cast(values, own.params, x.dtype)

        def of_group(group: jax.Array) -> jax.Array:
            return own.run(given, unpack(group[None], carried))[0][0]

        count = x.shape[0] * x.shape[1]
        flat = jnp.pad(x.reshape(count, x.shape[2]), ((0, -count % ROWS), (0, 0)))
        logits = jax.vmap(of_group)(flat.reshape(-1, ROWS, x.shape[2]))
        return logits.reshape(-1, logits.shape[-1])[:count].reshape(*x.shape[:2], -1)

    def _head_of(self, params: PyTree, first: Any, width: int) -> PyTree:
        leaves = trees.flatten(params)
        by_token = self.module.by_token()
        for path in leaves:
            if (name := self.names[path]) in by_token:
                leaves[path] = jax.lax.dynamic_slice_in_dim(leaves[path], first, width, by_token[name])
        return trees.unflatten(leaves)

    def _values(self, params: PyTree, prefix: str) -> dict[str, Any]:
        """Parameters by PyTorch's name."""
        return {self.names[prefix + path]: value for path, value in trees.flatten(params).items()}

    def _cast(self, values: Mapping[str, Any], names: Iterable[str], dtype: Any) -> list[jax.Array]:
        """In the dtypes that they have in a model of this one."""
        dtypes = self.module.of_dtype(dtype).dtypes
        return [jnp.asarray(values[name]).astype(dtypes[name]) for name in names]


CONTEXT = 1 << 20
"""Of a model whose config names no longest sequence."""
