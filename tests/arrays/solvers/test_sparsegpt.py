"""SparseGPT against the paper's own formulation in NumPy float64, and against what must hold whatever the formulation.

A solver in float32 may settle two scores that are equal up to rounding the other way round, and everything after that
choice differs. So masks are compared where it is free to differ by a hair, and weights with the reference following the
solver's mask while checking that every choice was one of lowest scores, up to rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_sparsegpt
import pytest
from numpy_scores import select, wanda

from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured
from jprune.solvers import sparsegpt
from jprune.solvers.sparsegpt import check_factor, factorise, sweep


def problem(d_in, d_out=12, seed=0, tokens=None):
    """A kernel, correlated inputs of different sizes, and their Gram matrix in float32."""
    rng = np.random.default_rng(seed)
    tokens = tokens or 2 * d_in
    mixed = rng.normal(size=(tokens, d_in)) + 2 * rng.normal(size=(tokens, 8)) @ rng.normal(size=(8, d_in))
    x = (mixed * np.exp(rng.normal(size=d_in) / 2)).astype(np.float32)
    kernel = rng.normal(size=(d_in, d_out)).astype(np.float32)
    return kernel, x, np.asarray(x.astype(np.float64).T @ x, np.float32)


def solve(kernel, gram, pattern, **options):
    options = {k: jnp.asarray(v) if k == "keep" else v for k, v in options.items()}
    result = sparsegpt(jnp.asarray(kernel), jnp.asarray(gram), pattern, **options)
    return np.asarray(result.kernel), np.asarray(result.mask), float(result.loss)


def described(pattern):
    """A pattern in the words of the reference."""
    if isinstance(pattern, NM):
        return {"nm": (pattern.n, pattern.m)}
    return {"sparsity": pattern.sparsity, "per": pattern.per or "block"}


def close(new, expected):
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def agrees(kernel, gram, pattern, *, zeros=None, **options):
    """Runs both and compares everything; returns what the solver found."""
    new, mask, loss = solve(kernel, gram, pattern, **options)
    assert (new[~mask] == 0).all()
    assert (~mask).sum() == (pattern.zeros(*kernel.shape) if zeros is None else zeros)
    free = numpy_sparsegpt.sparsegpt(kernel, gram, **described(pattern), **options)
    assert (mask != free.mask).mean() < 2e-3
    followed = free
    if (mask != free.mask).any():
        followed = numpy_sparsegpt.sparsegpt(kernel, gram, **described(pattern), **options, follow=mask)
        assert followed.inversion < 1.002
    close(new, followed.kernel)
    assert loss == pytest.approx(followed.loss, rel=1e-4)
    # Holds for any mask, however the loss was added up; the weights of dead inputs count as zero from the start.
    live = np.where(np.diagonal(gram)[:, None] == 0, 0, kernel)
    damped = numpy_sparsegpt.damped(gram, options.get("damping", 0.01))
    assert loss == pytest.approx(numpy_sparsegpt.reconstruction(new, live, damped), rel=1e-4)
    return new, mask, loss


BLOCK, OUTPUT, KERNEL = Unstructured(0.5), Unstructured(0.5, "output"), Unstructured(0.5, "kernel")


@pytest.mark.parametrize(
    ("d_in", "pattern"),
    [
        (1, OUTPUT),
        (100, BLOCK),
        (100, Unstructured(0.3)),
        (100, OUTPUT),
        (100, KERNEL),
        (100, Unstructured(0.9, "kernel")),
        (100, NM(2, 4)),
        (100, NM(1, 4)),
        (100, NM(7, 20)),
        (200, Unstructured(0.7, "output")),
        (200, NM(4, 8)),
        (201, NM(1, 3)),
        (576, BLOCK),
        (1000, BLOCK),
    ],
    ids=str,
)
def test_as_the_paper_computes_it(d_in, pattern):
    """From less than a block to two super-blocks, and widths that no block divides."""
    kernel, _, gram = problem(d_in)
    agrees(kernel, gram, pattern)


@pytest.mark.parametrize("pattern", [BLOCK, KERNEL, NM(2, 4)], ids=str)
def test_many_super_blocks(pattern):
    """Blocks of 16 inputs: 32 of them, in eight super-blocks."""
    kernel, _, gram = problem(500)
    agrees(kernel, gram, pattern, block_size=16)


@pytest.mark.parametrize("block_size", [7, 100])
def test_block_sizes(block_size):
    """Also such that groups of 16 rows do not fill."""
    kernel, _, gram = problem(100)
    agrees(kernel, gram, BLOCK, block_size=block_size)


@pytest.mark.parametrize("block_size", [2, 30])
def test_blocks_do_not_matter_to_nm(block_size):
    """N:M looks at m inputs at a time; blocks are only how the work is cut (and are rounded to multiples of m)."""
    kernel, _, gram = problem(100)
    new, mask, _ = solve(kernel, gram, NM(2, 4), block_size=block_size)
    expected, expected_mask, _ = solve(kernel, gram, NM(2, 4))
    np.testing.assert_array_equal(mask, expected_mask)
    close(new, expected)


@pytest.mark.parametrize("damping", [1e-4, 0.1, 1.0])
def test_damping(damping):
    kernel, _, gram = problem(100)
    agrees(kernel, gram, BLOCK, damping=damping)


def test_given_mask():
    """Only the weights are solved for; the mask comes back as it went in."""
    kernel, x, gram = problem(100)
    mask = select(wanda(kernel, x), sparsity=0.6)
    new, returned, loss = solve(kernel, gram, jnp.asarray(mask))
    np.testing.assert_array_equal(returned, mask)
    expected = numpy_sparsegpt.sparsegpt(kernel, gram, mask=mask)
    close(new, expected.kernel)
    assert loss == pytest.approx(expected.loss, rel=1e-4)


def test_given_mask_and_keep():
    kernel, _, gram = problem(100)
    rng = np.random.default_rng(1)
    mask, keep = rng.random(kernel.shape) < 0.7, rng.random(kernel.shape) < 0.7
    new, returned, _ = solve(kernel, gram, jnp.asarray(mask), keep=keep)
    np.testing.assert_array_equal(returned, mask & keep)
    close(new, numpy_sparsegpt.sparsegpt(kernel, gram, mask=mask & keep).kernel)


@pytest.mark.parametrize("pattern", [BLOCK, OUTPUT, KERNEL, NM(2, 4)], ids=str)
def test_what_was_pruned_stays_zero(pattern):
    """Old zeros are part of the sparsity asked for. The original revives them."""
    kernel, _, gram = problem(100)
    if isinstance(pattern, NM):
        keep = (np.arange(100)[:, None] + np.arange(12)) % 4 != 0
    else:
        keep = np.random.default_rng(1).random(kernel.shape) < 0.8
    kernel = np.where(keep, kernel, 0)
    _, mask, _ = agrees(kernel, gram, pattern, keep=keep)
    assert not (mask & ~keep).any()


def test_pruning_twice():
    """50 %, then 75 % of the whole: exact counts both times, and nothing comes back."""
    kernel, _, gram = problem(100)
    first, mask, _ = solve(kernel, gram, BLOCK)
    second, finer, _ = solve(first, gram, Unstructured(0.75), keep=mask)
    assert (second == 0).sum() == 0.75 * kernel.size
    assert not (finer & ~mask).any()


def test_old_zeros_that_lie_unevenly():
    """Nine tenths of the first block are zero: the other blocks give up as many, and the count is exact."""
    kernel, _, gram = problem(300)
    keep = np.random.default_rng(1).random(kernel.shape) < np.where(np.arange(300) < 128, 0.1, 0.9)[:, None]
    _, mask, _ = agrees(np.where(keep, kernel, 0), gram, Unstructured(0.5), keep=keep)
    assert not (mask & ~keep).any()
    per_block = [(~mask[a:b]).mean() for a, b in ((0, 128), (128, 256), (256, 300))]
    assert per_block[0] == (~keep[:128]).mean()
    assert per_block[1] == pytest.approx(per_block[2], abs=0.01)


def test_more_zeros_than_asked_for():
    kernel, _, gram = problem(100)
    keep = np.random.default_rng(1).random(kernel.shape) > 0.9
    _, mask, _ = solve(kernel, gram, BLOCK, keep=keep)
    np.testing.assert_array_equal(mask, keep)


def test_nothing_to_prune():
    kernel, _, gram = problem(100)
    new, mask, loss = solve(kernel, gram, Unstructured(0.0))
    np.testing.assert_array_equal(mask, True)
    np.testing.assert_allclose(new, kernel, rtol=1e-5, atol=1e-6)
    assert loss == 0


@pytest.mark.parametrize("pattern", [BLOCK, NM(2, 4)], ids=str)
def test_scale_of_the_gram_matrix(pattern):
    """Sum, mean, 2/n times the sum: the same masks and weights; to the bit, for powers of four."""
    kernel, _, gram = problem(100)
    new, mask, loss = solve(kernel, gram, pattern)
    for scale in (2.0**-30, 2.0**40):
        scaled_new, scaled_mask, scaled_loss = solve(kernel, gram * np.float32(scale), pattern)
        np.testing.assert_array_equal(scaled_mask, mask)
        np.testing.assert_array_equal(scaled_new, new)
        assert scaled_loss == pytest.approx(loss * scale, rel=1e-6)
    third, third_mask, _ = solve(kernel, gram / np.float32(3), pattern)
    assert (third_mask != mask).mean() < 2e-3
    assert (np.abs(third - new) < 1e-4).mean() > 0.9


DEAD = [0, 17, 18, 19, 20, 99]


@pytest.mark.parametrize("pattern", [BLOCK, OUTPUT, KERNEL, NM(2, 4)], ids=str)
def test_dead_inputs(pattern):
    """Their weights become zero, they are the first to be pruned, and the others' solution is finite."""
    kernel, _, gram = problem(100)
    gram[DEAD] = gram[:, DEAD] = 0
    new, mask, _ = agrees(kernel, gram, pattern)
    assert np.isfinite(new).all()
    assert (new[DEAD] == 0).all()
    if not isinstance(pattern, NM):
        assert not mask[DEAD].any()
        assert (new == 0).sum() == pattern.zeros(*kernel.shape)


def test_dead_inputs_do_not_change_the_others():
    """With the mask given, the solution of the live inputs is that of the problem without the dead ones."""
    kernel, _, gram = problem(100)
    gram[DEAD] = gram[:, DEAD] = 0
    live = np.setdiff1d(np.arange(100), DEAD)
    mask = np.random.default_rng(1).random(kernel.shape) < 0.5
    new, _, loss = solve(kernel, gram, jnp.asarray(mask))
    expected, _, expected_loss = solve(kernel[live], gram[np.ix_(live, live)], jnp.asarray(mask[live]))
    close(new[live], expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_all_inputs_dead():
    kernel, _, gram = problem(100)
    new, mask, loss = solve(kernel, gram * 0, BLOCK)
    np.testing.assert_array_equal(new, 0)
    assert (~mask).sum() == kernel.size / 2
    assert loss == 0


def indefinite(d_in, lowest):
    """A symmetric matrix with mean diagonal of about one and one negative eigenvalue."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(d_in, d_in)))[0]
    values = np.ones(d_in)
    values[0] = lowest
    return ((basis * values) @ basis.T).astype(np.float32)


@pytest.mark.parametrize(("lowest", "needed"), [(-0.05, 0.1), (-0.5, 1.0)])
def test_damping_escalates(lowest, needed):
    """Tenfold, twice at most; the result is that of asking for the higher damping at once, and it is reported."""
    kernel, gram = problem(100)[0], indefinite(100, lowest)
    assert float(factorise(jnp.asarray(gram), 0.01).damping) == pytest.approx(needed)
    new, mask, loss = solve(kernel, gram, BLOCK)
    expected, expected_mask, expected_loss = solve(kernel, gram, BLOCK, damping=needed)
    np.testing.assert_array_equal(mask, expected_mask)
    close(new, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-4)


def test_fewer_tokens_than_inputs():
    """A singular Gram matrix is what damping is for."""
    kernel, _, gram = problem(100, tokens=10)
    agrees(kernel, gram, BLOCK)


def test_not_positive_definite():
    with pytest.raises(JpruneError, match=r"kernel: .*not positive definite even with damping 1 .*calibration tokens"):
        solve(problem(100)[0], indefinite(100, -3), BLOCK)
    factor = factorise(jnp.asarray(indefinite(100, -3)), 0.01)
    with pytest.raises(JpruneError, match=r"^blocks/3/attn/q/kernel: "):
        check_factor(factor, jnp.asarray(indefinite(100, -3)), "blocks/3/attn/q/kernel")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gram_that_is_not_finite(value):
    kernel, _, gram = problem(100)
    gram[5, 5] = value
    with pytest.raises(JpruneError, match=r"kernel: .* NaN or inf in 1 of 100 inputs; .*overflow"):
        solve(kernel, gram, BLOCK)


@pytest.mark.parametrize(("dtype", "pattern"), [(jnp.bfloat16, BLOCK), (jnp.float16, NM(2, 4))])
def test_half_precision_kernels(dtype, pattern):
    """Solved in float32 and rounded once, at the end."""
    kernel, _, gram = problem(100)
    half = jnp.asarray(kernel, dtype)
    result = sparsegpt(half, jnp.asarray(gram), pattern)
    exact = sparsegpt(half.astype(jnp.float32), jnp.asarray(gram), pattern)
    assert result.kernel.dtype == dtype
    np.testing.assert_array_equal(result.mask, exact.mask)
    np.testing.assert_array_equal(result.kernel, exact.kernel.astype(dtype))


def test_side_by_side():
    """Kernels of one input solved in one sweep, each by its own rule: as if each had been alone."""
    _, x, gram = problem(100)
    rng = np.random.default_rng(2)
    kernels = [jnp.asarray(rng.normal(size=(100, 12)), jnp.float32) for _ in range(6)]
    kernels[1] = kernels[1].astype(jnp.bfloat16)
    given = jnp.asarray(select(wanda(kernels[4], x), sparsity=0.5))
    patterns = [Unstructured(0.3), NM(2, 4), OUTPUT, KERNEL, given, NM(1, 4)]
    keeps = [None, None, jnp.asarray(rng.random((100, 12)) < 0.8), None, None, None]
    factor = factorise(jnp.asarray(gram), 0.01)
    together = sweep(kernels, factor, patterns, keeps)
    for kernel, pattern, keep, result in zip(kernels, patterns, keeps, together):
        alone = sparsegpt(kernel, jnp.asarray(gram), pattern, keep=keep)
        assert result.kernel.dtype == kernel.dtype
        np.testing.assert_array_equal(result.mask, alone.mask)
        np.testing.assert_allclose(
            np.asarray(result.kernel, np.float32), np.asarray(alone.kernel, np.float32), rtol=1e-2, atol=1e-4
        )
        assert float(result.loss) == pytest.approx(float(alone.loss), rel=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_better_than_wanda_better_than_magnitude(pattern):
    kernel, x, gram = problem(100)
    damped = numpy_sparsegpt.damped(gram)
    words = {"nm": (2, 4)} if isinstance(pattern, NM) else {"sparsity": 0.5}
    by_wanda = np.where(select(wanda(kernel, x), **words), kernel, 0)
    by_magnitude = np.where(select(np.abs(kernel), **words), kernel, 0)
    errors = [
        numpy_sparsegpt.reconstruction(new, kernel, damped)
        for new in (solve(kernel, gram, pattern)[0], by_wanda, by_magnitude)
    ]
    assert errors[0] < 0.7 * errors[1]
    assert errors[1] < errors[2]


block_solver = jax.jit(lambda kernel, gram: sparsegpt(kernel, gram, BLOCK))


def test_under_jit():
    """With the Gram matrix as an argument, and (traced only) as a constant."""
    kernel, _, gram = (jnp.asarray(a) for a in problem(100))
    expected = sparsegpt(kernel, gram, BLOCK)
    result = block_solver(kernel, gram)
    np.testing.assert_array_equal(result.mask, expected.mask)
    close(result.kernel, np.asarray(expected.kernel))
    shapes = jax.eval_shape(lambda kernel: sparsegpt(kernel, gram, BLOCK), kernel)
    assert shapes.kernel.shape == kernel.shape


def test_under_vmap():
    """Over layers: kernels and Gram matrices stacked, as a scanned decoder has them."""
    kernels, _, grams = (jnp.stack(a) for a in zip(*(problem(100, seed=seed) for seed in range(3))))
    together = jax.vmap(lambda kernel, gram: sparsegpt(kernel, gram, BLOCK))(kernels, grams)
    for i in range(3):
        alone = sparsegpt(kernels[i], grams[i], BLOCK)
        np.testing.assert_array_equal(together.mask[i], alone.mask)
        close(together.kernel[i], np.asarray(alone.kernel))


def test_failure_under_jit_is_nan():
    kernel, gram = jnp.asarray(problem(100)[0]), jnp.asarray(indefinite(100, -3))
    result = block_solver(kernel, gram)
    assert not np.isfinite(np.asarray(result.kernel)).all()


def equations(jaxpr):
    """Number of equations of a jaxpr and of all that it contains."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("pattern", [BLOCK, OUTPUT, KERNEL, NM(2, 4)], ids=str)
def test_program_does_not_grow_with_d_in(pattern):
    """What is compiled is as long for 24 blocks as for 6: compile time is bounded by construction."""
    counts = set()
    for d_in in (768, 1536, 3072):
        kernel, gram = jax.ShapeDtypeStruct((d_in, 96), jnp.float32), jax.ShapeDtypeStruct((d_in, d_in), jnp.float32)
        counts.add(equations(jax.make_jaxpr(lambda k, g: sparsegpt(k, g, pattern))(kernel, gram).jaxpr))
    assert len(counts) == 1
    assert counts.pop() > 100


def test_nm_that_does_not_divide():
    kernel, _, gram = problem(100)
    with pytest.raises(JpruneError, match="4:8 needs a number of inputs divisible by 8, it has 100"):
        solve(kernel, gram, NM(4, 8))
