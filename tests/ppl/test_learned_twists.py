"""Twists that read the model's features: the best ones leave nothing to chance, and parameters are inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import inference, models, ppl
from latentrace.ppl import errors, run

KEY = jax.random.key(0)
V, EOS = 5, 0
IMPOSSIBLE = -np.inf
LM = models.MarkovLM(
    [0.2, 0.5, -0.4, IMPOSSIBLE, IMPOSSIBLE],
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.3, IMPOSSIBLE, IMPOSSIBLE, -0.2, 0.8],
        [-0.5, IMPOSSIBLE, IMPOSSIBLE, 0.9, 0.1],
        [0.7, IMPOSSIBLE, IMPOSSIBLE, IMPOSSIBLE, IMPOSSIBLE],
        [-0.9, IMPOSSIBLE, IMPOSSIBLE, IMPOSSIBLE, IMPOSSIBLE],
    ],
    EOS,
)
"""Tokens 1 and 2 may be followed by 3 and 4, which end: a text has at most three tokens."""
LIKES = np.array([0.0, 1.2, -0.8, 0.6, -1.9])
"""How the target likes the last token before EOS, nats."""


@ppl.program
def program(head):
    text, _ = ppl.generate("x", ppl.prompt(LM), max_tokens=4, twist=head)
    last = jnp.where(text.length > 1, text.tokens[jnp.maximum(text.length - 2, 0)], EOS)
    ppl.factor("likes", jnp.asarray(LIKES)[last])
    return text


def best_head():
    """A linear head fitted to log psi = log E[exp(likes) | the text so far, the next token], which has a closed form here."""
    initial, rows = jax.nn.softmax(LM.initial), np.asarray(jax.nn.softmax(LM.transition), np.float64)
    promise = np.zeros(V)  # of a text that goes on from each token
    for token in (4, 3, 2, 1):
        promise[token] = rows[token, EOS] * np.exp(LIKES[token]) + rows[token, 3:] @ promise[3:]
    seen = [np.asarray(LM.initial), *np.asarray(LM.transition)[1:]]
    features = np.array([[*np.where(np.isfinite(f), f, 0.0), 1.0] for f in seen])
    psi = np.array([[np.exp(likes), *promise[1:]] for likes in [0.0, *LIKES[1:]]])
    solved = np.linalg.lstsq(features, np.log(psi))[0]
    evidence = float(initial[EOS] * psi[0, EOS] + np.asarray(initial)[1:3] @ promise[1:3])
    return ppl.proposals.TwistHead((jnp.asarray(solved[:-1], jnp.float32),), (jnp.asarray(solved[-1], jnp.float32),)), evidence


def test_the_best_twist_leaves_no_variance():
    """Where nobody is resampled between the end of a text, which takes its twist back, and the factor, each particle's weight
    is the evidence."""
    head, evidence = best_head()
    exact = inference.Exact().run(KEY, program, head)
    assert exact.log_evidence == pytest.approx(np.log(evidence), abs=1e-5)
    for seed in range(3):
        alone = inference.SMC(1).run(jax.random.key(seed), program, head)
        assert alone.log_evidence == pytest.approx(np.log(evidence), abs=1e-4)
    posterior = inference.SMC(400, ess_threshold=0.0).run(KEY, program, head)
    np.testing.assert_allclose(posterior.log_weights, np.log(evidence), atol=1e-4)
    assert not posterior.restricted
    assert len(set(posterior.values["x"].ids())) == len(exact.weights), "all texts are written"
    without = inference.SMC(400, ess_threshold=0.0).run(KEY, program, ppl.proposals.twist_head(KEY, LM))
    assert np.std(without.log_weights) > 0.5


def test_a_new_head_steers_nothing_and_costs_no_pass():
    plain = inference.SMC(50).run(KEY, program, None)
    head = ppl.proposals.twist_head(KEY, LM, (3,))
    new = inference.SMC(50).run(KEY, program, head)
    np.testing.assert_array_equal(plain.values["x"].tokens, new.values["x"].tokens)
    np.testing.assert_allclose(plain.log_weights, new.log_weights, atol=1e-5)
    assert plain.ledger.model_calls == new.ledger.model_calls
    traced = run.traced
    other = inference.SMC(50).run(KEY, program, jax.tree.map(lambda x: x + 1.0, head))
    assert run.traced == traced, "parameters are inputs"
    assert (np.asarray(other.values["x"].tokens) != np.asarray(new.values["x"].tokens)).any() or (
        np.abs(other.log_weights - new.log_weights) > 1e-3
    ).any()


class Table(NamedTuple):
    log_psi: Any

    def log_potentials(self, features):
        return self.log_psi


class Plain:
    """Not a pytree."""

    def log_potentials(self, features):
        return features


def test_bad_heads_are_refused_before_anything_runs():
    call = lambda head: inference.SMC(4).run(KEY, lambda: program.fn(head))
    with pytest.raises(errors.SiteError, match=r"site 'x': the twist's `log_potentials` .* 5 tokens, found shape \[4\]"):
        call(Table(jnp.zeros(4)))
    with pytest.raises(errors.SiteError, match="site 'x': the twist must be a pytree of arrays, found Plain in it"):
        call(Plain())
    with pytest.raises(errors.SiteError, match=r"site 'x': a twist is a function of the `Text` so far or has .*, found float"):
        call(0.3)
    wide = ppl.proposals.TwistHead((jnp.zeros((7, 5)),), (jnp.zeros(5),))
    with pytest.raises(errors.SiteError, match=r"site 'x': the twist does not take the model's features float32\[5\]"):
        call(wide)
    with pytest.raises(errors.SiteError, match="sizes of hidden layers must be at least 1"):
        ppl.proposals.twist_head(KEY, LM, (0,))
    with pytest.raises(errors.NonFiniteError, match="site 'x'"):
        call(Table(jnp.full(5, jnp.nan)))
    assert inference.SMC(50).run(KEY, lambda: program.fn(Table(jnp.full(5, -jnp.inf).at[0].set(0.0)))).restricted
