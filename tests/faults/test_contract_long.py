"""The tracer's contract on hundreds of random programs; JPRUNE_EXAMPLES says how many, for thousands."""

import os

from hypothesis import given, settings
from random_programs import PROGRAMS, right_or_refused


@settings(deadline=None, max_examples=int(os.environ.get("JPRUNE_EXAMPLES", "160")))
@given(PROGRAMS)
def test_right_or_refused(program):
    right_or_refused(program)
