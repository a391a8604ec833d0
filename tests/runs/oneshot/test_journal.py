from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.pipeline.oneshot.journal import Step, route
from jprune.trees import count_zeros

UNITS = st.sets(st.integers(0, 9))


@settings(deadline=None)
@given(todo=UNITS, saved=st.sets(st.integers(1, 9)))
def test_a_route_gets_everything_done_from_what_is_known(todo, saved):
    steps = route(todo, saved)
    assert {step.unit for step in steps if step.prune} == todo
    at = None
    for step in steps:
        if step.load:
            assert step.unit in {0, *saved}
        else:
            assert step.unit == at  # its input is the output of the step before
        at = step.unit + 1
    pruned = [step.unit for step in steps if step.prune]
    assert pruned == sorted(pruned)
    assert len({step.unit for step in steps}) == len(steps)


@settings(deadline=None)
@given(todo=UNITS, saved=st.sets(st.integers(1, 9)))
def test_a_route_is_as_short_as_can_be(todo, saved):
    """Between two units that must be done, what need not be is skipped if some activations allow it."""
    gone_through = [step.unit for step in route(todo, saved) if not step.prune]
    known = {0, *saved}
    for unit in gone_through:
        later = [t for t in sorted(todo) if t > unit]
        assert later  # nothing is gone through for nothing
        assert not any(unit < k <= later[0] for k in known)


def test_routes_by_hand():
    assert route([], [3]) == []
    assert route([2, 3], [2]) == [Step(2, True, True), Step(3, True, False)]
    assert route([1, 4], [4]) == [Step(0, False, True), Step(1, True, False), Step(4, True, True)]
    assert route([1, 3], []) == [
        Step(0, False, True),
        Step(1, True, False),
        Step(2, False, False),
        Step(3, True, False),
    ]


def test_zeros_of_every_dtype():
    import ml_dtypes
    import numpy as np

    values = np.array([0.0, -0.0, 1.0, 1e-7, -2.0])
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert count_zeros(values.astype(dtype)) == int((values.astype(dtype) == 0).sum())
