"""Expectation maximisation of hidden Markov models: its counts are right, and it finds a model that explains the texts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from latentrace import models
from latentrace.models.hmm_fit import improved, log_likelihood

HMM = programs.hmm(2, 3, seed=8)
TOKENS, LENGTHS = np.array([[1, 2, 2, 1], [2, 0, 0, 0], [1, 1, 0, 0]]), np.array([4, 2, 3])
INSIDE = np.arange(4) < LENGTHS[:, None]


def chances(hmm):
    return tuple(jax.nn.log_softmax(x) for x in (hmm.initial, hmm.transition, hmm.emission))


def test_likelihood_and_expected_counts_by_enumeration():
    """Sums over all paths of hidden states."""
    p = chances(HMM)
    start, move, emit = (np.exp(np.asarray(x, np.float64)) for x in p)
    total, emitted, moved, started = 0.0, np.zeros((2, 3)), np.zeros((2, 2)), np.zeros(2)
    for text, length in zip(TOKENS, LENGTHS):
        paths = []
        for path in itertools.product(range(2), repeat=int(length)):
            joint = start[path[0]] * np.prod([move[a, b] for a, b in itertools.pairwise(path)])
            paths.append((path, joint * np.prod([emit[s, t] for s, t in zip(path, text)])))
        evidence = sum(joint for _, joint in paths)
        total += np.log(evidence)
        for path, joint in paths:
            started[path[0]] += joint / evidence
            for s, t in zip(path, text):
                emitted[s, t] += joint / evidence
            for s, after in zip(path, [*path[1:], None]):
                moved[s] += joint / evidence * (move[s] if after is None else np.eye(2)[after])
    np.testing.assert_allclose(log_likelihood(p, jnp.asarray(TOKENS), jnp.asarray(INSIDE)), total, rtol=1e-5)
    found = improved(p, jnp.asarray(TOKENS), jnp.asarray(INSIDE), 0.5)
    for log_p, counts in zip(found, (started, moved, emitted)):
        expected = (counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True)
        np.testing.assert_allclose(np.exp(log_p), expected, atol=1e-5)


def test_a_fit_explains_what_a_model_writes():
    """Every step raises the likelihood, and the fit foresees new texts nearly as well as the model that wrote them."""
    write = lambda key, n: jax.vmap(lambda key: draw(key, 12))(jax.random.split(jax.random.key(key), n))

    def draw(key, length):
        start, move, emit = chances(HMM)

        def step(state, key):
            one, two = jax.random.split(key)
            return jax.random.categorical(two, move[state]), jax.random.categorical(one, emit[state])

        first = jax.random.categorical(jax.random.fold_in(key, 0), start)
        return jax.lax.scan(step, first, jax.random.split(key, length))[1]

    tokens, fresh, everywhere = write(0, 1500), write(1, 1500), jnp.ones((1500, 12), bool)
    fits = [
        models.fit_hmm(jax.random.key(2), tokens, np.full(1500, 12), 2, vocab_size=3, eos_id=0, num_steps=n, pseudo_count=0.0)
        for n in (1, 3, 10, 60)
    ]
    likelihoods = [float(log_likelihood(chances(fit), tokens, everywhere)) for fit in fits]
    assert likelihoods == sorted(likelihoods)
    assert likelihoods[-1] - likelihoods[0] > 10
    truth = float(log_likelihood(chances(HMM), fresh, everywhere))
    assert float(log_likelihood(chances(fits[-1]), fresh, everywhere)) > truth - 20, "20 nats of 18,000 tokens"


def test_bad_input():
    fit = lambda tokens, lengths, states=2: models.fit_hmm(jax.random.key(0), tokens, lengths, states, vocab_size=3, eos_id=0)
    with pytest.raises(ValueError, match=r"expected tokens \[N, T\] and lengths \[N\], found \(2,\)"):
        fit([1, 2], [2])
    with pytest.raises(ValueError, match="token id 7 is outside the vocabulary of 3 tokens"):
        fit([[1, 7]], [2])
    with pytest.raises(ValueError, match="a state and a token at least"):
        fit([[1, 2]], [2], 0)
