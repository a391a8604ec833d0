"""`choose`: the formats that hold a mask, and the bytes that packing then takes; how kernels are cut for a GPU."""

import itertools
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from sparse_kernels import load_script, random_kernel, random_mask

import pallas_kernels as pk
from pallas_kernels import tiles


@pytest.mark.parametrize("values", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("fits", ["capped:2", "bitmap"])
def test_bytes_are_those_of_packing(rng, fits, values):
    mask = random_mask(rng, 200, 150, fits)
    kernel = random_kernel(rng, mask, "float32" if values != "bfloat16" else "bfloat16")
    choices = pk.choose(mask, values=values)
    assert [c.nbytes for c in choices if c.holds] == sorted(c.nbytes for c in choices if c.holds)
    for choice in choices:
        if choice.format == "dense":
            assert choice.nbytes == mask.size * (4 if values == "float32" else 2)
        elif choice.holds:
            packed = pk.pack(kernel, choice.format, values=values)
            assert packed.nbytes == choice.nbytes
        else:
            assert choice.nbytes == 0
            with pytest.raises(pk.FormatError):
                pk.pack(kernel, choice.format, values=values)
    names = {c.format for c in choices}
    assert ("tiled_csl" in names) == (values == "bfloat16")
    assert {c.format for c in choices if c.holds} >= {fits, "dense"}


def test_expected_time_comes_from_the_table(rng, monkeypatch):
    mask = random_mask(rng, 64, 64, "capped:4")
    assert all(c.speedup is None for c in pk.choose(mask) if c.format != "dense")  # nothing was measured yet
    entry = {"microseconds": 2.0, "dense_microseconds": 3.0}
    classes = {"capped:4 bfloat16 n=16 small": entry, "capped:1 bfloat16 n=16 small": entry}
    monkeypatch.setattr(tiles, "table", lambda: {"A GPU": {"classes": classes}})
    found = {c.format: c.speedup for c in pk.choose(mask, batch=7, device="A GPU")}
    assert found["capped:4"] == 1.5
    assert found["capped:1"] is None  # does not hold the mask
    assert found["bitmap"] is None
    assert {c.speedup for c in pk.choose(mask, batch=64, device="A GPU")} == {1.0, None}


def test_tiles_from_the_table(rng, monkeypatch):
    packed = pk.pack(np.zeros((512, 256), np.float32).astype("float16"), "bitmap")
    default = tiles.choose_tile(packed, 5)
    assert (default.rows, default.warps, default.stages) == (128, 4, 1)
    monkeypatch.setattr(tiles, "device", lambda: ("A GPU", 10))
    entry = {"rows": 64, "warps": 8, "stages": 3, "resident": 2}
    table = {"A GPU": {"decode_above": 7, "classes": {"bitmap float16 n=16 small": entry}}}
    monkeypatch.setattr(tiles, "table", lambda: table)
    chosen = tiles.choose_tile(packed, 5)
    assert (chosen.rows, chosen.warps, chosen.stages) == (64, 8, 3)
    assert tiles.decode_above() == 7
    assert tiles.choose_tile(packed, 33) == tiles.Tile(split=tiles.choose_tile(packed, 33).split)


@pytest.mark.parametrize(("kernel", "n"), [((8192, 28672), 16), ((8192, 8192), 64), ((64, 128), 1), ((300, 5000), 100)])
def test_splits_fill_the_gpu(kernel, n):
    """At most one program in four waits for a place or leaves one empty where the kernel is large enough to choose."""
    d_in, d_out = kernel
    packed = pk.Bitmap(
        shape=kernel,
        dtype="bfloat16",
        values="bfloat16",
        tile=(128, 64),
        bits=np.zeros(1, np.int32),
        tiles=np.zeros(1, np.int32),
        rows=np.zeros(1, np.int16),
        words=np.zeros(d_in * d_out // 4, np.int32),
    )
    tile = tiles.choose_tile(packed, n)
    assert 1 <= tile.split <= 16
    programs = -(-d_out // tile.rows) * tile.split
    if d_in * d_out > 1e7:
        waves = programs / (4 * tiles.CORES)
        assert waves / np.ceil(waves) > 0.75
    if d_in < 256:
        assert tile.split == 1  # nothing to share


# Multiprocessors: A10G, A100, L40S, H100 PCIe, H100 and H200, B200; and a number that nothing divides.
DEVICES = (80, 108, 142, 114, 132, 148, 97)


@pytest.mark.parametrize("cores", DEVICES)
def test_shares_are_the_tiles(monkeypatch, cores):
    """Of every layer, format and batch that we measure: each tile in one share, and none begins where no tile is.

    4096 x 14336 with one row of x on an H100 had 15 shares of 64 tiles, whose last began at the 65th.
    """
    monkeypatch.setattr(tiles, "device", lambda: ("A GPU", cores))
    kernel_code = load_script("kernel_code")
    source = (Path(kernel_code.__file__).parent / "bench_kernels.py").read_text()
    shapes = {(int(a), int(b)) for a, b in re.findall(r'": \((\d+), (\d+)\),', source)} | {(4096, 14336), (64, 8)}
    assert len(shapes) > 15
    for shape, format, values in itertools.product(shapes, ("capped:4", "capped:1", "bitmap"), ("bfloat16", "int8")):
        packed = kernel_code.abstract_packed(format, values, "bfloat16", shape)
        steps = packed.grid[1]
        for n in (1, 16, 17, 64, 128):
            split = tiles.choose_tile(packed, n).split
            assert min(count for _, count in shares(steps, split)) > 0


def shares(steps, split):
    """(first tile, tiles) of every share, which are checked."""
    found = [tiles.share_of(i, steps, split) for i in range(split)]
    assert [k for begin, count in found for k in range(begin, begin + count)] == list(range(steps))
    assert all(0 <= begin < steps for begin, _ in found)
    assert max(count for _, count in found) == math.ceil(steps / split)
    return found


def test_shares_of_any_number():
    for steps in (1, 2, 5, 63, 64, 65):
        for split in range(1, 20):
            found = shares(steps, split)
            assert tiles.some_are_empty(steps, split) == (found[-1][1] == 0)
    index = jnp.arange(15)
    begin, count = tiles.share_of(index, 64, 15)  # 13 of 5 tiles at most, and two of none
    assert list(zip(begin.tolist(), count.tolist())) == shares(64, 15)


@pytest.mark.parametrize("wrong", [{"rows": 96}, {"warps": 0}, {"split": 0}])
def test_bad_tiles(wrong):
    with pytest.raises(pk.FormatError, match="Tile"):
        tiles.Tile(**wrong)
