"""Log potentials of constraints: what a token is drawn from, and what resampling inside a text sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl.collectives import PARTICLES, index
from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Settings, execute
from latentrace.ppl.staging import stage

V, EOS = 4, 3
LM = programs.markov(V, eos_id=EOS, seed=8)


class Last(NamedTuple):
    """Potentials that depend on the last token, V at the start; EOS is not allowed."""

    log_psi: Any
    """float32[V + 1, V]"""

    def start(self, max_tokens):
        return jnp.int32(V)

    def mask(self, state):
        return jnp.arange(V) != EOS

    def log_potentials(self, state):
        return self.log_psi[state]

    def next(self, state, token):
        return token.astype(jnp.int32)


LOG_PSI = np.random.default_rng(2).normal(size=(V + 1, V)).astype(np.float32)
TWIST = np.array([0.4, -1.2, 0.7], np.float32)


class Recorder:
    """A policy that never resamples, and notes what it is asked about."""

    inside_texts, axes = True, (PARTICLES,)

    def __init__(self):
        self.seen: dict[int, float] = {}

    def __call__(self, choices, clock, *more):
        log_weight = more[-1]
        jax.debug.callback(lambda at, x: self.seen.update({int(at): float(x)}), clock, log_weight)
        return jnp.asarray(False), index(), log_weight, choices


def run(program, recorder):
    output = execute(stage(program, ()), jax.random.key(3), {}, Settings(1, policy=recorder))
    jax.effects_barrier()
    return output


def test_resampling_sees_the_models_density_times_the_potentials_until_the_text_ends():
    @ppl.program
    def program():
        twist = lambda text: jnp.asarray(TWIST)[text.length - 1]
        ppl.generate("x", ppl.prompt(LM), max_tokens=3, constraint=Last(jnp.asarray(LOG_PSI)), twist=twist)
        return ppl.generate("y", ppl.prompt(LM), max_tokens=1)[0].tokens

    recorder = Recorder()
    output = run(program, recorder)
    expected, log_ratio, before, text = [0.0], 0.0, V, ()
    for i, token in enumerate(np.asarray(output.values["x"][0])[0]):
        log_p = np.log(programs.next_probs(LM, text))
        drawn_from = np.where(np.arange(V) == EOS, -np.inf, log_p + LOG_PSI[before])
        log_ratio += log_p[token] - (drawn_from[token] - np.log(np.exp(drawn_from).sum()))
        potential = LOG_PSI[before, token] if i < 2 else 0.0  # taken back when the text is cut
        expected.append(log_ratio + potential + TWIST[i])
        before, text = token, (*text, int(token))
    seen = [recorder.seen[at] for at in sorted(recorder.seen)]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    np.testing.assert_allclose(output.log_weight[0], log_ratio, rtol=1e-5)


def program_with(constraint):
    return ppl.program(lambda: ppl.generate("x", ppl.prompt(LM), max_tokens=2, constraint=constraint)[0])


def test_a_potential_of_minus_infinity_where_the_mask_allows_restricts_and_says_so():
    log_psi = jnp.zeros((V + 1, V))
    free = inference.SMC(50).run(jax.random.key(0), program_with(Last(log_psi)))
    assert not free.restricted
    bound = inference.SMC(50).run(jax.random.key(0), program_with(Last(log_psi.at[V, 1].set(-jnp.inf))))
    assert bound.restricted
    assert (bound.values["x"].tokens[:, 0] != 1).all()
    with pytest.raises(ppl.errors.AllParticlesDeadError, match="last one died at site 'x'"):
        inference.SMC(5).run(jax.random.key(0), program_with(Last(jnp.full((V + 1, V), -jnp.inf))))


def test_wrong_potentials_are_said_with_their_site():
    for wrong in (jnp.zeros((V + 1, 1)), jnp.zeros((V + 1, V + 1))):
        with pytest.raises(SiteError, match=rf"site 'x': .*`log_potentials`.* 4 tokens, found shape \[{wrong.shape[1]}\]"):
            inference.SMC(5).run(jax.random.key(0), program_with(Last(wrong)))
    with pytest.raises(ppl.errors.NonFiniteError, match="site 'x'"):
        inference.SMC(5).run(jax.random.key(0), program_with(Last(jnp.full((V + 1, V), jnp.nan))))


def test_weighted_automata_check_their_potentials():
    automaton = ppl.constraints.regex(LM, "ab*")
    with pytest.raises(SiteError, match=r"16 states of pattern 'ab\*' or for its first few, found shape \[17\]"):
        ppl.constraints.weighted(automaton, np.zeros(17))
    with pytest.raises(SiteError, match="the log potential of state 1 is nan"):
        ppl.constraints.weighted(automaton, [0.0, np.nan])
