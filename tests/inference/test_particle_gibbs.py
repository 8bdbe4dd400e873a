"""Conditional SMC leaves the posterior invariant: its own random choices are enumerated, without Monte Carlo error.

For every retained trace the sum over worlds of P(world) gives a row of the kernel's transition matrix K; pi K must be pi.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from scipy import stats
from scipy.special import logsumexp, softmax

from latentrace import inference, ppl
from latentrace.inference import chains
from latentrace.inference.chains import Target, draw_of
from latentrace.inference.mcmc import RandomWalk
from latentrace.inference.mcmc import mcmc as driver
from latentrace.inference.smc.conditional import CONDITIONAL_SCHEMES
from latentrace.inference.smc.smc import Resample
from latentrace.inference.smc.triggers import ESSBelow
from latentrace.ppl import errors
from latentrace.ppl.choices import WHOLE, Retained
from latentrace.ppl.collectives import PARTICLES, index
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.run import RetainingSource, Settings, arrays_of
from latentrace.ppl.staging import stage

from . import control_flow_cases, language_cases  # noqa: F401  (they fill the table)
from . import test_smc_exact as unconditional
from .cases import CASES

N, V, EOS = 2, 3, 2


class World(unconditional.World):
    """The choices of the free particle, and of resamplings given the retained one."""

    def uniforms(self, clock, weights, count):
        w = weights[0]
        whole = jnp.floor(2 * w)
        # two particles: place 1 draws its ancestor, or the number of place 0's offspring is drawn by size
        cut = w if count == 2 else (2 * w - whole) * (whole + 1) / jnp.maximum(2 * w, 1e-30)
        second = self.shared % 2
        chance = jnp.where(second == 1, 1 - cut, cut)
        u = jnp.where(second == 1, (cut + 1) / 2, cut / 2)
        paid = self.log_p_shared + jnp.log(chance)
        return jnp.full(count, u), self._replace(shared=self.shared // 2, log_p_shared=paid)


def kernel(
    program, retained, own: int, shared: int, inside_texts: bool, threshold: float, scheme: str, world_type=World, repeats=1
):
    """For each retained trace (leading axis), P(world) of every world, and log-weight and trace of both particles there.

    `repeats` is how many outcomes the draws of the retained particle have that are no part of its trace."""
    staged = stage(ppl.program(program), ())
    consts = {name: jnp.asarray(array) for name, array in staged.consts.items()}
    policy = Resample(ESSBelow(threshold), CONDITIONAL_SCHEMES[scheme], inside_texts)

    def one_world(trace, world):
        def one_particle(_):
            zero, mine, others = jnp.float32(0), index() == 0, world // own
            drawn = world_type(jnp.where(mine, others % repeats, world % own), others // repeats, zero, zero)
            state = first_state(staged, staged.models, Retained(drawn, trace, jnp.where(mine, WHOLE, 0)))
            run = Interpreter(staged, consts, staged.models, state, policy=policy)
            cells = run.walk(staged.jaxpr, [])
            return jnp.asarray(run.frame.get(cells[0])), run.state.log_weight, run.state.choices.drawn

        traces, log_weight, choices = jax.vmap(one_particle, axis_name=PARTICLES)(jnp.zeros(N))
        spent = (choices.own == 0).all() & (choices.shared[1] == 0)  # else this world repeats one with fewer digits
        log_p_own = choices.log_p_own[1] + (choices.log_p_own[0] if repeats > 1 else 0.0)
        log_p = jnp.where(spent, log_p_own + choices.log_p_shared[1], -jnp.inf)
        return jnp.exp(log_p), log_weight, traces

    worlds = jnp.arange(own * repeats * 2**shared)
    return jax.jit(jax.vmap(lambda trace: jax.vmap(one_world, (None, 0))(trace, worlds)))(retained)


def text():
    """A text whose weights move after each token, and after it; no particle can die."""
    promise = jnp.asarray(unconditional.PROMISE)
    twist = lambda t: promise[t.length - 1, t.tokens[t.length - 1]]
    proposal = ppl.proposals.temperature(1.7)
    x, _ = ppl.generate("x", ppl.prompt(unconditional.LM), max_tokens=2, proposal=proposal, twist=twist)
    ppl.factor("reward", jnp.asarray(unconditional.REWARD)[x.tokens].sum())
    return x.tokens


def text_density(path):
    a, b = programs.padded(path.text(unconditional.LM, (), 2), 2, EOS)
    path.weigh(np.exp(unconditional.REWARD[a] + unconditional.REWARD[b]))
    return a, b


# program, density, outcomes of a particle's draws, resamplings, whether inside texts, trace from what is returned
KERNELS = {
    "loop": (*unconditional.CASES["loop"], lambda x: {"x": x[:, :, None]}),
    "text": (text, text_density, V**2, 2, True, lambda x: {"x": x}),
    "branches": (*unconditional.CASES["branches"], lambda x: {"k": x[:, 0], "x": x[:, 1:], "b": x[:, 1]}),
}


def check_invariance(names, posterior, p, log_weight, traces):
    """The posterior over traces of these names is that after one more step."""
    p, log_weight, traces = (np.asarray(x, np.float64) for x in (p, log_weight, traces))
    weight = softmax(log_weight, axis=-1)
    transition = np.zeros((len(names), len(names)))
    for i in range(len(names)):
        np.testing.assert_allclose(p[i].sum(), 1.0, atol=1e-5)
        for k in range(N):
            for x, mass in zip(traces[i, :, k].astype(int).tolist(), p[i] * weight[i, :, k]):
                if mass > 0:  # what is impossible has no name
                    transition[i, names.index(tuple(x))] += mass
    np.testing.assert_allclose(transition.sum(1), 1.0, atol=1e-5)
    assert (transition > 0).sum() > len(names), "the chain moves"
    np.testing.assert_allclose(posterior @ transition, posterior, atol=2e-6)


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
@pytest.mark.parametrize("threshold", [0.8, 1.1])
@pytest.mark.parametrize("case", KERNELS)
def test_the_posterior_is_invariant(case, threshold, scheme):
    program, density, own, shared, inside_texts, split = KERNELS[case]
    target = {x: p for x, p in programs.measure(programs.paths(density)).items() if p > 0}
    names = list(target)
    posterior = np.array([target[x] for x in names]) / sum(target.values())
    retained = {k: jnp.asarray(v, jnp.int32) for k, v in split(np.array(names)).items()}
    p, log_weight, traces = kernel(program, retained, own, shared, inside_texts, threshold, scheme)
    check_invariance(names, posterior, p, log_weight, traces)
    p, log_weight = np.asarray(p, np.float64), np.asarray(log_weight, np.float64)
    # around an exact trace 1 / Z_hat is unbiased, what the upper bound on the evidence rests on, but for runs that all die
    inverse = posterior @ (p / np.exp(logsumexp(log_weight, axis=-1) - np.log(N))).sum(1)
    assert inverse * sum(target.values()) < 1 + 1e-5
    assert case != "text" or abs(inverse * sum(target.values()) - 1) < 1e-5


REPEATED = [
    "reverse scan over data",
    "jit in scan in cond in while",
    "plate in scan with scan inside",
]


LONG = pytest.param("plate of texts from one context", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*REPEATED, LONG])
def test_the_retained_particle_repeats_its_trace(name):
    """In loops in either direction, branches and plates, and through resampling."""
    target = target_of(CASES[name].program)
    policy = inference.SMC(8, ess_threshold=0.9, resample="multinomial").policy()
    first = target.population(jax.random.key(0), Settings(8, policy=policy))
    draw = draw_of(first, jnp.argmax(first.log_weight))
    policy = policy._replace(resampler=CONDITIONAL_SCHEMES["multinomial"])
    second = target.population(jax.random.key(2), Settings(8, RetainingSource(), policy), trace=target.choices(draw))
    jax.tree.map(np.testing.assert_array_equal, draw_of(second, jnp.int32(0)), draw)
    others = jax.tree.leaves(jax.tree.map(lambda x: (x[1:] != x[0]).any(), second.values))
    assert any(others), "the others draw"


def target_of(program):
    staged = stage(program, ())
    return Target(staged.skeleton(), arrays_of(staged), {})


@ppl.program
def drifting(ys):
    """A random walk with unknown drift and scale, seen through noise: its posterior is known by quadrature below."""
    drift = ppl.sample("drift", dist.Normal(0.5, 1.0))

    def step(x, y):
        x = ppl.sample("x", dist.Normal(x + drift, 1.0))
        ppl.observe("y", dist.Normal(x, 0.5), y)
        return x, x

    return jax.lax.scan(step, 0.0, ys)[1]


YS = np.array([0.4, -0.3, 1.2, 2.9], np.float32)


def drift_posterior():
    """Mean and variance of the drift and of each x: all is jointly normal."""
    n = len(YS)
    # x_t = t * drift + a sum of t steps
    times = np.arange(1, n + 1)
    walk = np.minimum.outer(times, times).astype(float)
    mean = np.append(0.5, 0.5 * times)
    covariance = np.block([[np.ones((1, 1)), times[None, :]], [times[:, None], np.outer(times, times) + walk]])
    seen = covariance[1:, 1:] + 0.25 * np.eye(n)
    gain = np.linalg.solve(seen, covariance[1:]).T
    return mean + gain @ (YS - mean[1:]), np.diag(covariance - gain @ covariance[1:])


SAMPLERS = {
    "iterated conditional SMC": inference.ParticleGibbs(16, 1500, num_warmup=20),
    "systematic": inference.ParticleGibbs(16, 1500, num_warmup=20, resample="systematic", ess_threshold=1.1),
    "particle Gibbs": inference.ParticleGibbs(8, 1500, RandomWalk(drift=0.6), num_warmup=20, num_chains=2),
    "PMMH": inference.PMMH(RandomWalk(drift=0.9), inference.SMC(16), 1500, num_warmup=20),
}


def check_moments(posterior):
    """Means and variances of a chain over `drifting` are right, within its own errors."""
    mean, variance = drift_posterior()
    draws = np.concatenate([posterior.values["drift"][:, None], posterior.values["x"]], axis=1)
    squares = (draws - mean) ** 2
    for i in range(len(mean)):
        error = posterior.error(draws[:, i])
        assert 0 < error < 0.1, "too noisy for the test to tell anything"
        assert abs(draws[:, i].mean() - mean[i]) < 5 * error
        assert abs(squares[:, i].mean() - variance[i]) < 5 * posterior.error(squares[:, i])


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_of_a_linear_gaussian_program(name):
    check_moments(SAMPLERS[name].run(jax.random.key(1), drifting, YS))


def test_texts_and_words_of_a_chain():
    """A chain over texts: what it says agrees with enumeration, and its table has errors."""
    exact = inference.Exact().run(jax.random.key(0), text)
    posterior = inference.ParticleGibbs(8, 1500).run(jax.random.key(2), text)
    truth = {row.value: row.probability for row in exact.marginal("x")}
    for row in posterior.marginal("x").top(3):
        assert 0 < row.error < 0.05
        assert abs(row.probability - truth[row.value]) < 5 * row.error
    assert posterior.chains == 1
    assert "1500 draws of 1 chain" in repr(posterior)
    assert posterior.ledger.tokens_generated > 1500
    with pytest.raises(ValueError, match="SMC and importance sampling do"):
        posterior.log_evidence  # noqa: B018


@pytest.mark.slow
def test_bounds_hold_the_evidence_between_them():
    """The evidence of a simulated walk is known: all is jointly normal."""
    simulated = noisy.simulate(jax.random.key(3)).values
    program = noisy.condition({"y": simulated["y"]})
    covariance = np.minimum.outer(np.arange(1, 7), np.arange(1, 7)) + 0.25 * np.eye(6)
    truth = stats.multivariate_normal.logpdf(simulated["y"], np.zeros(6), covariance)
    for scheme in ("multinomial", "systematic"):
        bounds = inference.smc.evidence_bounds(
            jax.random.key(0), program, trace={"x": simulated["x"]}, smc=inference.SMC(3, resample=scheme), num_runs=300
        )
        assert bounds.lower + 3 * bounds.lower_error < truth < bounds.upper - 3 * bounds.upper_error
    sharp = inference.smc.evidence_bounds(
        jax.random.key(0), program, trace={"x": simulated["x"]}, smc=inference.SMC(500), num_runs=40
    )
    assert abs(sharp.gap) < bounds.gap / 4
    with pytest.raises(errors.SiteError, match="no conditional form of resampling 'ssp'"):
        inference.smc.evidence_bounds(jax.random.key(0), program, trace={}, smc=inference.SMC(8, resample="ssp"))
    with pytest.raises(errors.SiteError, match="no value for site 'x'"):
        inference.smc.evidence_bounds(jax.random.key(0), program, trace={}, smc=inference.SMC(8))
    with pytest.raises(errors.SiteNameError, match="no random site 'y' to repeat"):
        inference.smc.evidence_bounds(jax.random.key(0), program, trace=simulated, smc=inference.SMC(8))


@ppl.program
def noisy():
    """A random walk whose noisy observations are sampled, so that they can be simulated and given."""

    def step(x, _):
        x = ppl.sample("x", dist.Normal(x, 1.0))
        return x, ppl.sample("y", dist.Normal(x, 0.5))

    return jax.lax.scan(step, 0.0, None, length=6)[1]


def test_bad_input():
    with pytest.raises(errors.SiteError, match="at least 2"):
        inference.ParticleGibbs(1, 10)
    with pytest.raises(errors.SiteError, match=r"no conditional resampling 'sistematic'.*systematic"):
        inference.ParticleGibbs(4, 10, resample="sistematic")
    with pytest.raises(errors.SiteError, match="must be positive"):
        RandomWalk(drift=0.0)
    with pytest.raises(errors.SiteError, match="at least one site"):
        RandomWalk()
    with pytest.raises(errors.SiteNameError, match="'drfit' to move: did you mean 'drift'"):
        inference.ParticleGibbs(4, 10, RandomWalk(drfit=1.0)).run(jax.random.key(0), drifting, YS)
    with pytest.raises(errors.SiteError, match="'ceil_residual' is biased"):
        inference.PMMH(RandomWalk(x=1.0), inference.SMC(4, resample="ceil_residual"), 10)
    impossible = ppl.program(lambda: ppl.condition("never", ppl.sample("x", dist.Bernoulli(0.5)) > 1))
    with pytest.raises(errors.AllParticlesDeadError, match="'never'"):
        inference.ParticleGibbs(4, 10).run(jax.random.key(0), impossible)
    with pytest.raises(errors.AllParticlesDeadError, match="'never'"):
        inference.PMMH(RandomWalk(x=1.0), inference.SMC(4), 10).run(jax.random.key(0), impossible)


def test_an_interrupt_keeps_the_draws_so_far(monkeypatch):
    count = 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        return chains.check(*args)

    monkeypatch.setattr(driver, "check", interrupted)
    posterior = inference.ParticleGibbs(4, 100).run(jax.random.key(0), drifting, YS)
    assert 2 <= len(posterior.values["drift"]) < 100
