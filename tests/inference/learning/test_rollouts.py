"""Rollouts of a policy: what is drawn, its rewards and log-probabilities, and one training run from end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from latentrace.inference import learning
from latentrace.inference.learning import policies
from latentrace.ppl import run
from latentrace.ppl.errors import SiteError

PROMPTS = [[3, 5, 2, 7, 4, 4, 9, 2, 8], [6], [], [2, 3]]
SIZES = dict(group_size=3, max_tokens=6)
score = jax.jit(learning.log_probs)


@pytest.fixture(scope="module")
def lm():
    return programs.attentive_model(12.0)


def long_and_late(prompt, text):
    return len(text) + 0.1 * sum(prompt) + 0.01 * text[-1]


@pytest.fixture(scope="module")
def found(lm):
    return learning.rollouts(jax.random.key(1), lm, PROMPTS, long_and_late, **SIZES)


def test_shapes_and_rewards(lm, found):
    assert found.prompts.shape == (4, 16)  # the bucket of the longest
    assert found.tokens.shape == found.mask.shape == found.log_probs.shape == (4, 3, 6)
    assert found.prompts[2].tolist() == [lm.start_id, *[-1] * 15]
    for b, prompt in enumerate(PROMPTS):
        for g in range(3):
            text = found.tokens[b, g][found.mask[b, g]].tolist()
            assert len(text) == found.lengths[b, g]
            assert found.ended[b, g] == (text[-1] == lm.eos_id)
            assert found.rewards[b, g] == pytest.approx(long_and_late(prompt, text))
    assert found.ended.any()
    assert not found.ended.all()


def test_log_probs_are_those_of_the_draws(lm, found):
    """In one pass over padded prompts of unequal lengths, and of another model's texts: as by its logits of whole texts."""
    np.testing.assert_allclose(score(lm, found), found.log_probs, atol=1e-5)
    other = programs.attentive_model(9.0)
    scores = score(other, found)
    for b, prompt in enumerate(PROMPTS):
        ids = prompt or [lm.start_id]
        for g in range(3):
            length = int(found.lengths[b, g])
            text = found.tokens[b, g, :length].tolist()
            rows = jax.nn.log_softmax(other.logits(np.pad([*ids, *text], (0, 16 - len(ids) - length))))
            expected = [rows[len(ids) - 1 + t, token] for t, token in enumerate(text)]
            np.testing.assert_allclose(scores[b, g], [*expected, *[0.0] * (6 - length)], atol=1e-5)


def test_log_probs_of_a_model_that_reads_its_last_entry():
    """A hidden Markov model, which goes on from the last entry of the prompt's cache."""
    lm = programs.hmm(3, 4, seed=2)
    found = learning.rollouts(jax.random.key(0), lm, ["bcdbcdbcd", "b", ""], lambda prompt, text: 0.0, **SIZES)
    np.testing.assert_allclose(score(lm, found), found.log_probs, atol=1e-5)
    assert np.abs(found.log_probs).max() > 0.1


def test_gradients_are_those_of_logits(lm, found):
    def whole(lm):
        ids, text = PROMPTS[0], found.tokens[0, 1]
        rows = jax.nn.log_softmax(lm.logits(jnp.concatenate([jnp.array(ids), text])))[len(ids) - 1 : -1]
        return jnp.where(found.mask[0, 1], jnp.take_along_axis(rows, text[:, None], axis=-1)[:, 0], 0.0).sum()

    expected = jax.jit(jax.grad(whole))(lm)
    got = jax.jit(jax.grad(lambda lm: learning.log_probs(lm, found)[0, 1].sum()))(lm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, expected)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.1


def test_other_weights_prompts_and_keys_compile_nothing(lm, found):
    before = run.traced
    changed = jax.tree.map(lambda x: 0.9 * x, lm)
    again = learning.rollouts(jax.random.key(2), changed, [[4, 4], *PROMPTS[:2], [1]], long_and_late, **SIZES)
    assert run.traced == before
    assert (again.tokens != found.tokens).any()
    same = learning.rollouts(jax.random.key(1), lm, PROMPTS, long_and_late, **SIZES)
    np.testing.assert_array_equal(same.tokens, found.tokens)


def test_traced_rewards(lm, found):
    """The same draws, rewarded inside of the compiled call."""

    def reward(prompt, text):
        last = text.tokens[text.length - 1]
        return text.length + 0.1 * jnp.where(prompt > 1, prompt, 0).sum() + 0.01 * last

    again = learning.rollouts(jax.random.key(1), lm, PROMPTS, reward, **SIZES, traced=True)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    np.testing.assert_allclose(again.rewards, found.rewards, atol=1e-5)


def test_texts_that_a_string_ends():
    lm = programs.markov(4, seed=1)
    found = learning.rollouts(
        jax.random.key(0), lm, ["b", "cd"], lambda prompt, text: text.endswith("c"), group_size=20, max_tokens=5, until="c"
    )
    stopped = found.rewards == 1
    last = jnp.take_along_axis(found.tokens, found.lengths[..., None] - 1, axis=-1)[..., 0]
    np.testing.assert_array_equal(stopped, last == 2)
    assert (found.ended >= stopped).all()
    assert 0 < stopped.sum() < 40


def test_mixed_rollouts_are_refilled():
    lm = programs.markov(3, seed=1)

    def draw(rng_key, number):
        right = lambda prompt, text: float(len(text) > 1 and prompt != "c")  # nothing after "c" is right
        return learning.rollouts(rng_key, lm, ["b", "c"], right, group_size=2, max_tokens=2)

    refilled = learning.mixed_rollouts(jax.random.key(0), draw, 5, max_draws=50)
    drawn = [draw(jax.random.fold_in(jax.random.key(0), number), number) for number in range(refilled.groups // 2)]
    rows = [jax.tree.map(lambda x: x[0], batch) for batch in drawn if policies.is_mixed(batch.rewards)[0]]
    assert not any(policies.is_mixed(batch.rewards)[1] for batch in drawn)
    assert len(rows) == 5 < len(drawn)
    jax.tree.map(np.testing.assert_array_equal, refilled.rollouts, jax.tree.map(lambda *xs: jnp.stack(xs), *rows))
    assert refilled.tokens == sum(int(batch.mask.sum()) for batch in drawn)
    same = lambda rng_key, number: drawn[number]._replace(rewards=jnp.ones((2, 2)))
    with pytest.raises(SiteError, match=r"0 of 6 groups have rewards that differ, 1 are wanted, and max_draws=3"):
        learning.mixed_rollouts(jax.random.key(0), same, 1, max_draws=3)


def test_errors(lm):
    with pytest.raises(SiteError, match="`prompts` is empty"):
        learning.rollouts(jax.random.key(0), lm, [], long_and_late, **SIZES)
    with pytest.raises(SiteError, match="token id 99 is outside the vocabulary of 11"):
        learning.rollouts(jax.random.key(0), lm, [[99]], long_and_late, **SIZES)
    bad = lambda prompt, text: float("nan") if prompt == [6] else 0.0
    with pytest.raises(SiteError, match="the reward of text 0 of prompt 1 is nan"):
        learning.rollouts(jax.random.key(1), lm, PROMPTS, bad, **SIZES)


@pytest.mark.slow
def test_a_soft_target_is_learned():
    """Trajectory balance on a policy's own texts finds p_reference exp(R / beta), enumerated."""
    lm, beta = programs.markov(3, seed=6), 0.5
    value = {"": 0.3, "b": -0.4, "bb": 0.9, "bc": 0.1, "c": 0.6, "cb": -0.5, "cc": 0.0}

    def loss(rng_key, params, batch):
        reference = learning.log_probs(lm, batch)
        return policies.trajectory_balance(learning.log_probs(params, batch), reference, batch.rewards, batch.mask, beta=beta)

    def data(step, rng_key, params):
        return learning.rollouts(rng_key, params, [""], lambda prompt, text: value[text], group_size=32, max_tokens=2)

    found = learning.fit(loss, lm, optax.adam(0.05), num_steps=150, rng_key=jax.random.key(0), data=data)
    assert found.losses[-1] < 1e-3 < 0.1 < found.losses[0]

    rows = [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]  # in the order of `value`
    mask = jnp.array([[True, row[0] > 0] for row in rows])[None]
    every = learning.Rollouts(jnp.array([[lm.start_id]]), jnp.array(rows)[None], mask, *[None] * 3)
    base, learned = (learning.log_probs(model, every).sum(-1)[0] for model in (lm, found.params))
    target = jax.nn.softmax(base + jnp.array(list(value.values())) / beta)
    np.testing.assert_allclose(jnp.exp(learned), target, atol=0.01)
    assert np.abs(jnp.exp(base) - target).max() > 0.1
