"""A method that trains is one class: the one that the docs show runs as those of the library do."""

import json
import pathlib
import re

import numpy as np
import pytest

import jprune
from jprune.pipeline.training import plan_training, tune_model

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "add-a-method.md"

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def half_way():
    """The class of the docs."""
    section = PAGE.read_text(encoding="utf-8").split("## A method that prunes while it trains")[1]
    names = {"__name__": "docs"}
    exec(re.search(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1], names)
    return names["HalfWay"]


def test_a_method_that_prunes_half_way(tiny_model, token_file, tmp_path, half_way):
    """Zeros from the middle on, kept by a run that is stopped and resumed after it; a record, and a plan."""
    folder = tiny_model()
    method = half_way(steps=4, batch_size=4, micro_batch=4, warmup=0, learning_rate=0.01, sparsity=0.25)
    data = np.tile(np.load(token_file(4, 12)), (3, 1))
    options = {"method": method, "data": data, "checkpoint_every": 1}

    def stop(progress):
        if progress.phase == "train" and progress.done >= 3:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        tune_model(folder, tmp_path / "out", progress=stop, **options)
    report = tune_model(folder, tmp_path / "out", resume=True, **options)
    assert report.resumed_from == 2
    assert report.method == "HalfWay"
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["recipe"]["sparsity"] == 0.25
    before, after = jprune.load(folder), jprune.load(tmp_path / "out")
    for path in after.shapes:
        if path.startswith("blocks/") and path.endswith("kernel"):
            assert np.count_nonzero(before.read(path)) == before.shapes[path].size
    # One quarter of each kernel of the three equal layers together.
    kernels = [np.stack([after.read(f"blocks/{i}/mlp/{name}/kernel") for i in range(3)]) for name in ("up", "down")]
    for kernel in kernels:
        assert np.count_nonzero(kernel == 0) == kernel.size // 4
    plan = plan_training(folder, method=method)
    assert plan.parameters == (report.parameters, report.parameters)
