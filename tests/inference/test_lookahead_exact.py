"""Twists by rollouts: SMC stays exactly unbiased, the rollouts' own draws enumerated too; and nothing runs where nothing
resamples."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl import errors

from . import test_particle_gibbs
from .test_smc_exact import EOS, LM, REWARD, V, World, estimated_measure

KEY = jax.random.key(0)
HIDDEN = programs.hmm(2, V, eos_id=EOS, seed=9)


class WithRollouts(World):
    """Each rollout has digits of its own: one draw of V outcomes."""

    def enter_element(self, i, jaxpr):
        return self._replace(own=self.own // V**i % V, log_p_own=jnp.float32(0))

    def leave_plate(self, size, jaxpr, elements):
        log_p = self.log_p_own + jnp.where((elements.own == 0).all(), elements.log_p_own.sum(), -jnp.inf)
        return self._replace(own=self.own // V**size, log_p_own=log_p)


def reward(name, text):
    ppl.factor(name, jnp.asarray(REWARD)[text.tokens[0]])


def in_a_loop(num_samples=1, floor=-np.inf, possible=(0, 1, 2)):
    """Each line is followed by a look at the next token, which has to be one of the `possible` ones."""

    def program():
        def step(carry, i):
            context, before = carry
            line, context = ppl.generate("line", context, max_tokens=1)

            def rest():
                end, _ = ppl.generate("end", context, max_tokens=1)
                reward("looks good", end)
                ppl.condition("may be", jnp.isin(end.tokens[0], jnp.array(possible)))

            ppl.lookahead("promise", rest, num_samples=num_samples, floor=floor)()
            ppl.factor("reward", jnp.asarray(REWARD)[line.tokens[0]] * (i + before))
            return (context, line.tokens[0]), line.tokens[0]

        return jax.lax.scan(step, (ppl.prompt(HIDDEN), jnp.int32(0)), jnp.arange(2))[1]

    return program


def loop_density(path):
    a, b = programs.padded(path.text(HIDDEN, (), 2), 2, EOS)
    path.weigh(np.exp(REWARD[b] * (1 + a)))
    return a, b


def two_samples():
    """One of two branches looks ahead twice."""
    first, context = ppl.generate("x", ppl.prompt(LM), max_tokens=1)

    def look():
        rest = lambda scale: ppl.factor("likes", scale * ppl.generate("end", context, max_tokens=1)[0].tokens[0])
        ppl.lookahead("promise", rest, num_samples=2)(0.8)
        return 0

    jax.lax.cond(first.tokens[0] == 1, look, lambda: 0)
    second, _ = ppl.generate("y", context, max_tokens=1)
    reward("reward", second)
    return jnp.concatenate([first.tokens, second.tokens])


def two_samples_density(path):
    a, b = programs.padded(path.text(LM, (), 2), 2, EOS)
    path.weigh(np.exp(REWARD[b]))
    return a, b


CASES = {
    "in a loop": (in_a_loop(), loop_density, V**4, 2),
    "in a loop, with a floor": (in_a_loop(floor=-0.5, possible=(1,)), loop_density, V**4, 2),
    "two samples in a branch": (two_samples, two_samples_density, V**4, 1),
}


def errors_of(case):
    program, density, own, shared = CASES[case]
    target = programs.measure(programs.paths(density))
    total, measures = estimated_measure(program, own, shared, True, (0.0, 0.8, 1.1), world_type=WithRollouts)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    evidence = sum(target.values())
    return [
        {trace: (measure.get(trace, 0.0) - target.get(trace, 0.0)) / evidence for trace in {*target, *measure}}
        for measure in measures
    ]


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "in a loop")) for case in CASES])
def test_expected_weighted_measure_is_the_target(case):
    for found in errors_of(case):
        assert max(map(abs, found.values())) < 1e-5, found


def test_a_particle_without_promise_is_dropped():
    """What `floor` is for: where all rollouts die, resampling loses what might have gone on; without it nothing is lost."""
    CASES["dropped"] = (in_a_loop(possible=(1,)), loop_density, V**4, 2)
    never, _, always = errors_of("dropped")
    del CASES["dropped"]
    assert max(map(abs, never.values())) < 1e-5
    assert max(always.values()) < 1e-5
    assert sum(always.values()) < -0.005


def test_nothing_runs_where_nothing_resamples():
    program = ppl.program(in_a_loop(num_samples=5))
    plain = ppl.program(lambda: ppl.generate("line", ppl.prompt(HIDDEN), max_tokens=2)[0])
    exact = inference.Exact().run(KEY, program)
    target = programs.measure(programs.paths(loop_density))
    assert set(exact.values) == {"line"}
    assert abs(exact.log_evidence - np.log(sum(target.values()))) < 1e-5
    assert len(exact.weights) == len(inference.Exact().run(KEY, plain).weights)
    sampled = inference.ImportanceSampling(50).run(KEY, program)
    assert sampled.ledger.tokens_generated == (sampled.values["line"].length).sum()
    (best,) = np.flatnonzero(exact.log_weights == exact.log_weights.max())[:1]
    values = {"line": np.asarray(exact.values["line"].tokens)[best]}
    assert program.log_density(values) == pytest.approx(exact.log_weights[best], abs=1e-5)


def test_rollouts_count_and_leave_no_trace():
    posterior = inference.SMC(50).run(KEY, ppl.program(in_a_loop(num_samples=5)))
    assert set(posterior.values) == {"line"}
    own = int(posterior.values["line"].length.sum())
    assert own < posterior.ledger.tokens_generated <= own + 50 * 2 * 5
    assert not posterior.restricted


class Conditional(test_particle_gibbs.World):
    """The choices of both particles of conditional SMC: the retained one draws its rollouts anew."""

    enter_element, leave_plate = WithRollouts.enter_element, WithRollouts.leave_plate


def test_conditional_smc_leaves_the_posterior_invariant():
    """Rollouts are drawn again given the trace that is repeated."""
    target = {x: p for x, p in programs.measure(programs.paths(loop_density)).items() if p > 0}
    names, posterior = list(target), np.array(list(target.values())) / sum(target.values())
    retained = {"line": jnp.asarray(np.array(names)[:, :, None], jnp.int32)}
    found = test_particle_gibbs.kernel(
        in_a_loop(), retained, V**4, 2, True, 1.1, "multinomial", world_type=Conditional, repeats=V**4
    )
    test_particle_gibbs.check_invariance(names, posterior, *found)


def test_rollouts_in_plates_and_nested_samplers():
    """In a plate they steer what is resampled after it; inside `nested` nothing resamples, and they are not run."""

    def look(x):
        ppl.lookahead("promise", lambda: ppl.factor("f", ppl.sample("z", dist.Bernoulli(0.4)) - x), num_samples=3)()

    def element(i):
        x = ppl.sample("x", dist.Bernoulli(0.5))
        look(x)
        return x

    def plate():
        total = ppl.vmap(element)(jnp.arange(2)).sum()
        ppl.sample("y", dist.Bernoulli(0.2 + 0.3 * total))
        return total

    def nested():
        return ppl.nested("which", lambda: element(0), num_samples=2)()

    for fn in (plate, nested):
        posterior = inference.SMC(400, ess_threshold=1.1).run(KEY, ppl.program(fn))
        assert "z" not in posterior.values
        mean = posterior.expectation(lambda v: np.asarray(v["x"], float).mean()) if fn is plate else 0.5
        assert abs(mean - 0.5) < 0.1
        assert abs(posterior.log_evidence) < 0.1


def test_bad_input():
    program = ppl.program(in_a_loop())
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(errors.SiteError, match="lookahead 'l': num_samples must be a whole number of at least 1"):
            ppl.lookahead("l", lambda: 0, num_samples=wrong)
    for wrong in (np.nan, np.inf):
        with pytest.raises(errors.SiteError, match="lookahead 'l': the floor must be a number of nats below infinity"):
            ppl.lookahead("l", lambda: 0, num_samples=1, floor=wrong)
    with pytest.raises(errors.SiteNameError, match=r"site 'end' is inside `ppl\.lookahead`, and cannot be given"):
        inference.SMC(4).run(KEY, program.condition({"end": [[1], [1]]}))
    twice = lambda: [ppl.lookahead("l", lambda: ppl.sample("x", dist.Bernoulli(0.5)), num_samples=1)() for _ in "ab"]
    with pytest.raises(errors.SiteNameError, match="is declared twice"):
        inference.SMC(4).run(KEY, twice)
    wrong = lambda: ppl.lookahead("l", lambda: ppl.factor("f", jnp.nan), num_samples=1)()
    with pytest.raises(errors.NonFiniteError, match="site 'f'"):
        inference.SMC(4).run(KEY, wrong)
