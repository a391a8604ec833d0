"""`jprune info` and `jprune groups`: what a model is, and what of it goes together."""

import collections
import dataclasses
import functools
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from jprune.cli import display
from jprune.cli.command import Command, Told

if TYPE_CHECKING:
    from jprune.checkpoints import Checkpoint
    from jprune.trace import Group
    from jprune.trees import Sparsity

_SIZES = ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "context", "tied")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Command):
    """What a model is: family, sizes, zeros and their patterns, and what becomes of every parameter."""

    verify: bool = False
    """Read every file that jprune wrote, and say which of them is not what it was."""

    def run(self) -> Told:
        """Reads every kernel of the blocks once."""
        from jprune import patterns, trees
        from jprune.anatomy.account import account
        from jprune.anatomy.kernels import matmul_kernels, prunable
        from jprune.checkpoints import load

        if self.verify:
            _verify(self.model)
        checkpoint = load(self.model)
        found = matmul_kernels(checkpoint)
        rows = []
        for path in prunable(checkpoint):
            matrix = _matrix(checkpoint.read(path), found[path][1].in_axes)
            rows.append(
                {
                    "path": path,
                    "shape": checkpoint.shapes[path].shape,
                    "parameters": matrix.size,
                    "zeros": trees.count_zeros(matrix),
                    "patterns": patterns.satisfied(matrix),
                }
            )
        sparsity = trees.Sparsity(
            zeros=sum(row["zeros"] for row in rows),
            prunable_parameters=sum(row["parameters"] for row in rows),
            total_parameters=checkpoint.parameters,
        )
        result = {
            "family": checkpoint.hf_config.get("model_type", checkpoint.architecture),
            "architecture": checkpoint.architecture,
            "road": checkpoint.road,
            "parameters": sparsity.total_parameters,
            "prunable_parameters": sparsity.prunable_parameters,
            "zeros": sparsity.zeros,
            "sparsity": sparsity.achieved,
            **_sizes(checkpoint),
            "dtypes": sorted({s.dtype.name for s in checkpoint.shapes.values()}),
            "kernels": rows,
            "account": [dataclasses.asdict(entry) for entry in account(checkpoint)],
        }
        if checkpoint.is_packed:
            result["packed"] = {"bytes": checkpoint.stored_bytes, "unpacked_bytes": checkpoint.nbytes}
        elif checkpoint.stored_bytes != checkpoint.nbytes:
            result["quantised"] = {"bytes": checkpoint.stored_bytes, "dequantised_bytes": checkpoint.nbytes}
        return Told(result, show=functools.partial(_show, result, sparsity))


def _sizes(checkpoint: "Checkpoint") -> dict[str, Any]:
    """The model's sizes, and those of each layer where they are known."""
    from jprune.models.config import describe

    if checkpoint.road == "native":
        config = dataclasses.asdict(checkpoint.config)
        return {"config": {name: config[name] for name in _SIZES}, "layers": describe(checkpoint.config)["layers"]}
    names = [name for name in _SIZES if hasattr(checkpoint.model, name)]
    return {"config": {name: getattr(checkpoint.model, name) for name in names}, "layers": []}


def _verify(model: str) -> None:
    """Raises JpruneError if a file of a result is damaged, or if nobody noted what it should be."""
    from jprune import paths
    from jprune.checkpoints import record
    from jprune.errors import JpruneError

    if wrong := record.damaged(paths.real(model)):
        raise JpruneError(f"{model}: {'; '.join(wrong)} since jprune wrote it. Make it again, or restore a copy")


def _show(result: dict[str, Any], sparsity: "Sparsity") -> None:
    from jprune.models.config import LAYER_SIZES

    print(f"{result['architecture']} ({result['family']}), {', '.join(result['dtypes'])}")
    if result["road"] != "native":
        print(f"without a table in jprune: computed by {result['road']}")
    differ = LAYER_SIZES if any(layer != result["layers"][0] for layer in result["layers"]) else ()
    print(", ".join(f"{name} {value}" for name, value in result["config"].items() if name not in differ))
    if differ:
        for first, last, layer in display.runs(result["layers"]):
            here = f"layers {first} to {last}" if last > first else f"layer {first}"
            print(f"{here}: {', '.join(f'{name} {value}' for name, value in layer.items())}")
    print(f"{sparsity.total_parameters:,} parameters, {sparsity.prunable_parameters:,} prunable")
    print(f"zeros: {sparsity}")
    if packed := result.get("packed"):
        print(f"packed: {packed['bytes'] / 1e6:.1f} MB, unpacked {packed['unpacked_bytes'] / 1e6:.1f} MB")
    if quantised := result.get("quantised"):
        print(f"quantised: {quantised['bytes'] / 1e6:.1f} MB, as read {quantised['dequantised_bytes'] / 1e6:.1f} MB")
    print()
    kinds = collections.defaultdict(list)
    for row in result["kernels"]:
        kinds[row["path"].split("/", 2)[2], row["shape"]].append(row)
    display.table(
        ["kernel", "shape", "blocks", "zeros %", "in every block"],
        [
            (
                name,
                shape,
                len(rows),
                f"{100 * sum(r['zeros'] for r in rows) / sum(r['parameters'] for r in rows):.2f}",
                ", ".join(sorted(set.intersection(*(set(r["patterns"]) for r in rows)))) or "-",
            )
            for (name, shape), rows in kinds.items()
        ],
    )
    print("\nall parameters:")
    display.table(["parameters", "share %", "is", "why"], _accounted(result["account"]))


def _accounted(entries: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """What is prunable in one line, all else by kind."""
    alike: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for entry in entries:
        prunable = entry["state"] == "prunable" and entry["path"].startswith("blocks/")
        name = "kernels of the blocks" if prunable else _anywhere(entry["path"])
        alike[name, entry["state"], entry["reason"]] += entry["share"]
    return [(name, f"{100 * share:.2f}", state, reason or "-") for (name, state, reason), share in alike.items()]


def _matrix(kernel: np.ndarray, in_axes: tuple[int, ...]) -> np.ndarray:
    """`trees.to_matrix` without a device."""
    out_axes = [axis for axis in range(kernel.ndim) if axis not in in_axes]
    return kernel.transpose(*in_axes, *out_axes).reshape(math.prod(kernel.shape[axis] for axis in in_axes), -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups(Command):
    """The coupled axes of a model: what can only be removed together, and what cannot be removed and why."""

    def run(self) -> Told:
        """Traces the model; reads no weight."""
        from jprune.anatomy.units import model_groups
        from jprune.checkpoints import load

        groups = model_groups(load(self.model, weights=False))
        rows = [
            {
                "name": group.name,
                "size": group.size,
                "members": [dataclasses.asdict(member) for member in group.members],
                "frozen": group.frozen,
                "renormalised": group.renormalised,
                "proven": group.proven,
                "evidence": group.evidence,
            }
            for group in groups
        ]
        return Told({"groups": rows}, show=lambda: _show_groups(list(groups)))


def _show_groups(groups: "list[Group]") -> None:
    alike: "dict[tuple, list[Group]]" = {}
    for group in groups:
        key = (_anywhere(group.name), group.size, len(group.members), _anywhere(group.frozen or ""), group.proven)
        alike.setdefault(key, []).append(group)
    rows = []
    for same in alike.values():
        group = same[0]
        name = _anywhere(group.name) if len(same) > 1 else group.name
        prunable = f"no: {group.frozen}" if group.frozen else "renormalised" if group.renormalised else "yes"
        if not group.frozen and not group.proven:
            prunable += f", but only believed: {group.evidence}"
        rows.append((name, len(same), group.size, _members(group), prunable))
    display.table(["group", "times", "size", "members", "prunable"], rows)


def _anywhere(text: str) -> str:
    """A path or a reason with the number of the block left open."""
    return re.sub(r"blocks/\d+", "blocks/*", text)


def _members(group: "Group") -> str:
    """Where a group lies, the blocks' numbers left open where there are several."""
    places = dict.fromkeys(f"{m.path}[{m.axis}]" for m in group.members)
    if len({re.findall(r"blocks/(\d+)", place)[0] for place in places if "blocks/" in place}) > 1:
        places = dict.fromkeys(_anywhere(place) for place in places)
    else:
        places = dict.fromkeys(re.sub(r"blocks/\d+/", "", place) for place in places)
    return ", ".join(places)
