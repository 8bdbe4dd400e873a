"""Resampling schemes one by one: who has offspring, how many, and how much that varies."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import inference
from latentrace.inference.smc.resampling import SCHEMES

UNBIASED = [name for name, scheme in SCHEMES.items() if not scheme.biased]
BELOW_ONE = np.float32(1) - np.float32(2**-24)
WEIGHTS = np.array([0.05, 0.41, 0.0, 0.32, 0.22], np.float32)


@cache
def jitted(scheme):
    return jax.jit(SCHEMES[scheme].ancestors)


def weights_with_zeros(rng, n: int, alive: float) -> np.ndarray:
    """Normalised weights of very different sizes, most of them 0, the last ones too."""
    weights = np.exp(3 * rng.normal(size=n)) * (rng.random(n) < alive)
    weights[n - n // 3 :] = 0
    weights[0 if n < 3 else n // 2] += 1e-3
    return (weights / weights.sum()).astype(np.float32)


def at_boundaries(weights: np.ndarray) -> list[np.float32]:
    """Offsets at which a resampling point falls on or beside a float32 prefix sum."""
    cumulative = np.asarray(jnp.cumsum(jnp.asarray(weights)))
    fractions = (cumulative / cumulative[-1] * len(weights) % 1).astype(np.float32)
    beside = [np.nextafter(fractions, np.float32(to)) for to in (0, 1)]
    return [u for u in np.unique(np.concatenate([fractions, *beside])) if 0 <= u < 1]


@pytest.mark.parametrize("n", [1, 2, 3, 65, 1000, 4096])
@pytest.mark.parametrize("alive", [0.9, 0.5, 0.02])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_particles_are_never_ancestors(n, alive, scheme):
    rng = np.random.default_rng(n)
    weights = weights_with_zeros(rng, n, alive)
    every = [*rng.choice(at_boundaries(weights), 6), np.float32(0), BELOW_ONE]
    numbers = [np.full(n, u) for u in every] + [rng.random(n).astype(np.float32).clip(0, BELOW_ONE) for _ in range(3)]
    ancestors = np.stack([jitted(scheme)(weights, u[:1] if SCHEMES[scheme].single else u) for u in numbers])
    assert (weights[ancestors] > 0).all()
    assert (np.diff(ancestors, axis=1) >= 0).all()


def offspring_of(scheme, draws: int = 40_000) -> np.ndarray:
    """Numbers of offspring int[draws, N] of independent resamplings of `WEIGHTS`."""
    count = 1 if SCHEMES[scheme].single else len(WEIGHTS)
    uniforms = jax.random.uniform(jax.random.key(0), (draws, count))
    ancestors = jax.jit(jax.vmap(partial(SCHEMES[scheme].ancestors, jnp.asarray(WEIGHTS))))(uniforms)
    return (np.asarray(ancestors)[:, :, None] == np.arange(len(WEIGHTS))).sum(1)


@pytest.mark.parametrize("scheme", UNBIASED)
def test_offspring_are_unbiased(scheme):
    offspring, expected = offspring_of(scheme), len(WEIGHTS) * WEIGHTS
    error = offspring.std(0) / np.sqrt(len(offspring))
    assert (np.abs(offspring.mean(0) - expected) <= 5 * error + 1e-6).all()
    if scheme in {"systematic", "ssp"}:
        assert (offspring >= np.floor(expected - 1e-6)).all()
        assert (offspring <= np.ceil(expected + 1e-6)).all()
    if scheme == "residual":
        assert (offspring >= np.floor(expected)).all()


def test_variances_are_in_the_known_order():
    variance = {scheme: offspring_of(scheme).var(0).sum() for scheme in UNBIASED}
    assert variance["multinomial"] > 1.5 * variance["residual"]
    assert variance["residual"] > variance["ssp"]
    assert variance["multinomial"] > 1.5 * variance["stratified"]
    np.testing.assert_allclose(variance["multinomial"], (5 * WEIGHTS * (1 - WEIGHTS)).sum(), rtol=0.05)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.7, 0.999])
def test_uniform_weights_leave_everybody_in_place(u):
    n = 64
    for scheme in ("systematic", "residual", "ssp", "ceil_residual"):
        ancestors = jitted(scheme)(np.full(n, 1 / n, np.float32), np.full(1 if SCHEMES[scheme].single else n, u, np.float32))
        np.testing.assert_array_equal(ancestors, np.arange(n))


@pytest.mark.parametrize("scheme", UNBIASED)
def test_schemes_in_smc(scheme):
    """Independent runs estimate the evidence of a program without bias."""
    import programs

    from latentrace import ppl

    lm = programs.markov(3, seed=1)

    @ppl.program
    def program():
        text, _ = ppl.generate("x", ppl.prompt(lm), max_tokens=4, twist=lambda text: 0.8 * (text.tokens == 1).sum())
        ppl.factor("reward", 0.7 * (text.tokens == 1).sum())

    exact = inference.Exact().run(jax.random.key(0), program).log_evidence
    runs = [inference.SMC(64, 0.9, resample=scheme).run(jax.random.key(i), program).log_evidence for i in range(12)]
    ratio = np.exp(np.array(runs) - exact)
    assert abs(ratio.mean() - 1) < 6 * ratio.std(ddof=1) / np.sqrt(len(ratio))
