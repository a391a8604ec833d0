"""Packing that is interrupted goes on where it was."""

import json

import pytest

from jprune.checkpoints import load
from jprune.checkpoints.packed import write
from jprune.errors import JpruneError
from jprune.pipeline.pack import PackReport, pack


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("packed*")}


def test_goes_on_with_the_files_that_are_complete(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "PART_BYTES", 2**12)
    model, out = tiny_model(), tmp_path / "out"
    whole = pack(model, tmp_path / "whole")
    total = len(load(model).shapes)
    assert len(files(tmp_path / "whole")) > 4

    def until(stop, seen):
        def progress(step):
            seen.append(step.done)
            if step.done == stop:
                raise KeyboardInterrupt

        return progress

    seen: list[float] = []
    with pytest.raises(KeyboardInterrupt, match=r"parts of the run are done and kept in .*out\.run"):
        pack(model, out, progress=until(total - 2, seen))
    assert not out.exists()
    with pytest.raises(JpruneError, match="go on with it by `resume`"):
        pack(model, out)
    with pytest.raises(JpruneError, match="values"):
        pack(model, out, values="int8", resume=True)
    report = pack(model, out, resume=True, progress=until(None, seen := []))
    assert 0 < len(seen) < total  # not those whose file was complete
    assert seen[-1] == total
    assert files(out) == files(tmp_path / "whole")
    assert not (tmp_path / "out.run").exists()
    assert report.kernels == whole.kernels
    assert report.bytes == whole.bytes

    told = json.loads((out / "jprune.json").read_text())
    again = PackReport.from_record(told, out)
    assert again.json() == report.json() | {"out": str(out)}
    with pytest.raises(JpruneError, match="exists"):
        pack(model, out)
    pack(model, out, overwrite=True)
    assert files(out) == files(tmp_path / "whole")
