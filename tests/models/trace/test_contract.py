"""The tracer's contract, on random programs: right, or refused with a reason; every leaf accounted for."""

from hypothesis import given, settings
from random_programs import PROGRAMS, right_or_refused


@settings(deadline=None, max_examples=20, derandomize=True)
@given(PROGRAMS)
def test_right_or_refused(program):
    right_or_refused(program)
