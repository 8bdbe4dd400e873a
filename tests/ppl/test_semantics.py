"""What programs mean: densities of texts and values against sums written by hand, and what every site leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from scipy import stats

from latentrace import inference, models, ppl

KEY = jax.random.key(0)
LM = programs.markov(4, eos_id=3, seed=8)  # a, b, c, <end>
HMM = programs.hmm(2, 3, seed=4)
EOS = 3


def log_p(lm, context, tokens) -> float:
    """log p(tokens | context), one next-token distribution at a time."""
    return sum(np.log(programs.next_probs(lm, (*context, *tokens[:i]))[t]) for i, t in enumerate(tokens))


# --- texts ------------------------------------------------------------------------------------------------------------


@ppl.program
def one_text():
    text, context = ppl.generate("x", ppl.prompt(LM, [1]), max_tokens=3, until=["ab", "cc"])
    return text, ppl.tokens(context, last=3)


@pytest.fixture(scope="module")
def density_of_text():
    many = jax.jit(jax.vmap(lambda tokens: one_text.log_density({"x": tokens})))
    return lambda texts: np.asarray(many(jnp.asarray(texts)))


def test_density_of_a_text_is_that_of_its_tokens_up_to_its_end(density_of_text):
    cases = {
        (EOS, EOS, EOS): (EOS,),  # EOS at once
        (1, EOS, EOS): (1, EOS),
        (0, 1, EOS): (0, 1),  # `until` met: what follows is padding
        (2, 2, EOS): (2, 2),
        (1, 0, 1): (1, 0, 1),  # met by the last token
        (1, 1, EOS): (1, 1, EOS),
        (1, 1, 0): (1, 1, 0),  # cut at max_tokens
    }
    expected = [log_p(LM, (1,), text) for text in cases.values()]
    np.testing.assert_allclose(density_of_text(list(cases)), expected, rtol=1e-5)


def test_only_padded_texts_have_density(density_of_text):
    impossible = [(EOS, 0, EOS), (1, EOS, 2), (0, 1, 0), (2, 2, 2)]
    assert (density_of_text(impossible) == -np.inf).all()


def test_densities_of_all_texts_sum_to_one(density_of_text):
    every = np.stack(np.meshgrid(*[range(4)] * 3), -1).reshape(-1, 3)
    assert abs(np.exp(density_of_text(every).astype(float)).sum() - 1) < 1e-5


def test_fields_of_drawn_texts():
    posterior = inference.ImportanceSampling(400).run(KEY, one_text)
    text, (last, count) = posterior.values["x"], posterior.returned[1]
    assert text.tokens.shape == (400, 3)
    assert text.log_probs.dtype == np.float32
    ends = {"eos": 0, "until": 0, "cut": 0}
    for i in range(400):
        tokens, n = tuple(text.tokens[i].tolist()), int(text.length[i])
        inside = tokens[:n]
        spelled = "".join("abc"[t] for t in inside if t != EOS)
        found = "eos" if inside[-1] == EOS else "until" if spelled.endswith(("ab", "cc")) else "cut"
        ends[found] += 1
        assert 1 <= n <= 3
        assert EOS not in inside[:-1]
        assert set(tokens[n:]) <= {EOS}
        assert bool(text.ended[i]) == (found != "cut")
        assert n == 3 or found != "cut"
        assert (text.log_probs[i][n:] == 0).all()
        np.testing.assert_allclose(text.log_probs[i].sum(), log_p(LM, (1,), inside), rtol=1e-5)
        assert text[i].decode() == spelled
        context = (1, *inside)[-3:]
        assert tuple(last[i][3 - count[i] :].tolist()) == context
    assert min(ends.values()) > 10
    np.testing.assert_array_equal(posterior.log_weights, 0)  # a prior draw


@pytest.mark.parametrize(
    ("lm", "context"),
    [(HMM, []), (HMM, [1]), (HMM, [0, 1, 1, 2, 0, 1, 2, 2, 1, 0]), (LM, [2, 1])],
    ids=lambda x: type(x).__name__ if not isinstance(x, list) else len(x),
)
def test_generation_follows_the_models_own_logits(lm, context):
    """Decoding through the cache, replaying, and scoring agree with one pass over the whole sequence."""

    @ppl.program
    def program():
        start = ppl.prompt(lm, context)
        text, after = ppl.generate("x", start, max_tokens=3)
        more, _ = ppl.generate("y", ppl.extend(after, [1, 2]), max_tokens=2)
        ppl.score("z", start, [1, 0, 2])
        return text, more

    trace = program.simulate(jax.random.key(5))
    x, y = trace.values["x"], trace.values["y"]
    first, second = tuple(x.tokens[: int(x.length)].tolist()), tuple(y.tokens[: int(y.length)].tolist())
    expected = log_p(lm, context, first), log_p(lm, (*context, *first, 1, 2), second), log_p(lm, context, (1, 0, 2))
    impossible = lm.eos_id == 0  # the scored text goes on after EOS
    np.testing.assert_allclose(x.log_probs.sum(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(y.log_probs.sum(), expected[1], rtol=1e-5)
    np.testing.assert_allclose(trace.log_weight, -np.inf if impossible else expected[2], rtol=1e-5)
    total = program.log_density({"x": x, "y": y})
    np.testing.assert_allclose(total, -np.inf if impossible else sum(expected), rtol=1e-5)


def test_a_finished_context_is_silent_until_it_is_extended():
    @ppl.program
    def program():
        context = ppl.score("end", ppl.prompt(LM, [1]), [0, EOS])
        silent, context = ppl.generate("silent", context, max_tokens=2)
        context = ppl.score("nothing", context, "")
        revived, _ = ppl.generate("revived", ppl.extend(context, [2]), max_tokens=1)
        return silent, revived

    posterior = inference.ImportanceSampling(50).run(KEY, program)
    silent, revived = posterior.returned
    assert (silent.length == 0).all()
    assert silent.ended.all()
    assert (silent.tokens == EOS).all()
    assert (silent.log_probs == 0).all()
    assert (revived.length == 1).all()
    assert len(np.unique(revived.tokens)) > 1
    np.testing.assert_allclose(posterior.log_weights, log_p(LM, (1,), (0, EOS)), rtol=1e-5)
    density = lambda silent: program.log_density({"silent": silent, "revived": [1]})
    expected = log_p(LM, (1,), (0, EOS)) + log_p(LM, (1, 0, EOS, 2), (1,))
    np.testing.assert_allclose(density([]), expected, rtol=1e-5)
    assert density([1, EOS]) == -np.inf


def test_given_end_tokens_do_not_finish_a_context():
    @ppl.program
    def program():
        context = ppl.extend(ppl.prompt(LM, [1, EOS]), [0, EOS])
        return ppl.generate("x", context, max_tokens=1)[0]

    np.testing.assert_allclose(program.log_density({"x": [2]}), log_p(LM, (1, EOS, 0, EOS), (2,)), rtol=1e-5)


def test_nothing_can_be_observed_after_the_end():
    @ppl.program
    def program():
        return ppl.score("too late", ppl.score("end", ppl.prompt(LM, [1]), [0, EOS]), [1]).handle

    assert program.simulate(KEY).log_weight == -np.inf


def test_cut_text_can_be_continued():
    @ppl.program
    def program():
        _, context = ppl.generate("x", ppl.prompt(HMM), max_tokens=2)
        ppl.generate("y", context, max_tokens=2)

    np.testing.assert_allclose(program.log_density({"x": [1, 2], "y": [2, 0]}), log_p(HMM, (), (1, 2, 2, 0)), rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 2])
def test_tiny_vocabularies(vocab_size):
    lm = programs.markov(vocab_size, seed=vocab_size)

    @ppl.program
    def program():
        text, context = ppl.generate("x", ppl.prompt(lm), max_tokens=2)
        ppl.generate("y", context, max_tokens=1)
        return text.tokens

    exact = inference.Exact().run(KEY, program)
    target = programs.measure(programs.paths(lambda path: programs.padded(path.text(lm, (), 2), 2)))
    assert abs(exact.log_evidence) < 1e-6
    found = programs.measure(zip(exact.returned, exact.weights))
    assert found == pytest.approx(target, rel=1e-5)
    assert inference.SMC(1, 1.1).run(KEY, program).ess == pytest.approx(1.0)


# --- values -----------------------------------------------------------------------------------------------------------


@ppl.program
def mixed(y):
    scale = ppl.sample("scale", dist.LogNormal(0.3, 0.8))
    z = ppl.sample("z", dist.Normal(jnp.array([0.0, 1.0]), scale))
    ppl.observe("y", dist.StudentT(3.0, z.sum(), scale), y)
    text, _ = ppl.generate("x", ppl.prompt(LM), max_tokens=2, proposal=ppl.proposals.temperature(1 + scale))
    ppl.factor("reward", -scale * text.length + jnp.sin(z[0]))
    ppl.twist("promise", 5.0 * z[1])


def by_hand(scale, z, y, tokens):
    return (
        stats.lognorm(0.8, scale=np.exp(0.3)).logpdf(scale)
        + stats.norm([0, 1], scale).logpdf(z).sum()
        + stats.t(3, np.sum(z), scale).logpdf(y)
        + log_p(LM, (), tokens)
        - scale * len(tokens)
        + np.sin(z[0])
    )


def test_log_density_and_its_gradient_are_those_of_the_sum_by_hand():
    y, tokens = np.float32(0.4), (1, 2)
    density = lambda scale, z: mixed.log_density({"scale": scale, "z": z, "x": jnp.array(tokens)}, jnp.asarray(y))
    scale, z = 0.7, np.array([0.2, -0.5])
    value, (d_scale, d_z) = jax.value_and_grad(density, (0, 1))(jnp.float32(scale), jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(value, by_hand(scale, z, y, tokens), rtol=1e-5)
    h = 1e-5
    difference = lambda up, down: (by_hand(*up, y, tokens) - by_hand(*down, y, tokens)) / (2 * h)
    np.testing.assert_allclose(d_scale, difference((scale + h, z), (scale - h, z)), rtol=1e-4)
    unit = np.eye(2) * h
    np.testing.assert_allclose(d_z, [difference((scale, z + u), (scale, z - u)) for u in unit], rtol=1e-4)


@pytest.mark.parametrize(
    ("distribution", "outside"),
    [
        (dist.Exponential(2.0), -1.0),
        (dist.Gamma(2.0, 1.0), -0.5),
        (dist.Beta(2.0, 3.0), 1.5),
        (dist.LogNormal(0.0, 1.0), -2.0),
        (dist.Uniform(0.0, 1.0), 2.0),
        (dist.HalfNormal(1.0), -0.3),
        (dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])), jnp.array([0.5, 0.9, -0.4])),
        (dist.Exponential(jnp.array([1.0, 2.0])), jnp.array([0.5, -0.5])),
    ],
    ids=lambda x: type(x).__name__,
)
def test_values_outside_a_support_have_density_zero_and_finite_gradients(distribution, outside):
    @ppl.program
    def program():
        ppl.sample("x", distribution)

    value, gradient = jax.value_and_grad(lambda x: program.log_density({"x": x}))(jnp.asarray(outside))
    assert value == -np.inf
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("distribution", "outside"),
    [(dist.Bernoulli(0.3), 2), (dist.Categorical(probs=jnp.array([0.2, 0.8])), 5), (dist.Poisson(2.0), -1)],
    ids=["Bernoulli", "Categorical", "Poisson"],
)
def test_discrete_values_outside_a_support(distribution, outside):
    @ppl.program
    def program():
        ppl.sample("k", distribution)

    assert program.log_density({"k": outside}) == -np.inf
    assert program.log_density({"k": 1}) == pytest.approx(float(distribution.log_prob(1)), rel=1e-6)


def test_a_text_outside_the_vocabulary_is_refused():
    with pytest.raises(ppl.errors.SiteError, match=r"'x'.*outside the vocabulary"):
        one_text.log_density({"x": [1, 9]})


def test_untaken_branches_and_steps_past_the_end_have_no_density():
    silent = lambda _: None

    @ppl.program
    def program(x):
        k = ppl.sample("k", dist.Bernoulli(0.3))
        jax.lax.cond(k == 1, lambda: ppl.factor("a", jnp.log(x)), lambda: silent(ppl.sample("b", dist.Normal(x, 1.0))))

        def step(i):
            ppl.bound(3)
            ppl.sample("c", dist.Bernoulli(0.2))
            return i + 1

        jax.lax.while_loop(lambda i: i < 1 + k, step, 0)

    density = lambda k, x: program.log_density({"k": k, "b": 0.5, "c": jnp.array([1, 0, 1])}, x)
    x = jnp.float32(2.0)
    np.testing.assert_allclose(density(1, x), np.log([0.3, 2.0, 0.2, 0.8]).sum(), rtol=1e-5)
    np.testing.assert_allclose(density(0, x), np.log([0.7, 0.2]).sum() + stats.norm(2, 1).logpdf(0.5), rtol=1e-5)
    posterior = inference.ImportanceSampling(40).run(KEY, program, x)
    k, active = posterior.values["k"], posterior.active
    np.testing.assert_array_equal(active["b"], k == 0)
    np.testing.assert_array_equal(active["c"].sum(1), 1 + k)
    assert (posterior.values["b"][k == 1] == 0).all()


def test_gradient_of_an_untaken_branch_is_zero_even_where_its_own_is_infinite():
    @ppl.program
    def program(x):
        jax.lax.cond(x > 1, lambda: ppl.factor("a", jnp.sqrt(x - 1)), lambda: ppl.factor("b", -x))

    assert jax.grad(lambda x: program.log_density({}, x))(jnp.float32(1.0)) == -1.0


def test_simulate_returns_what_the_run_paid():
    trace = mixed.simulate(jax.random.key(2), np.float32(0.4))
    values = {name: trace.values[name] for name in ("scale", "z", "x")}
    prior = (
        stats.lognorm(0.8, scale=np.exp(0.3)).logpdf(values["scale"])
        + stats.norm([0, 1], values["scale"]).logpdf(values["z"]).sum()
    )
    text = values["x"]
    logits = np.array([np.log(programs.next_probs(LM, tuple(text.tokens[:i].tolist()))) for i in range(int(text.length))])
    tempered = jax.nn.log_softmax(jnp.asarray(logits) / (1 + values["scale"]))
    proposed = sum(tempered[i, t] for i, t in enumerate(text.tokens[: int(text.length)]))
    joint = mixed.log_density(values, np.float32(0.4))
    np.testing.assert_allclose(trace.log_weight, joint - prior - proposed, rtol=1e-4)


def test_condition_takes_strings_ids_and_texts_also_in_loops():
    @ppl.program
    def program():
        def step(context, _):
            text, context = ppl.generate("x", context, max_tokens=2)
            b = ppl.sample("b", dist.Bernoulli(0.3))
            return context, (text.tokens, b)

        return jax.lax.scan(step, ppl.prompt(LM), None, length=2)[1]

    expected = log_p(LM, (), (0, 2, 1, EOS)) + np.log(0.3 * 0.7)
    text = ppl.Text(np.array([[0, 2], [1, EOS]]), np.array([2, 2]), np.array([False, True]), np.zeros((2, 2)), LM)
    for given in (["ac", "b"], [[0, 2], [1]], np.array([[0, 2], [1, EOS]]), text):
        density = program.log_density({"x": given, "b": [1, 0]})
        np.testing.assert_allclose(density, expected, rtol=1e-5)
    posterior = inference.ImportanceSampling(30).run(KEY, program.condition({"x": ["ac", "b"]}))
    np.testing.assert_allclose(posterior.log_evidence, log_p(LM, (), (0, 2, 1, EOS)), rtol=1e-5)
    np.testing.assert_array_equal(posterior.returned[0], np.tile([[0, 2], [1, EOS]], (30, 1, 1)))


def test_a_program_inside_a_program():
    @ppl.program
    def coin(p):
        return ppl.sample("coin", dist.Bernoulli(p))

    @ppl.program
    def both():
        with ppl.scope("a"):
            a = coin(0.2)
        with ppl.scope("b"):
            return a + coin(0.6)

    assert both.log_density({"a/coin": 1, "b/coin": 0}) == pytest.approx(np.log(0.2 * 0.4), rel=1e-5)


def test_a_program_without_random_sites_has_its_factors_as_evidence():
    @ppl.program
    def program():
        ppl.factor("f", -1.25)
        return 3

    for algorithm in (inference.Exact(), inference.SMC(3, 1.1), inference.ImportanceSampling(2)):
        assert algorithm.run(KEY, program).log_evidence == pytest.approx(-1.25)


@pytest.mark.parametrize("algorithm", [inference.Exact(), inference.SMC(3, 1.1)], ids=["Exact", "SMC"])
def test_a_loop_of_no_steps(algorithm):
    @ppl.program
    def program():
        b = ppl.sample("b", dist.Bernoulli(0.3))
        return b, jax.lax.scan(lambda c, _: (c, ppl.sample("x", dist.Bernoulli(0.3))), 0, None, length=0)[1]

    posterior = algorithm.run(KEY, program)
    assert posterior.log_evidence == pytest.approx(0.0, abs=1e-6)
    assert posterior.values["x"].shape[1:] == (0,)


# --- keys -------------------------------------------------------------------------------------------------------------


@ppl.program
def chain(shift):
    z = ppl.sample("z", dist.Normal(shift, 1.0))
    a, context = ppl.generate("a", ppl.prompt(LM), max_tokens=3)
    ppl.factor("f", z * a.length)
    b, _ = ppl.generate("b", context, max_tokens=2)
    return z, a, b


def leaves(posterior):
    return [np.asarray(x) for x in jax.tree.leaves((posterior.values, posterior.returned, posterior.log_weights))]


def test_the_key_decides_the_draws_whatever_the_chunking():
    shift = np.asarray(0.3, np.float32)
    whole = inference.ImportanceSampling(50).run(KEY, chain, shift)
    again = inference.ImportanceSampling(50).run(KEY, chain, shift)
    chunked = inference.ImportanceSampling(50, batch_size=16).run(KEY, chain, shift)
    fewer = inference.ImportanceSampling(16).run(KEY, chain, shift)
    other = inference.ImportanceSampling(50).run(jax.random.key(1), chain, shift)
    for a, b, c, d in zip(*map(leaves, (whole, again, chunked, fewer))):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a[:16], d)
    assert (whole.values["z"] != other.values["z"]).all()
    assert len(np.unique(whole.values["z"])) == 50


def test_smc_repeats_itself_with_the_same_key():
    shift = np.asarray(0.3, np.float32)
    runs = [inference.SMC(20, 1.1).run(jax.random.key(k), chain, shift) for k in (4, 4, 5)]
    for a, b in zip(leaves(runs[0]), leaves(runs[1])):
        np.testing.assert_array_equal(a, b)
    assert runs[0].log_evidence != runs[2].log_evidence


def test_texts_in_loops_and_plates_are_drawn_independently():
    flat = models.MarkovLM(np.zeros(4), np.zeros((4, 4)), 3)

    @ppl.program
    def program():
        def step(context, _):
            return context, ppl.generate("x", context, max_tokens=3)[0].tokens

        context = ppl.prompt(flat)
        rows = jax.lax.scan(step, context, None, length=8)[1]
        plate = ppl.vmap(lambda: ppl.generate("y", context, max_tokens=3)[0].tokens, axis_size=8)()
        return rows, plate

    rows, plate = inference.ImportanceSampling(1).run(KEY, program).returned
    assert len(np.unique(rows[0], axis=0)) > 3
    assert len(np.unique(plate[0], axis=0)) > 3
