"""Gibbs sampling of discrete sites leaves the posterior invariant: its transition matrix is exact on enumerable programs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.chains import State, Target
from latentrace.inference.mcmc import gibbs
from latentrace.ppl import errors
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage
from latentrace.ppl.state import Tempering, spread_over

from .cases import M2, M3, J
from .moves import Enumerated, exclusive_branches, plate_between

KEY = jax.random.key(0)


def strategy():
    """A text written by the strategy that is drawn before it; not every strategy may write every text."""
    k = ppl.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
    first = jnp.where(k == 2, 1, k)
    context = ppl.extend(ppl.prompt(M3), first[None])
    text, _ = ppl.generate("text", context, max_tokens=2)
    ppl.factor("reward", J[text.tokens[0]] * k)
    ppl.condition("possible", (text.tokens[0] != 2) | (k > 0))


def loop_with_batches():
    """Two coins at each of two steps, each step weighed by the one before; a part is impossible."""

    def step(before, w):
        x = ppl.sample("x", dist.Bernoulli(jnp.array([0.3, 0.6])))
        ppl.factor("f", w * x[0] - 0.7 * (x[1] == before))
        ppl.condition("possible", (x.sum() > 0) | (before == 1))
        return x[1], x

    y = ppl.sample("y", dist.Categorical(logits=J))
    jax.lax.scan(step, (y > 0).astype(jnp.int32), jnp.array([0.8, -1.1]))


def loop_of_texts():
    """Texts in a loop, of the model that is drawn before, and as many as the same draw says."""
    n = ppl.sample("n", dist.Categorical(logits=jnp.array([0.3, -0.2, 0.1])))
    b = ppl.sample("b", dist.Bernoulli(0.4))

    def step(carry):
        i, context = carry
        ppl.bound(2)
        text, context = ppl.generate("x", context, max_tokens=1)
        ppl.factor("f", (0.9 * b - 0.3) * text.tokens[0])
        return i + 1, context

    jax.lax.while_loop(lambda carry: carry[0] < n, step, (0, ppl.prompt(M2)))


def same_name_in_branches():
    k = ppl.sample("k", dist.Bernoulli(0.3))
    one = lambda: ppl.sample("x", dist.Categorical(logits=J))
    other = lambda: ppl.sample("x", dist.Bernoulli(0.3))
    x = jax.lax.cond(k == 1, one, other)
    ppl.factor("f", 0.5 * x)


PROGRAMS = {
    "strategy": strategy,
    "loop with batches": loop_with_batches,
    "loop of texts": loop_of_texts,
    "same name in branches": same_name_in_branches,
    "exclusive branches": exclusive_branches,
    "plate": plate_between,
}


class Chain:
    """A program's traces of positive density, and the kernel's moves between them."""

    def __init__(self, program, tempering=None):
        staged = stage(program, ())
        self.target = Target(staged.skeleton(), arrays_of(staged), {}, tempering=tempering)
        exact = inference.Exact().run(KEY, program)
        values = {k: v.tokens if isinstance(v, ppl.Text) else v for k, v in exact.values.items()}
        values = {name: jnp.asarray(values[name]) for name in self.target.random}
        self.number = {key: i for i, key in enumerate(Enumerated.keys(values))}
        self.draws, log_density, _ = jax.jit(jax.vmap(self.target.evaluate))(values)
        if tempering is None:
            np.testing.assert_allclose(log_density, exact.log_weights, atol=1e-5)
        density = np.exp(np.asarray(log_density, np.float64))
        self.posterior = density / density.sum()

    def numbers(self, draws):
        """Which traces these are; -1 for those of density 0."""
        return np.array([self.number.get(key, -1) for key in Enumerated.keys(self.target.choices(draws))])

    def transition(self, kernel):
        """float64[X, X]"""
        whole = np.eye(len(self.posterior))
        for name, site in gibbs.elements(self.target, kernel.names).items():

            def rows(draw, at, name=name, site=site):
                draws, log_density, _ = kernel.candidates(self.target, draw, name, site, at)
                now = gibbs.element(draw.values[name], at) == jnp.asarray(site.support)
                active = jnp.broadcast_to(spread_over(draw.active[name], draw.values[name]), (*site.dims, *site.shape))
                return draws, gibbs.moves(log_density, now, kernel.metropolised), gibbs.element(active, at)

            rows = jax.jit(jax.vmap(rows, (0, None)))
            for at in range(site.number):
                draws, row, active = rows(self.draws, at)
                matrix = np.zeros_like(whole)
                for k in range(len(site.support)):
                    to = self.numbers(jax.tree.map(lambda x, k=k: x[:, k], draws))
                    p = np.asarray(row[:, k], np.float64)
                    assert (p[active & (to < 0)] == 0).all()
                    np.add.at(matrix, (np.arange(len(to)), np.where(to < 0, 0, to)), np.where(active, p, 0))
                whole = whole @ (matrix + np.diag(np.where(active, 0.0, 1.0)))
        return whole


QUICK = [("strategy", False), ("loop with batches", True), ("loop of texts", False), ("same name in branches", True)]
SLOW = [(name, metropolised) for name in PROGRAMS for metropolised in (False, True) if (name, metropolised) not in QUICK]


@pytest.mark.parametrize(("name", "metropolised"), [*QUICK, *[pytest.param(*x, marks=pytest.mark.slow) for x in SLOW]])
def test_the_posterior_is_invariant(name, metropolised):
    chain = Chain(PROGRAMS[name])
    matrix = chain.transition(mcmc.Gibbs(metropolised=metropolised))
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(chain.posterior @ matrix, chain.posterior, atol=1e-5)
    assert np.abs(matrix - np.eye(len(matrix))).max() > 0.3, "the chain moves"


def test_a_tempered_target_is_invariant():
    chain = Chain(strategy, Tempering(jnp.float32(2.5), jnp.float32(0.4)))
    plain = Chain(strategy)
    assert np.abs(chain.posterior - plain.posterior).max() > 0.05
    matrix = chain.transition(mcmc.Gibbs("k"))
    np.testing.assert_allclose(chain.posterior @ matrix, chain.posterior, atol=1e-5)
    assert np.abs(plain.posterior @ matrix - plain.posterior).max() > 0.01


@pytest.mark.parametrize("metropolised", [False, True])
def test_one_element_has_its_full_conditional(metropolised):
    """All that differs is one site of one element: rows of the matrix are the conditional, or Liu's."""
    chain, p = Chain(strategy), []
    matrix = chain.transition(mcmc.Gibbs("k", metropolised=metropolised))
    k, text = np.asarray(chain.draws.values["k"]), np.asarray(chain.draws.values["text"][0])
    for i, row in enumerate(matrix):
        alike = (text == text[i]).all(axis=1)
        p = np.where(alike, chain.posterior, 0) / chain.posterior[alike].sum()
        if metropolised:
            p = np.minimum(p / (1 - p[i] + 1e-300), p / (1 - p + 1e-300))
            p[i] = 0
            p[i] = 1 - p.sum()
        np.testing.assert_allclose(row, p, atol=1e-5)
    assert len(np.unique(k)) == 3


@pytest.mark.parametrize(("name", "metropolised"), [("loop with batches", False), ("same name in branches", True)])
def test_the_compiled_step_is_this_kernel(name, metropolised):
    """Frequencies of one step from some traces, against the rows of the matrix."""
    chain, n, kernel = Chain(PROGRAMS[name]), 4000, mcmc.Gibbs(metropolised=metropolised)
    matrix = chain.transition(kernel)
    many = jax.jit(jax.vmap(lambda key, draw: kernel.step(chain.target, key, State(draw)), (0, None)))
    for start in np.argsort(chain.posterior)[[0, len(matrix) // 2, -1]]:
        draw = jax.tree.map(lambda x, start=start: x[start], chain.draws)
        state, info = many(jax.random.split(jax.random.key(start), n), draw)
        to = chain.numbers(state.draw)
        counts, expected = np.bincount(to, minlength=len(matrix)), np.maximum(matrix[start], 0)
        assert (counts[expected == 0] == 0).all()
        assert (np.abs(counts / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-6).all()
        changed = sum((np.asarray(state.draw.values[k]) != np.asarray(draw.values[k])).reshape(n, -1).sum(1)
                      for k in gibbs.elements(chain.target, ()))  # fmt: skip
        visited = sum(int(np.broadcast_to(spread_over(jnp.asarray(draw.active[k]), draw.values[k]), (*s.dims, *s.shape)).sum())
                      for k, s in gibbs.elements(chain.target, ()).items())  # fmt: skip
        np.testing.assert_allclose(info.stats["changed"], changed / visited, atol=1e-6)
        assert (np.asarray(info.accepted) <= 1).all()
        assert metropolised or (np.asarray(info.accepted) == 1).all()


def test_moves_where_nothing_else_is_possible():
    log_density, now = jnp.array([-jnp.inf, 0.3, -jnp.inf]), jnp.array([False, True, False])
    for metropolised in (False, True):
        np.testing.assert_allclose(gibbs.moves(log_density, now, metropolised), now, atol=1e-6)
    two = jnp.array([-jnp.inf, 0.3, -20.0])
    np.testing.assert_allclose(gibbs.moves(two, now, True), [0, 1 - np.exp(-20.3), np.exp(-20.3)], atol=1e-6)
    far = jnp.array([-400.0, -400.3, -jnp.inf])
    np.testing.assert_allclose(gibbs.moves(far, now, True), [1, 0, 0], atol=1e-6)


def test_it_runs_under_the_driver():
    exact = inference.Exact().run(KEY, strategy)
    chains = inference.MCMC(mcmc.Gibbs(), num_samples=20, num_chains=2)
    found = chains.run(KEY, strategy)
    assert found.values["k"].shape == (40,)
    assert (found.moves.accepted == 1).all()
    assert len({tuple(x) for x in found.values["text"].tokens.reshape(2, 20, 2)[0].tolist()}) == 1, "texts are kept"
    assert set(found.values["k"].tolist()) <= {row.value for row in exact.marginal("k")}
    # three values, side by side, at each of 40 steps and one first run: two passes for the contexts, one for the text
    assert found.moves.tokens[0, 0] == 3 * found.values["text"].length[0]


ERRORS = [
    (lambda: ppl.sample("z", dist.Normal(0.0, 1.0)), ("z",), "site 'z' has no finite support.*mcmc.NUTS"),
    (lambda: ppl.sample("z", dist.Poisson(2.0)), (), "no random site with a finite support"),
    (lambda: ppl.sample("z", dist.Poisson(2.0)), ("z",), "site 'z' has no finite support"),
    (lambda: ppl.generate("t", ppl.prompt(M2), max_tokens=1)[0], ("t",), "site 't' is a text.*Regenerate"),
    (lambda: ppl.sample("coin", dist.Bernoulli(0.2)), ("koin",), "no random site 'koin'.*'coin'"),
]


@pytest.mark.parametrize(("program", "sites", "message"), ERRORS)
def test_errors_come_before_anything_runs(program, sites, message, monkeypatch):
    monkeypatch.setattr("latentrace.inference.mcmc.mcmc.compiled", lambda key, make: SimpleNamespace())
    with pytest.raises(errors.SiteError, match=message):
        inference.MCMC(mcmc.Gibbs(*sites), num_samples=1).run(KEY, program)
