"""Every error names the site and says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, models, ppl
from latentrace.ppl import errors

KEY = jax.random.key(0)
LM = programs.markov(3, seed=1)
SMC = inference.SMC(4)


def stage(fn):
    """Stage a program; errors found before any computation appear here."""
    from latentrace.ppl.staging import stage

    return stage(ppl.program(fn), ())


def coin(name="b", p=0.5):
    return ppl.sample(name, dist.Bernoulli(p))


# --- names ------------------------------------------------------------------------------------------------------------


def twice():
    coin()
    coin()


def twice_by_jit():
    flip = jax.jit(coin, static_argnums=(0, 1))
    flip("b", 0.5)
    flip("b", 0.5)


def inside_and_outside_a_loop():
    coin()
    jax.lax.fori_loop(0, 3, lambda i, x: x + coin(), 0)


def in_a_branch_and_after():
    jax.lax.cond(coin("a") == 1, lambda: coin("b"), lambda: 0)
    coin("b")


def in_two_conds():
    for _ in range(2):
        jax.lax.cond(jnp.array(True), lambda: coin("b"), lambda: 0)


def text_and_score():
    _, context = ppl.generate("b", ppl.prompt(LM), max_tokens=1)
    ppl.score("b", context, [1])


@pytest.mark.parametrize(
    "program", [twice, twice_by_jit, inside_and_outside_a_loop, in_a_branch_and_after, in_two_conds, text_and_score]
)
def test_a_repeated_name(program):
    with pytest.raises(errors.SiteNameError, match=r"site 'b' is declared twice.*rename.*scope"):
        stage(program)


def test_names_may_repeat_in_exclusive_branches_and_scopes():
    def program():
        jax.lax.switch(coin("a"), [lambda: coin("b"), lambda: coin("b", 0.1)])
        for prefix in ("x", "y"):
            with ppl.scope(prefix):
                coin("b")

    assert set(stage(program).sites) == {"a", "b", "x/b", "y/b"}


@pytest.mark.parametrize("given", ["answr", "Answer"])
def test_a_misspelt_name_is_met_with_near_misses(given):
    program = ppl.program(lambda: (coin("answer"), coin("question"), ppl.factor("reward", 0.5))[0])
    with pytest.raises(errors.SiteNameError, match=rf"'{given}' does not exist; did you mean 'answer'\?"):
        SMC.run(KEY, program.condition({given: 1}))
    with pytest.raises(errors.SiteNameError, match=r"'reward' is a factor site, which has no value"):
        SMC.run(KEY, program.condition({"reward": 1.0}))
    posterior = SMC.run(KEY, program)
    with pytest.raises(errors.SiteNameError, match=rf"no site '{given}'.*did you mean 'answer'"):
        posterior.marginal(given)


def test_a_missing_value_in_log_density():
    with pytest.raises(errors.SiteError, match="every random site; 'b' has none"):
        ppl.program(lambda: (coin("a"), coin("b"))).log_density({"a": 1})


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_that_is_no_name(name):
    with pytest.raises(errors.SiteError, match="non-empty string"):
        stage(lambda: coin(name))


# --- arguments of sites -----------------------------------------------------------------------------------------------

ALL = jnp.ones(3, bool)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda c: ppl.generate("x", c, max_tokens=0), r"'x': max_tokens must be .* at least 1, found 0"),
        (lambda c: ppl.generate("x", c, max_tokens=2.5), r"'x': max_tokens must be a whole number .* 2\.5"),
        (lambda c: ppl.generate("x", c, max_tokens=True), r"'x': max_tokens"),
        (lambda c: ppl.generate("x", c, max_tokens=2, constraint=ALL[:2]), r"'x': a constraint is bool\[3\].*bool\[2\]"),
        (lambda c: ppl.generate("x", c, max_tokens=2, constraint=jnp.ones(3)), r"'x': a constraint is bool\[3\].*float32"),
        (lambda c: ppl.generate("x", c, max_tokens=2, until=""), r"'x': `until` must hold"),
        (lambda c: ppl.generate("x", c, max_tokens=2, until=[]), r"'x': `until` must hold"),
        (lambda c: ppl.generate("x", c, max_tokens=2, until=[7]), r"'x': token id 7 is outside .* 3 tokens"),
        (lambda c: ppl.generate("x", c, max_tokens=2, until=["a", 1]), r"'x': .*not a mixture"),
        (lambda c: ppl.generate("x", c, max_tokens=2, proposal=lambda z: z[:2]), r"'x': the proposal must return .*\[3\]"),
        (lambda c: ppl.generate("x", c, max_tokens=2, twist=lambda t: t.log_probs), r"'x': the twist must return a scalar"),
        (lambda c: ppl.generate("x", c, max_tokens=2, twist=lambda t: coin() * 1.0), r"twist of site 'x' holds a site"),
        (lambda c: ppl.score("x", c, [1, 5]), r"'x': token id 5 is outside the vocabulary of 3"),
        (lambda c: ppl.extend(c, [-2]), r"token id -2 is outside"),
        (lambda c: ppl.tokens(c, last=0), r"`last` must be at least 1"),
        (lambda c: ppl.factor("f", jnp.ones(2)), r"'f': expected a scalar, found shape \(2,\); reduce it"),
        (lambda c: ppl.factor("f", jnp.array(True)), r"'f': a bool is not a log-weight; use `ppl.condition`"),
        (lambda c: ppl.factor("f", "big"), r"'f'"),
        (lambda c: ppl.twist("t", jnp.ones(3)), r"'t': expected a scalar"),
        (lambda c: ppl.condition("c", 1.0), r"'c': expected a bool, found float32; compare"),
        (lambda c: ppl.condition("c", ALL), r"'c': expected a scalar, found shape \(3,\); reduce it.*all"),
        (lambda c: ppl.sample("z", 0.5), r"'z': expected a NumPyro distribution, found float"),
        (lambda c: ppl.prompt("gpt"), r"expected a LanguageModel, found str"),
        (lambda c: ppl.bound(0), r"bound must be at least 1"),
        (lambda c: ppl.vmap(lambda x, y: x)(jnp.ones(2), jnp.ones(3)), r"one size, found \[2, 3\]"),
        (lambda c: ppl.vmap(lambda: coin())(), r"give axis_size"),
        (lambda c: ppl.vmap(lambda x: x)(jnp.ones((0, 2))), r"at least one element"),
        (lambda c: ppl.vmap(lambda x: x, in_axes=1)(jnp.ones((2, 2))), r"in_axes must be 0 or None"),
    ],
)
def test_bad_arguments(program, message):
    with pytest.raises(errors.SiteError, match=message):
        stage(lambda: program(ppl.prompt(LM)) and None)


def test_a_context_cannot_leave_a_plate():
    def program():
        context = ppl.prompt(LM)
        ppl.vmap(lambda i: ppl.generate("x", context, max_tokens=1)[1])(jnp.arange(2))

    with pytest.raises(errors.SiteError, match=r"context cannot leave the plate.*return its text"):
        stage(program)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"b": jnp.zeros(2)}, r"'b': given a value of shape \(2,\), expected \(\)"),
        ({"b": 0.5}, r"'b': given float32 values, expected int32"),
        ({"x": [1, 1, 1, 1]}, r"'x': given 4 tokens, more than its max_tokens of 2"),
        ({"x": 1}, r"'x': given array\(1\), expected a text or token ids"),
        ({"x": "a?"}, r"'x': given 'a\?', expected a text or token ids"),
        ({"x": [5]}, r"'x': given token id 5, which is outside the vocabulary of 3"),
        ({"y": [[1]]}, r"'y': given 1 values for a loop or plate of 2"),
        ({"y": "ab"}, r"'y': given 2 values for a loop or plate of 2"),
    ],
)
def test_given_values_that_do_not_fit(given, message):
    def program():
        coin()
        _, context = ppl.generate("x", ppl.prompt(LM), max_tokens=2)
        jax.lax.scan(lambda c, _: (c, ppl.generate("y", c, max_tokens=1)[0]), context, None, length=2)

    with pytest.raises(errors.SiteError, match=message):
        SMC.run(KEY, ppl.program(program).condition(given))


# --- where sites may stand --------------------------------------------------------------------------------------------


def vmapped_with_operands():
    jax.vmap(lambda p: coin("b", p))(jnp.array([0.1, 0.2]))


def vmapped_without_operands():
    jax.vmap(lambda i: i + coin())(jnp.arange(3))


def vmapped_inside_jit():
    jax.jit(jax.vmap(lambda i: i + coin()))(jnp.arange(3))


def vmapped_factor():
    jax.vmap(lambda x: ppl.factor("b", x))(jnp.ones(2))


@pytest.mark.parametrize(
    "program", [vmapped_with_operands, vmapped_without_operands, vmapped_inside_jit, vmapped_factor], ids=lambda f: f.__name__
)
def test_a_site_under_vmap(program):
    with pytest.raises(errors.TransformationError, match=r"site 'b' stands under jax.vmap: use `ppl.vmap`"):
        stage(program)


def grad_of_a_factor():
    jax.grad(lambda x: ppl.factor("b", x) or x)(1.0)


def grad_through_a_draw():
    jax.grad(lambda x: x * ppl.sample("b", dist.Normal(x, 1.0)))(1.0)


def grad_in_a_scan():
    jax.grad(lambda x: jax.lax.scan(lambda c, _: (c * ppl.sample("b", dist.Normal(c, 1.0)), None), x, None, length=2)[0])(1.0)


def grad_repeats_a_draw():
    """JAX moves what a differentiated loop does not differentiate out of it: both steps share one draw."""

    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) * ppl.sample("b", dist.Normal(0.0, 1.0)), None), x, None, length=2)[0]

    ppl.factor("f", jax.grad(f)(3.0))


@pytest.mark.parametrize(
    "program",
    [
        grad_of_a_factor,
        grad_through_a_draw,
        grad_in_a_scan,
        pytest.param(grad_repeats_a_draw, marks=pytest.mark.xfail(strict=True, reason="the draw is moved out of the loop")),
    ],
    ids=lambda f: f.__name__,
)
def test_a_site_under_grad(program):
    with pytest.raises(errors.SiteError, match=r"'b'"):
        stage(program)


@pytest.mark.parametrize(
    "site",
    [coin, lambda: ppl.factor("b", 0.0), lambda: ppl.prompt(LM), lambda: ppl.vmap(coin, axis_size=2)(), ppl.program(coin)],
)
def test_a_site_outside_a_program(site):
    with pytest.raises(errors.SiteError, match=r"site .* was reached outside of inference: decorate .* `ppl.program`"):
        site()


def test_a_program_with_given_values_does_not_run_inside_another():
    inner = ppl.program(coin).condition({"b": 1})
    with pytest.raises(errors.SiteError, match="given values"):
        stage(lambda: inner())


def test_a_while_without_a_bound():
    with pytest.raises(errors.SiteError, match=r"site 'b' stands in a while loop without a bound: call `ppl.bound"):
        stage(lambda: jax.lax.while_loop(lambda n: n < 3, lambda n: n + coin(), 0))


def test_a_site_in_a_while_loops_condition():
    def program():
        def step(n):
            ppl.bound(3)
            return n + 1

        return jax.lax.while_loop(lambda n: coin() == 1, step, 0)

    with pytest.raises(errors.TransformationError, match="condition holds a site; move it to the body"):
        SMC.run(KEY, program)


# --- what runs find ---------------------------------------------------------------------------------------------------


def test_all_dead_names_the_site_where_the_last_died():
    def program(a, b):
        x = coin()
        ppl.condition("first", (x == a) | (x == b))
        ppl.condition("second", x == b)
        ppl.condition("third", x == 2)
        ppl.condition("fourth", x == 3)

    for algorithm in (inference.SMC(8), inference.SMC(8, 0.0), inference.ImportanceSampling(8), inference.Exact()):
        n = 2 if isinstance(algorithm, inference.Exact) else 8
        with pytest.raises(errors.AllParticlesDeadError, match=rf"all {n} .*died at site 'third'.*twist"):
            algorithm.run(KEY, program, jnp.int32(0), jnp.int32(1))


def test_a_plate_does_not_kill_the_dead_again():
    def program():
        ppl.condition("first", coin() == 2)
        ppl.vmap(lambda x: ppl.factor("inside", jnp.log(x)))(jnp.zeros(2))

    with pytest.raises(errors.AllParticlesDeadError, match="died at site 'first'"):
        inference.ImportanceSampling(4).run(KEY, program)


def test_a_constraint_that_forbids_everything():
    def program():
        ppl.generate("x", ppl.prompt(LM), max_tokens=2, constraint=jnp.zeros(3, bool))

    for algorithm in (inference.SMC(8), inference.Exact()):
        with pytest.raises(errors.AllParticlesDeadError, match="died at site 'x'"):
            algorithm.run(KEY, program)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_weight_that_is_not_finite(value):
    def program(value):
        x = coin()
        ppl.factor("f", jnp.where(x == 1, value, 0.0))

    for algorithm in (inference.SMC(16), inference.Exact()):
        with pytest.raises(errors.NonFiniteError, match=r"site 'f': its log-weight was NaN or \+inf for .* of"):
            algorithm.run(KEY, program, jnp.asarray(value))


def test_a_nan_of_the_dead_is_no_error():
    def program():
        x = coin()
        ppl.condition("alive", x == 1)
        ppl.factor("f", jnp.log(x - 0.5))
        ppl.twist("t", jnp.log(x - 0.5))
        ppl.vmap(lambda y: ppl.factor("in a plate", y * jnp.log(x - 0.5)))(jnp.ones(2))

    posterior = inference.ImportanceSampling(30).run(KEY, program)
    assert np.unique(posterior.log_weights).tolist() == pytest.approx([-np.inf, 3 * np.log(0.5)])


def test_a_bound_that_is_reached():
    def program(p, truncate):
        def step(n):
            ppl.bound(2, truncate=truncate)
            coin()
            return n + 1

        return jax.lax.while_loop(lambda n: n < 1 + p, step, 0)

    with pytest.raises(errors.BoundReachedError, match=r"site 'b': its while loop .* bound in 4 of 4 .*truncate=True"):
        SMC.run(KEY, program, jnp.int32(2), False)
    assert (SMC.run(KEY, program, jnp.int32(2), True).returned == 2).all()
    assert (SMC.run(KEY, program, jnp.int32(1), False).returned == 2).all()


def test_a_bound_in_a_loop_without_other_sites():
    def program(n):
        def step(i):
            ppl.bound(2)
            return i + 1

        return jax.lax.while_loop(lambda i: i < n, step, 0)

    assert (SMC.run(KEY, program, jnp.int32(2)).returned == 2).all()
    with pytest.raises(errors.BoundReachedError, match="raise the bound"):
        SMC.run(KEY, program, jnp.int32(3))


@pytest.mark.parametrize("row", [jnp.nan, -jnp.inf])
def test_a_model_without_a_next_token(row):
    lm = models.MarkovLM(jnp.full(3, row), jnp.zeros((3, 3)), 0)
    with pytest.raises(errors.NonFiniteError, match="site 'x'"):
        SMC.run(KEY, lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=2)[0].tokens)


class Short(models.MarkovLM):
    """A model whose contexts hold four tokens."""

    max_length = 4


jax.tree_util.register_pytree_with_keys(
    Short,
    lambda m: ([("initial", m.initial), ("transition", m.transition)], m.eos_id),
    lambda eos_id, arrays: _short(*arrays, eos_id),
)


def _short(initial, transition, eos_id):
    model = object.__new__(Short)
    for name, value in {"initial": initial, "transition": transition, "eos_id": eos_id, "vocabulary": None}.items():
        object.__setattr__(model, name, value)
    return model


NEVER_ENDS = _short(jnp.array([-jnp.inf, 0.0]), jnp.array([[0.0, 0.0], [-jnp.inf, 0.0]]), 0)


def test_a_prompt_that_does_not_fit():
    with pytest.raises(errors.SiteError, match="5 tokens do not fit the model's context of 4; shorten"):
        stage(lambda: ppl.prompt(NEVER_ENDS, [1] * 5) and None)


@pytest.mark.parametrize("algorithm", [inference.SMC(3), inference.Exact()], ids=["SMC", "Exact"])
def test_a_context_that_grows_too_long(algorithm):
    """Both ways of writing a text, drawing and enumerating, agree on what fits."""
    program = lambda n: lambda: ppl.generate("x", ppl.prompt(NEVER_ENDS, [1, 1]), max_tokens=n)[0].tokens
    assert (algorithm.run(KEY, program(2)).returned == 1).all()
    with pytest.raises(errors.ContextOverflowError, match=r"site 'x': .* past the model's 4 tokens; shorten the prompt"):
        algorithm.run(KEY, program(3))


# --- algorithms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inference.SMC(0), "num_particles must be at least 1, not 0"),
        (lambda: inference.SMC(4, resample="systemic"), r"no resampling scheme 'systemic'; did you mean 'systematic'\?"),
        (lambda: inference.SMC(4, granularity="tokens"), "'token' or 'site', not 'tokens'"),
        (lambda: inference.ImportanceSampling(0), "num_particles must be at least 1"),
        (lambda: inference.ImportanceSampling(5, batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(errors.SiteError, match=message):
        make()


def test_exact_refuses_a_continuous_site():
    def program():
        coin()
        ppl.sample("height", dist.Normal(0.0, 1.0))

    with pytest.raises(errors.NotEnumerableError, match=r"'height' has no finite support.*use ImportanceSampling or SMC"):
        inference.Exact().run(KEY, program)
    given = ppl.program(program).condition({"height": 0.3})
    assert inference.Exact().run(KEY, given).log_evidence == pytest.approx(-0.5 * 0.09 - 0.5 * np.log(2 * np.pi), rel=1e-5)


def test_exact_refuses_too_many_traces_and_counts_them():
    def program():
        jax.lax.scan(lambda c, _: (c, ppl.generate("x", c, max_tokens=4)[0]), ppl.prompt(LM), None, length=3)
        coin()

    with pytest.raises(errors.NotEnumerableError, match=r"up to 1,062,882 traces, more than max_traces=1,000.*SMC"):
        inference.Exact(max_traces=1000).run(KEY, program)
