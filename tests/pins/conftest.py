"""The pins' own helpers, and what they compare with the snapshots."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def found(request):
    """What the code does now; all of it only if a test of those that compile more is among the tests."""
    import collect

    everything = any(item.path.name == "test_more_pins.py" for item in request.session.items)
    # Bits were recorded with all of XLA's optimisations and with none, but not with the other emitters that tests have.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if flag != "--xla_cpu_use_fusion_emitters=false"]
    return collect.in_fresh_process(everything=everything, XLA_FLAGS=" ".join(flags))
