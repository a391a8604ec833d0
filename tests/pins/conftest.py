"""The pins' own helpers, and what they compare with the snapshots."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def found(request):
    """What the code does now; all of it only if a test of those that compile more is among the tests."""
    import collect

    everything = any(item.path.name == "test_more_pins.py" for item in request.session.items)
    return collect.in_fresh_process(everything=everything)
