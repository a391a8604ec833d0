import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jprune import devices
from jprune.checkpoints import writing
from jprune.errors import JpruneError
from jprune.runs.activations import ArrayFile, Batches, Room
from jprune.runs.background import Background

HERE = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * 2


def specs(count=3):
    return tuple(
        (jax.ShapeDtypeStruct((2, 5, 7), jnp.float32), jax.ShapeDtypeStruct((2, j + 1), jnp.bfloat16))
        for j in range(count)
    )


def values(rng, count=3):
    return [tuple(jnp.asarray(rng.standard_normal(s.shape), s.dtype) for s in arrays) for arrays in specs(count)]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("host", [0, 700, 10**6])
@pytest.mark.parametrize("device", [0, 700, 10**6])
def test_what_is_put_comes_back(rng, tmp_path, device, host):
    room, given = Room(device=device, host=host), values(rng)
    batches = Batches(specs(), room, tmp_path / "file.bin")
    for j in (2, 0, 1):
        batches.put(j, given[j])
    for j in range(3):
        same(batches.get(j), given[j])
        same(batches.take(j), given[j])
    assert room.left == device + host
    assert (tmp_path / "file.bin").exists() == (device + host < 1000)  # 700 bytes hold two of the three
    batches.drop()
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_and_given_back(rng, tmp_path):
    batches = Batches(specs(), Room(device=600, host=0), tmp_path / "file.bin")
    given = values(rng)
    for j in range(2):
        batches.put(j, given[j])
    assert not (tmp_path / "file.bin").exists()
    batches.put(2, given[2])
    assert (tmp_path / "file.bin").exists()
    (tmp_path / "file.bin").unlink()
    batches.take(0)
    batches.put(2, given[2])
    assert not (tmp_path / "file.bin").exists()
    same(batches.get(2), given[2])


def test_written_behind_and_checked(rng, tmp_path):
    given = values(rng)
    with Background() as background:
        batches = Batches(specs(), Room(device=600, host=0), tmp_path / "file.bin", background)
        for j in range(3):
            batches.put(j, given[j])
        background.wait()
        checksums = batches.synced()
    file = ArrayFile(tmp_path / "file.bin", specs())
    for j in range(3):
        same([piece for (piece,) in map(dict.values, file.read(j, HERE))], given[j])
        assert file.checksums(j, HERE) == checksums[j] == [writing.checksum(np.asarray(x)) for x in given[j]]
    data = bytearray((tmp_path / "file.bin").read_bytes())
    data[4096 + 1] ^= 1  # in the second array of the first micro-batch
    (tmp_path / "file.bin").write_bytes(data)
    assert file.checksums(0, HERE)[0] == checksums[0][0]
    assert file.checksums(0, HERE)[1] != checksums[0][1]


def test_bfloat16_is_mapped_as_it_is(tmp_path):
    spec = ((jax.ShapeDtypeStruct((3,), jnp.bfloat16),),)
    file = ArrayFile(tmp_path / "file.bin", spec)
    file.write(0, ({((0, 3),): np.array([1, -2, 0.5], ml_dtypes.bfloat16)},))
    ((mapped,),) = map(dict.values, file.read(0, HERE[:1]))
    assert isinstance(mapped, np.memmap)
    assert mapped.dtype == ml_dtypes.bfloat16
    assert jax.jit(jnp.sum)(mapped) == -0.5


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "checksum", full)
    with pytest.raises(JpruneError, match=r"disk .* is full"):
        ArrayFile(tmp_path / "file.bin", specs()).write(
            0, list(map(devices.to_host, values(np.random.default_rng(), 1)[0]))
        )


def test_jobs_run_in_order_and_their_errors_come_out():
    done = []
    with Background() as background:
        for i in range(5):
            background.submit(lambda i=i: done.append(i))
        background.wait()
        assert done == [0, 1, 2, 3, 4]
        background.submit(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            background.wait()
    background = Background()
    background.__enter__()
    background.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.__exit__(None, None, None)


def test_pending_bytes_are_limited():
    go, third = threading.Event(), threading.Event()
    with Background(limit=10) as background:
        background.submit(lambda: go.wait(60), 8)
        background.submit(lambda: None, 2)  # fits
        waiting = threading.Thread(target=lambda: background.submit(third.set, 1))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()  # until the first is done
        go.set()
        waiting.join(60)
        background.wait()
        assert third.is_set()


def test_after_an_error_nothing_more_begins():
    begun, go, done = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        go.wait(60)
        done.append("first")

    background = Background()
    background.__enter__()
    background.submit(first)
    background.submit(lambda: done.append("second"))
    begun.wait(60)
    threading.Timer(0.05, go.set).start()
    background.__exit__(KeyError, KeyError(), None)
    assert done == ["first"]
