"""Kernels made of kernels leave the posterior invariant: the choices of all parts are enumerated."""

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.chains import Kernel, Target
from latentrace.inference.mcmc import composition, metropolis
from latentrace.ppl import errors
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage

from .cases import J

SIZES = {"k": 3, "b": 2}
TABLES = {
    "k": np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]]),
    "b": np.array([[0.3, 0.7], [0.9, 0.1]]),
}
"""probability that the row's value proposes the column's: far from symmetric"""


@ppl.program
def program():
    """Two sites that depend on each other; one combination is impossible."""
    k = ppl.sample("k", dist.Categorical(logits=J))
    b = ppl.sample("b", dist.Bernoulli(0.2 + 0.3 * k))
    ppl.factor("reward", 0.8 * k * b - 0.5 * b)
    ppl.condition("possible", k + b < 3)
    return k, b


class Table(NamedTuple):
    """A proposal of known probabilities, whose outcome is named in place of a key."""

    site: str

    @property
    def sites(self):
        return (self.site,)

    def propose(self, key, values):
        now, then, q = values[self.site], key["then"], jnp.asarray(TABLES[self.site])
        return {self.site: then}, jnp.log(q[then, now]) - jnp.log(q[now, then])


@dataclass(frozen=True)
class Enumerated(mcmc.Metropolis):
    """Says how probable the outcomes are that stand in place of its key."""

    def step(self, target, rng_key, state):
        now = target.choices(state.draw)[self.proposal.site]
        state, info = super().step(target, rng_key, state)
        accepted = jnp.exp(jnp.minimum(SEEN.pop(), 0.0))
        chance = jnp.asarray(TABLES[self.proposal.site])[now, rng_key["then"]]
        return state, info._replace(stats={"p": chance * jnp.where(rng_key["accept"], accepted, 1 - accepted)})


SEEN = []
"""log ratios of acceptance"""


@pytest.fixture
def enumerated(monkeypatch):
    """Keys are trees of outcomes, with a branch for each part."""
    split = SimpleNamespace(split=lambda key, n=2: [key] * n)
    monkeypatch.setattr(metropolis, "jax", SimpleNamespace(tree=jax.tree, random=split))
    monkeypatch.setattr(metropolis, "accepts", lambda key, log_ratio: SEEN.append(log_ratio) or key["accept"])

    def part(target, key, number):
        if isinstance(key, jax.Array):  # `init` draws nothing
            return target, key
        return target, key[number] if isinstance(key, tuple) else jax.tree.map(lambda x: x[number], key)

    monkeypatch.setattr(composition, "part", part)
    monkeypatch.setattr(composition, "pick", lambda key, weights: key)


def outcomes(kernel):
    """Every tree of outcomes of a kernel's step, as in place of its key."""
    match kernel:
        case Enumerated():
            ranges = [np.arange(SIZES[kernel.proposal.site], dtype=np.int32), [False, True]]
            return [dict(zip(("then", "accept"), pair)) for pair in itertools.product(*ranges)]
        case mcmc.Cycle():
            return list(itertools.product(*map(outcomes, kernel.kernels)))
        case mcmc.Mixture():
            parts = [outcomes(part) for part in kernel.kernels]
            first = [options[0] for options in parts]
            return [(*first[:i], one, *first[i + 1 :], np.int32(i)) for i, options in enumerate(parts) for one in options]
        case mcmc.Repeat():
            times = itertools.product(outcomes(kernel.kernel), repeat=kernel.times)
            return [jax.tree.map(lambda *xs: np.stack(xs), *each) for each in times]


def chance(kernel, stats):
    """The probability of what has happened in a step of a kernel, from what it says."""
    match kernel:
        case Enumerated():
            return stats["p"]
        case mcmc.Repeat():
            return jax.vmap(lambda stats: chance(kernel.kernel, stats))(stats).prod()
    parts = [chance(part, stats[name]) for part, name in zip(kernel.kernels, composition.labels(kernel.kernels))]
    if isinstance(kernel, mcmc.Cycle):
        return jnp.prod(jnp.stack(parts))
    return jnp.stack(parts)[stats["which"]] * jnp.asarray(kernel.weights)[stats["which"]]


def target_of(fn):
    staged = stage(fn, ())
    return Target(staged.skeleton(), arrays_of(staged), {})


@cache
def transition(kernel):
    """The kernel's matrix over the traces of positive density, and their probabilities."""
    exact = inference.Exact().run(jax.random.key(0), program)
    traces, target, keys = np.stack(exact.returned, axis=1), target_of(program), outcomes(kernel)
    keys = jax.tree.map(lambda *xs: jnp.stack(xs), *keys)

    def one(k, b, key):
        draw, *_ = target.evaluate({"k": k, "b": b})
        state, info = kernel.step(target, key, kernel.init(target, jax.random.key(0), draw))
        values = target.choices(state.draw)
        return chance(kernel, info.stats), values["k"], values["b"]

    p, k, b = jax.jit(jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None)))(*traces.T, keys)
    matrix = np.zeros((len(traces), len(traces)))
    for i, j in np.ndindex(p.shape):
        if p[i, j] > 0:
            matrix[i, traces.tolist().index([int(k[i, j]), int(b[i, j])])] += p[i, j]
    return matrix, exact.weights


K, B = Enumerated(Table("k")), Enumerated(Table("b"))
KERNELS = {
    "cycle": mcmc.Cycle(K, B),
    "mixture": mcmc.Mixture(K, B, K, weights=(0.2, 0.7, 0.1)),
    "repeat": mcmc.Repeat(K, 2),
    "nested": mcmc.Mixture(mcmc.Cycle(B, K), mcmc.Cycle(mcmc.Repeat(B, 1)), weights=(3, 1)),
}


@pytest.mark.parametrize("name", ["mixture", "nested", *[pytest.param(n, marks=pytest.mark.slow) for n in ("cycle", "repeat")]])
def test_the_posterior_is_invariant(enumerated, name):
    matrix, posterior = transition(KERNELS[name])
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-5)
    assert (matrix > 0).sum() > 2 * len(posterior), "the chain moves"
    np.testing.assert_allclose(posterior @ matrix, posterior, atol=1e-5)
    flow = posterior[:, None] * matrix
    if name == "mixture":
        np.testing.assert_allclose(flow, flow.T, atol=1e-6)
    k, b = transition(K)[0], transition(B)[0]
    expected = {"cycle": k @ b, "mixture": 0.3 * k + 0.7 * b, "repeat": k @ k, "nested": 0.75 * b @ k + 0.25 * b}[name]
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


# --- states of the parts ----------------------------------------------------------------------------------------------


class Remembered(NamedTuple):
    draw: object
    log_density: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class Remembering(Kernel):
    """Stays, and says how far the density that it has kept is from that of its trace, and how often it was asked to move."""

    def init(self, target, rng_key, draw):
        return Remembered(draw, target.evaluate(target.choices(draw))[1], jnp.int32(0))

    def at(self, target, state, draw):
        CALLS["at"] += 1
        return self.init(target, None, draw)._replace(steps=state.steps)

    def step(self, target, rng_key, state):
        jax.debug.callback(lambda _: CALLS.update(steps=1), state.log_density)
        _, log_density, info = target.evaluate(target.choices(state.draw))
        stats = {"gap": jnp.abs(log_density - state.log_density), "steps": state.steps}
        return state._replace(steps=state.steps + 1), info._replace(accepted=jnp.float32(0.5), stats=stats)


CALLS = Counter()
WALK = mcmc.Metropolis(mcmc.RandomWalk(x=0.5))


@ppl.program
def number():
    x = ppl.sample("x", dist.Normal(0.0, 1.0))
    ppl.factor("reward", 0.4 * x)


def stats_of(kernel, num_samples=60):
    CALLS.clear()
    posterior = inference.MCMC(kernel, num_samples, num_chains=3).run(jax.random.key(0), number)
    jax.effects_barrier()
    return posterior.moves


def test_states_follow_the_trace_and_keep_what_is_adapted():
    moves = stats_of(mcmc.Cycle(WALK, Remembering(), WALK, Remembering()))
    stats = moves.stats
    assert list(stats) == ["Metropolis(x)", "Metropolis(x) 2", "Remembering", "Remembering 2"]
    for part in ("Remembering", "Remembering 2"):
        assert (stats[part]["gap"] == 0).all()
        np.testing.assert_array_equal(stats[part]["steps"], np.broadcast_to(np.arange(60), (3, 60)))
    accepted = [part["accepted"] for part in stats.values()]
    assert 0.2 < accepted[0].mean() < 1
    np.testing.assert_allclose(moves.accepted, np.mean(accepted, axis=0), rtol=1e-6)


def test_a_mixture_runs_one_part_for_all_chains():
    moves = stats_of(mcmc.Mixture(WALK, mcmc.Repeat(Remembering(), 2), weights=(0.4, 0.6)))
    which, stats = moves.stats["which"], moves.stats["Repeat"]
    assert (which == which[0]).all()
    assert abs(which[0].mean() - 0.6) < 0.25
    assert CALLS["steps"] == 2 * (which == 1).sum(), "the part that is not drawn is not run"
    assert (stats["gap"] == 0).all()
    np.testing.assert_array_equal(np.isnan(stats["accepted"]).all(-1), which == 0)
    np.testing.assert_array_equal(np.isnan(moves.stats["Metropolis(x)"]["accepted"]), which == 1)
    before = np.cumsum(which == 1, axis=1) - 1
    np.testing.assert_array_equal(stats["steps"][..., 1][which == 1], (2 * before + 1)[which == 1])
    np.testing.assert_array_equal(moves.accepted[which == 1], 0.5)


def test_a_cycle_of_one_is_its_kernel():
    np.testing.assert_array_equal(stats_of(mcmc.Cycle(Remembering())).stats["Remembering"]["steps"][0], np.arange(60))
    assert not CALLS["at"]


def test_parts_share_no_key():
    """What chains share is another for each part: equal kernels in a cycle draw different parts of a mixture."""
    mixture = mcmc.Mixture(Remembering(), Remembering())
    stats = stats_of(mcmc.Cycle(mixture, mcmc.Repeat(mixture, 2))).stats
    first, (second, third) = stats["Mixture"]["which"][0], stats["Repeat"]["which"][0].T
    for a, b in ((first, second), (first, third), (second, third)):
        assert 0.2 < (a == b).mean() < 0.8


def test_sites_and_populations():
    kernel = mcmc.Cycle(WALK, mcmc.ConditionalSMC(8), mcmc.Mixture(mcmc.Metropolis(mcmc.RandomWalk(y=2.0)), WALK))
    assert kernel.sites == ("x", "y")
    assert kernel.num_particles == 8
    with pytest.raises(errors.SiteNameError, match="no random site 'y'"):
        stats_of(kernel)


def test_estimates_of_the_evidence_cannot_be_moved_by_others():
    marginal = mcmc.MarginalMetropolis(inference.SMC(4), mcmc.RandomWalk(x=0.5))
    with pytest.raises(errors.SiteError, match=r"PMMH keeps an estimate .* run it alone"):
        stats_of(mcmc.Cycle(marginal, WALK))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mcmc.Cycle(), "Cycle: give at least one kernel"),
        (lambda: mcmc.Mixture(weights=()), "Mixture: give at least one kernel"),
        (lambda: mcmc.Cycle(mcmc.Regenerate), r"expected a kernel, found .*; call it, as in Regenerate\(\)"),
        (lambda: mcmc.Repeat("kernel", 2), "Repeat: expected a kernel, found 'kernel'; derive it"),
        (lambda: mcmc.Repeat(K, 0), "times must be a whole number of at least 1, not 0"),
        (lambda: mcmc.Mixture(K, B, weights=(1, -1)), "weights must be finite, 0 or more, and not all 0"),
        (lambda: mcmc.Mixture(K, B, weights=(0, 0)), "not all 0"),
        (lambda: mcmc.Mixture(K, B, weights=(1, float("nan"))), "must be finite"),
        (lambda: mcmc.Mixture(K, B, weights=(1, 2, 3)), "3 weights for 2 kernels"),
    ],
)
def test_errors(make, message):
    with pytest.raises(errors.SiteError, match=message):
        make()
