"""Inner samplers: a program with `ppl.nested` means the same as with the function called in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl import errors

LM = programs.hmm(2, 3, seed=4)
REWARD = np.array([0.7, -1.1, 0.4])
SEEDS, LIMIT = 16, 6.0


def make(run):
    """A text in a loop, each line rewarded by how the text may end, which `run` makes of a function."""

    @ppl.program
    def program():
        def step(context, i):
            line, context = ppl.generate("line", context, max_tokens=1)

            def rest():
                end, _ = ppl.generate("end", context, max_tokens=2)
                ppl.twist("promise", 0.8 * jnp.asarray(REWARD)[end.tokens[0]])
                bonus = ppl.sample("bonus", dist.Bernoulli(0.3))
                ppl.factor("reward", jnp.asarray(REWARD)[end.tokens[0]] * (1 + bonus) - 0.4 * i)
                ppl.condition("not silent", (end.length + line.tokens[0]) > 0)
                return end.tokens[0] + 3 * bonus

            return context, (line.tokens[0], run(rest)())

        _, (lines, ends) = jax.lax.scan(step, ppl.prompt(LM, [1]), jnp.arange(2))
        return jnp.concatenate([lines, ends])

    return program


def sampled(num_samples, **options):
    return make(lambda rest: ppl.nested("which", rest, num_samples=num_samples, **options))


@pytest.fixture(scope="module")
def exact():
    posterior = inference.Exact().run(jax.random.key(0), make(lambda rest: rest))
    measure = programs.measure(zip(np.asarray(posterior.returned), posterior.weights))
    return posterior.log_evidence, measure


SLOW = [(1, 0.0, 0.0), (4, 0.0, 0.0), (1, 0.9, 0.0), (4, 0.0, 0.9), (4, 0.9, 0.0)]


@pytest.mark.parametrize(
    ("num_samples", "threshold", "inner"), [(4, 0.9, 0.9), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_the_target_is_that_of_the_function_itself(num_samples, threshold, inner, exact):
    program = sampled(num_samples, ess_threshold=inner)
    log_evidence, target = exact
    likely = sorted(target, key=target.get)[-4:]
    estimates = []
    for seed in range(SEEDS):
        posterior = inference.SMC(400, threshold).run(jax.random.key(seed), program)
        measure = programs.measure(zip(np.asarray(posterior.returned), posterior.weights))
        assert set(measure) <= set(target)
        ratio = np.exp(posterior.log_evidence - log_evidence)
        estimates.append([ratio, *(ratio * measure.get(r, 0.0) for r in likely)])
    error = np.std(estimates, axis=0, ddof=1) / np.sqrt(SEEDS)
    assert (error < 0.03).all(), "too noisy for the test to tell anything"
    t = (np.mean(estimates, axis=0) - [1.0, *(target[r] for r in likely)]) / error
    assert (np.abs(t) < LIMIT).all(), t


@pytest.mark.slow
def test_more_samples_estimate_the_evidence_better():
    spread = [
        np.std([inference.ImportanceSampling(200).run(jax.random.key(s), sampled(n)).log_evidence for s in range(12)])
        for n in (1, 16)
    ]
    assert spread[1] < 0.8 * spread[0]


def test_shapes_dead_samplers_and_refusals():
    posterior = inference.ImportanceSampling(6).run(jax.random.key(0), sampled(4))
    assert posterior.values["end"].tokens.shape == (6, 2, 4, 2)
    assert posterior.values["which"].shape == (6, 2)
    dead = make(
        lambda rest: ppl.nested("which", lambda: (rest(), ppl.condition("never", jnp.asarray(False)))[0], num_samples=3)
    )
    with pytest.raises(errors.AllParticlesDeadError, match="'which evidence'"):
        inference.SMC(5).run(jax.random.key(0), dead)
    with pytest.raises(errors.NotEnumerableError, match="call its function in its place"):
        inference.Exact().run(jax.random.key(0), sampled(2))
    with pytest.raises(errors.SiteError, match=r"'bonus' is inside `ppl\.nested`"):
        inference.SMC(5).run(jax.random.key(0), sampled(2).condition({"bonus": np.zeros((2, 2), int)}))
    with pytest.raises(errors.SiteError, match="at least 1"):
        ppl.nested("x", lambda: 0, num_samples=0)


@pytest.mark.slow
def test_particle_gibbs_repeats_inner_samples(exact):
    posterior = inference.ParticleGibbs(8, 1200).run(jax.random.key(1), sampled(2))
    _, target = exact
    truth = sum(p * (r[0] == 1) for r, p in target.items())
    holds = (np.asarray(posterior.returned)[:, 0] == 1).astype(float)
    error = posterior.error(holds)
    assert 0 < error < 0.03
    assert abs(holds.mean() - truth) < 5 * error
