"""Runs that are killed, cut off, damaged and raced for: what comes out in the end is what an undisturbed run writes.

They prune two kernels a block, by a method that costs nothing.
"""

import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import killable
import numpy as np
import pytest
from fake_method import EveryOther, EveryOtherOfTwo

import jprune
from jprune import Magnitude, Unstructured, Wanda
from jprune.checkpoints import load, record
from jprune.errors import JpruneError
from jprune.pipeline import prune_model
from jprune.pipeline.forecast import forecast
from jprune.pipeline.oneshot import stages as stagewise
from jprune.pipeline.pack import pack
from jprune.runs import lock

KILLS, POWER_FAILURES = 13, 7
BLOCKS = 6
KERNELS = ("attn/q", "mlp/up")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of the model and the tokens."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def recipe(place, tiny_config):
    """Options of a run over a model of six blocks."""
    from safetensors.numpy import save_file

    from jprune import trees
    from jprune.models import decoder, families

    hf_config = {**tiny_config, "num_hidden_layers": BLOCKS}
    config = families.config(hf_config)
    rng = np.random.default_rng(3)
    shapes = {p: s.shape for p, s in trees.flatten(decoder.abstract_params(config)).items()}
    params = {p: (0.1 * rng.standard_normal(s)).astype(np.float32) for p, s in shapes.items()}
    (place / "model").mkdir()
    save_file({e.key: e.write(params[p]) for p, e in families.table(config).items()}, place / "model/model.safetensors")
    (place / "model" / "config.json").write_text(json.dumps(hf_config))
    np.save(place / "tokens.npy", rng.integers(0, 96, (6, 24), dtype=np.int32))
    killable.start_server()
    return {
        "model": str(place / "model"),
        "method": EveryOther(),
        "pattern": Unstructured(0.5),
        "where": KERNELS,
        "calibration": str(place / "tokens.npy"),
        "micro_batch": 2,
    }


@pytest.fixture(scope="module")
def undisturbed(place, recipe):
    """Files of the result of a run that nothing happens to, and how often it changes the disk."""
    out, count = place / "undisturbed" / "out", place / "count"
    out.parent.mkdir()
    status = killable.run(recipe | {"out": str(out)}, watched=str(out.parent), count_into=str(count))
    assert status == 0
    assert os.listdir(out.parent) == ["out"]
    return killable.digest(out), int(count.read_text())


@pytest.fixture
def interrupted(tmp_path, recipe):
    """A function that runs until a block has begun, and then presses Ctrl-C; returns the options."""

    def run(at=4, **options):
        options = recipe | {"out": tmp_path / "out"} | options

        def press(step):
            if step.phase == "prune" and step.done >= at:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt, match="`resume`"):
            prune_model(**options, progress=press)
        return options

    return run


@pytest.fixture
def solved(monkeypatch):
    """The kernels that are solved for, one after the other."""
    paths = []
    solve = stagewise.PartRun._solve

    def spy(self, params, kernels, statistic):
        paths.extend(kernel.path for kernel in kernels.values())
        return solve(self, params, kernels, statistic)

    monkeypatch.setattr(stagewise.PartRun, "_solve", spy)
    return paths


def resumed(options, undisturbed):
    """Resumes; the result must be what it would have been, and nothing else may be left."""
    report = prune_model(**options, resume=True)
    out = report.out
    assert killable.digest(out) == undisturbed[0]
    assert [path.name for path in out.parent.iterdir() if "out" in path.name] == ["out"]
    written = json.loads((out / "jprune.json").read_text())
    assert len(written["kernels"]) == BLOCKS * len(KERNELS)
    assert written["sparsity"]["achieved"] == report.sparsity.achieved
    assert 2 * report.sparsity.zeros == sum(kernel.size for kernel in report.kernels)
    return report


def blocks_of(paths):
    return sorted({int(path.split("/")[1]) for path in paths})


@pytest.mark.parametrize(("count", "power"), [(KILLS, False), (POWER_FAILURES, True)], ids=["kill -9", "power failure"])
def test_killed_anywhere(tmp_path, recipe, undisturbed, count, power):
    finished = 0  # how often activations are saved depends on the time it takes, so a run may be a little shorter
    for i, point in enumerate(killable.random_points(count, undisturbed[1], seed=int(power))):
        folder = tmp_path / str(i)
        folder.mkdir()
        options = recipe | {"out": str(folder / "out")}
        status = killable.run(options, watched=str(folder), die_at=point, power=power)
        assert status in (killable.DEAD, 0), f"operation {point}"
        finished += status == 0
        if (folder / "out").exists() and not (folder / "out.run").exists():  # died after the last thing there was to do
            assert killable.digest(folder / "out") == undisturbed[0]
        else:
            resumed(options, undisturbed)
    assert finished <= 2


def test_packing_killed_anywhere(tmp_path, recipe):
    """A small model has one file of arrays, so all begin anew; that files are kept is tested where they are small."""
    job = {"job": "jprune.pipeline.pack:pack"}
    (tmp_path / "whole").mkdir()
    options = {"model": recipe["model"], "out": str(tmp_path / "whole" / "out")}
    assert killable.run(options, watched=str(tmp_path / "whole"), count_into=str(tmp_path / "count"), **job) == 0
    count = int((tmp_path / "count").read_text())
    for i, point in enumerate(killable.random_points(count, 6, seed=2)):
        folder = tmp_path / str(i)
        folder.mkdir()
        options["out"] = str(folder / "out")
        assert killable.run(options, watched=str(folder), die_at=point, power=i % 2 == 1, **job) == killable.DEAD
        if not (folder / "out").exists() or (folder / "out.run").exists():
            pack(**options, resume=True)
        assert [path.name for path in folder.iterdir()] == ["out"]
        for path in (tmp_path / "whole" / "out").glob("packed*"):
            assert (folder / "out" / path.name).read_bytes() == path.read_bytes()
        load(folder / "out")


def test_killed_again_and_again(tmp_path, recipe, undisturbed):
    options = recipe | {"out": str(tmp_path / "out"), "resume": True}
    for _ in range(3):  # not so often that the last might have finished
        killable.run(options, watched=str(tmp_path), die_at=undisturbed[1] // 4)
    del options["resume"]
    resumed(options, undisturbed)


def test_orbax_killed_while_it_is_converted(tmp_path, recipe, undisturbed):
    options = recipe | {"out": str(tmp_path / "out"), "format": "orbax"}
    status = killable.run(options, watched=str(tmp_path), die_at=undisturbed[1] + 5)
    assert status == killable.DEAD
    report = prune_model(**options, resume=True)
    assert not list(report.out.glob("*.safetensors"))
    result = jprune.load(report.out)
    for path, share in ((p, float(np.mean(result.read(p) == 0))) for p in result.shapes if p.startswith("blocks/")):
        assert share == (0.5 if path.endswith(tuple(f"{name}/kernel" for name in KERNELS)) else 0), path


def test_ctrl_c_says_how_to_go_on(interrupted, undisturbed, solved):
    options = interrupted(at=3.4)
    assert (options["out"].parent / "out.run" / "done").exists()
    assert not options["out"].exists()
    solved.clear()
    resumed(options, undisturbed)
    assert blocks_of(solved) == [3, 4, 5]


def test_ctrl_c_on_the_command_line(tmp_path, recipe, monkeypatch, capsys):
    cli = importlib.import_module("jprune.cli.main")  # the package has a function of this name
    monkeypatch.setattr(stagewise.PartRun, "progress", lambda *_: signal.raise_signal(signal.SIGINT))
    words = ["prune", "wanda", recipe["model"], "--sparsity", "0.5", "--calibration", recipe["calibration"]]
    with monkeypatch.context() as patched:
        patched.setattr(cli, "_keep_compiled_programs", lambda: None)
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_not_overwritten_unasked(interrupted, undisturbed):
    options = interrupted()
    with pytest.raises(JpruneError, match=r"holds a run that was interrupted.*`resume`"):
        prune_model(**options)
    prune_model(**options, overwrite=True)
    assert killable.digest(options["out"]) == undisturbed[0]
    assert [path.name for path in options["out"].parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pattern": Unstructured(0.4)}, "the pattern"),
        ({"method": Wanda()}, "the method"),
        ({"method": EveryOther(scale=0.5)}, "the method"),
        ({"calibration": np.zeros((6, 24), np.int32)}, "the calibration"),
        ({"skip": ("mlp/up",)}, "--skip"),
        ({"overrides": {"mlp/": Unstructured(0.1)}}, "--override"),
        ({"dtype": "bfloat16"}, "--dtype"),
        ({"format": "orbax"}, "--format"),
        ({"model": "another"}, "the model"),
        ({"run": "elsewhere"}, "out"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_differs_is_named(interrupted, tmp_path, recipe, change, named):
    options = interrupted(at=1.5)
    if "model" in change:
        shutil.copytree(recipe["model"], tmp_path / "another")
        data = bytearray((tmp_path / "another" / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "another" / "model.safetensors").write_bytes(data)
        change = {"model": tmp_path / "another"}
    if "run" in change:
        change = {"run": tmp_path / "out.run", "out": tmp_path / "other"}
    with pytest.raises(JpruneError, match=f"was begun with {named}.* = .* and cannot go on with"):
        prune_model(**options | change, resume=True)


def test_another_version_is_named(interrupted, monkeypatch):
    from jprune.pipeline import job

    options = interrupted(at=1.5)
    real = job.environment

    def newer(dtype):
        found = real(dtype)
        return found | {"versions": found["versions"] | {"jax": "99.0"}}

    monkeypatch.setattr(job, "environment", newer)
    with pytest.raises(JpruneError, match=r"was begun with the version of jax = .* and cannot go on with .99\.0"):
        prune_model(**options, resume=True)


def partial_shard(options):
    (folder,) = options["out"].parent.glob(".out.*.partial")
    return folder / "model.safetensors"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_a_bit_flipped_in_a_finished_shard(interrupted, undisturbed, solved):
    options = interrupted(at=4.2)
    shard = partial_shard(options)
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    header = json.loads(shard.read_bytes()[8 : 8 + length])
    start = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    flip(shard, 8 + length + start + 101)
    solved.clear()
    resumed(options, undisturbed)
    assert blocks_of(solved) == [1, 4, 5]  # blocks 0, 2 and 3 are only gone through


def test_a_shard_truncated_between_runs(interrupted, undisturbed):
    options = interrupted(at=4.2)
    shard = partial_shard(options)
    os.truncate(shard, shard.stat().st_size // 3)
    resumed(options, undisturbed)


def test_a_shard_that_is_gone(interrupted, undisturbed):
    options = interrupted(at=4.2)
    partial_shard(options).unlink()
    resumed(options, undisturbed)


@pytest.mark.parametrize("damage", ["bit", "truncated", "gone"])
def test_damaged_activations(interrupted, undisturbed, solved, damage):
    options = interrupted(at=4.2)
    kept = list((options["out"].parent / "out.run" / "hidden").glob("*.bin"))  # of one block, or of two on a slow disk
    assert kept
    for saved in kept:
        match damage:
            case "bit":
                flip(saved, saved.stat().st_size // 2)
            case "truncated":
                os.truncate(saved, 100)
            case "gone":
                saved.unlink()
    solved.clear()
    resumed(options, undisturbed)
    assert blocks_of(solved) == [4, 5]  # the blocks before are gone through, not solved for again


@pytest.mark.parametrize("saved", [True, False])
def test_the_dense_model_is_gone_on_with(interrupted, recipe, tmp_path, solved, saved):
    """Its activations are saved with the others; without them it is gone through again, with its own weights."""
    method = EveryOtherOfTwo()
    prune_model(**recipe | {"method": method, "out": tmp_path / "whole"})
    options = interrupted(at=4.2, method=method)
    if not saved:
        shutil.rmtree(tmp_path / "out.run" / "hidden")
    solved.clear()
    prune_model(**options, resume=True)
    assert killable.digest(tmp_path / "out") == killable.digest(tmp_path / "whole")
    assert blocks_of(solved) == [4, 5]


@pytest.mark.parametrize("contents", [b"", b"{", b'{"checksum": 1, "contents": {}}', b"[]"])
def test_a_damaged_mark(interrupted, undisturbed, solved, contents):
    options = interrupted(at=3.2)
    (options["out"].parent / "out.run" / "done" / "blocks-1.json").write_bytes(contents)
    solved.clear()
    resumed(options, undisturbed)
    assert blocks_of(solved) == [1, 3, 4, 5]


def test_activations_that_do_not_fit_into_memory(tmp_path, recipe, undisturbed, interrupted, monkeypatch):
    """With no memory at all for activations everything goes through files, and nothing changes."""
    monkeypatch.setattr(forecast.Memory, "room", property(lambda self: forecast.Room(device=0, host=0)))
    prune_model(**recipe, out=tmp_path / "spilled")
    assert killable.digest(tmp_path / "spilled") == undisturbed[0]
    options = interrupted(at=3.2)
    assert list((tmp_path / "out.run" / "hidden").glob("*.bin"))
    resumed(options, undisturbed)


def test_less_memory_when_resumed(interrupted, undisturbed):
    options = interrupted(at=3.2)
    # The number of windows would give other bits, but is remembered.
    resumed(options | {"memory": 1, "micro_batch": 5}, undisturbed)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_disk_full(tmp_path, recipe, undisturbed, part):
    options = recipe | {"out": tmp_path / "out"}
    with (
        killable.Disk(tmp_path, full_at=int(part * undisturbed[1])),
        pytest.raises(JpruneError, match=r"disk of .* is full"),
    ):
        prune_model(**options)
    assert not options["out"].exists()
    resumed(options, undisturbed)


def test_disk_full_at_the_record(tmp_path, recipe, undisturbed, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(record, "write", full)
        with pytest.raises(JpruneError, match=r"disk of .* is full.*`resume`"):
            prune_model(**recipe, out=tmp_path / "out")
    resumed(recipe | {"out": tmp_path / "out"}, undisturbed)


def test_small_file_system(tmp_path, recipe, undisturbed):
    """A real disk that is full: the result fits, but not all that the run needs beside it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=288k", "jprune-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        options = recipe | {"out": disk / "out"}
        with pytest.raises(JpruneError, match=r"disk of .* is full"):
            prune_model(**options)
        assert os.listdir(disk) != []
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        resumed(options, undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_output_that_cannot_be_written(tmp_path, recipe, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(JpruneError, match=r"`out` .* cannot be made in .*file: it is a file"):
        prune_model(**recipe, out=tmp_path / "file" / "out")
    with pytest.raises(JpruneError, match="file/run cannot be written"):
        prune_model(**recipe, out=tmp_path / "out", run=tmp_path / "file" / "run")

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse)
        with pytest.raises(JpruneError, match=r"Permission denied.*permissions"):
            prune_model(**recipe, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_folder_with_something_else_in_it(tmp_path, recipe):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(JpruneError, match=r"thesis\.tex.*jprune did not write"):
        prune_model(**recipe, out=tmp_path / "out", run=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "do not lose me"


def test_a_second_process_is_refused(tmp_path, recipe, undisturbed):
    (tmp_path / "out.run").mkdir()
    held = lock.Lock(tmp_path / "out.run")
    with pytest.raises(JpruneError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}"):
        prune_model(**recipe, out=tmp_path / "out")
    held.release()
    prune_model(**recipe, out=tmp_path / "out")
    assert killable.digest(tmp_path / "out") == undisturbed[0]


def test_two_processes_race(tmp_path, recipe, undisturbed):
    options = recipe | {"out": str(tmp_path / "out")}
    errors = [tmp_path / "error-0", tmp_path / "error-1"]
    racers = [killable.start(options, watched=str(tmp_path), stderr=str(path)) for path in errors]
    for racer in racers:
        racer.join()
    assert sorted(racer.exitcode for racer in racers) == [0, 1]
    loser = next(path for path, racer in zip(errors, racers, strict=True) if racer.exitcode == 1)
    assert any(words in loser.read_text() for words in ("in use by process", "exists; give another folder"))
    assert killable.digest(tmp_path / "out") == undisturbed[0]


def test_a_lock_of_the_dead(interrupted, undisturbed):
    options = interrupted(at=2.5)
    path = options["out"].parent / "out.run" / "lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    resumed(options, undisturbed)


def test_a_lock_of_another_machine(interrupted, undisturbed):
    options = interrupted(at=2.5)
    path = options["out"].parent / "out.run" / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with pytest.raises(JpruneError, match=r"process 7 on elsewhere.*remove .*lock"):
        prune_model(**options, resume=True)
    path.unlink()
    resumed(options, undisturbed)


def test_the_clock_goes_backwards(interrupted, undisturbed, monkeypatch):
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    options = interrupted(at=3.2)
    for path in (options["out"].parent / "out.run").rglob("*"):
        os.utime(path, (4_000_000_000, 4_000_000_000))
    resumed(options, undisturbed)


def test_perplexity_before_is_not_measured_twice(interrupted, undisturbed, recipe, monkeypatch):
    from jprune.pipeline.oneshot import measure

    options = interrupted(at=3.2, evaluate=recipe["calibration"])
    measured = []
    real = measure.perplexity
    monkeypatch.setattr(measure, "perplexity", lambda *args, **kwargs: measured.append(1) or real(*args, **kwargs))
    report = resumed(options, undisturbed)
    assert len(measured) == 1
    assert report.before.value != report.after.value


def test_methods_without_data_resume_too(interrupted, recipe, tmp_path, solved):
    prune_model(**recipe | {"method": Magnitude()}, out=tmp_path / "whole")
    options = interrupted(at=3, method=Magnitude())
    solved.clear()
    done = {int(path.stem.split("-")[1]) for path in (tmp_path / "out.run" / "done").glob("blocks-*.json")}
    prune_model(**options, resume=True)
    assert killable.digest(tmp_path / "out") == killable.digest(tmp_path / "whole")
    # What was solved but not yet written in the background is done again.
    assert done
    assert blocks_of(solved) == sorted(set(range(BLOCKS)) - done)


def test_resuming_what_is_finished(tmp_path, recipe, undisturbed):
    """Died between giving the result its name and cleaning up."""
    options = recipe | {"out": str(tmp_path / "out")}
    died = killable.run(options, watched=str(tmp_path), die_after=str(tmp_path / "out"))
    assert died == killable.DEAD
    assert (tmp_path / "out.run" / "run.json").exists()
    report = prune_model(**options, resume=True)
    assert dataclasses.asdict(report)["sparsity"]["zeros"] > 0
    assert killable.digest(tmp_path / "out") == undisturbed[0]
    assert os.listdir(tmp_path) == ["out"]
