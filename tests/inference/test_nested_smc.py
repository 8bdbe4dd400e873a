"""Nested samplers that resample are exactly unbiased: their own choices are enumerated, with no Monte Carlo error.

Every draw is one of a few values of equal probability, by a digit of the number of a world: token and value probabilities,
and the weights that samples are resampled and chosen by, are fractions of small denominators.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, models, ppl
from latentrace.ppl import errors
from latentrace.ppl.choices import Keyed, SiteRef
from latentrace.ppl.collectives import PARTICLES, index, over_particles, reindex
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.staging import stage

K = 2
THREE = float(np.log(3.0))
LM = models.MarkovLM(np.log([0.25, 0.75]), np.log([[0.5, 0.5], [0.75, 0.25]]), 1, vocabulary=("a", "b"))


@partial(jax.tree_util.register_dataclass, data_fields=("digits",), meta_fields=("layout",))
@dataclass(frozen=True)
class Table:
    """Choices by site, loop indices and sample: digits of one world."""

    digits: Any
    layout: tuple[tuple[str, tuple[int, ...], int], ...]
    """name, dims, and number of outcomes of each kind of draw"""

    def supply(self, spec, active):
        return None

    def enter_element(self, i, jaxpr):
        return self

    def leave_plate(self, size, jaxpr, elements):
        return self

    def uniform(self, name, path):
        """The middle of one of so many equal parts of [0, 1)."""
        start = 0
        for found, dims, outcomes in self.layout:
            if found == name:
                flat = 0
                for index, size in zip(path, dims, strict=True):
                    flat = flat * size + index
                return (self.digits[start + flat] + 0.5) / outcomes
            start += int(np.prod(dims, dtype=int))
        raise KeyError(name)

    def value(self, site, distribution, number):
        support = distribution.enumerate_support()
        below = jnp.cumsum(jnp.exp(jax.vmap(distribution.log_prob)(support)))
        return support[jnp.searchsorted(below, self.uniform(site.name, site.path))], self

    def token(self, site, step, logits, number):
        below = jnp.cumsum(jax.nn.softmax(logits))
        return jnp.searchsorted(below, self.uniform(site.name, (*site.path, step))).astype(jnp.int32), self

    def uniforms(self, clock, weights, count, site=None):
        """One number for each visit: a visit has one chance at which weights have moved, and what others draw is not used."""
        return jnp.full(count, 0.5 if site is None else self.uniform(site.name, site.path)), self


def steps(run):
    """Two draws in a loop, each rewarded, the first with a promise that is taken back: an inner hidden path."""

    def fn():
        def step(before, i):
            x = ppl.sample("x", dist.Bernoulli(0.25 + 0.5 * before))
            ppl.factor("reward", THREE * (x == 1 - i * before))
            ppl.twist("promise", THREE * x * (1 - i))
            return x, x

        return jax.lax.scan(step, jnp.int32(0), jnp.arange(2))[1]

    xs = run("inner", fn)()
    ppl.factor("after", 0.5 * xs[0] - 0.3 * xs[1])
    return xs


def text(run):
    """A text that steers itself, of which some are impossible: all samples may die."""

    def fn():
        x, _ = ppl.generate("x", ppl.prompt(LM), max_tokens=2, twist=lambda t: THREE * (t.tokens[t.length - 1] == 0))
        ppl.condition("not ab", (x.tokens[0] == 1) | (x.tokens[1] == 0))
        return x.tokens

    return run("inner", fn)()


def branches(run):
    """In a loop, in one branch of two: each visit has samples and resamplings of its own."""

    def step(before, _):
        k = ppl.sample("k", dist.Bernoulli(0.5))

        def fn():
            x = ppl.sample("x", dist.Bernoulli(0.5))
            ppl.factor("reward", THREE * (x == before))
            y = ppl.sample("y", dist.Bernoulli(0.5))
            ppl.factor("more", THREE * y)
            return x, y  # x was drawn before samples resampled, and is not read since

        x, y = jax.lax.cond(k == 1, lambda: run("inner", fn)(), lambda: (jnp.int32(0), jnp.int32(0)))
        z = x + 2 * y
        ppl.factor("after", 0.4 * z - 0.6 * k)
        return z % 2, jnp.stack([k, z])

    return jax.lax.scan(step, jnp.int32(0), length=2)[1].ravel()


# program, threshold, draws: name, loops and samples, outcomes; weights are 1, 3 or 9 times each other
CASES = {
    "steps": (steps, 0.9, (("x", (K, 2), 4), ("inner()", (), 10), ("inner", (), 20))),
    "text": (text, 0.9, (("x", (K, 2), 4), ("inner()", (), 2), ("inner", (), 4))),
    "branches": (branches, 1.1, (("k", (2,), 2), ("x", (2, K), 2), ("y", (2, K), 2), ("inner()", (2,), 2), ("inner", (2,), 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_expected_weight_of_every_trace_is_the_target(case):
    program, threshold, layout = CASES[case]
    exact = inference.Exact().run(jax.random.key(0), ppl.program(lambda: program(lambda _, fn: fn)))
    target = programs.measure(zip(np.asarray(exact.returned), np.exp(exact.log_weights.astype(float))))
    nested = lambda name, fn: ppl.nested(name, fn, num_samples=K, ess_threshold=threshold)
    staged = stage(lambda: program(nested), ())
    radices = [outcomes for _, dims, outcomes in layout for _ in range(int(np.prod(dims, dtype=int)))]

    def one_world(digits):
        def one_particle():
            run = Interpreter(staged, staged.consts, staged.models, first_state(staged, staged.models, Table(digits, layout)))
            (out,) = run.walk(staged.jaxpr, [])
            records = {name: value for name, (value, _) in run.recorded().items()}
            return run.frame.get(out), run.state.log_weight, records

        return jax.tree.map(lambda x: x[0], over_particles(one_particle, 1))

    worlds = np.indices(radices).reshape(len(radices), -1).T.astype(np.int32)
    returned, log_weight, records = jax.device_get(jax.jit(jax.vmap(one_world))(jnp.asarray(worlds)))
    assert not np.isnan(log_weight).any()
    rows, where = np.unique(returned, axis=0, return_inverse=True)
    mass = np.bincount(where.ravel(), np.exp(log_weight.astype(float)).ravel()) / len(worlds)
    found = programs.measure(zip(rows, mass))
    for trace in {*target, *found}:
        assert abs(found.get(trace, 0.0) - target.get(trace, 0.0)) < 1e-5 * sum(target.values()), trace
    if case != "branches":  # what is recorded is what was returned: both follow their sample
        chosen = records["x"][0] if case == "text" else records["x"]
        alive = log_weight > -np.inf
        np.testing.assert_array_equal(chosen[np.arange(len(worlds)), records["inner"]][alive], returned[alive])
        assert alive.all() == (case == "steps")


def test_every_particle_and_visit_resamples_by_numbers_of_its_own():
    draw = lambda particle, visit, clock: float(
        Keyed(jax.random.key(0), particle).uniforms(clock, jnp.ones(2) / 2, 1, SiteRef("inner()", (visit,)))[0][0]
    )
    assert len({draw(*where) for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4
    assert draw(1, 1, 1) == draw(1, 1, 1)


def test_values_move_along_the_axis_of_the_population_that_resamples():
    """Samples inside particles inside problems: what does not differ along the axis stays untouched, and unbatched."""
    problems, particles, samples = 2, 3, 4
    x = np.arange(problems * particles * samples).reshape(problems, particles, samples)

    def sample(value, of_particle):
        inner = (index("samples") + 1 + index() ** 2) % samples
        outer = (index() + 1) % particles
        untouched = reindex(of_particle, inner)
        return reindex(value, inner), untouched, reindex(untouched, outer)

    def particle(values, own):
        inside = jax.vmap(sample, (0, None), (0, 0, None), axis_name="samples")
        return inside(values, own)

    over = jax.vmap(jax.vmap(particle, axis_name=PARTICLES), axis_name="problems")
    moved, kept, passed_on = over(jnp.asarray(x), jnp.asarray(x[..., 0]))
    for p in range(particles):
        np.testing.assert_array_equal(moved[:, p], x[:, p, (np.arange(samples) + 1 + p**2) % samples])
        np.testing.assert_array_equal(passed_on[:, p], x[:, (p + 1) % particles, 0])
    np.testing.assert_array_equal(kept, np.broadcast_to(x[..., :1], x.shape))


@ppl.program
def tracking(ys, ess_threshold):
    """A walk whose likelihood is estimated inside a particle: importance sampling loses track of it."""

    def walk():
        def step(x, y):
            x = ppl.sample("x", dist.Normal(x, 1.0))
            ppl.observe("y", dist.Normal(x, 0.3), y)
            return x, x

        return jax.lax.scan(step, 0.0, ys)[1]

    return ppl.nested("walk", walk, num_samples=16, ess_threshold=ess_threshold)()


def test_resampling_pays_where_weights_come_on_the_way():
    ys = np.array([0.4, -0.3, 1.2, 2.9, 3.0, 2.0, 1.0, 0.1], np.float32)
    n = len(ys)
    covariance = np.minimum.outer(np.arange(1, n + 1), np.arange(1, n + 1)) + 0.09 * np.eye(n)
    truth = -0.5 * (ys @ np.linalg.solve(covariance, ys) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    run = lambda threshold: inference.ImportanceSampling(400).run(jax.random.key(0), tracking, ys, threshold)
    plain, resampled = run(0.0), run(0.5)
    spread = [np.std(p.log_weights) for p in (plain, resampled)]
    assert spread[1] < 0.2 * spread[0]
    assert abs(resampled.log_evidence - truth) < 5 / np.sqrt(resampled.ess)
    assert resampled.ess > 20
    np.testing.assert_array_equal(
        resampled.values["x"][np.arange(400), resampled.values["walk"]], resampled.returned, "the drawn sample's path"
    )


def test_samplers_that_die_and_refusals():
    def dead():
        ppl.sample("x", dist.Bernoulli(0.5))
        ppl.condition("never", jnp.asarray(False))
        return ppl.sample("y", dist.Bernoulli(0.5))

    doomed = ppl.program(lambda: ppl.nested("inner", dead, num_samples=3, ess_threshold=1.1)())
    with pytest.raises(errors.AllParticlesDeadError, match="'inner evidence'"):
        inference.SMC(5).run(jax.random.key(0), doomed)
    ys = np.zeros(2, np.float32)
    with pytest.raises(errors.SiteError, match=r"nested 'walk' resamples .* give it ess_threshold=0"):
        inference.ParticleGibbs(4, 5).run(jax.random.key(0), tracking, ys, 0.5)
    with pytest.raises(errors.SiteError, match="nested 'walk' resamples"):
        inference.smc.evidence_bounds(jax.random.key(0), tracking, ys, 0.5, trace={}, smc=inference.SMC(4))
    inference.ParticleGibbs(4, 2).run(jax.random.key(0), tracking, ys, 0.0)
    with pytest.raises(errors.NotEnumerableError, match="call its function in its place"):
        inference.Exact().run(jax.random.key(0), tracking, ys, 0.5)
    with pytest.raises(errors.SiteError, match="ess_threshold must be at least 0"):
        ppl.nested("x", lambda: 0, num_samples=2, ess_threshold=-1.0)
