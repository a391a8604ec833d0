"""Tests run with shapes checked, strict dtype promotion and warnings as errors, on one of four virtual CPU devices.

The tests compile much and compute little. So the compiler does without its optimisations, unless XLA_FLAGS says
something else; and the processes of a run share what they compile, in a folder of their own, unless
JAX_COMPILATION_CACHE_DIR names one that stays.
"""

import contextlib
import functools
import gc
import os
import pathlib
import signal
import tempfile

import jax
import jaxtyping
import numpy as np
import pytest
from jax._src.interpreters import mlir

# Read when the first device is asked for. A program of a few operations is not worth being cut up for several
# compilers; the emitters of fusions make faster programs, and compile three to five times as long. XLA ends the process
# at a flag that it does not know, and JAX 0.12 does not know the last.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
QUICK += " --xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
os.environ.setdefault("XLA_FLAGS", QUICK)

# Where an operation stands in the source, told to the compiler, and tracebacks made short: nobody reads either here.
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_traceback_filtering", "off")

# For every program JAX makes a context of MLIR's anew, and the more programs are kept, the longer that takes: a tenth
# of the time of all tests. One does for all that a process lowers.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# What is traced are many small objects that stay: looking through all of them for garbage is a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

# Shapes are checked at every call of a function whose module writes them down. The other modules' types are left to
# mypy: the tracer's small functions alone are called so often that checking them takes longer than the tests.
ROOT = pathlib.Path(__file__).parents[1]
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("jprune", "pallas_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "from jprune.annotations import" in path.read_text()
]
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")

# A shell ignores Ctrl-C for what it starts in the background, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """The environment is for workers and for processes that tests start; JAX here has read it already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="jprune-compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        jax.config.update("jax_compilation_cache_dir", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def getkey():
    """A function that returns a fresh PRNG key each time it is called."""
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    return lambda: next(keys)


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """Runs are on one device, unless their test asks for `four_devices`: programs for several take longer to compile.

    Gives back what it replaces, by module.
    """
    from jprune import devices
    from jprune.train import sharding

    def alone(*, data=None, fsdp=1):
        assert (data or 1) * fsdp == 1, "a test that trains on several devices asks for `four_devices`"

    real = {devices: devices.make_mesh, sharding: sharding.make_mesh}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "make_mesh", functools.partial(devices.make_mesh, devices=jax.devices()[:1]))
        patch.setattr(sharding, "make_mesh", alone)
        yield real


@pytest.fixture
def four_devices(one_device):
    """A context manager: within it runs go over all devices, as they do outside of these tests."""

    @contextlib.contextmanager
    def over_all():
        with pytest.MonkeyPatch.context() as patch:
            for module, make_mesh in one_device.items():
                patch.setattr(module, "make_mesh", make_mesh)
            yield

    return over_all


@pytest.fixture(scope="session")
def tiny_config():
    """config.json of a LLaMA whose sizes are no multiples of each other where they need not be."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


@pytest.fixture
def tiny_model(tmp_path, tiny_config):
    """A function that writes a random model (options: config keys, dtype) and returns its folder; no tokenizer."""
    import json

    from safetensors.numpy import save_file

    from jprune import trees
    from jprune.models import decoder, families

    def make(name="model", *, dtype=np.float32, change=lambda tensors: None, **options):
        hf_config = {**tiny_config, **options}
        config = families.config(hf_config)
        params = trees.flatten(decoder.init_params(config, jax.random.key(1)))
        # Larger than usual, so that pruning changes outputs by more than rounding.
        params = {p: np.asarray(x) * (5 if p.endswith("kernel") else 1) for p, x in params.items()}
        tensors = {}
        for p, e in families.table(config).items():
            for i, key in enumerate(e.keys):  # of a stack of experts each has one
                tensors[key] = np.zeros(e.shape, dtype)
                e.write_to(i, params[p].astype(dtype), tensors[key])
        change(tensors)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf_config))
        return folder

    return make


@pytest.fixture
def token_file(tmp_path):
    """A function that writes random token ids [n, length] as .npy and returns the path."""

    def make(n=6, length=24, *, seed=0, vocab=96):
        path = tmp_path / f"tokens-{n}-{length}-{seed}.npy"
        np.save(path, np.random.default_rng(seed).integers(0, vocab, (n, length), dtype=np.int32))
        return str(path)

    return make


@pytest.fixture
def learnable(token_file):
    """Token ids that can be learnt: of each window's kind there are few."""
    return np.tile(np.load(token_file(4, 12)), (3, 1))


@pytest.fixture
def token_rows(token_file):
    """Token windows: to calibrate on, to train on, to measure on."""
    return {
        "calibration": token_file(6, 24),
        "data": token_file(12, 16, seed=1),
        "evaluate": np.load(token_file(4, 16, seed=2)),
    }
