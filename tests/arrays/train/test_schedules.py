"""Sparsity schedules: their ends are exact, and between them they follow the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.patterns import Unstructured
from jprune.train import schedules


@pytest.mark.parametrize(("make", "power"), [(schedules.linear, 1), (schedules.cubic, 3)])
def test_between_its_ends_a_schedule_follows_its_equation_also_with_a_traced_step(make, power):
    schedule = make(0.8, initial=0.2, begin=10, end=50)
    traced = jax.jit(schedule)
    for step in range(60):
        t = min(max(step, 10), 50)
        expected = 0.8 + (0.2 - 0.8) * (1 - (t - 10) / 40) ** power
        assert float(traced(jnp.int32(step))) == pytest.approx(expected, abs=1e-6), step
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6), step


def test_counts_are_those_of_the_pattern_at_both_ends_whatever_float32_makes_of_the_share():
    # 0.52 x 75, 0.7 x 10 and the like are whole numbers that a float32 product misses; 3e7 has no room in a mantissa.
    for size in (1, 10, 75, 4096, 29_999_999):
        for share in (0.0, 0.07, 0.29, 0.52, 0.7, 0.9):
            schedule = schedules.cubic(share, initial=share / 2, begin=3, end=9)
            assert int(schedule.zeros(2, size)) == Unstructured(share / 2).zeros(size, 1)
            assert int(schedule.zeros(9, size)) == int(schedule.zeros(99, size)) == Unstructured(share).zeros(size, 1)


def test_counts_never_go_down():
    zeros = [int(schedules.cubic(0.6, begin=5, end=40).zeros(step, 1001)) for step in range(50)]
    assert zeros == sorted(zeros)
    assert [zeros[5], zeros[40]] == [0, 600]
    assert zeros[6] > 0


def test_a_constant_schedule_jumps_at_its_beginning():
    schedule = schedules.constant(0.5, begin=4)
    assert [int(schedule.zeros(step, 8)) for step in (0, 3, 4, 5)] == [0, 0, 4, 4]
    assert [bool(schedule.due(step, 2)) for step in range(8)] == [step == 4 for step in range(8)]


def test_masks_are_due_every_so_many_steps_and_at_the_end():
    schedule = schedules.linear(0.5, begin=3, end=13)
    due = jax.jit(lambda step: schedule.due(step, 4))
    assert [step for step in range(30) if due(jnp.int32(step))] == [3, 7, 11, 13]
    assert np.flatnonzero([schedule.due(step, 5) for step in range(30)]).tolist() == [3, 8, 13]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: schedules.linear(0.2, initial=0.5, end=3), "goes up within"),
        (lambda: schedules.cubic(1.0, end=3), "goes up within"),
        (lambda: schedules.cubic(0.5, begin=4, end=3), "0 <= begin <= end"),
        (lambda: schedules.constant(0.5, begin=-1), "0 <= begin <= end"),
        (lambda: schedules.SparsitySchedule(final=0.5, end=3, power=0), "power"),
    ],
)
def test_nonsense_is_refused(made, said):
    with pytest.raises(JpruneError, match=said):
        made()
