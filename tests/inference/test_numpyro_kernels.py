"""NumPyro's kernels on programs: the potential is the one that it should be, and stays so when other kernels move the rest."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import potential_energy
from scipy import integrate, stats

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.chains import Target
from latentrace.ppl import errors
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage
from latentrace.ppl.state import Tempering

from .cases import M3

KEY = jax.random.key(0)
NUTS = mcmc.NUTS()
BARKER = mcmc.NumPyro(lambda potential_fn: numpyro.infer.BarkerMH(potential_fn=potential_fn))


def target_of(program, *args, **more):
    staged = stage(getattr(program, "fn", program), args)
    return Target(staged.skeleton(), arrays_of(staged), {}, **more)


def close(found, expected, **more):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 2e-4, "atol": 2e-4, **more}), found, expected)


def same(found, expected):
    """Equal to the bit, keys left out."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)


# --- the potential of plain NumPyro models ----------------------------------------------------------------------------


def nested_supports():
    theta = numpyro.sample("theta", dist.HalfCauchy(2.0))
    x = numpyro.sample("x", dist.Uniform(-theta, 2 * theta).expand([2]))
    numpyro.sample("y", dist.Normal(x.sum(), theta), obs=0.3)


def many_supports():
    p = numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 0.5])))
    b = numpyro.sample("b", dist.Beta(2.0, 3.0).expand([2]))
    chol = numpyro.sample("chol", dist.LKJCholesky(3, 1.5))
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    z = numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(3), scale_tril=chol))
    numpyro.factor("f", -(mu**2).sum() + (b * z[:2]).sum())
    numpyro.sample("k", dist.Categorical(p), obs=1)


def plates_and_masks():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("N", 3):
        x = numpyro.sample("x", dist.Gamma(2.0, scale))
        with numpyro.handlers.mask(mask=jnp.array([True, False, True])):
            numpyro.sample("y", dist.Normal(x, scale), obs=jnp.array([0.3, jnp.nan, 2.0]))


def loop():
    rate = numpyro.sample("rate", dist.Exponential(1.0))

    def step(x, y):
        x = numpyro.sample("x", dist.Uniform(x, x + rate))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None

    scan(step, 0.5, jnp.array([0.7, 1.1, 1.0]))


@pytest.mark.parametrize("model", [nested_supports, many_supports, plates_and_masks, loop])
def test_potential_of_numpyro_models(model):
    target = target_of(model)
    energies = jax.jit(jax.value_and_grad(lambda points: potential_energy(model, (), {}, points)))
    points = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(sorted(NUTS._shapes(target).items()))
    }

    @jax.jit
    def ours(points):
        """At a trace that was started near the origin, of the potential there."""
        draw, _ = NUTS.start(target, KEY, {})
        return jax.value_and_grad(NUTS.potential(target, draw))(points)

    close(ours(points), energies(points))
    far = jax.tree.map(lambda x: 2.5 * x, points)
    close(ours(far), energies(far), rtol=1e-3)


# --- of a program with a text, a loop, a plate and branches -----------------------------------------------------------


@ppl.program
def mixed(ys):
    width = ppl.sample("width", dist.Uniform(0.0, 3.0))
    text, _ = ppl.generate("text", ppl.prompt(M3), max_tokens=2)
    ppl.factor("sharpen", width * text.log_probs.sum())
    k = ppl.sample("k", dist.Bernoulli(0.3))

    def element(y):
        x = ppl.sample("x", dist.Normal(0.0, width))
        ppl.observe("y", dist.Normal(x, 1.0), y)
        return x

    xs = ppl.vmap(element)(ys)

    def step(level, _):
        level = ppl.sample("level", dist.Uniform(level, level + width))
        return level, None

    top, _ = jax.lax.scan(step, xs.sum(), None, length=2)
    high = lambda: ppl.sample("shape", dist.Gamma(2.0, 1.0))
    low = lambda: 0.5 * ppl.sample("slope", dist.Normal(top, 1.0))
    ppl.factor("branch", -jax.lax.cond(k == 1, high, low))


YS = jnp.array([0.4, -1.3])
TEXT = jnp.array([2, 1])
ALL = ("width", "x", "level", "shape", "slope")


def by_hand(points, k, sharpness=1.0, power=1.0):
    """The same in plain NumPyro distributions, of points of every continuous site."""
    log_p = jnp.float32(0)

    def at(point, distribution):
        bijection = biject_to(distribution.support)
        value = bijection(point)
        return value, distribution.log_prob(value) + bijection.log_abs_det_jacobian(point, value)

    width, paid = at(points["width"], dist.Uniform(0.0, 3.0))
    log_p += paid
    text = jnp.log(jnp.stack([jax.nn.softmax(M3.initial)[2], jax.nn.softmax(M3.transition[2])[1]])).sum()
    log_p += sharpness * text + power * width * text + dist.Bernoulli(0.3).log_prob(k)
    xs, paid = at(points["x"], dist.Normal(0.0, width))
    log_p += paid.sum() + power * dist.Normal(xs, 1.0).log_prob(YS).sum()
    level = xs.sum()
    for point in points["level"]:
        level, paid = at(point, dist.Uniform(level, level + width))
        log_p += paid
    shape, paid = at(points["shape"], dist.Gamma(2.0, 1.0))
    log_p += paid - power * shape if k else -0.5 * points["shape"] ** 2
    slope, paid = at(points["slope"], dist.Normal(level, 1.0))
    log_p += -0.5 * points["slope"] ** 2 if k else paid - power * 0.5 * slope
    return -log_p


POINTS = {
    "width": jnp.float32(0.4),
    "x": jnp.array([0.7, -0.2]),
    "level": jnp.array([-0.9, 0.3]),
    "shape": jnp.float32(0.6),
    "slope": jnp.float32(-0.8),
}
VALUES = {"width": 1.3, "x": jnp.array([0.3, 0.9]), "level": jnp.array([1.5, 2.1]), "shape": 0.7, "slope": 1.9}


def draw_of(target, k, **changes):
    values = {**VALUES, "k": k, "text": TEXT, **changes}
    return jax.jit(target.evaluate)({name: jnp.asarray(value) for name, value in values.items()})[0]


TEMPERING = Tempering(jnp.float32(2.5), jnp.float32(0.3))


@pytest.mark.parametrize(("k", "tempering"), [(0, TEMPERING), (1, None), pytest.param(0, None, marks=pytest.mark.slow)])
def test_potential_by_hand(k, tempering):
    target = target_of(mixed, YS, tempering=tempering)
    draw = draw_of(target, k)
    energy = jax.jit(jax.value_and_grad(NUTS.potential(target, draw)))
    expected = jax.jit(jax.value_and_grad(lambda points: by_hand(points, k, *(tempering or ()))))
    close(energy(POINTS), expected(POINTS))


def test_potential_of_some_sites():
    """The others keep their values, whatever supports they have: these two are points themselves."""
    target = target_of(mixed, YS)
    draw = draw_of(target, 1)
    points = {"x": jnp.array([0.4, 0.9]), "slope": jnp.float32(-0.8)}
    energy, gradient = jax.jit(jax.value_and_grad(mcmc.NUTS("x", "slope").potential(target, draw)))(points)
    density = lambda x: target.evaluate({**target.choices(draw), "x": x})[1]
    log_density, slope = jax.jit(jax.value_and_grad(density))(points["x"])
    close((energy, gradient), (-log_density + 0.5 * 0.8**2, {"x": -slope, "slope": -0.8}))


@pytest.mark.parametrize("k", [0, 1])
def test_points_are_those_of_the_values(k):
    """There and back; an inactive element has point 0."""
    target = target_of(mixed, YS)
    draw = draw_of(target, k)
    points = jax.jit(lambda draw: NUTS.points(target, draw))(draw)
    evaluate = jax.jit(lambda values: target.evaluate(values)[:2])
    again, log_density = evaluate({**target.choices(draw), **mcmc.numpyro_kernels.as_points(points)})
    plain = evaluate(target.choices(draw))[1]
    close(again.values, draw.values)
    np.testing.assert_array_equal(again.active["shape"], k == 1)
    assert points["slope" if k else "shape"] == 0
    # the pseudo-prior of the inactive one is 1 at its point, up to a constant that is left out
    assert float(log_density) == pytest.approx(-float(by_hand(points, k)), abs=1e-4)
    assert abs(log_density - plain) > 0.1, "a Jacobian"


def test_points_on_the_edge_are_finite():
    def program():
        ppl.sample("u", dist.Beta(0.1, 0.1).expand([2]))
        ppl.sample("g", dist.Gamma(0.1, 1.0))

    target = target_of(program)

    @jax.jit
    def there(values):
        draw = target.evaluate(values)[0]
        points = NUTS.points(target, draw)
        return points, *jax.value_and_grad(NUTS.potential(target, draw))(points)

    points, value, gradient = there({"u": jnp.array([0.0, 1.0]), "g": jnp.float32(0.0)})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient, points)))


# --- what is kept, and what is renewed --------------------------------------------------------------------------------


HMC = mcmc.HMC(num_steps=3, trajectory_length=None)
SLOW = [pytest.param(kernel, marks=pytest.mark.slow) for kernel in (HMC, mcmc.NUTS("x", dense_mass=True))]


@pytest.mark.parametrize("kernel", [NUTS, BARKER, *SLOW], ids=["NUTS", "Barker", "HMC", "dense"])
def test_a_state_follows_the_trace(kernel):
    """After other kernels have moved the rest: the potential and gradient of the new trace, and what has been adapted."""
    target = target_of(mixed, YS, num_warmup=20, iteration=jnp.int32(10))

    @jax.jit
    def run(key):
        state = kernel.init(target, key, draw_of(target, 0))
        state = jax.lax.fori_loop(0, 10, lambda i, s: kernel.step(target, jax.random.fold_in(key, i), s)[0], state)
        moved = draw_of(target, 1, text=jnp.array([1, 0]), width=jnp.float32(2.0))
        after = kernel.at(target, state, moved)
        return state.inner, after, jax.value_and_grad(kernel.potential(target, moved))(kernel.points(target, moved)), moved

    before, after, (energy, gradient), moved = run(KEY)
    close(after.draw, moved)
    close((after.inner.potential_energy, after.inner.z_grad), (energy, gradient))
    same(after.inner.adapt_state, before.adapt_state)
    assert after.inner.i == before.i == 10
    assert before.adapt_state.step_size != 1.0
    assert abs(before.potential_energy - energy) > 0.1


def normal(scale):
    return ppl.sample("theta", dist.Normal(jnp.zeros(2), scale))


@pytest.mark.parametrize("kernel", [BARKER, pytest.param(NUTS, marks=pytest.mark.slow)], ids=["Barker", "NUTS"])
def test_adaptation_ends_with_warm_up(kernel):
    scale = jnp.array([1.0, 10.0])
    chains = inference.MCMC(kernel, num_samples=150, num_warmup=150, num_chains=2)
    found = chains.run(KEY, normal, scale)
    steps = found.moves.stats["step_size"]
    assert steps.shape == (2, 150)
    assert (steps == steps[:, :1]).all()
    assert (steps != 1).all()
    inner = found.chain_state.boundary.value().inner
    assert (np.asarray(inner.i) == 300).all()
    mass = np.asarray(inner.adapt_state.inverse_mass_matrix)
    assert (mass[..., 1] > 10 * mass[..., 0]).all()
    more = chains.run(KEY, normal, scale, resume=found)
    same(more.chain_state.boundary.value().inner.adapt_state, inner.adapt_state)
    whole = inference.MCMC(kernel, num_samples=300, num_warmup=150, num_chains=2).run(KEY, normal, scale)
    both = np.concatenate([x.values["theta"].reshape(2, 150, 2) for x in (found, more)], axis=1)
    np.testing.assert_allclose(both.reshape(-1, 2), whole.values["theta"], rtol=1e-6)


def test_a_kernel_that_took_part_in_warm_up_now_and_then_is_done_with_it_too():
    target = target_of(normal, jnp.ones(2), num_warmup=100)
    draw = target.evaluate({"theta": jnp.zeros(2)})[0]

    @jax.jit
    def run(key):
        state = NUTS.init(target, key, draw)
        step = lambda i, s: NUTS.step(target._replace(iteration=2 * i), jax.random.fold_in(key, i), s)[0]
        warm = jax.lax.fori_loop(0, 50, step, state)
        first = jax.lax.fori_loop(50, 51, step, warm)
        return warm.inner, first.inner, jax.lax.fori_loop(51, 60, step, first).inner

    warm, first, last = run(KEY)
    assert warm.i == 50
    assert first.i == 101
    assert first.adapt_state.step_size == pytest.approx(float(jnp.exp(warm.adapt_state.ss_state[1])))
    assert last.adapt_state.step_size == first.adapt_state.step_size
    same(last.adapt_state._replace(step_size=0), warm.adapt_state._replace(step_size=0))


def test_what_steps_report():
    def program():
        width = ppl.sample("width", dist.Uniform(0.0, 3.0))
        ppl.factor("sharpen", width * ppl.generate("text", ppl.prompt(M3), max_tokens=2)[0].log_probs.sum())

    chains = inference.MCMC(mcmc.HMC(num_steps=3, trajectory_length=None), num_samples=5, num_warmup=5)
    found = chains.run(KEY, program)
    stats_ = found.moves.stats
    assert set(stats_) == {"accept_prob", "diverging", "num_steps", "energy", "potential_energy", "step_size"}
    np.testing.assert_array_equal(found.moves.accepted, stats_["accept_prob"])
    assert (stats_["num_steps"] == 3).all()
    assert (found.moves.tokens == found.values["text"].length[0]).all(), "the text is scored once for three gradients"


# --- whole chains -----------------------------------------------------------------------------------------------------


def branching():
    """Which branch is taken depends on what NUTS moves; each has a site of its own, and one is in a loop of random length."""
    theta = ppl.sample("theta", dist.Normal(0.5, 1.0))
    right = lambda: ppl.sample("rate", dist.Gamma(3.0, 2.0))
    left = lambda: ppl.sample("shift", dist.Normal(2.0, 0.5))
    x = jax.lax.cond(theta > 0, right, left)
    ppl.factor("f", -0.5 * (x - theta) ** 2)


@pytest.mark.slow
def test_trajectories_cross_into_other_branches():
    chains = inference.MCMC(NUTS, num_samples=4000, num_warmup=500, num_chains=4)
    found = chains.run(KEY, branching)
    density = lambda x, theta: stats.norm.pdf(theta, 0.5, 1) * np.exp(-0.5 * (x - theta) ** 2) * (
        stats.gamma.pdf(x, 3, scale=0.5) if theta > 0 else stats.norm.pdf(x, 2, 0.5)
    )  # fmt: skip
    over = lambda f, a, b: integrate.dblquad(lambda x, t: f(x, t) * density(x, t), a, b, -2 if a < 0 else 0, 12)[0]
    one = lambda x, t: 1.0
    z = over(one, 0, 8), over(one, -8, 0)
    theta, total = found.values["theta"], sum(z)
    for value, expected in [
        ((theta > 0).astype(float), z[0] / total),
        (theta, (over(lambda x, t: t, 0, 8) + over(lambda x, t: t, -8, 0)) / total),
        (found.values["rate"], over(lambda x, t: x, 0, 8) / total),
        (found.values["shift"], over(lambda x, t: x, -8, 0) / total),
    ]:
        assert abs(value.mean() - expected) < 5 * found.error(value)
        assert found.error(value) < 0.05
    assert ((found.values["shift"] != 0) == (theta <= 0)).all()


def test_other_choices_do_not_appear_or_vanish():
    """theta decides whether there is a coin; NUTS on theta alone never makes one of zeros."""

    def program():
        theta = ppl.sample("theta", dist.Normal(0.0, 1.0))
        jax.lax.cond(theta > 0, lambda: ppl.sample("coin", dist.Bernoulli(0.7)), lambda: jnp.int32(0))

    target = target_of(program)
    draw = target.evaluate({"theta": jnp.float32(0.3), "coin": jnp.int32(1)})[0]
    energy = jax.jit(jax.value_and_grad(mcmc.NUTS("theta").potential(target, draw)))
    there, gradient = energy({"theta": jnp.float32(-0.1)})
    assert (there, gradient["theta"]) == (jnp.inf, 0)
    assert float(energy({"theta": jnp.float32(1.0)})[0]) == pytest.approx(0.5 + np.log(np.sqrt(2 * np.pi)) - np.log(0.7))


def test_improper_sites_need_no_start():
    def program():
        mu = ppl.sample("mu", dist.ImproperUniform(constraints.positive, (), ()))
        ppl.observe("y", dist.Normal(mu, 1.0), 3.0)

    found = inference.MCMC(BARKER, num_samples=900, num_warmup=300, num_chains=2).run(KEY, program)
    expected = stats.truncnorm(-3, np.inf, 3).mean()
    assert abs(found.expectation("mu") - expected) < 5 * found.error(found.values["mu"])
    with pytest.raises(errors.SiteError, match=r"'mu': ImproperUniform cannot be simulated.*proper prior, or a value"):
        inference.SMC(4).run(KEY, program)


def test_gradients_of_inactive_steps_are_zero():
    """Past the loop's end the scale that is not moved is 0 in the trace, and the density of x there is NaN."""

    def program():
        def step(carry):
            i, x = carry
            ppl.bound(3)
            scale = ppl.sample("scale", dist.Exponential(1.0))
            return i + 1, ppl.sample("x", dist.Normal(x, scale))

        jax.lax.while_loop(lambda carry: carry[0] < 1, step, (0, 0.3))

    target = target_of(program)
    draw = target.evaluate({"scale": jnp.array([2.0, 0.0, 0.0]), "x": jnp.array([0.9, 0.0, 0.0])})[0]
    energy, gradient = jax.value_and_grad(mcmc.NUTS("x").potential(target, draw))({"x": jnp.array([0.9, 0.5, -1.0])})
    assert float(energy) == pytest.approx(-stats.norm.logpdf(0.9, 0.3, 2.0) - stats.expon.logpdf(2.0) + 0.625, abs=1e-5)
    np.testing.assert_allclose(gradient["x"], [0.6 / 4, 0.5, -1.0], rtol=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------------


class Odd(dist.Normal):
    support = constraints.dependent


ERRORS = [
    (mcmc.NUTS("k"), lambda: ppl.sample("k", dist.Bernoulli(0.3)), r"NUTS: site 'k' is discrete.*mcmc.Gibbs\('k'\)"),
    (mcmc.HMC("t"), lambda: ppl.generate("t", ppl.prompt(M3), max_tokens=1)[0], "HMC: site 't' is a text.*Regenerate"),
    (NUTS, lambda: ppl.sample("k", dist.Bernoulli(0.3)), "no continuous random site; take mcmc.Gibbs"),
    (mcmc.NUTS("thta"), lambda: normal(1.0), "no random site 'thta'.*'theta'"),
    (NUTS, lambda: ppl.sample("odd", Odd(0.0, 1.0)), "'odd' has a support that NumPyro knows no bijection onto"),
    (mcmc.NumPyro(lambda potential_fn: 3), lambda: normal(1.0), "`make` returned int"),
]


@pytest.mark.parametrize(("kernel", "program", "message"), ERRORS)
def test_errors_come_before_anything_runs(kernel, program, message, monkeypatch):
    monkeypatch.setattr("latentrace.inference.mcmc.mcmc.compiled", lambda key, make: SimpleNamespace())
    with pytest.raises(errors.SiteError, match=message):
        inference.MCMC(kernel, num_samples=1).run(KEY, program)


def test_options():
    assert mcmc.NUTS("a", dense_mass=[("a", "b")]) == mcmc.NUTS("a", dense_mass=(("a", "b"),))
    assert hash(mcmc.NUTS(step_size=0.1)) != hash(mcmc.HMC(step_size=0.1))
    assert mcmc.NUTS(step_size=0.1) != mcmc.HMC(step_size=0.1)
    with pytest.raises(errors.SiteError, match=r"NUTS: no option 'target_acept'.*'target_accept_prob'"):
        mcmc.NUTS(target_acept=0.9)
    with pytest.raises(errors.SiteError, match=r"option 'inverse_mass_matrix' must be a number.*ArrayImpl.*mcmc.NumPyro"):
        mcmc.NUTS(inverse_mass_matrix=jnp.ones(2))
    with pytest.raises(errors.SiteError, match="no option 'init_strategy'"):
        mcmc.HMC(init_strategy=None)
    assert mcmc.NUTS("x").sites == ("x",)
    assert NUTS.sites == ()
