"""Tensors of files as transformers makes parameters of them, and back: renamed, stacked, joined, cut, interleaved."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
import bridged
import hf_families as hf
import tiny_configs

from jprune.bridge.module import Module
from jprune.bridge.names import stored_in
from jprune.checkpoints import load
from jprune.errors import JpruneError

KINDS = {
    "exaone": set(),
    "exaone_moe": {"MergeModulelist", "Concatenate"},
    "hrm_text": {"Chunk"},
    "inkling2_text": {"Interleave"},
    "lara_mini": {"Split"},
    "sarvam_moe": {"MergeModulelist", "Concatenate", "Split"},
}
"""What transformers' tables do to the files of each, beside renaming."""


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_that_transformers_reads_and_files_come_back(kind, tmp_path):
    from transformers.conversion_mapping import get_model_conversion_mapping

    made = tiny_configs.model(kind)
    done = {type(o).__name__ for entry in get_model_conversion_mapping(made) for o in getattr(entry, "operations", ())}
    assert done >= KINDS[kind]
    hf.save(made, tmp_path)
    files, want = bridged.tensors(tmp_path), bridged.theirs(tmp_path).state_dict()
    module = Module(json.loads((tmp_path / "config.json").read_text()), kind, "it is tested")
    stored = stored_in(module, {key: values.shape for key, values in files.items()}, kind)
    assert not stored.unread
    back = {key: np.full_like(values, np.nan) for key, values in files.items()}
    for name, entry in stored.entries.items():
        values = entry.read(*(files[key] for key in entry.keys))
        np.testing.assert_array_equal(values, want[name].numpy(), err_msg=name)
        for index, key in enumerate(entry.keys):
            entry.write_to(index, values, back[key])
    assert {*want} == {*stored.entries, *module.aliases}
    for key, values in files.items():
        assert back[key].tobytes() == values.tobytes(), key


def test_parts_that_do_not_fill_their_tensor_are_refused(tmp_path):
    hf.save(tiny_configs.model("lara_mini"), tmp_path)
    module = Module(json.loads((tmp_path / "config.json").read_text()), "tiny", "it is tested")
    given = {key: values.shape for key, values in bridged.tensors(tmp_path).items()}
    key = "model.layers.0.linear_attn.in_proj.weight"
    given[key] = (given[key][0] + 1, *given[key][1:])
    with pytest.raises(JpruneError, match=f"tensors of shape .*{key}.* do not make .* do not belong together"):
        stored_in(module, given, "tiny")


def test_tables_of_integers_are_refused(tmp_path):
    hf.save(tiny_configs.model("deepseek_v4"), tmp_path)
    with pytest.raises(JpruneError, match="tid2eid is a table of integers in the files"):
        load(tmp_path)
