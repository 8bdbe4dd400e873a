"""Resample-move is exactly unbiased: its draws, resamplings, cuts, redraws and refusals are enumerated.

For every trace x the sum over worlds of P(world) * Z_hat * (posterior weight of x) must be p(x), the unnormalised density.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from scipy import stats

from latentrace import inference, ppl
from latentrace.inference.mcmc.regenerate import log_ratio
from latentrace.inference.smc.resampling import SCHEMES
from latentrace.inference.smc.smc import Resample
from latentrace.inference.smc.triggers import ESSBelow
from latentrace.ppl import cuts, errors, run
from latentrace.ppl.choices import Retained
from latentrace.ppl.run import Prefixes, Settings
from latentrace.ppl.segments import SegmentedRun
from latentrace.ppl.staging import stage

from . import control_flow_cases, language_cases  # noqa: F401  (they fill the table)
from .cases import CASES, M2, J
from .test_against_enumeration import check_sampler, staged_once  # noqa: F401  (a fixture)
from .test_particle_gibbs import YS, drift_posterior, drifting
from .test_tempering import t_statistics
from .worlds import World, systematic_cuts

N = 2


class Digits(NamedTuple):
    """In place of a key: digits of each particle, and those that all share."""

    own: Any
    shared: Any

    def world(self, particle):
        zero = jnp.float32(0)
        return World(self.own[particle], self.shared, zero, zero, two_places)


def two_places(weights):
    return systematic_cuts(weights, N)[:1]


class FromDigits(NamedTuple):
    def choices(self, rng_key, particle, trace):
        return rng_key.world(particle)


class RepeatedFromDigits(NamedTuple):
    def choices(self, rng_key, particle, trace):
        mine = jax.tree.map(lambda x: x[particle], trace)
        return Retained(rng_key.world(particle), mine.values, mine.cuts)


def steps():
    """Draws in a loop, each rewarded and twisted, after one before it; some are impossible."""
    k = ppl.sample("k", dist.Bernoulli(0.35))

    def step(before, w):
        x = ppl.sample("x", dist.Bernoulli(0.3 + 0.4 * before))
        ppl.factor("reward", w * x * (1 + k))
        ppl.condition("possible", (x == 1) | (before == 1) | (k == 0))
        ppl.twist("promise", 0.9 * x - 0.5 * k)
        return x, x

    last, xs = jax.lax.scan(step, k, jnp.array([0.8, -1.1]))
    ppl.factor("last", 0.4 * last)
    return jnp.concatenate([k[None], xs])


def steps_density(path):
    k = before = path.flip(0.35)
    out = [k]
    for w in (0.8, -1.1):
        x = path.flip(0.3 + 0.4 * before)
        path.weigh(np.exp(w * x * (1 + k)) * ((x == 1) | (before == 1) | (k == 0)))
        before = x
        out.append(x)
    path.weigh(np.exp(0.4 * before))
    return out


def texts():
    """Texts of one or two tokens and of one, with a proposal and a twist."""
    x, context = ppl.generate("x", ppl.prompt(M2), max_tokens=2, proposal=ppl.proposals.temperature(1.6))
    ppl.factor("reward", J[x.tokens].sum() - 0.8 * x.length)
    ppl.twist("promise", 0.7 * x.length)
    y, _ = ppl.generate("y", ppl.extend(context, [1]), max_tokens=1)
    ppl.condition("possible", (x.length == 2) | (y.tokens[0] == 0))
    return jnp.concatenate([x.tokens, y.tokens])


def texts_density(path):
    x = path.text(M2, (), 2)
    tokens = programs.padded(x, 2)
    path.weigh(np.exp(sum(np.asarray(J)[list(tokens)]) - 0.8 * len(x)))
    y = path.text(M2, (1,), 1)
    path.weigh(len(x) == 2 or y[0] == 0)
    return *tokens, *y


def pair():
    """Two draws in a loop: few enough for moves at two cuts."""

    def step(before, w):
        x = ppl.sample("x", dist.Bernoulli(0.3 + 0.4 * before))
        ppl.factor("reward", w * x)
        ppl.twist("promise", 0.9 * x)
        return x, x

    last, xs = jax.lax.scan(step, 0, jnp.array([0.8, -1.1]))
    ppl.factor("last", 0.4 * last)
    return xs


def pair_density(path):
    x = path.flip(0.3)
    y = path.flip(0.3 + 0.4 * x)
    path.weigh(np.exp(0.8 * x - 1.1 * y + 0.4 * y))
    return x, y


class Case(NamedTuple):
    program: Any
    density: Any
    own: int
    """outcomes of a particle's draws"""
    asked: int
    """how often the population may resample"""
    at: dict[int, tuple[int, int]]
    """for each cut at which particles move, their choices and the outcomes of a redraw there"""


CUTS = {
    "twice": Case(pair, pair_density, 4, 4, {1: (1, 2), 2: (2, 4)}),
    "in a loop": Case(steps, steps_density, 8, 6, {2: (2, 4)}),
    "texts": Case(texts, texts_density, 8, 4, {1: (2, 4)}),
    "texts, at the end": Case(texts, texts_density, 8, 4, {3: (3, 8)}),
}
SLOW = [(name, threshold) for name in CUTS for threshold in (0.0, 0.8)] + [("in a loop", 1.1), ("texts, at the end", 1.1)]


def estimated(case: Case, threshold: float) -> tuple[float, dict]:
    """The sum of P(world), and of P(world) * Z_hat * weight over each trace."""
    staged = stage(ppl.program(case.program), ())
    policy = Resample(ESSBelow(threshold), SCHEMES["systematic"], inside_texts=False)
    radices = [case.own] * N + [2**case.asked]
    for made, redraws in case.at.values():
        radices += [made, redraws, 2] * N
    strides = np.cumprod([1, *radices])

    def one_world(world):
        digits = iter([world // int(s) % r for s, r in zip(strides, radices)])
        take = lambda: next(digits)
        key = Digits(jnp.stack([take() for _ in range(N)]), take())
        filtering = SegmentedRun(staged, key, {}, Settings(N, FromDigits(), policy))
        p, cut = jnp.float32(1), 0
        while not filtering.done:
            filtering.advance()
            cut += 1
            if not filtering.done:
                cuts.renew(filtering)
            if cut in case.at:
                chosen, redraw, accept = (jnp.stack(d) for d in zip(*[(take(), take(), take()) for _ in range(N)]))
                now = filtering.output()
                trace = Prefixes(cuts.choices_of(filtering, now.values), chosen)
                regenerating = Settings(N, RepeatedFromDigits())
                other = SegmentedRun(staged, Digits(redraw, jnp.int32(0)), {}, regenerating, trace=trace)
                cuts.to_the_same_cut(filtering, other)
                after = other.boundary.whole(N).state
                chance = jnp.exp(jnp.minimum(log_ratio(cuts.log_rise(filtering, other), now.made, after.made), 0.0))
                drawn = after.choices.drawn
                p *= jnp.where(chosen < now.made, 1 / now.made, 0.0).prod()
                p *= jnp.where(drawn.own == 0, jnp.exp(drawn.log_p_own), 0.0).prod()
                p *= jnp.where(accept == 1, chance, 1 - chance).prod()
                cuts.replace(filtering, other, accept == 1)
        choices = filtering.boundary.whole(N).state.choices
        spent = (choices.own == 0).all() & (choices.shared == 0).all()  # else this world repeats one with fewer digits
        p *= jnp.where(spent, jnp.exp(choices.log_p_own.sum() + choices.log_p_shared[0]), 0.0)
        output = filtering.output()
        return p, output.log_weight, output.returned[0]

    total, measure, chunk, worlds = 0.0, {}, 2**16, int(strides[-1])
    over_worlds = jax.jit(jax.vmap(one_world))
    for first in range(0, worlds, chunk):
        numbers = first + jnp.arange(min(chunk, worlds))
        p, log_weight, traces = (np.asarray(x) for x in over_worlds(numbers))
        p = np.where(np.asarray(numbers) < worlds, p.astype(np.float64), 0.0)
        total += p.sum()
        mass = p[:, None] * np.exp(log_weight.astype(np.float64)) / N
        rows, where = np.unique(traces.reshape(-1, traces.shape[-1]), axis=0, return_inverse=True)
        for row, found in zip(rows.tolist(), np.bincount(where.ravel(), mass.ravel())):
            measure[tuple(row)] = measure.get(tuple(row), 0.0) + found
    return total, measure


QUICK = [("twice", 1.1), ("texts", 1.1)]


@pytest.mark.parametrize(("name", "threshold"), [*QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in SLOW)])
def test_expected_weighted_measure_is_the_target(name, threshold):
    case = CUTS[name]
    target = programs.measure(programs.paths(case.density))
    total, found = estimated(case, threshold)
    assert total == pytest.approx(1.0, abs=1e-5)
    for trace in {*target, *found}:
        error = found.get(trace, 0.0) - target.get(trace, 0.0)
        assert abs(error) < 1e-5 * sum(target.values()), (trace, error)


# --- whole runs -------------------------------------------------------------------------------------------------------


VARIED = [
    "while loop stops by data",
    "reverse scan over data",
    "cond returns a context",
    "jit in scan in cond in while",
    "plate in scan with scan inside",
    "plate of texts from one context",
    "twist inside a text",
]


@pytest.fixture
def problem(request):
    found = CASES[request.param]
    return found, programs.measure(programs.paths(found.oracle))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@pytest.mark.parametrize("problem", VARIED, indirect=True)
def test_against_enumeration(problem):
    check_sampler(problem, inference.ResampleMove(inference.SMC(600, ess_threshold=0.9)))


def log_evidence():
    """Of the random walk with unknown drift: its observations are jointly normal."""
    times = np.arange(1, len(YS) + 1)
    covariance = np.outer(times, times) + np.minimum.outer(times, times) + 0.25 * np.eye(len(YS))
    return stats.multivariate_normal(0.5 * times, covariance).logpdf(YS)


@pytest.mark.slow
def test_early_choices_become_many_again():
    """Of the drift, the first choice, plain SMC keeps few values; moves bring new ones. All moments are known."""
    smc = inference.SMC(200, ess_threshold=1.1)
    plain, moved = smc, inference.ResampleMove(smc, num_moves=4)
    mean, variance = drift_posterior()
    truth = [1.0, mean[0], mean[1], variance[0] + mean[0] ** 2]
    estimates, distinct = [], []
    for seed in range(16):
        key = jax.random.key(seed)
        before, after = plain.run(key, drifting, YS), moved.run(key, drifting, YS)
        distinct.append([len(np.unique(p.values["drift"])) for p in (before, after)])
        drift, first = after.values["drift"], after.values["x"][:, 0]
        ratio = np.exp(after.log_evidence - log_evidence())
        estimates.append([ratio, *(ratio * after.weights @ v for v in (drift, first, drift**2))])
    assert (np.abs(t_statistics(estimates, truth)) < 6).all(), (np.mean(estimates, 0), truth)
    few, many = np.mean(distinct, axis=0)
    assert many > 1.5 * few, (few, many)


@pytest.mark.slow
def test_cost_and_cuts():
    smc = inference.SMC(16, ess_threshold=0.9)
    algorithm = inference.ResampleMove(smc, num_moves=2)
    posterior = algorithm.run(jax.random.key(0), texts)
    traced = run.traced, len(run._compiled)
    again = algorithm.run(jax.random.key(1), texts)
    assert (run.traced, len(run._compiled)) == traced, "a second run compiles nothing"
    plain = smc.run(jax.random.key(0), texts)
    # cuts after x, after y and at the end: two moves at each run the program that far
    assert posterior.ledger.potential_calls == 16 * (3 + 2 * (0 + 2 + 3))
    assert posterior.ledger.tokens_generated > 5 * plain.ledger.tokens_generated
    assert not np.array_equal(posterior.values["x"].tokens, again.values["x"].tokens)
    seldom = inference.ResampleMove(smc, every=2).run(jax.random.key(0), texts)
    assert seldom.ledger.potential_calls == 16 * (3 + 2 + 3)
    assert np.asarray(posterior.values["x"].log_probs).shape == (16, 2)


def test_errors():
    for settings, message in [({"num_moves": 0}, "num_moves must be at least 1"), ({"every": 0}, "every must be at least 1")]:
        with pytest.raises(errors.SiteError, match=message):
            inference.ResampleMove(inference.SMC(8), **settings)
    with pytest.raises(errors.SiteError, match="num_particles must be at least 2"):
        inference.ResampleMove(inference.SMC(1))
    with pytest.raises(errors.SiteError, match="no random choice"):
        inference.ResampleMove(inference.SMC(8)).run(jax.random.key(0), lambda: ppl.factor("f", 1.0))

    def never():
        ppl.sample("k", dist.Bernoulli(0.5))
        ppl.condition("never", jnp.asarray(False))

    with pytest.raises(errors.AllParticlesDeadError, match="'never'"):
        inference.ResampleMove(inference.SMC(4)).run(jax.random.key(0), never)

    def rare():
        """NaN, which the filter itself seldom meets."""
        ppl.factor("odd", jnp.where(ppl.sample("x", dist.Normal(0.0, 1.0)) > 1.5, jnp.nan, 0.0))

    with pytest.raises(errors.NonFiniteError, match="'odd'"):
        inference.ResampleMove(inference.SMC(4), num_moves=40).run(jax.random.key(1), rare)
