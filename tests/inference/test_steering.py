"""SMC steering, triggers and biased resampling as algorithms: what a user sees of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference.smc import Branching, EveryK, Tempered
from latentrace.ppl import errors

KEY = jax.random.key(0)
LM = programs.markov(4, seed=1)


@ppl.program
def rewarded():
    """A loop of draws, each rewarded and twisted: the population may resample before all but the first."""
    u = ppl.sample("u", dist.Normal())

    def step(x, i):
        x = ppl.sample("x", dist.Normal(x, 1.0))
        ppl.observe("y", dist.Normal(x, 0.4), 0.5 * i)
        ppl.twist("promise", -0.3 * jnp.abs(x - 0.5 * i))
        return x, x

    return jax.lax.scan(step, u, jnp.arange(4))[1]


def evidences(algorithm, program, runs: int = 12):
    return np.exp([algorithm.run(jax.random.key(i), program).log_evidence for i in range(runs)])


def test_candidates_of_steering_are_weighed_against_exact_inference():
    @ppl.program
    def program():
        text, _ = ppl.generate("x", ppl.prompt(LM), max_tokens=4, twist=lambda t: 0.8 * (t.tokens == 1).sum())
        ppl.factor("reward", 0.7 * (text.tokens == 1).sum())

    exact = np.exp(inference.Exact().run(KEY, program).log_evidence)
    steering = inference.SMCSteering(16, branches=4)
    posterior = steering.run(KEY, program)
    assert len(posterior.log_weights) == 64
    assert not posterior.biased
    found = evidences(steering, program)
    assert abs(found.mean() - exact) < 6 * found.std(ddof=1) / np.sqrt(len(found))


def test_every_survivor_has_as_many_branches():
    """The last choice, seen in the draw before it: eight survivors of three branches each."""
    posterior = inference.SMCSteering(8, branches=3).run(KEY, rewarded)
    before_last, counts = np.unique(posterior.values["x"][:, :3], axis=0, return_counts=True)
    assert (counts == 3).all()
    assert len(before_last) == 8
    assert len(np.unique(posterior.values["x"][:, 3])) == 24


def test_nobody_chooses_twice_by_the_same_weights():
    """A draw that follows another without a weight in between is no reason to resample, at the start of a loop neither."""

    def drawn(loop: bool):
        def program():
            x = ppl.sample("x", dist.Normal())
            ppl.factor("reward", -(x**2))
            y = ppl.sample("y", dist.Normal())
            if loop:
                jax.lax.scan(lambda _, __: (ppl.sample("z", dist.Normal(y)),) * 2, 0.0, None, length=2)

        return program

    for algorithm in (inference.SMCSteering(4, branches=3), inference.SMC(12, 1.1, resample="multinomial")):
        once, asked_again = (algorithm.run(KEY, drawn(loop)) for loop in (False, True))
        np.testing.assert_array_equal(once.roots, asked_again.roots)
        assert len(np.unique(once.roots)) < 12
        assert len(np.unique(asked_again.values["y"])) == 12


@pytest.mark.slow
def test_triggers_see_chances_to_resample():
    """The loop of four steps may resample three times, though its weights move eight times."""
    runs = {
        "never": inference.SMC(20, 0.0),
        "always": inference.SMC(20, 1.1),
        1: inference.SMC(20, when=EveryK(1)),
        2: inference.SMC(20, when=EveryK(2)),
        4: inference.SMC(20, when=EveryK(4)),
    }
    found = {name: algorithm.run(KEY, rewarded).log_weights for name, algorithm in runs.items()}
    np.testing.assert_array_equal(found[1], found["always"])
    np.testing.assert_array_equal(found[4], found["never"])
    assert len({tuple(found[k]) for k in (1, 2, 4)}) == 3


def test_other_ways_to_resample_find_the_evidence():
    ys = 0.5 * np.arange(4)
    # y is normal: x_i - x_j has covariance 2 + min(i, j), the variance of u included
    covariance = 2 + np.minimum.outer(np.arange(4), np.arange(4)) + 0.4**2 * np.eye(4)
    exact = np.exp(-0.5 * ys @ np.linalg.solve(covariance, ys)) / np.sqrt(np.linalg.det(2 * np.pi * covariance))
    for algorithm in (
        inference.SMC(200, 0.9, resample=Tempered(0.6)),
        inference.SMC(200, resample=Tempered(0.6, "multinomial"), when=EveryK(2)),
        inference.SMC(200, 1.1, resample=Branching(4)),
    ):
        found = evidences(algorithm, rewarded)
        assert abs(found.mean() - exact) < 6 * found.std(ddof=1) / np.sqrt(len(found))


def test_biased_resampling_says_so():
    posterior = inference.SMC(8, 1.1, resample="ceil_residual").run(KEY, rewarded)
    assert posterior.biased
    assert "biased resampling" in repr(posterior)
    assert posterior.sample(KEY, 3).biased
    assert not inference.SMC(8, 1.1).run(KEY, rewarded).biased


def test_errors():
    with pytest.raises(errors.SiteError, match="num_particles must be at least 1, not 0"):
        inference.SMCSteering(0, 2)
    with pytest.raises(errors.SiteError, match="branches must be at least 2, not 1"):
        inference.SMCSteering(4, 1)
    with pytest.raises(errors.SiteError, match="SMCSteering: granularity is 'token' or 'site', not 'text'"):
        inference.SMCSteering(4, 2, granularity="text")
    with pytest.raises(errors.SiteError, match="k must be at least 1, not 0"):
        EveryK(0)
    with pytest.raises(errors.SiteError, match="did you mean 'systematic'"):
        inference.SMC(4, resample="systematics")

    @ppl.program
    def impossible():
        ppl.condition("never", ppl.sample("x", dist.Bernoulli(0.5)) > 1)
        ppl.sample("y", dist.Bernoulli(0.5))

    with pytest.raises(errors.AllParticlesDeadError, match="'never'"):
        inference.SMCSteering(2, 2).run(KEY, impossible)
