"""What compilers make of the kernels, without a GPU: every one lowers for CUDA, and none grows unnoticed.

Through `jax_triton` too, where it and JAX's plugin for CUDA are installed, which loads without a GPU or its driver.

Ceilings are in `ceilings.json`: registers and instructions of the main loop for sm_80 and sm_90. A change may lower
them, and then writes them anew with `python scripts/kernel_code.py --record FILE`; one that raises them has to say why.
They belong to one version of the `triton` package; under another only the issue's own limits are checked. Without the
package only the lowering is.
"""

import builtins
import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sparse_kernels import load_script

import pallas_kernels as pk
from pallas_kernels import formats

HERE = Path(__file__).parent
kernel_code = load_script("kernel_code")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:triton"),
]
RECORDED = json.loads((HERE / "ceilings.json").read_text())
CASES = {case.name: case for case in kernel_code.cases()}
LIMITS = {"capped:4": 5.5, "bitmap": 9.0}
"""Instructions a weight of 16 bits on sm_90 that are allowed at most, whatever was recorded."""


def test_every_kernel_has_a_ceiling():
    assert set(RECORDED["kernels"]) == set(CASES)
    assert all(set(entry) == set(kernel_code.ARCHITECTURES) for entry in RECORDED["kernels"].values())
    for name, entry in RECORDED["kernels"].items():
        limit = next((LIMITS[f] for f in LIMITS if name.startswith((f"{f} bfloat16 x", f"{f} float16 x"))), None)
        assert limit is None or entry["sm_90"]["per_weight"] <= limit, name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.backend == "pallas"])
def test_lowers_for_cuda(name):
    case = CASES[name]
    (call,) = kernel_code.triton_calls(case.function, case.arguments)
    assert "tt.func" in call[0]
    assert ("tt.dot" in call[0]) == ("n=" in name)


def test_whole_functions_lower_for_cuda():
    """With dispatch, padding, sums and chunks around the kernels; the reference is not in it."""
    packed = kernel_code.abstract_packed("bitmap", "int8", "bfloat16", (1000, 700))

    def calls(n):
        x = jax.ShapeDtypeStruct((n, 1000), jnp.bfloat16)
        return kernel_code.triton_calls(pk.matmul, (x, packed))

    assert len(calls(3)) == 1
    (decode,) = calls(500)
    assert "tt.dot" not in decode[0]
    csl = formats.TiledCSL(
        shape=(128, 128),
        dtype="bfloat16",
        values="bfloat16",
        tile=(128, 64),
        offsets=jax.ShapeDtypeStruct((3,), jnp.int32),
        items=jax.ShapeDtypeStruct((400,), jnp.int32),
    )
    assert kernel_code.triton_calls(pk.matmul, (jax.ShapeDtypeStruct((3, 128), jnp.bfloat16), csl)) == []
    block = jax.ShapeDtypeStruct((128, 100), jnp.float32)
    inverse = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    keep = jax.ShapeDtypeStruct((128, 100), jnp.bool_)
    assert len(kernel_code.triton_calls(pk.sparsegpt_sweep, (block, inverse, keep))) == 1


@pytest.mark.parametrize(("format", "values"), [("capped:3", "bfloat16"), ("bitmap", "int8")])
def test_jax_triton_lowers_for_cuda(monkeypatch, format, values):
    """All but the launch: the call is traced, the kernel compiled for an H100 and put into the program."""
    pytest.importorskip("jax_triton", reason="needs jax-triton and a JAX for GPUs", exc_type=ImportError)
    library = pytest.importorskip("jaxlib.gpu_triton")
    if not hasattr(library, "TritonKernel"):
        pytest.skip("needs JAX's plugin for CUDA")
    monkeypatch.setattr(library, "get_compute_capability", lambda device: 90, raising=False)
    packed = kernel_code.abstract_packed(format, values, "bfloat16", (1000, 700))
    for n, products in ((3, 0), (500, 1)):  # decoded in the kernel; decoded to dense, which XLA multiplies
        x = jax.ShapeDtypeStruct((n, 1000), jnp.bfloat16)
        with kernel_code.pretend_gpu():
            traced = jax.jit(functools.partial(pk.matmul, backend="triton")).trace(x, packed)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @triton_kernel_call") == 1
        assert text.count("dot_general") == products


def test_what_the_second_backend_needs_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pk.FormatError, match=r"triton and jax-triton, which are not installed: pip install"):
        pk.matmul(jnp.ones((1, 8)), pk.pack(jnp.eye(8), "bitmap"), backend="triton")


@pytest.mark.parametrize(("jax_version", "reason"), [((0, 12, 0), "does not work with jax"), (None, "No GPU; see the")])
def test_versions_that_do_not_go_together(monkeypatch, jax_version, reason):
    pytest.importorskip("triton")
    if jax_version is None:

        def broken(name, *args, real=builtins.__import__, **options):
            if name == "jax_triton":
                raise ImportError("No GPU; see the\ninstallation page")
            return real(name, *args, **options)

        monkeypatch.setattr(builtins, "__import__", broken)
    else:
        fake = types.SimpleNamespace(__version__="0.4.1", __version_info__=(0, 4, 1))
        monkeypatch.setitem(sys.modules, "jax_triton", fake)
        monkeypatch.setattr(jax, "__version_info__", jax_version)
    with pytest.raises(pk.FormatError, match=reason) as caught:
        pk.matmul(jnp.ones((1, 8)), pk.pack(jnp.eye(8), "bitmap"), backend="triton")
    assert "\n" not in str(caught.value)


# All for the newer architecture, and every other one for the older: two to six seconds each.
@pytest.mark.parametrize(
    ("name", "arch"), [(name, "sm_90") for name in CASES] + [(name, "sm_80") for name in list(CASES)[::2]]
)
def test_compiles_below_its_ceiling(name, arch):
    triton = pytest.importorskip("triton", reason="compiles with the triton package")
    code = kernel_code.measure(CASES[name], arch)
    ceiling = RECORDED["kernels"][name][arch]
    if RECORDED["versions"] == {"jax": jax.__version__, "triton": triton.__version__}:
        assert code.registers <= ceiling["registers"]
        assert code.loop <= ceiling["instructions"]
    assert code.spilled == 0
    for format, limit in LIMITS.items():
        if arch == "sm_90" and name.startswith((f"{format} bfloat16 x", f"{format} float16 x")):
            assert code.per_weight <= limit
