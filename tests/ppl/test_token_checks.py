"""Constraints that are asked about one token at a time: what they cost, where they end, and who refuses them."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.errors import JaxRuntimeError

from latentrace import inference, models, ppl
from latentrace.ppl import constraints, errors

KEY = jax.random.key(0)
LM = programs.markov(3, seed=5)  # tokens spell a, b and c, and a ends


class OneOf(NamedTuple):
    """Tokens of a set."""

    allowed: Any
    """bool[V]"""

    def start(self, max_tokens):
        return ()

    def allows(self, state, token):
        return self.allowed[token]

    def next(self, state, token):
        return ()


def program(lm, constraint, max_tokens=3, **more):
    return ppl.program(lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=max_tokens, constraint=constraint, **more)[0])


def test_a_search_that_rejects_nothing_weighs_nothing():
    constraint = OneOf(jnp.ones(3, bool))
    posterior = inference.ImportanceSampling(200).run(KEY, program(LM, constraint))
    np.testing.assert_allclose(posterior.log_weights, 0.0, atol=1e-6)
    tokens, checks = posterior.ledger.tokens_generated, posterior.ledger.potential_calls
    assert tokens < checks < 2 * tokens, "the second draw is not asked about where it is the first again"


def test_a_search_takes_a_few_checks_where_a_mask_takes_all():
    """Against the mask, on a vocabulary of 2,000 tokens of which a third is not allowed."""
    size, rng = 2000, np.random.default_rng(0)
    lm = models.MarkovLM(2 * rng.normal(size=size), jnp.asarray(2 * rng.normal(size=(size, size)), jnp.float32), 0)
    allowed = jnp.asarray(rng.random(size) < 2 / 3).at[0].set(False)
    exact = inference.SMC(300).run(KEY, program(lm, allowed))
    found = inference.SMC(300).run(KEY, program(lm, OneOf(allowed)))
    assert np.asarray(allowed)[np.asarray(found.values["x"].tokens)].all()
    assert abs(found.log_evidence - exact.log_evidence) < 0.15
    assert found.ledger.tokens_generated == exact.ledger.tokens_generated == 900
    assert 2 < found.ledger.potential_calls / 900 < 4, "3 are expected of a search with replacement, 2 / mass"


def test_where_nothing_is_allowed_every_token_is_tried_once():
    with pytest.raises(errors.AllParticlesDeadError, match="last one died at site 'x'"):
        inference.SMC(4).run(KEY, program(LM, OneOf(jnp.zeros(3, bool))))
    tries = []
    constraint = constraints.check(lambda ids, left: tries.append(ids) or ids == (1,), "only b")
    lm = models.MarkovLM([0.0, 1.0, 0.5], [[0.0, 1.0, 0.5]] * 3, 0, ("", "b", "c"))
    assert inference.Exact().run(KEY, program(lm, constraint, 1)).values["x"].decode() == ["b"]
    assert set(tries) == {(0,), (1,), (2,)}
    with pytest.raises(errors.AllParticlesDeadError):
        inference.SMC(50).run(KEY, program(lm, constraint, 3))
    assert set(tries[3:]) == {(0,), (1,), (2,), (1, 0), (1, 1), (1, 2)}, "a particle that cannot go on is left alone"
    assert len(tries) == 3 + 6, "what was asked before is remembered"
    with pytest.raises(errors.AllParticlesDeadError):
        inference.SMC(50).run(KEY, program(lm, constraint, 4, proposal=ppl.proposals.top_k(2)))
    assert set(tries[9:]) == {(1,), (2,), (1, 1), (1, 2)}, "a proposal on two tokens bounds the tries"


def test_a_model_that_answers_nan_is_said_and_ends():
    lm = models.MarkovLM([0.0, 1.0, 0.5], np.full((3, 3), np.nan), 0)
    with pytest.raises(errors.NonFiniteError, match="site 'x'"):
        inference.SMC(8).run(KEY, program(lm, OneOf(jnp.ones(3, bool))))


def test_the_host_is_asked_about_texts_that_go_on():
    asked = []

    def allows(ids, left):
        asked.append((ids, left))
        return ids[-1] != 0 or len(ids) == 3

    constraint = constraints.check(allows, "three tokens")
    posterior = inference.SMC(64).run(KEY, program(LM, constraint, 5))
    assert set(posterior.values["x"].length.tolist()) == {3, 5}
    assert all(0 not in ids[:-1] and min(ids) >= 0 and left == 5 - len(ids) for ids, left in asked)
    assert constraint.cost.checks == len(asked) == len(set(asked)) < posterior.ledger.potential_calls
    assert constraint.cost.calls > 5
    assert constraint.cost.seconds > 0
    exact = inference.Exact().run(KEY, program(LM, constraint, 5))
    assert abs(posterior.log_evidence - exact.log_evidence) < 0.6
    assert exact.ledger.potential_calls > 0


def test_a_trace_through_a_search_cannot_be_repeated():
    searched = program(LM, OneOf(jnp.array([True, True, False])))
    with pytest.raises(errors.SiteError, match=r"site 'x': its constraint is asked about one token at a time \(`allows`\)"):
        inference.ParticleGibbs(4, 10).run(KEY, searched)
    with pytest.raises(errors.SiteError, match=r"site 'x': .* cannot be repeated; give the constraint a `mask`"):
        inference.smc.evidence_bounds(KEY, searched, trace={"x": [1, 0]}, smc=inference.SMC(4, resample="multinomial"))


class Plain:
    """Not a pytree."""

    def start(self, max_tokens):
        return ()

    def allows(self, state, token):
        return token > 0

    def next(self, state, token):
        return ()


def test_bad_constraints_are_refused_before_anything_runs():
    run = lambda constraint: inference.SMC(4).run(KEY, program(LM, constraint))
    for wrong in (jnp.ones((3, 2), bool), jnp.ones(3)):
        with pytest.raises(errors.SiteError, match="site 'x': the constraint's `allows` must say of one token"):
            run(OneOf(wrong))
    with pytest.raises(errors.SiteError, match="site 'x': the constraint must be a pytree of arrays, found Plain in it"):
        run(Plain())
    with pytest.raises(errors.SiteError, match=r"has the methods of `ppl.Constraint` or `ppl.TokenCheck`; found object"):
        run(object())
    with pytest.raises(errors.SiteError, match="`allows` must be a function of token ids and a number, found str"):
        constraints.check("ab", "wrong")


def fail(ids, left):
    raise ZeroDivisionError("oh")


FAULTS = {
    "no letters: its function raised ZeroDivisionError": fail,
    "no letters: its function has not answered within 0.2 s": lambda ids, left: time.sleep(2) or True,
    "no letters: its function must answer a bool, found float": lambda ids, left: 0.5,
}


@pytest.mark.parametrize("message", FAULTS)
def test_functions_that_misbehave_end_the_run(message):
    constraint = constraints.check(FAULTS[message], "no letters", time_limit=0.2)
    with pytest.raises(JaxRuntimeError, match=message):
        jax.block_until_ready(inference.SMC(8).run(KEY, program(LM, constraint)).log_weights)
    assert jnp.ones(2).sum() == 2, "JAX goes on"
