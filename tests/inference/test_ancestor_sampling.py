"""Particle Gibbs with ancestor sampling leaves the posterior invariant: its own choices are enumerated, no Monte Carlo error.

For every retained trace the sum over worlds of P(world) gives a row of the kernel's transition matrix K; pi K must be pi.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from scipy.special import softmax

from latentrace import inference, ppl
from latentrace.inference.chains import Target
from latentrace.inference.mcmc import RandomWalk
from latentrace.inference.smc.ancestor_sampling import Trace, pieces, sweep_of
from latentrace.inference.smc.conditional import CONDITIONAL_SCHEMES
from latentrace.inference.smc.smc import Resample
from latentrace.inference.smc.triggers import ESSBelow
from latentrace.ppl import errors
from latentrace.ppl.choices import WHOLE, Retained
from latentrace.ppl.collectives import over_particles
from latentrace.ppl.run import Settings, arrays_of
from latentrace.ppl.segments import names_in
from latentrace.ppl.staging import stage

from . import test_smc_exact as unconditional
from .test_particle_gibbs import YS, check_moments, drifting

N = 2
H2 = programs.hmm(3, 2, eos_id=1, seed=5)
M3 = programs.markov(3, eos_id=2, seed=36)
REWARD = np.array([0.9, -1.3, 0.4])


class World(unconditional.World):
    """The choices of the free particle, of its ancestors, and of the ancestors of the retained one."""

    def uniforms(self, clock, weights, count):
        """Of two particles one draws its ancestor by each call's last number: place 1, then place 0 by other weights."""
        cut, second = weights[0], self.shared % 2
        paid = self.log_p_shared + jnp.log(jnp.where(second == 1, 1 - cut, cut))
        u = jnp.where(second == 1, (cut + 1) / 2, cut / 2)
        return jnp.full(count, u), self._replace(shared=self.shared // 2, log_p_shared=paid)


class WorldSource(NamedTuple):
    """The world is the number that stands for the key: the free particle's digits, and those of the resamplings."""

    own: int

    def choices(self, world, particle, trace):
        mine, zero = particle == 0, jnp.float32(0)
        return Retained(
            World(jnp.where(mine, 0, world % self.own), world // self.own, zero, zero), trace, jnp.where(mine, WHOLE, 0)
        )


def loop():
    """Texts of a model with hidden states in a loop, twisted and rewarded; what was written is then read as a whole."""

    def step(context, i):
        text, context = ppl.generate("x", context, max_tokens=1)
        token = text.tokens[0]
        ppl.factor("reward", jnp.asarray(REWARD)[token] * (1 + 0.5 * i))
        ppl.twist("promise", 0.6 - 1.1 * token)
        return context, token

    _, tokens = jax.lax.scan(step, ppl.prompt(H2), jnp.arange(3))
    ppl.factor("pattern", 1.2 * (tokens[0] == tokens[2]) - 0.7 * tokens.sum())
    ppl.condition("not all the same", (tokens != tokens[0]).any())
    return tokens


def loop_density(path):
    x = programs.padded(path.text(H2, (), 3), 3, 1)
    path.weigh(np.exp(sum(REWARD[t] * (1 + 0.5 * i) for i, t in enumerate(x)) + 1.2 * (x[0] == x[2]) - 0.7 * sum(x)))
    path.weigh(len(set(x)) > 1)
    return x


def likeliest(probs):
    return probs >= np.sort(probs)[-2]


def straight():
    """Texts in a line, the second from a proposal that leaves out a token, which depends on what was written before; and
    branches by what was written, so that the rest of one trace need not fit the past of another."""
    x, context = ppl.generate("x", ppl.prompt(M3), max_tokens=1)
    a = x.tokens[0]
    ppl.factor("reward", jnp.asarray(REWARD)[a])
    y, context = ppl.generate("y", context, max_tokens=1, proposal=ppl.proposals.top_k(2))
    b = y.tokens[0]
    ppl.condition("not both", ~((a == 0) & (b == 0)))
    ppl.twist("promise", 0.8 * b - 0.3 * a)
    write = lambda: ppl.generate("z", context, max_tokens=1)[0].tokens[0]
    flip = lambda: ppl.sample("c", dist.Bernoulli(0.4)).astype(jnp.int32)
    z = jax.lax.cond(b == 1, write, flip)
    ppl.factor("last", 0.9 * (z == a) - 0.5 * z * b)
    return jnp.stack([a, b, z])


def straight_density(path):
    x = path.text(M3, (), 1)
    a = x[0]
    text = () if a == 2 else path.text(M3, x, 1, None, likeliest)
    b = text[0] if text else 2
    path.weigh(np.exp(REWARD[a]) * (not a == b == 0))
    z = path.text(M3, x + text, 1)[0] if b == 1 else path.flip(0.4)
    path.weigh(np.exp(0.9 * (z == a) - 0.5 * z * b))
    return a, b, z


def going():
    """A loop that ends by itself, after a parameter: traces differ in which of its steps are active."""
    shift = ppl.sample("shift", dist.Bernoulli(0.4))
    ppl.factor("prior", 0.8 * shift)

    def body(state):
        n, total, last = state
        ppl.bound(2)
        x = ppl.sample("x", dist.Bernoulli(0.3 + 0.4 * last))
        ppl.factor("reward", 0.9 * x - 0.4 * (x == last) + 0.5 * shift * n)
        return n + 1, total + 2**n * (1 + x), x

    start = jnp.int32(0), jnp.int32(0), shift.astype(jnp.int32)
    n, total, _ = jax.lax.while_loop(lambda s: (s[0] < 1) | ((s[0] < 2) & (s[2] == 1)), body, start)
    ppl.condition("not 1", total != 1)
    ppl.factor("parity", 0.7 * (total % 2))
    return jnp.stack([shift, n, total])


def going_density(path):
    shift = path.flip(0.4)
    path.weigh(np.exp(0.8 * shift))
    n, total, last = 0, 0, shift
    while n < 1 or (n < 2 and last == 1):
        x = path.flip(0.3 + 0.4 * last)
        path.weigh(np.exp(0.9 * x - 0.4 * (x == last) + 0.5 * shift * n))
        n, total, last = n + 1, total + 2**n * (1 + x), x
    path.weigh((total != 1) * np.exp(0.7 * (total % 2)))
    return shift, n, total


def backwards():
    """A loop with branches that runs from the end of its data, and reads what was drawn before it."""
    first = ppl.sample("first", dist.Bernoulli(0.6))

    def step(before, bias):
        up, down = lambda: ppl.sample("up", dist.Bernoulli(0.7)), lambda: ppl.sample("down", dist.Bernoulli(0.2))
        x = jax.lax.cond(before == 1, up, down)
        ppl.factor("reward", bias * x + 0.6 * (x == first))
        return x, x

    ppl.factor("prior", -0.5 * first)
    _, xs = jax.lax.scan(step, first, jnp.array([-0.8, 1.1]), reverse=True)
    ppl.factor("pattern", 0.9 * xs[0] * (1 - xs[1]))
    return jnp.concatenate([first[None], xs])


def backwards_density(path):
    first = before = path.flip(0.6)
    xs = [0, 0]
    for i in (1, 0):
        xs[i] = before = path.flip(0.7 if before else 0.2)
        path.weigh(np.exp([-0.8, 1.1][i] * xs[i] + 0.6 * (xs[i] == first)))
    path.weigh(np.exp(-0.5 * first + 0.9 * xs[0] * (1 - xs[1])))
    return first, *xs


# program, density, outcomes of the free particle's draws, cuts
CASES = {
    "loop": (loop, loop_density, 2**3, 3),
    "straight": (straight, straight_density, 3 * 3 * 3 * 2, 2),
    "going": (going, going_density, 2**3, 2),
    "backwards": (backwards, backwards_density, 2**5, 2),
}


def transitions(case, thresholds):
    """The posterior over traces, and for each threshold the kernel's transition matrix."""
    program, density, own, cuts = CASES[case]
    exact = inference.Exact().run(jax.random.key(0), program)
    target = {x: p for x, p in programs.measure(programs.paths(density)).items() if p > 0}
    names = [tuple(row) for row in np.asarray(exact.returned).tolist()]
    kept = [i for i, name in enumerate(names) if name in target]
    assert sorted(names[i] for i in kept) == sorted(target), "one trace for each result"
    names = [names[i] for i in kept]
    staged = stage(program, ())
    texts = {name: getattr(value, "tokens", value) for name, value in exact.values.items()}
    trace = jax.tree.map(lambda x: jnp.asarray(x)[jnp.asarray(kept)], Trace(texts, exact.active))

    def one_world(threshold, trace, world):
        policy = Resample(ESSBelow(threshold), CONDITIONAL_SCHEMES["multinomial"], False)
        target = Target(staged.skeleton(), arrays_of(staged), {})
        sweep = sweep_of(target, trace, {}, policy, Settings(N, WorldSource(own)))

        def one_particle():
            carried = sweep.to_the_end(world)
            output = sweep.drawing.output(carried, complete=True)
            return output.returned[0], output.log_weight, carried.state.choices.drawn

        found, log_weight, choices = over_particles(one_particle, N)
        spent = (choices.own[1] == 0) & (choices.shared[1] == 0)  # else this world repeats one with fewer digits
        log_p = jnp.where(spent, choices.log_p_own[1] + choices.log_p_shared[1], -jnp.inf)
        return jnp.exp(log_p), log_weight, found

    worlds = jnp.arange(own * 4**cuts)
    over_traces = jax.vmap(jax.vmap(one_world, (None, None, 0)), (None, 0, None))
    results = jax.jit(jax.vmap(over_traces, (0, None, None)))(jnp.asarray(thresholds), trace, worlds)
    matrices = []
    for p, log_weight, found in zip(*(np.asarray(x, np.float64) for x in results)):
        np.testing.assert_allclose(p.sum(1), 1.0, atol=1e-5)
        matrix = np.zeros((len(names), len(names)))
        mass = p[..., None] * softmax(log_weight, axis=-1)
        for i in range(len(names)):
            for x, m in zip(found[i].reshape(-1, found.shape[-1]).astype(int).tolist(), mass[i].ravel()):
                if m > 0:  # what is impossible has no name
                    matrix[i, names.index(tuple(x))] += m
        matrices.append(matrix)
    weights = np.array([target[name] for name in names])
    return names, weights / weights.sum(), matrices


@pytest.mark.parametrize("case", CASES)
def test_the_posterior_is_invariant(case):
    names, posterior, matrices = transitions(case, (0.8, 1.1))
    for matrix in matrices:
        np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-5)
        assert (matrix > 0).sum() > len(names), "the chain moves"
        np.testing.assert_allclose(posterior @ matrix, posterior, atol=2e-6)


def test_where_a_program_is_cut():
    """Before draws that follow a weight; loops stand by themselves, and those that draw nothing are no place to cut."""

    @ppl.program
    def program():
        a = ppl.sample("a", dist.Normal(0.0, 1.0))
        b = ppl.sample("b", dist.Normal(a, 1.0))
        jax.lax.scan(lambda _, x: (ppl.factor("data", -((b - x) ** 2)), None), None, jnp.arange(3.0))
        c = ppl.sample("c", dist.Normal(b, 1.0))
        xs = jax.lax.scan(lambda x, _: (ppl.sample("x", dist.Normal(x, 1.0)),) * 2, c, length=2)[1]
        ppl.factor("late", xs.sum())
        return xs

    staged = stage(program.fn, ())
    found = [({n for e in staged.jaxpr.eqns[p.start : p.stop] for n in names_in(e)}, p.is_loop) for p in pieces(staged, {})]
    assert [names for names, _ in found if names] == [{"a", "b", "data"}, {"c"}, {"x"}, {"late"}]
    assert [is_loop for names, is_loop in found if names] == [False, False, True, False]
    found = [names_in(e) for p in pieces(staged, {"x": 0}) for e in staged.jaxpr.eqns[p.start : p.start + 1]]
    assert not any("x" in names for names in found), "given values need no cut"


SAMPLERS = {
    "everything together": inference.ParticleGibbs(6, 1500, num_warmup=20, ess_threshold=0.8, ancestor_sampling=True),
    "parameters by Metropolis": inference.ParticleGibbs(
        3, 1500, RandomWalk(drift=0.8), num_warmup=20, num_chains=2, ess_threshold=1.1, ancestor_sampling=True
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_of_a_linear_gaussian_program(name):
    check_moments(SAMPLERS[name].run(jax.random.key(1), drifting, YS))


def test_early_steps_move_where_they_would_not():
    """Four particles and forty steps: all trace back to the retained one's start, unless it takes another past."""
    ys = np.cumsum(np.random.default_rng(0).normal(size=40)).astype(np.float32)

    def update_rates(**options):
        kernel = inference.ParticleGibbs(4, 300, RandomWalk(drift=0.3), ess_threshold=1.1, **options)
        x = kernel.run(jax.random.key(1), drifting, ys).values["x"]
        return (np.diff(x, axis=0) != 0).mean(axis=0)

    plain, sampled = update_rates(), update_rates(ancestor_sampling=True)
    print(f"updates of step 0: {plain[0]:.3f} without ancestor sampling, {sampled[0]:.3f} with it")
    assert plain[0] < 0.02 < 0.3 < sampled[0]
    assert sampled.min() > 0.1, "every step moves"


@pytest.mark.slow
def test_texts_agree_with_enumeration():
    """A chain over a loop of texts, and what it says it cost."""
    exact = inference.Exact().run(jax.random.key(0), loop)
    posterior = inference.ParticleGibbs(3, 1500, ancestor_sampling=True, ess_threshold=0.9).run(jax.random.key(2), loop)
    truth = {row.value: row.probability for row in exact.marginal("x")}
    for row in posterior.marginal("x").top(3):
        assert 0 < row.error < 0.04
        assert abs(row.probability - truth[row.value]) < 5 * row.error
    plain = inference.ParticleGibbs(3, 1500, ess_threshold=0.9).run(jax.random.key(2), loop)
    assert posterior.ledger.tokens_scored > plain.ledger.tokens_scored == 0
    assert posterior.ledger.model_calls > plain.ledger.model_calls


def test_bad_input():
    with pytest.raises(errors.SiteError, match="'systematic' resampling does not; take resample='multinomial'"):
        inference.ParticleGibbs(4, 10, resample="systematic", ancestor_sampling=True)
    inner = ppl.program(lambda: ppl.nested("inner", lambda: ppl.sample("x", dist.Normal(0.0, 1.0)), num_samples=2)())
    with pytest.raises(errors.SiteError, match=r"nested 'inner': ancestor sampling needs densities"):
        inference.ParticleGibbs(4, 10, ancestor_sampling=True).run(jax.random.key(0), inner)

    @ppl.program
    def broken():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.factor("reward", x)
        y = ppl.sample("y", dist.Normal(0.0, 1.0))
        ppl.factor("not a number", jnp.log(-1.0 + 0.0 * y))

    with pytest.raises(errors.NonFiniteError, match="'not a number'"):
        inference.ParticleGibbs(4, 10, ancestor_sampling=True).run(jax.random.key(0), broken)
