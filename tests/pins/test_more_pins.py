"""The pins of runs that compile more; see test_pins.py."""

import pytest
from comparing import KNOWN, same_bits, same_keys, same_structure
from typed import MORE, RUNS


@pytest.mark.parametrize("name", [name for name in KNOWN["keys"] if name in MORE])
def test_keys_of_json(found, name):
    same_keys(found, name)


@pytest.mark.parametrize("name", [name for name in RUNS if name in MORE])
def test_structure(found, name):
    same_structure(found, name)


@pytest.mark.parametrize("name", [name for name in RUNS if name in MORE])
def test_bits(found, name):
    same_bits(found, name)
