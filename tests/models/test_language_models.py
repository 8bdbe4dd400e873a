"""The three kinds of language model: the protocol, exact values of the table models, cache against full pass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import models
from latentrace.models import layers, scoring
from latentrace.ppl.language_model import Block, LanguageModel, Memory, empty_memory

from .helpers import hmm, logits_in_two_blocks, markov, transformer

KINDS = {"markov": markov, "hmm": hmm, "transformer": transformer}
TOKENS = jnp.array([0, 3, 2, 4, 1, 0, 2, 2, 3], jnp.int32)


@pytest.fixture(params=KINDS)
def lm(request):
    return KINDS[request.param]()


@jax.jit
def entries_of(lm, tokens):
    return lm.forward(tokens, empty_memory())[1]


@jax.jit
def after(lm, tokens, memory):
    return lm.unembed(lm.forward(tokens, memory)[0])


def softmax(x):
    weights = np.exp(np.asarray(x, float))
    return weights / weights.sum(-1, keepdims=True)


def test_protocol(lm):
    assert isinstance(lm, LanguageModel)
    assert 0 <= lm.eos_id < lm.vocab_size
    assert lm.start_id <= lm.vocab_size
    logits = lm.logits(TOKENS)
    assert logits.shape == (len(TOKENS), lm.vocab_size)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(lm.logits(np.asarray(TOKENS, np.int64)), logits)


def test_is_a_pytree_with_hashable_structure(lm):
    leaves, structure = jax.tree.flatten(lm)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    hash(structure)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.logits(TOKENS), lm.logits(TOKENS))


def test_batched_weights_pass_through_vmap(lm):
    twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), lm)
    logits = jax.jit(jax.vmap(lambda lm: lm.logits(TOKENS)))(twice)
    np.testing.assert_allclose(logits[0], lm.logits(TOKENS), atol=1e-5)


def test_causal(lm):
    changed = TOKENS.at[5].set(4)
    np.testing.assert_allclose(lm.logits(changed)[:5], lm.logits(TOKENS)[:5], atol=1e-6)
    assert np.abs(lm.logits(changed) - lm.logits(TOKENS))[5].max() > 1e-3


@pytest.mark.parametrize("cut", [1, 4])
def test_cached_steps_equal_the_full_pass(lm, cut):
    tolerance = 1e-4 if isinstance(lm, models.TransformerLM) else 1e-5
    stepped = jax.jit(logits_in_two_blocks, static_argnums=(2, 3))(lm, TOKENS, cut, 20)
    np.testing.assert_allclose(stepped, lm.logits(TOKENS)[cut:], atol=tolerance)


def test_cached_steps_under_vmap(lm):
    batch = jax.random.randint(jax.random.key(0), (4, len(TOKENS)), 0, 5).at[:, :3].set(TOKENS[:3])
    stepped = jax.jit(jax.vmap(lambda tokens: logits_in_two_blocks(lm, tokens, 3, 16)))(batch)
    for row, tokens in zip(stepped, batch):
        np.testing.assert_allclose(row, lm.logits(tokens)[3:], atol=1e-4)


def test_several_new_tokens_after_a_block(lm):
    entries = entries_of(lm, TOKENS[:4])
    last = jax.tree.map(lambda x: x[..., -1:, :], entries)
    memory = Memory((Block(entries, jnp.ones(4, bool)),), jnp.int32(4), last)
    found = after(lm, TOKENS[4:], memory)
    np.testing.assert_allclose(found, lm.logits(TOKENS)[4:], atol=1e-4)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("length", [9, 31])
def test_long_passes_attend_in_parts(length, window, monkeypatch):
    """Bands, and parts of bands, with a last part that is not full, after a cached block."""
    lm = transformer(layer_pattern=(models.LayerOptions(window=window), models.LayerOptions()))
    tokens = jnp.arange(length + 5) * 7 % 11
    expected = lm.logits(tokens)
    monkeypatch.setattr(layers, "QUERIES", 3)
    monkeypatch.setattr(layers, "BANDS", 2)
    entries = jax.jit(lambda lm: lm.forward(tokens[:5], empty_memory())[1])(lm)
    memory = Memory((Block(entries, jnp.ones(5, bool)),), jnp.int32(5), None)
    found = jax.jit(lambda lm: lm.unembed(lm.forward(tokens[5:], memory)[0]))(lm)
    np.testing.assert_allclose(found, expected[5:], atol=1e-5)


def test_masked_block_counts_for_nothing(lm):
    entries = entries_of(lm, TOKENS[:4])
    last = jax.tree.map(lambda x: jnp.zeros_like(x[..., -1:, :]), entries)
    memory = Memory((Block(entries, jnp.zeros(4, bool)),), jnp.int32(0), last)
    np.testing.assert_allclose(after(lm, TOKENS, memory), lm.logits(TOKENS), atol=1e-5)


def test_markov_logits_are_its_tables():
    lm = markov()
    expected = np.stack([lm.initial, lm.transition[3], lm.transition[1]])
    np.testing.assert_array_equal(lm.logits([lm.start_id, 3, 1]), expected)


def test_hmm_against_sums_over_state_paths():
    lm = hmm()
    initial, transition, emission = (softmax(x) for x in (lm.initial, lm.transition, lm.emission))

    def probability(tokens):
        total = 0.0
        for path in itertools.product(range(3), repeat=len(tokens)):
            moves = np.prod([transition[a, b] for a, b in itertools.pairwise(path)])
            total += initial[path[0]] * moves * np.prod([emission[s, x] for s, x in zip(path, tokens)])
        return total

    tokens = [0, 3, 2, 4]
    found = lm.logits([lm.start_id, *tokens])
    for t in range(len(tokens) + 1):
        before = probability(tokens[:t]) if t else 1.0
        expected = [np.log(probability([*tokens[:t], x]) / before) for x in range(5)]
        np.testing.assert_allclose(found[t], expected, atol=1e-5)


def test_hmm_start_token_may_be_left_out():
    lm = hmm()
    np.testing.assert_allclose(lm.logits([lm.start_id, 2, 3])[1:], lm.logits([2, 3]), atol=1e-6)


def test_hmm_with_impossible_events_has_no_nan():
    inf = np.inf
    lm = models.HMMLM([0.0, -inf], [[-inf, 0.0], [-inf, -inf]], [[0.0, -inf, -inf], [-inf, 0.0, -inf]], eos_id=2)
    logits = lm.logits([lm.start_id, 0, 1, 0, 2])
    assert not np.isnan(logits).any()
    np.testing.assert_array_equal(logits[0], [0.0, -inf, -inf])
    np.testing.assert_array_equal(logits[1], [-inf, 0.0, -inf])

    def reachable(lm):
        return lm.logits([lm.start_id, 0])[1, 1]

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(reachable))(lm)))


def test_vocabulary():
    lm = models.MarkovLM(np.zeros(4), np.zeros((4, 4)), eos_id=0, vocabulary=("<end>", "a", "ab", "é"))
    assert lm.encode("abaé") == [2, 1, 3]
    assert lm.decode(np.array([lm.start_id, 2, 1, 3, 0])) == "abaé"
    assert lm.token_bytes() == [b"", b"a", b"ab", "é".encode()]
    with pytest.raises(ValueError, match="'xa'"):
        lm.encode("axa")
    with pytest.raises(ValueError, match="no vocabulary"):
        markov().encode("a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), np.zeros((3, 2)), 0), r"transition has shape \(3, 2\), expected \(3, 3\)"),
        ((np.zeros(3), np.zeros((3, 3)), 3), "eos_id is 3"),
        ((np.zeros(2), np.zeros((2, 2)), 0, ("a", "a")), "repeats 'a'"),
        ((np.zeros(2), np.zeros((2, 2)), 0, ("a",)), "1 strings for 2 tokens"),
    ],
)
def test_table_models_check_their_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.MarkovLM(*arguments)


def test_batched_training_forward():
    lm = transformer(tied=False, qkv_bias=True, out_bias=True, mlp_bias=True)
    batch = jnp.stack([TOKENS, TOKENS[::-1]])
    logits = jax.jit(lambda lm: lm.to_module()(batch))(lm)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[1], lm.logits(TOKENS[::-1]), atol=1e-5)


def test_gradients_reach_every_weight():
    loss = jax.jit(jax.grad(lambda lm: jnp.square(lm.to_module()(TOKENS[None])).sum()))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(loss(transformer())))


def test_shape_errors_name_the_sizes():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        transformer(num_kv_heads=3)


@pytest.mark.parametrize("prompt", [(), (3,), (3, 0, 4)])
def test_scoring_many_texts(lm, prompt):
    texts = jax.random.randint(jax.random.key(1), (3, 20), 0, 5)
    found = models.log_probs(lm, texts, prompt)
    given = list(prompt) or [lm.start_id]
    for row, text in zip(found, texts):
        every = jax.nn.log_softmax(lm.logits([*given, *text.tolist()]))
        np.testing.assert_allclose(row, every[jnp.arange(20) + len(given) - 1, text], atol=1e-4)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_scoring_holds_few_logits(wants_gradient):
    """64 texts of 128 tokens over 20,000 tokens: their logits would take 655 MB."""
    lm, texts = transformer(vocab_size=20_000, max_length=256), jnp.zeros((64, 128), jnp.int32)
    fn = jax.jit(jax.grad(lambda *args: scoring._log_probs(*args).sum())) if wants_gradient else scoring._log_probs
    compiled = fn.lower(lm, jnp.zeros(1, jnp.int32), texts).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 128 * 20_000 * 4 / 2
