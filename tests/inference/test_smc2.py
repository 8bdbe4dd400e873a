"""SMC^2: its estimates are unbiased, with few parameters and small filters too."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference.mcmc import RandomWalk
from latentrace.ppl import errors

from .test_particle_gibbs import YS, drift_posterior, drifting

LM = programs.markov(3, seed=4)
REWARD = jnp.array([0.8, -0.9, 0.3])


@ppl.program
def styles():
    """A style decides which tokens are liked, in a text and in a loop after it."""
    style = ppl.sample("style", dist.Categorical(jnp.array([0.5, 0.2, 0.3])))
    liked = jnp.roll(0.8 * REWARD, style)
    first, context = ppl.generate("first", ppl.prompt(LM), max_tokens=2)
    ppl.factor("first reward", liked[first.tokens].sum())

    def step(context, _):
        text, context = ppl.generate("x", context, max_tokens=1)
        ppl.factor("reward", liked[text.tokens[0]])
        return context, text.tokens[0]

    _, tokens = jax.lax.scan(step, context, length=2)
    return style, first.tokens, tokens


@dataclass(frozen=True)
class Switch:
    """Any other style, the next one more often."""

    sites = ("style",)

    def propose(self, rng_key, values):
        one = jax.random.bernoulli(rng_key, 0.7)
        there = jnp.where(one, 1, 2)
        return {"style": (values["style"] + there) % 3}, jnp.where(one, jnp.log(0.3 / 0.7), jnp.log(0.7 / 0.3))


def check_unbiased(algorithm, program, args, seeds, log_evidence, expected):
    """The means over seeds of Z_hat, and of Z_hat times the posterior mean of f, are Z and Z E[f]."""
    rows = []
    for seed in range(seeds):
        posterior = algorithm.run(jax.random.key(seed), program, *args)
        means = [posterior.expectation(f) for f, _ in expected]
        rows.append(np.exp(posterior.log_evidence - log_evidence) * np.array([1.0, *means]))
    rows = np.array(rows)
    truth = np.array([1.0, *[value for _, value in expected]])
    error = rows.std(0, ddof=1) / np.sqrt(seeds)
    assert (error < 0.2 * np.maximum(np.abs(truth), 0.5)).all(), (error, "too noisy to tell anything")
    assert (np.abs(rows.mean(0) - truth) < 4.5 * error).all(), (rows.mean(0), truth, error)


@pytest.mark.slow
def test_unbiased_on_an_enumerable_program():
    exact = inference.Exact().run(jax.random.key(0), styles)
    functions = [lambda t: t["style"] == 0, lambda t: t["style"] == 2, lambda t: t["x"].tokens[..., 1, 0] == 1,
                 lambda t: t["first"].tokens[..., 0] == 2]  # fmt: skip
    assert all(0.1 < exact.expectation(f) < 0.9 for f in functions), "rare events would tell nothing"
    expected = [(f, exact.expectation(f)) for f in functions]
    algorithm = inference.SMC2(4, Switch(), inference.SMC(2, 0.9), num_moves=2, moves_at=(1, 2))
    check_unbiased(algorithm, styles, (), 120, exact.log_evidence, expected)


def drift_evidence():
    """Log density of the observations: they are jointly normal."""
    times = np.arange(1, len(YS) + 1)
    covariance = np.minimum.outer(times, times) + np.outer(times, times) + 0.25 * np.eye(len(YS))
    rest = YS - 0.5 * times
    return float(-0.5 * (rest @ np.linalg.solve(covariance, rest) + np.linalg.slogdet(2 * np.pi * covariance)[1]))


@pytest.mark.slow
def test_unbiased_on_a_linear_gaussian_program():
    mean, variance = drift_posterior()
    expected = [(lambda t: t["drift"], mean[0]), (lambda t: (t["drift"] - mean[0]) ** 2, variance[0]),
                (lambda t: t["x"][..., 0], mean[1]), (lambda t: t["x"][..., -1], mean[-1])]  # fmt: skip
    algorithm = inference.SMC2(16, RandomWalk(drift=0.6), inference.SMC(8), ess_threshold=0.9)
    check_unbiased(algorithm, drifting, (YS,), 200, drift_evidence(), expected)


def test_moves_make_new_parameters_and_are_paid():
    few = inference.SMC2(8, RandomWalk(drift=0.5), inference.SMC(8), moves_at=(1, 3))
    assert few.schedule(jax.random.key(0), drifting, YS) == few.schedule(jax.random.key(0), drifting, YS)
    always = inference.SMC2(8, RandomWalk(drift=0.5), inference.SMC(8), ess_threshold=1.1)
    assert always.schedule(jax.random.key(0), drifting, YS) == (1, 2, 3, 4), "all but the last"
    posterior = few.run(jax.random.key(0), drifting, YS)
    assert len(np.unique(posterior.values["drift"])) > 3
    assert len(np.unique(posterior.roots)) > 3
    plain = inference.SMC2(8, Switch(), inference.SMC(4), moves_at=()).run(jax.random.key(0), styles)
    moved = inference.SMC2(8, Switch(), inference.SMC(4), moves_at=(1, 2), num_moves=3).run(jax.random.key(0), styles)
    assert moved.ledger.tokens_generated > 2 * plain.ledger.tokens_generated > 0


@ppl.program
def late():
    ppl.sample("early", dist.Normal(0.0, 1.0))
    ppl.sample("theta", dist.Normal(0.0, 1.0))


def test_bad_input():
    walk, smc = RandomWalk(theta=1.0), inference.SMC(4)
    with pytest.raises(errors.SiteError, match="num_particles must be at least 1, not 0"):
        inference.SMC2(0, walk, smc)
    with pytest.raises(errors.SiteError, match=r"moves_at are numbers of cuts, counted from 1, not \(0,\)"):
        inference.SMC2(4, walk, smc, moves_at=(0,))
    with pytest.raises(errors.SiteError, match="'ceil_residual' is biased"):
        inference.SMC2(4, walk, inference.SMC(4, resample="ceil_residual"))
    with pytest.raises(errors.SiteError, match="site 'early' is drawn before or together with a parameter"):
        inference.SMC2(4, walk, smc).run(jax.random.key(0), late)
    with pytest.raises(errors.SiteNameError, match="no random site 'theta' to move"):
        inference.SMC2(4, walk, smc).run(jax.random.key(0), drifting, YS)
    impossible = ppl.program(lambda: ppl.condition("never", ppl.sample("theta", dist.Normal(0.0, 1.0)) > 1e9))
    with pytest.raises(errors.AllParticlesDeadError, match="'never'"):
        inference.SMC2(4, walk, smc).run(jax.random.key(0), impossible)
