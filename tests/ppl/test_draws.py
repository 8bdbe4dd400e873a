"""The pieces that choose: inverse CDF, and the automaton of stop strings."""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrace import models
from latentrace.ppl.choices import Keyed, SiteRef, inverse_cdf
from latentrace.ppl.until import stop_table

draw = jax.jit(jax.vmap(inverse_cdf, in_axes=(None, 0)))
BELOW_ONE = np.float32(1) - np.float32(2**-24)


@pytest.mark.parametrize("v", [1, 2, 3, 255, 256, 257, 513, 5000])
def test_inverse_cdf_is_searchsorted(v):
    rng = np.random.default_rng(v)
    weights = (np.exp(2 * rng.normal(size=v)) * (rng.random(v) < 0.7)).astype(np.float32)
    weights[v // 2] += 0.1
    weights[v - v // 4 :] = 0
    cumulative = np.cumsum(weights.astype(np.float64))
    exact = cumulative / cumulative[-1]
    u = np.concatenate([rng.random(500), exact, exact - 1e-7, [0, BELOW_ONE]]).astype(np.float32).clip(0, BELOW_ONE)
    index = np.asarray(draw(weights, u))
    assert (weights[index] > 0).all()
    slack = 4e-7 * np.sqrt(v)  # float32 rounding of a sum of v terms
    below = np.where(index > 0, exact[np.maximum(index - 1, 0)], 0.0)
    assert (below <= u + slack).all()
    assert (exact[index] >= u - slack).all()
    low, high = (np.searchsorted(exact, u + d, side="right") for d in (-slack, slack))
    np.testing.assert_array_equal(index[low == high], low[low == high])


def test_inverse_cdf_of_one_possible_token():
    for place in (0, 300, 4999):
        weights = np.zeros(5000, np.float32)
        weights[place] = 1e-30
        assert (np.asarray(draw(weights, jnp.array([0.0, 0.5, BELOW_ONE]))) == place).all()


def test_token_frequencies_follow_the_logits():
    logits = jnp.array([0.5, -jnp.inf, -1.0, 1.5])
    keyed = lambda i: Keyed(jax.random.key(3), i).token(SiteRef("x"), jnp.int32(0), logits, jnp.int32(0))[0]
    n = 20_000
    found = np.bincount(np.asarray(jax.jit(jax.vmap(keyed))(jnp.arange(n))), minlength=4) / n
    p = np.asarray(jax.nn.softmax(logits))
    assert (np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_draws_differ_between_particles_sites_steps_and_loop_indices():
    u = lambda particle, name, step, *path: float(
        jax.random.uniform(jax.random.fold_in(Keyed(jax.random.key(0), particle).site_key(SiteRef(name, path)), step))
    )
    places = [(0, "x", 0), (1, "x", 0), (0, "y", 0), (0, "x", 1), (0, "x", 0, 0), (0, "x", 0, 1), (0, "x", 0, 0, 0)]
    assert len({u(*place) for place in places}) == len(places)


# --- stop strings -----------------------------------------------------------------------------------------------------


def spelled(*vocabulary: str) -> models.MarkovLM:
    v = len(vocabulary)
    return models.MarkovLM(np.zeros(v), np.zeros((v, v)), v - 1, vocabulary=vocabulary)


def stops_at(lm: models.MarkovLM, until, tokens: list[int]) -> int | None:
    """After how many tokens the automaton says that the text is over."""
    table, state = stop_table(lm, until, "x"), 0
    for i, token in enumerate(tokens):
        state = table[state, token]
        if state == len(table):
            return i + 1
    return None


words = st.text(alphabet="abé", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stop_automaton_is_a_byte_search(data):
    vocabulary = data.draw(st.lists(words, min_size=1, max_size=5, unique=True))
    lm = spelled(*vocabulary, "<end>")
    until = data.draw(st.lists(words, min_size=1, max_size=4))
    tokens = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=8))
    spelling = lm.token_bytes()
    expected = None
    for i in range(len(tokens)):
        text = b"".join(spelling[t] for t in tokens[: i + 1])
        if any(word.encode() in text for word in until):
            expected = i + 1
            break
    assert stops_at(lm, until, tokens) == expected


@pytest.mark.parametrize(
    ("until", "tokens", "expected"),
    [
        ("aba", [0, 1, 0], 3),  # one letter per token
        ("abab", [0, 1, 0, 0, 1, 0, 1], 7),  # a false start that overlaps
        (["bb", "abba"], [0, 1, 1], 3),  # a shorter pattern inside a longer one
        ("ab", [2], 1),  # within one token
        ("ba", [2, 2], 2),  # across two
        ("c", [0, 1], None),
    ],
)
def test_stop_strings_cross_token_boundaries(until, tokens, expected):
    assert stops_at(spelled("a", "b", "ab", "."), until, tokens) == expected


def test_stop_ids_stop_at_once():
    lm = programs.markov(4)
    assert stops_at(lm, [2, 3], [1, 1, 3, 2]) == 3
    assert stops_at(lm, 1, [2, 1]) == 2
    np.testing.assert_array_equal(stop_table(lm, np.int64(2), "x"), [[0, 0, 1, 0]])
