"""Compiles the kernels for NVIDIA GPUs on a machine without one, and counts registers and instructions.

    python scripts/kernel_code.py [--arch sm_80 sm_90] [--only capped:4] [--dump FOLDER] [--record FILE]

JAX lowers a Pallas kernel to Triton's language for a GPU that is not there; the `triton` package, which carries
NVIDIA's assembler and disassembler, does the rest, and all of it for the kernels of the backend "triton". Instructions
a weight are those of the main loop over the weights that one step of it multiplies. The Triton inside XLA is another
revision of the same compiler, so what runs may differ a little. `--record` writes the numbers as the ceilings that
tests/arrays/pallas_kernels/test_compiled.py holds a change to; what was not measured keeps its own.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import backends, formats, sweep, tiles

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
KERNEL = (8192, 28672)


def abstract_packed(format: str, values: str, dtype: str, kernel: tuple[int, int] = KERNEL) -> formats.Packed:
    """Shapes of a packed kernel of half its weights; nothing is allocated."""
    parsed = formats.parse(format)
    tile = formats.TILES[parsed.name]
    grid = (-(-kernel[1] // tile[0]), -(-kernel[0] // tile[1]))
    itemsize = formats.dtype_of(values).itemsize

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    options: dict = {"shape": kernel, "dtype": dtype, "values": values, "tile": tile}
    if values in formats.QUANTISED:
        options["scale"] = array(jnp.float32, kernel[1])
    bits = array(jnp.int32, *grid, tile[0], tile[1] // 32)
    if parsed.name == "capped":
        sizes = formats.plane_bytes(parsed.capacity, itemsize)
        planes = tuple(array(f"int{8 * size}", *grid, tile[0], tile[1] // 8) for size in sizes)
        return formats.Capped(bits=bits, planes=planes, capacity=parsed.capacity, **options)
    words = array(jnp.int32, kernel[0] * kernel[1] // 2 * itemsize // 4)
    rows = array(jnp.int16, *grid, tile[0])
    return formats.Bitmap(bits=bits, tiles=array(jnp.int32, *grid), rows=rows, words=words, **options)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    name: str
    function: Callable
    """Calls the kernel, or for the backend "triton" says how it is called: a `Launch`."""
    arguments: tuple
    weights: int
    """That a step of the main loop multiplies; 0 where that is not what the kernel does."""
    backend: str = "pallas"


def kernels(backend: str):
    """A backend's module, whether or not it could run here."""
    return backends.load(backend, interpret=True)


def multiply_case(format: str, values: str, x_dtype: str, n: int, backend: str = "pallas") -> Case:
    """The matmul kernel of a format, with the tile that the table has for it."""
    dtype = values if values in formats.FLOATS else x_dtype
    packed = abstract_packed(format, values, dtype)
    tile = tiles.choose_tile(packed, n, backend)
    x = jax.ShapeDtypeStruct((n, KERNEL[0]), x_dtype)

    def function(x, packed):
        if backend == "triton":
            return kernels(backend).launch_multiply(x, packed, tile)
        return kernels(backend).multiply(x, packed, tile)

    name = f"{format} {values} x {x_dtype} n={n}" + " triton" * (backend == "triton")
    return Case(name, function, (x, packed), tile.rows * packed.tile[1], backend)


def dense_case(format: str, values: str, dtype: str, backend: str = "pallas") -> Case:
    """The decode-to-dense kernel of a format."""
    packed = abstract_packed(format, values, dtype)
    tile = tiles.choose_tile(packed, 1, backend)

    def function(packed):
        if backend == "triton":
            return kernels(backend).launch_dense(packed, 0, packed.grid[0], tile, dtype)
        return kernels(backend).dense_rows(packed, 0, packed.grid[0], tile, dtype)

    return Case(f"{format} {values} dense" + " triton" * (backend == "triton"), function, (packed,), 0, backend)


def sweep_case(nm: tuple[int, int] | None) -> Case:
    """The SparseGPT sweep over a block of 128 inputs."""
    weights = jax.ShapeDtypeStruct((128, 4096), jnp.float32)
    inverse = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    keep = jax.ShapeDtypeStruct((128, 4096), jnp.bool_)

    def function(weights, inverse, keep):
        return sweep.sweep_kernel(weights, inverse, keep, nm=nm)

    return Case("sweep" if nm is None else f"sweep {nm[0]}:{nm[1]}", function, (weights, inverse, keep), 0)


def cases() -> Iterator[Case]:
    """Every kernel that is held to a ceiling."""
    for backend in backends.NAMES:
        for n in (1, 16, 32, 64):
            yield multiply_case("capped:4", "bfloat16", "bfloat16", n, backend)
            yield multiply_case("bitmap", "bfloat16", "bfloat16", n, backend)
        for capacity in (1, 2, 3):
            yield multiply_case(f"capped:{capacity}", "bfloat16", "bfloat16", 16, backend)
        for format in ("capped:4", "bitmap"):
            yield multiply_case(format, "float16", "float16", 16, backend)
            yield multiply_case(format, "float32", "float32", 16, backend)
            for values in formats.QUANTISED:
                yield multiply_case(format, values, "bfloat16", 16, backend)
                yield multiply_case(format, values, "float16", 16, backend)
            yield dense_case(format, "bfloat16", "bfloat16", backend)
        yield multiply_case("capped:3", "int8", "bfloat16", 16, backend)
    yield sweep_case(None)
    yield sweep_case((2, 4))


@contextlib.contextmanager
def pretend_gpu():
    """Newer JAX asks which GPU a kernel is lowered for; older takes Hopper for granted."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

        device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
        mesh = AbstractMesh((), (), abstract_device=device)
    except (ImportError, TypeError):
        yield
        return
    with use_abstract_mesh(mesh):
        yield


def triton_calls(function: Callable, arguments: tuple) -> list[tuple[str, int, int]]:
    """(Triton IR, warps, stages) of every kernel that a function calls, lowered for CUDA wherever this runs."""
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect

    with pretend_gpu():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    calls = []

    def walk(op):
        for region in op.regions:
            for block in region.blocks:
                for inner in block.operations:
                    attributes = inner.operation.attributes
                    if inner.operation.name == "stablehlo.custom_call" and "triton" in str(
                        attributes["call_target_name"]
                    ):
                        key = "mhlo.backend_config" if "mhlo.backend_config" in attributes else "backend_config"
                        config = ir.DictAttr(attributes[key])
                        numbers = (ir.IntegerAttr(config[k]).value for k in ("num_warps", "num_stages"))
                        calls.append((ir.StringAttr(config["ir"]).value_bytes, *numbers))
                    walk(inner.operation)

    walk(lowered.compiler_ir("stablehlo").operation)
    context = mlir.JaxIrContext()
    context.append_dialect_registry(mlir.upstream_dialects)
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        return [(str(ir.Module.parse(code)), warps, stages) for code, warps, stages in calls]


@dataclasses.dataclass(frozen=True)
class Code:
    """What the assembler made of a kernel."""

    registers: int
    spilled: int
    """Bytes of local memory a thread; anything above 0 is slow."""
    shared: int
    """Bytes of shared memory a program."""
    loop: int
    """Instructions a thread in the longest loop."""
    per_weight: float
    """Those a weight of the kernel, counting each of the 32 threads of an instruction as one."""
    operations: dict[str, int]
    """How often each instruction stands in the loop."""


def language_source(launch):
    """What the triton package compiles, of a kernel in its language: pointers to whole and aligned arrays."""
    from triton.compiler import ASTSource

    letters = {"int": "i", "float": "fp", "bfloat": "bf"}
    types = [re.sub(r"[a-z]+", lambda m: letters[m[0]], jnp.dtype(a.dtype).name) for a in (*launch.arrays, launch.out)]
    names = launch.kernel.arg_names
    signature = {name: f"*{kind}" for name, kind in zip(names, types)} | dict.fromkeys(names[len(types) :], "constexpr")
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    return ASTSource(launch.kernel, signature, constants, aligned)


def compile_call(source, warps: int, stages: int, arch: str, weights: int, dump: Path | None = None) -> Code:
    """Compiles Triton IR (as text) or a kernel in Triton's language and reads what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as temporary:
        folder = dump or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"num_warps": warps, "num_stages": stages}
        target = GPUTarget("cuda", ARCHITECTURES[arch], 32)
        if isinstance(source, str):
            path = folder / "kernel.ttir"
            # A cache hint whose spelling differs between Triton revisions; it changes no instruction count.
            path.write_text(re.sub(r" evictionPolicy = \d+ : i32,?", "", source))
            _simplify(path, target, options)
            source = str(path)
        if os.environ.get("TRITON_CACHE_DIR") == "":  # as jax-triton leaves it, for its own calls
            del os.environ["TRITON_CACHE_DIR"]
        compiled = triton.compile(source, target=target, options=options)
        cubin = folder / f"kernel.{arch}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        if dump:
            (folder / f"kernel.{arch}.ptx").write_text(compiled.asm["ptx"])

        def tool(name, *arguments):
            command = [str(tools / name), *arguments, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "-res-usage")
        registers, stack = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK"))  # type: ignore[index]
        loop = _longest_loop(tool("nvdisasm", "-c"))
        if dump:
            (folder / f"kernel.{arch}.loop").write_text("\n".join(loop))
    names = collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in loop)
    per_weight = len(loop) * 32 * warps / weights if weights else 0.0
    return Code(registers, stack, compiled.metadata.shared, len(loop), per_weight, dict(names.most_common()))


def _simplify(source: Path, target, options: dict) -> None:
    """Triton's first passes, in place: it skips them for IR that comes from a file, and XLA does not."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ir.parse_mlir_module(str(source), context)
    module.context = context
    module = backend.make_ttir(module, {}, backend.parse_options(options), target.arch)
    source.write_text(str(module))


def _longest_loop(disassembly: str) -> list[str]:
    """Instructions between the target of a backward jump and the jump, where most are."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
    loops = [[]]
    for i, line in enumerate(lines):
        jump = re.search(r"BRA\S*\s.*?`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], len(lines)) < i:
            loops.append(lines[labels[jump[1]] : i + 1])
    return max(loops, key=len)


def measure(case: Case, arch: str, dump: Path | None = None) -> Code:
    """Lowers and compiles the one kernel of a case."""
    if case.backend == "triton":
        launch = case.function(*case.arguments)
        return compile_call(language_source(launch), launch.warps, launch.stages, arch, case.weights, dump)
    (call,) = triton_calls(case.function, case.arguments)
    return compile_call(*call, arch, case.weights, dump)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    parser.add_argument("--backend", nargs="+", choices=backends.NAMES, default=list(backends.NAMES))
    parser.add_argument("--dump", type=Path, help="folder for the code: Triton IR, PTX, the loop's instructions")
    parser.add_argument("--record", type=Path, help="JSON of ceilings to write")
    args = parser.parse_args()
    ceilings: dict = {}
    print(f"{'kernel':45} {'arch':6} {'registers':>9} {'spilled':>8} {'shared':>7} {'loop':>6} {'a weight':>9}")
    for case in cases():
        if not case.name.startswith(args.only) or case.backend not in args.backend:
            continue
        for arch in args.arch:
            code = measure(case, arch, args.dump and args.dump / re.sub(r"[ :=]", "_", case.name))
            print(
                f"{case.name:45} {arch:6} {code.registers:9} {code.spilled:8} {code.shared:7} {code.loop:6} "
                f"{code.per_weight:9.2f}",
                flush=True,
            )
            numbers = {
                "registers": code.registers,
                "instructions": code.loop,
                "per_weight": round(code.per_weight, 2),
            }
            ceilings.setdefault(case.name, {})[arch] = numbers
    if args.record:
        import triton

        versions = {"jax": jax.__version__, "triton": triton.__version__}
        before = json.loads(args.record.read_text()) if args.record.exists() else {}
        if before.get("versions") == versions:  # what was not measured stays
            ceilings = before["kernels"] | ceilings
        args.record.write_text(json.dumps({"versions": versions, "kernels": ceilings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
