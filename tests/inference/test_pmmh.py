"""Metropolis-Hastings moves leave the posterior invariant: proposals, worlds of the SMC and acceptances are enumerated."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

from latentrace import inference, ppl
from latentrace.inference.chains import Target
from latentrace.inference.mcmc import LogRandomWalk, RandomWalk, metropolis
from latentrace.inference.smc import pmmh
from latentrace.ppl.collectives import PARTICLES, index
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage

from .test_smc_exact import CODES, LM, REWARD, N, V, World

LOGITS = np.array([0.3, -0.9, 0.5])
Q = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]])
"""Probability that the row's value proposes the column's: far from symmetric."""


@ppl.program
def program():
    """A parameter, one token whose reward depends on it, and one more after a resampling."""
    k = ppl.sample("k", dist.Categorical(logits=jnp.asarray(LOGITS)))
    x, context = ppl.generate("x", ppl.prompt(LM), max_tokens=1)
    ppl.factor("reward", (1.0 + 0.8 * k) * jnp.asarray(REWARD)[x.tokens[0]])
    y, _ = ppl.generate("y", context, max_tokens=1)
    ppl.factor("last", -0.7 * (y.tokens[0] == k))
    return jnp.stack([k, x.tokens[0], y.tokens[0]])


class Table(NamedTuple):
    """A proposal of known probabilities, whose outcome is named in place of a key."""

    sites: tuple = ("k",)

    def propose(self, key, values):
        then = key["k"]
        q = jnp.asarray(Q)
        return {"k": then}, jnp.log(q[then, values["k"]]) - jnp.log(q[values["k"], then])


class Worlds(NamedTuple):
    """The source of choices of one world, whose number stands in place of a key."""

    own: int = V**2

    def choices(self, rng_key, particle, trace):
        zero = jnp.float32(0)
        world = rng_key["world"]
        return World(world // self.own**particle % self.own, world // self.own**N, zero, zero, (zero,) * CODES["systematic"])


class EnumeratedTarget(Target):
    def population(self, rng_key, settings, given=None, trace=None):
        return super().population(rng_key, settings._replace(source=Worlds()), given or {})


@pytest.fixture
def enumerated(monkeypatch):
    """Keys become dictionaries that name outcomes; the argument of the acceptance is what the state reports."""
    random = SimpleNamespace(split=lambda key, n=2: [key] * n, categorical=lambda key, log_weight: key["pick"])
    for module in (pmmh, metropolis):
        monkeypatch.setattr(module, "jax", SimpleNamespace(nn=jax.nn, tree=jax.tree, random=random))
    seen = []
    for module in (pmmh, metropolis):
        monkeypatch.setattr(module, "accepts", lambda key, log_ratio: seen.append(log_ratio) or jnp.asarray(True))
    return seen


def target_of(fn, kind=Target):
    staged = stage(fn, ())
    return kind(staged.skeleton(), arrays_of(staged), {})


def probabilities(smc, k, world):
    """P(world) of the SMC given k, and whether it is a world of its own: float32[]."""
    staged = stage(program, ())
    consts = {name: jnp.asarray(array) for name, array in staged.consts.items()}

    def one_particle(_):
        choices = Worlds().choices({"world": world}, index(), {})
        state = first_state(staged, staged.models, choices)
        run = Interpreter(staged, consts, staged.models, state, given={"k": k}, policy=smc.policy())
        run.walk(staged.jaxpr, [])
        return run.state.choices

    choices = jax.vmap(one_particle, axis_name=PARTICLES)(jnp.zeros(N))
    spent = (choices.own == 0).all() & (choices.shared == 0).all()
    return jnp.where(spent, jnp.exp(choices.log_p_own.sum() + choices.log_p_shared[0]), 0.0)


@pytest.mark.parametrize("threshold", [0.5, 1.1])
def test_pmmh_keeps_parameters_and_estimate_invariant(enumerated, threshold):
    """The chain of (k, world of its estimate): its law is P(world | k) Z(k, world), and k's margin is the posterior."""
    kernel = pmmh.MarginalMetropolis(inference.SMC(N, threshold), Table())
    target, worlds, ks = target_of(program, EnumeratedTarget), jnp.arange((V**2) ** N * 4), jnp.arange(3)
    chance = jax.jit(jax.vmap(jax.vmap(lambda k, w: probabilities(kernel.smc, k, w), (None, 0)), (0, None)))(ks, worlds)

    def estimate(k, world):
        return kernel._estimate(target, {"world": world, "pick": 0}, {"k": k})[0]

    def step(k, world, then, other):
        kernel.step(target, {"k": then, "world": other, "pick": 0}, estimate(k, world))
        return enumerated.pop()

    over = lambda fn: jax.vmap(jax.vmap(fn, (None, 0)), (0, None))
    log_z = np.asarray(jax.jit(over(lambda k, w: estimate(k, w).log_evidence))(ks, worlds), np.float64)
    log_z = np.where(chance > 0, log_z, -np.inf)
    chance = np.asarray(chance, np.float64)
    np.testing.assert_allclose(chance.sum(1), 1.0, atol=1e-5)

    law = chance * np.exp(log_z)
    exact = {row.value: row.probability for row in inference.Exact().run(jax.random.key(0), program).marginal("k")}
    np.testing.assert_allclose(law.sum(1) / law.sum(), [exact[k] for k in range(3)], atol=1e-5)

    states = np.argwhere(law > 0)
    k, w = states.T
    pairs = jax.vmap(jax.vmap(step, (None, None, 0, 0)), (0, 0, None, None))
    log_ratio = np.asarray(jax.jit(pairs)(k, w, k, w), np.float64)
    moves = Q[k[:, None], k] * chance[k, w] * np.minimum(1.0, np.exp(log_ratio))
    flow = (law / law.sum())[k, w][:, None] * moves
    np.testing.assert_allclose(flow, flow.T, atol=1e-7)  # detailed balance
    assert (np.abs(log_ratio) > 0.1).mean() > 0.5, "the ratio matters"


def test_metropolis_balances_in_detail(enumerated):
    """From each trace to each other one that differs in k."""
    exact = inference.Exact().run(jax.random.key(0), program)
    kernel, target = metropolis.Metropolis(Table()), target_of(program)
    evaluate = jax.jit(lambda values: target.evaluate(values)[0])
    move = jax.jit(lambda then, draw: (kernel.move(target, {"k": then}, draw)[0], enumerated.pop()))
    posterior = {tuple(map(int, x)): p for x, p in zip(exact.returned, exact.weights)}
    for (k, x, y), p in list(posterior.items())[::4]:
        values = {"k": jnp.int32(k), "x": jnp.array([x]), "y": jnp.array([y])}
        draw = evaluate(values)
        for then in range(3):
            moved, log_ratio = move(jnp.int32(then), draw)
            assert moved.values["k"] == then
            assert moved.values["x"][0][0] == x
            forth, back = p * Q[k, then], posterior[then, x, y] * Q[then, k]
            assert float(log_ratio) == pytest.approx(np.log(back / forth), abs=1e-5)


def test_metropolis_makes_no_choice_appear_or_vanish(enumerated):
    """k decides whether there is a coin, whose value in the other branch's trace is a 0 that nobody drew."""

    def branching():
        k = ppl.sample("k", dist.Categorical(logits=jnp.asarray(LOGITS)))
        jax.lax.cond(k == 0, lambda: ppl.sample("coin", dist.Bernoulli(0.3)), lambda: jnp.int32(0))

    kernel, target = metropolis.Metropolis(Table()), target_of(branching)
    evaluate = jax.jit(lambda values: target.evaluate(values)[0])
    move = jax.jit(lambda then, draw: (kernel.move(target, {"k": then}, draw)[0], enumerated.pop()))
    for k, then in [(0, 1), (1, 0), (1, 2), (0, 0)]:
        log_ratio = move(jnp.int32(then), evaluate({"k": jnp.int32(k), "coin": jnp.int32(0)}))[1]
        assert (log_ratio == -jnp.inf) == ((k == 0) != (then == 0))


@pytest.mark.parametrize(("proposal", "law"), [(RandomWalk(a=0.4), stats.norm), (LogRandomWalk(a=0.4), None)])
def test_random_walks_know_their_ratio(proposal, law):
    """log q(old | new) - log q(new | old) of the densities that SciPy knows."""
    old = jnp.array([0.7, 2.0])
    draws = jax.vmap(lambda key: proposal.propose(key, {"a": old})[0]["a"])(jax.random.split(jax.random.key(0), 4000))
    steps = np.asarray(draws - old if law else jnp.log(draws / old))
    assert abs(steps.std() - 0.4) < 0.02
    new, log_ratio = proposal.propose(jax.random.key(1), {"a": old})
    log_q = lambda to, start: stats.norm.logpdf(to, start, 0.4) if law else stats.lognorm.logpdf(to, 0.4, scale=start)
    expected = (log_q(np.asarray(old), np.asarray(new["a"])) - log_q(np.asarray(new["a"]), np.asarray(old))).sum()
    assert float(log_ratio) == pytest.approx(expected, abs=1e-5)


def test_acceptance_has_its_probability():
    keys = jax.random.split(jax.random.key(0), 20_000)
    for log_ratio, expected in [(np.log(0.3), 0.3), (0.2, 1.0), (-np.inf, 0.0), (np.nan, 0.0)]:
        share = float(jax.vmap(lambda key, r=log_ratio: metropolis.accepts(key, r))(keys).mean())
        assert abs(share - expected) < 5 * np.sqrt(max(expected * (1 - expected), 0.0) / 20_000) + 1e-9
