"""The pins' own helpers, and what they compare with the snapshots."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def found():
    """What the code does now."""
    import collect

    # Bits were recorded with all of XLA's optimisations and with none, and with no other flag that tests have.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if flag in collect.WITHOUT_OPTIMISATIONS.split()]
    return collect.in_fresh_process(XLA_FLAGS=" ".join(flags))
