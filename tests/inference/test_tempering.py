"""Tempered and waste-free SMC: their own choices are enumerated, and runs agree with enumeration of the program.

A population of two (or four) is enumerated exactly: first traces, ancestors and moves, with the library's weighting and
resampling and the exact matrix of the regeneration move. For every trace x the sum over worlds of P(world) * Z_hat * (weight of
x) must be its density under the target.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, models, ppl
from latentrace.inference.chains import Draw, Traces
from latentrace.inference.smc.ladder import Population, following_power, resampled, weighted
from latentrace.inference.smc.resampling import SCHEMES
from latentrace.inference.smc.smc import Resample
from latentrace.inference.smc.triggers import ESSBelow
from latentrace.inference.smc.waste_free import ancestors
from latentrace.ppl import errors, run

from .cases import CASES
from .moves import enumerated
from .test_against_enumeration import check_sampler, staged_once  # noqa: F401  (a fixture)

POWERS = (0.35, 1.0)


class Uniform:
    """The choices of a resampling that is given its uniform number."""

    def __init__(self, u):
        self.u = u

    def uniforms(self, clock, weights, count):
        assert count == 1
        return self.u[None], self


class Worlds:
    """States of a population (trace numbers int[S, N], log-weights [S, N]) and their probabilities."""

    def __init__(self, particles: int):
        found = enumerated("short text")
        self.matrices = {power: found.transition(power) for power in POWERS}
        q = found.density * np.exp(-found.log_weight.astype(np.float64))
        self.evidence, self.target = found.density.sum(), found.density
        # all impossible traces are one, the last, from which nothing moves
        self.log_w = np.append(found.log_weight, -np.inf).astype(np.float32)
        q = np.append(q, 1 - q.sum())
        assert q[-1] > 0.05
        self.traces = np.array(list(itertools.product(range(len(q)), repeat=particles)))
        self.log_weights = np.zeros(self.traces.shape, np.float32)
        self.p = q[self.traces].prod(1)

    def reweigh(self, before, after):
        one = lambda log_weights, log_w: weighted(log_weights, log_w, jnp.float32(before), jnp.float32(after))[0]
        self.log_weights = np.asarray(jax.vmap(one)(self.log_weights, self.log_w[self.traces]))

    def resample(self, chosen, count):
        """By `chosen`, a function of a population and a uniform number, for each stretch of numbers with one outcome."""
        total = np.logaddexp.reduce(self.log_weights.astype(np.float64), axis=1, keepdims=True)
        alive = total[:, 0] > -np.inf  # else the run is over: Z_hat is 0
        self.keep(alive)
        cumulative = np.cumsum(np.exp(self.log_weights - total[alive]), axis=1)
        edges = np.sort(np.concatenate([cumulative * count % 1, np.zeros_like(total[alive]), np.ones_like(total[alive])], 1), 1)
        size, middle = np.diff(edges, axis=1), (edges[:, 1:] + edges[:, :-1]) / 2
        states, stretches = np.nonzero(size > 1e-9)

        def one(traces, log_weights, u):
            whole = Traces(Draw({"number": traces}, {}, []), jnp.zeros(len(traces)), traces)
            after = chosen(Population(whole, log_weights, traces), Uniform(u))
            return after.traces.draw.values["number"], after.log_weights

        numbers = middle[states, stretches].astype(np.float32)
        after = jax.jit(jax.vmap(one))(self.traces[states], self.log_weights[states], numbers)
        p = self.p[states] * size[states, stretches]
        self.traces, self.log_weights, self.p = *map(np.asarray, after), p
        assert (self.log_weights[self.log_w[self.traces] == -np.inf] == -np.inf).all(), "what is dead is not chosen"

    def keep(self, which):
        self.traces, self.log_weights, self.p = self.traces[which], self.log_weights[which], self.p[which]

    def kernel(self, power):
        """The moves' matrix, where what is impossible stays so."""
        matrix = self.matrices[power]
        return np.block([[matrix, np.zeros((len(matrix), 1))], [np.zeros((1, len(matrix))), np.ones((1, 1))]])

    def move(self, column, to, power):
        """Each state becomes as many as there are traces, in which what `to` holds has moved from `column`."""
        chance = self.kernel(power)[self.traces[:, column]]
        states, after = np.nonzero(chance > 0)
        traces = self.traces[states]
        traces[:, to] = after
        self.traces, self.log_weights, self.p = traces, self.log_weights[states], self.p[states] * chance[states, after]

    def measure(self, power=None):
        """The expected weighted measure, float64[X], after a last move of each particle if there is a power."""
        mass = self.p[:, None] * np.exp(self.log_weights.astype(np.float64)) / self.traces.shape[1]
        found = np.bincount(self.traces.ravel(), mass.ravel(), minlength=len(self.log_w))
        return (found if power is None else found @ self.kernel(power))[:-1]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.1])
def test_tempered_smc_is_unbiased(threshold):
    policy = Resample(ESSBelow(threshold), SCHEMES["systematic"], inside_texts=False)
    worlds = Worlds(2)
    worlds.reweigh(0.0, POWERS[0])
    worlds.resample(lambda population, choices: resampled(population, policy, choices)[0], 2)
    for column in range(2):
        worlds.move(column, column, POWERS[0])
    worlds.reweigh(*POWERS)
    worlds.resample(lambda population, choices: resampled(population, policy, choices)[0], 2)
    np.testing.assert_allclose(worlds.measure(POWERS[1]), worlds.target, atol=1e-5 * worlds.evidence)


@pytest.mark.parametrize(("particles", "length"), [(2, 2), (3, 3), (4, 2)])
def test_waste_free_smc_is_unbiased(particles, length):
    worlds = Worlds(particles)
    worlds.reweigh(0.0, POWERS[0])
    count = particles // length
    worlds.resample(lambda population, choices: ancestors(population, count, choices), count)
    worlds.traces = np.concatenate([worlds.traces] * length, axis=1)
    worlds.log_weights = np.concatenate([worlds.log_weights] * length, axis=1)
    for column in range(particles - count):
        worlds.move(column, column + count, POWERS[0])
    worlds.reweigh(*POWERS)
    np.testing.assert_allclose(worlds.measure(), worlds.target, atol=1e-5 * worlds.evidence)


# --- whole runs -------------------------------------------------------------------------------------------------------

RUNS = {
    "adaptive": inference.TemperedSMC(600, num_moves=2),
    "fixed": inference.TemperedSMC(600, temperatures=(0.0, 0.3, 1.0), ess_threshold=0.9, resample="ssp"),
    "waste-free": inference.WasteFreeSMC(600, chain_length=20),
}
WASTE_FREE = pytest.param("waste-free", marks=pytest.mark.slow)
VARIED = [
    "reverse scan over data",
    "cond returns a context",
    "constraint and temperature",
    "jit in scan in cond in while",
    "plate in scan with scan inside",
    "plate of texts from one context",
    "top k restricts",
]


@pytest.fixture
def problem(request):
    found = CASES[request.param]
    return found, programs.measure(programs.paths(found.oracle))


@pytest.mark.usefixtures("staged_once")
@pytest.mark.parametrize("problem", ["while loop stops by data"], indirect=True)
@pytest.mark.parametrize("algorithm", ["adaptive", pytest.param("fixed", marks=pytest.mark.slow), WASTE_FREE])
def test_against_enumeration(problem, algorithm):
    check_sampler(problem, RUNS[algorithm])


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@pytest.mark.parametrize("problem", VARIED, indirect=True)
def test_against_enumeration_on_the_rest(problem):
    check_sampler(problem, RUNS["adaptive"])


def t_statistics(estimates, truth):
    """Of independent runs: each tells its own error. |t| with 15 degrees of freedom passes 6 once in 40,000 times."""
    estimates = np.asarray(estimates, np.float64)
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    assert (error < 0.2 * np.abs(truth)).all(), "too noisy for the test to tell anything"
    return (estimates.mean(0) - truth) / error


ALPHA = 4.0
LM = models.MarkovLM([-0.4, -0.9, 0.4], [[0.0, 0.0, 0.0], [-0.9, 1.6, 0.2], [0.2, 0.9, 0.1]], 0)


@ppl.program
def sharpened(lm):
    text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=5)
    ppl.factor("power", (ALPHA - 1) * text.log_probs.sum())


@pytest.mark.parametrize("algorithm", ["adaptive", "waste-free"])
def test_from_p_to_its_power(algorithm):
    """Where plain sampling seldom meets what p^4 favours: all texts of a Markov chain, enumerated."""
    exact = inference.Exact().run(jax.random.key(0), sharpened, LM)
    statistics = lambda posterior: [posterior.probability(lambda v, n=n: v["text"].length == n) for n in (1, 2, 5)]
    truth = [1.0, *statistics(exact)]
    assert min(truth) > 0.01, truth
    estimates = []
    for seed in range(16):
        posterior = RUNS[algorithm].run(jax.random.key(seed), sharpened, LM)
        ratio = np.exp(posterior.log_evidence - exact.log_evidence)
        estimates.append([ratio, *(ratio * np.array(statistics(posterior)))])
    assert (np.abs(t_statistics(estimates, truth)) < 6).all(), (np.mean(estimates, 0), truth)


A, C, BONUS, PRIOR = 1.5, 8.0, 2.2, 0.3


@ppl.program
def rewarded():
    """A continuous site whose reward is far from its prior, after a discrete one."""
    k = ppl.sample("k", dist.Bernoulli(PRIOR))
    x = ppl.sample("x", dist.Normal(-1.0 * k, 1.0))
    ppl.factor("reward", A * C * x - 0.5 * C * x**2 + BONUS * k)  # best at x = 1.5


def rewarded_moments():
    """log evidence, P(k = 1), E[x], E[x^2] by completing the square, for each k."""
    m = np.array([0.0, -1.0])
    variance = 1 / (1 + C)
    mean = (m + A * C) * variance
    log_z = 0.5 * np.log(variance) + 0.5 * mean**2 / variance - 0.5 * m**2 + np.array([0, BONUS])
    weights = np.exp(log_z - log_z.max()) * np.array([1 - PRIOR, PRIOR])
    log_evidence = log_z.max() + np.log(weights.sum())
    p = weights / weights.sum()
    return log_evidence, p[1], p @ mean, p @ (mean**2 + variance)


@pytest.mark.parametrize("algorithm", ["adaptive", WASTE_FREE])
def test_a_reward_of_a_continuous_site(algorithm):
    log_evidence, *moments = rewarded_moments()
    estimates = []
    for seed in range(16):
        posterior = RUNS[algorithm].run(jax.random.key(seed), rewarded)
        k, x = posterior.values["k"], posterior.values["x"]
        ratio = np.exp(posterior.log_evidence - log_evidence)
        estimates.append([ratio, *(ratio * posterior.weights @ v for v in (k, x, x**2))])
    assert (np.abs(t_statistics(estimates, [1.0, *moments])) < 6).all(), (np.mean(estimates, 0), moments)


# --- temperatures, cost, errors ---------------------------------------------------------------------------------------


def test_the_next_temperature():
    rng = np.random.default_rng(0)
    log_w = np.append(rng.normal(0, 40, 200), -np.inf).astype(np.float32)
    log_weights = np.append(rng.normal(0, 1, 200), 3.0).astype(np.float32)
    power = float(following_power(log_weights, log_w, jnp.float32(0.1), jnp.float32(0.5)))
    before, u = np.exp(log_weights[:-1].astype(np.float64)), np.exp((power - 0.1) * log_w[:-1].astype(np.float64))
    before /= before.sum()
    assert 0.1 < power < 1
    assert (before @ u) ** 2 / (before @ u**2) == pytest.approx(0.5, abs=2e-3)
    assert float(following_power(log_weights, 0.01 * log_w, jnp.float32(0.1), jnp.float32(0.5))) == 1.0


def test_a_ladder_is_found_in_a_pilot_run_and_may_be_handed_over():
    algorithm = RUNS["adaptive"]
    first = algorithm.run(jax.random.key(1), sharpened, LM)
    traced = run.traced
    again = algorithm.run(jax.random.key(1), sharpened, LM)
    given = replace(algorithm, temperatures=first.ladder.temperatures).run(jax.random.key(1), sharpened, LM)
    algorithm.run(jax.random.key(2), sharpened, LM)
    assert run.traced == traced, "a second run compiles nothing"
    for other in (again, given):
        assert other.ladder == first.ladder
        np.testing.assert_array_equal(other.values["text"].tokens, first.values["text"].tokens)
    assert first.ladder[-1].power == 1
    assert list(first.ladder.temperatures) == sorted(set(first.ladder.temperatures))
    assert all(0 < rung.accepted < 1 and 1 <= rung.ess <= 600.001 for rung in first.ladder)
    assert len(repr(first.ladder).splitlines()) == len(first.ladder) + 1
    # each move decodes every trace once, and so does the pilot run
    passes = 1 + 2 * len(given.ladder)
    assert 600 * passes < given.ledger.tokens_generated <= 600 * passes * 5
    assert given.ledger.potential_calls == 600 * passes
    assert first.ledger.potential_calls == 600 * passes * 2
    assert given.ledger.model_calls <= 6 * passes
    assert 0 < given.ledger.utilisation <= 1


def test_the_cost_of_waste_free():
    posterior = RUNS["waste-free"].run(jax.random.key(0), sharpened, LM)
    rungs = posterior.ladder
    assert len(rungs) > 1
    # the last temperature moves nothing; the pilot run has as many temperatures
    assert posterior.ledger.potential_calls == 2 * (600 + 30 * 19 * (len(rungs) - 1))
    assert [np.isnan(rung.accepted) for rung in rungs] == [False] * (len(rungs) - 1) + [True]
    assert len(posterior.weights) == 600
    assert 0 < posterior.ledger.utilisation <= 1


def test_faults_of_runs():
    small = inference.TemperedSMC(4, temperatures=(1.0,))

    @ppl.program
    def never():
        ppl.sample("k", dist.Bernoulli(0.5))
        ppl.condition("never", jnp.asarray(False))

    with pytest.raises(errors.AllParticlesDeadError, match="'never'"):
        small.run(jax.random.key(0), never)

    @ppl.program
    def nan():
        ppl.factor("odd", jnp.where(ppl.sample("k", dist.Bernoulli(0.5)) == 1, jnp.nan, 0.0))

    with pytest.raises(errors.NonFiniteError, match="'odd'"):
        inference.TemperedSMC(4, temperatures=(1.0,), num_moves=8).run(jax.random.key(0), nan)

    @ppl.program
    def steep():
        ppl.factor("steep", 1e12 * ppl.sample("x", dist.Normal(0.0, 1.0)))

    with pytest.raises(errors.RunError, match="hardly rises"):
        inference.TemperedSMC(20).run(jax.random.key(0), steep)


WRONG = [
    (inference.TemperedSMC, {"num_particles": 1}, "num_particles must be at least 2"),
    (inference.TemperedSMC, {"num_particles": 8, "num_moves": 0}, "num_moves must be at least 1"),
    (inference.TemperedSMC, {"num_particles": 8, "temperatures": (0.5, 0.4, 1.0)}, "increase from above 0 to 1"),
    (inference.TemperedSMC, {"num_particles": 8, "temperatures": (0.5, 0.9)}, "increase from above 0 to 1"),
    (inference.TemperedSMC, {"num_particles": 8, "temperatures": ()}, "increase from above 0 to 1"),
    (inference.TemperedSMC, {"num_particles": 8, "ess_threshold": 1.1}, "between 0 and 1"),
    (inference.TemperedSMC, {"num_particles": 8, "resample": "sytematic"}, "did you mean 'systematic'"),
    (inference.WasteFreeSMC, {"num_particles": 1, "chain_length": 2}, "num_particles must be at least 2"),
    (inference.WasteFreeSMC, {"num_particles": 8, "chain_length": 1}, "chain_length must be at least 2"),
    (inference.WasteFreeSMC, {"num_particles": 8, "chain_length": 3}, "multiple of chain_length"),
    (inference.WasteFreeSMC, {"num_particles": 8, "chain_length": 2, "temperatures": (2.0,)}, "increase from above 0 to 1"),
]


@pytest.mark.parametrize(("algorithm", "settings", "message"), WRONG)
def test_errors(algorithm, settings, message):
    with pytest.raises(errors.SiteError, match=message):
        algorithm(**settings)


def test_a_program_without_a_random_choice():
    with pytest.raises(errors.SiteError, match="no random choice"):
        inference.TemperedSMC(4).run(jax.random.key(0), lambda: ppl.factor("f", 1.0))
