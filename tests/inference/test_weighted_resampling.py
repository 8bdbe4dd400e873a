"""Resampling after which weights differ, and the scheme that is biased: exact in the uniform number, which is integrated."""

from fractions import Fraction
from functools import cache
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace.inference.smc import Branching, Tempered
from latentrace.inference.smc.resampling import SCHEMES, largest_power, optimal, powered
from latentrace.ppl import errors

EPS = float(np.finfo(np.float32).eps)
BELOW_ONE = np.float32(1) - np.float32(2**-24)


def uneven(seed: int, m: int, spread: float, dead: int = 0) -> np.ndarray:
    """Normalised weights float32[m], the logarithms of which have standard deviation `spread`; some are 0."""
    rng = np.random.default_rng(seed)
    weights = np.exp(spread * rng.normal(size=m))
    weights[rng.choice(m, dead, replace=False)] = 0
    return (weights / weights.sum()).astype(np.float32)


WEIGHTS = [uneven(0, 12, 0.3), uneven(1, 12, 1.5), uneven(2, 12, 3.0), uneven(3, 12, 1.0, dead=5), uneven(4, 12, 1.0, dead=9)]


def integrated(weights, chosen_by, places, sums) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square, float64[M], of sums(u), which is constant between the u at which one of the points
    (i + u) / places of the cumulative `chosen_by` passes from one particle to the next."""
    cumulative = np.cumsum(np.asarray(chosen_by), dtype=np.float64)
    edges = np.unique([0.0, *(places * cumulative / max(cumulative[-1], EPS) % 1), 1.0])
    middles = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
    found = np.stack([sums(jnp.asarray(weights), jnp.asarray([u])) for u in middles]).astype(np.float64)
    return np.diff(edges) @ found, np.diff(edges) @ found**2


def rounding(weights) -> float:
    """A cut is found to within M eps, and there are M of them; what is summed on either side is at most 1."""
    return len(weights) ** 2 * EPS


def threshold(weights, count: int) -> float:
    """The c of Fearnhead and Clifford: sum_j min(1, c w_j) = count, by bisection; where nobody has to go, large enough."""
    low, high = 0.0, 2 / weights[weights > 0].min().astype(np.float64)
    if (weights > 0).sum() <= count:
        return high
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * weights.astype(np.float64)).sum() < count else (low, c)
    return c


@cache
def jitted(count: int):
    return jax.jit(lambda weights, uniforms: optimal(weights, count, uniforms)[1])


@pytest.mark.parametrize("count", [1, 4, 7, 11, 12])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_optimal_choice_is_unbiased_and_has_the_least_variance(weights, count):
    c = threshold(weights, count)
    kept = c * weights >= 1
    mean, square = integrated(weights, np.where(kept, 0, weights), count - kept.sum(), jitted(count))
    np.testing.assert_allclose(mean, weights, atol=rounding(weights), rtol=0)
    variance = (square - mean**2).sum()

    def systematic(w, u):
        drawn = jnp.searchsorted(jnp.cumsum(w), (jnp.arange(count) + u) / count, side="right")
        return jnp.bincount(drawn.clip(0, len(w) - 1), length=len(w)) / count

    others = [(weights * (1 - weights)).sum() / count]  # multinomial
    mean, square = integrated(weights, weights, count, jax.jit(systematic))
    others.append((square - mean**2).sum())
    assert variance <= min(others) + rounding(weights)
    assert count == 1 or variance < others[0]


@pytest.mark.parametrize("count", [1, 4, 7, 12])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_survivors_weigh_what_they_should(weights, count):
    """Large ones as before, all others 1/c."""
    c = threshold(weights, count)
    for u in (0.0, 0.3, 0.9):
        survives, after = (np.asarray(x) for x in optimal(jnp.asarray(weights), count, jnp.asarray([u])))
        assert survives.sum() == min(count, (weights > 0).sum())
        assert survives[c * weights > 1].all()
        np.testing.assert_allclose(after[survives], np.maximum(weights, 1 / c)[survives], rtol=len(weights) * EPS)
        assert (after[~survives] == 0).all()


@pytest.mark.parametrize("alive", [1, 7, 13, 23, 48])
def test_nothing_is_random_where_all_can_stay(alive):
    weights = uneven(alive, alive, 0.0)  # equal ones, whose sums are rounded
    for u in (0.0, 0.5, BELOW_ONE):
        survives, after = optimal(jnp.append(weights, 0), alive, jnp.asarray([u]))
        np.testing.assert_array_equal(survives, [*[True] * alive, False])
        np.testing.assert_array_equal(after, [*weights, 0])


@pytest.mark.parametrize(("m", "branches"), [(2, 2), (3, 2), (65, 5), (1000, 4), (4096, 2)])
@pytest.mark.parametrize("dead", [0.0, 0.5, 0.98])
def test_branches_of_large_populations(m, branches, dead):
    weights = uneven(m, m, 2.0, dead=int(dead * m))
    resample = jax.jit(Branching(branches))
    for u in (0.0, 0.5, BELOW_ONE):
        ancestors, after = (np.asarray(x) for x in resample(weights, jnp.asarray([u])))
        copies = np.bincount(ancestors, minlength=m)
        assert (weights[copies > 0] > 0).all()
        assert (copies > 0).sum() == min(m // branches, (weights > 0).sum())
        assert np.ptp(copies[copies > 0]) <= 1
        assert copies.sum() == m
        assert abs(after.astype(np.float64).sum() - 1) < m * EPS


@pytest.mark.parametrize("ess", [0.3, 0.9])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_tempered_resampling_is_unbiased(weights, ess):
    resample, m = jax.jit(Tempered(ess)), len(weights)

    def sums(w, u):
        ancestors, after = resample(w, u)
        return jnp.zeros(m).at[ancestors].add(after)

    chosen_by = powered(jnp.asarray(weights), largest_power(jnp.asarray(weights), ess))
    mean, _ = integrated(weights, chosen_by, m, sums)
    np.testing.assert_allclose(mean, weights, atol=rounding(weights), rtol=0)


@pytest.mark.parametrize("ess", [0.3, 0.9])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_tempered_weights_have_the_wanted_effective_size(weights, ess):
    power = float(largest_power(jnp.asarray(weights), ess))
    alive = weights[weights > 0].astype(np.float64)
    size = lambda a: (alive**a).sum() ** 2 / (alive ** (2 * a)).sum()
    if size(1) >= ess * len(alive):
        assert power == 1
    else:
        # a step of the bisection multiplies a weight by its 2^-24th power; sizes are sums of sums
        error = 2 * EPS * (len(weights) + np.abs(np.log(alive)).max())
        np.testing.assert_allclose(size(power), ess * len(alive), rtol=error)
        assert power < 1


def test_nothing_is_tempered_where_weights_are_even():
    weights, u = uneven(0, 12, 0.3), jnp.asarray([0.4])
    tempered, plain = Tempered(0.5)(weights, u), SCHEMES["systematic"](weights, u)
    np.testing.assert_array_equal(tempered.ancestors, plain.ancestors)
    np.testing.assert_allclose(tempered.weights, plain.weights, rtol=len(weights) * EPS)


def rebase(weights: np.ndarray) -> list[int]:
    """How many continuations REBASE gives each, in exact arithmetic: shares of what is left, rounded up, heaviest first."""
    exact = [Fraction(float(w)) for w in weights]
    left, total, places = len(weights), sum(exact), [0] * len(weights)
    for j in sorted(range(len(weights)), key=lambda j: -exact[j]):
        places[j] = ceil(left * exact[j] / total) if total else 0
        left, total = left - places[j], total - exact[j]
    return places


@pytest.mark.parametrize("weights", [*WEIGHTS, uneven(5, 300, 1.0, dead=40), np.full(7, 1 / 7, np.float32)])
def test_rounding_up_is_that_of_rebase(weights):
    ancestors = np.asarray(SCHEMES["ceil_residual"].ancestors(jnp.asarray(weights), jnp.asarray([0.5])))
    assert np.bincount(ancestors, minlength=len(weights)).tolist() == rebase(weights)


def test_errors():
    with pytest.raises(errors.SiteError, match="ess must be between 0 and 1, a part of the population, not 50"):
        Tempered(50)
    with pytest.raises(errors.SiteError, match="did you mean 'systematic'"):
        Tempered(0.5, "sistematic")
    with pytest.raises(errors.SiteError, match="'ceil_residual' is biased"):
        Tempered(0.5, "ceil_residual")
