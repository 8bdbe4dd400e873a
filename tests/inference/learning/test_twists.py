"""Losses of twists against enumeration: their expected gradients, what they are at the best twist, and where training ends.

The model writes at most three of three tokens, and its features tell the position and the last token, which is all that the
best twist depends on here: a linear head is a table. Expectations are over all draws, and have no Monte Carlo error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference import learning
from latentrace.inference.learning import twists
from latentrace.ppl.errors import SiteError
from latentrace.ppl.language_model import empty_memory

KEY = jax.random.key(1)
V, T, EOS, START = 3, 3, 0, 3
IMPOSSIBLE = -np.inf
LIKES = np.array([[0, 0, 0], [IMPOSSIBLE, 0, 0], [0, -0.3, -2.2], [0, -1.4, -0.2]])
"""log phi of a text by its length and its last token before EOS; EOS alone is refused."""


@jax.tree_util.register_pytree_node_class
class TimedLM(programs.DigitModel):
    """Logits by position and last token, which are its features, as one-hot vectors."""

    eos_id, start_id, max_length = EOS, START, 8

    def forward(self, tokens, memory):
        at = jnp.minimum(memory.position + jnp.arange(tokens.shape[0]), T - 1)
        return jax.nn.one_hot(at * (V + 1) + tokens, T * (V + 1)), ()

    def unembed(self, features):
        return features @ self.weights

    def logits(self, tokens):
        return self.unembed(self.forward(jnp.asarray(tokens), empty_memory())[0])


LM = TimedLM(jnp.asarray(np.random.default_rng(2).normal(size=(T * (V + 1), V)), jnp.float32))
PROBS = np.exp(np.asarray(LM.weights, np.float64))
PROBS /= PROBS.sum(1, keepdims=True)


def row(prefix: tuple[int, ...]) -> int:
    """The feature that is 1 after a prefix."""
    return len(prefix) * (V + 1) + (prefix[-1] if prefix else START)


def is_over(text: tuple[int, ...]) -> bool:
    return len(text) == T or (len(text) > 0 and text[-1] == EOS)


def log_phi(text: tuple[int, ...]) -> float:
    words = [token for token in text if token != EOS]
    return float(LIKES[len(text), words[-1] if words else EOS])


def p(text: tuple[int, ...]) -> float:
    return float(np.prod([PROBS[row(text[:t]), text[t]] for t in range(len(text))]))


def grow(prefixes):
    return [(*s, token) for s in prefixes if not is_over(s) for token in range(V)]


LEVELS = [grow([()])]
while len(LEVELS) < T:
    LEVELS.append(grow(LEVELS[-1]))
TEXTS = [s for level in LEVELS for s in level if is_over(s)]
P = np.array([p(x) for x in TEXTS])
PHI = np.exp([log_phi(x) for x in TEXTS])
Z = float(P @ PHI)


def psi_star(prefix: tuple[int, ...]) -> float:
    under = np.array([x[: len(prefix)] == prefix for x in TEXTS])
    return float(P[under] @ PHI[under]) / p(prefix)


class Table(NamedTuple):
    """A twist: its entries by feature and token."""

    log_psi: Any

    def log_potentials(self, features):
        return features @ self.log_psi


def best_table() -> np.ndarray:
    """log psi*; 0 where nothing comes by. That of EOS alone, which is refused, is -20 in place of -inf."""
    table = np.zeros((T * (V + 1), V))
    for level in LEVELS:
        for s in level:
            value = psi_star(s)
            table[row(s[:-1]), s[-1]] = np.log(value) if value > 0 else -20.0
    return table


BEST = Table(jnp.asarray(best_table(), jnp.float32))
SOME = Table(jnp.asarray(-0.1 - np.random.default_rng(5).random((T * (V + 1), V)), jnp.float32))
"""A twist that is wrong everywhere, below 0 as `acceptance_loss` wants it."""


def written(texts) -> ppl.Text:
    padded = np.array([[*x, *[EOS] * (T - len(x))] for x in texts], np.int32)
    n = np.array([len(x) for x in texts], np.int32)
    return ppl.Text(jnp.asarray(padded), jnp.asarray(n), jnp.ones(len(texts), bool), jnp.zeros(padded.shape), LM)


def all_texts(twist=None) -> learning.TwistExamples:
    return learning.examples_of(LM, "", written(TEXTS), np.log(PHI, where=PHI > 0, out=np.full(len(PHI), -np.inf)), twist)


def every_text_once() -> learning.TwistExamples:
    """All texts as the draws of a proposal that is uniform over them: their averages are expectations."""
    under = lambda prefix: sum(x[: len(prefix)] == prefix for x in TEXTS)
    log_q = np.zeros((len(TEXTS), T))
    for k, x in enumerate(TEXTS):
        log_q[k, : len(x)] = [np.log(under(x[: t + 1]) / under(x[:t])) for t in range(len(x))]
    return all_texts()._replace(log_q=jnp.asarray(log_q, jnp.float32))


ONCE = every_text_once()
DRAWN_FROM = {"the model": None, "the twist's proposal": SOME, "another": Table(SOME.log_psi[::-1])}
one_prompt = lambda tree: jax.tree.map(lambda x: x[None], tree)
"""[N, ...] as [1, N, ...]"""
alone = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
"""[N, ...] as N batches of one text"""


# --- the losses by their definitions: sums over prefixes ---------------------------------------------------------------


def at(table, prefix):
    return table[row(prefix[:-1]), prefix[-1]]


def exact_contrast(table):
    total = 0.0
    for t, level in enumerate(LEVELS):
        over = [x for x in TEXTS if len(x) <= t]
        z = sum(p(s) * jnp.exp(at(table, s)) for s in level) + sum(p(x) * np.exp(log_phi(x)) for x in over)
        pulled = sum(p(s) * psi_star(s) * at(table, s) for s in level)
        total += jnp.log(z) - (pulled + sum(p(x) * np.exp(log_phi(x)) * log_phi(x) for x in over if log_phi(x) > -9)) / Z
    return total


def exact_ratio(table):
    cost = lambda s: psi_star(s) / Z * jax.nn.softplus(-at(table, s)) + jax.nn.softplus(at(table, s))
    return sum(p(s) * cost(s) for level in LEVELS for s in level)


def exact_acceptance(table):
    cost = lambda s: psi_star(s) * at(table, s) + (1 - psi_star(s)) * jnp.log(1 - jnp.exp(at(table, s)))
    return -sum(p(s) * cost(s) for level in LEVELS for s in level)


def exact_soft_values(q):
    """q: how often each text comes."""

    def loss(table):
        total = 0.0
        for s in (s for level in LEVELS for s in level):
            after = [np.log(PROBS[row(s), token]) + at(table, (*s, token)) for token in range(V)] if not is_over(s) else []
            value = max(log_phi(s), -10.0) if is_over(s) else jax.nn.logsumexp(jnp.stack(after))
            total += sum(q[k] for k, x in enumerate(TEXTS) if x[: len(s)] == s) * (at(table, s) - value) ** 2
        return total

    return loss


def expected_gradient(loss, batches, chances):
    """The expectation of a loss's value and gradient over batches (leading axis) of these probabilities."""
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=1), in_axes=(None, None, 0)))(KEY, SOME, batches)
    return np.tensordot(chances, values, 1), np.tensordot(chances, np.asarray(gradients.log_psi), 1)


def assert_equal_to(found, exact):
    value, gradient = jax.jit(jax.value_and_grad(exact))(SOME.log_psi)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1], gradient, atol=1e-5)
    assert np.abs(gradient).max() > 0.01


def chances(examples) -> np.ndarray:
    return np.exp(np.asarray(examples.log_q, np.float64).sum(-1))


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", DRAWN_FROM)
def test_examples_are_what_the_model_says(q):
    found = all_texts(DRAWN_FROM[q])
    np.testing.assert_allclose(np.exp(np.asarray(found.log_p).sum(-1)), P, rtol=1e-5)
    np.testing.assert_allclose(chances(found).sum(), 1.0, rtol=1e-5)
    for k, x in enumerate(TEXTS):
        rows = [row(x[:t]) for t in range(len(x))]
        np.testing.assert_array_equal(np.asarray(found.features[k]).argmax(-1)[: len(x)], rows)
        if q != "the model":
            tilted = PROBS[rows] * np.exp(DRAWN_FROM[q].log_psi[jnp.array(rows)])
            tilted /= tilted.sum(1, keepdims=True)
            np.testing.assert_allclose(np.exp(found.log_q[k, : len(x)]), tilted[np.arange(len(x)), list(x)], rtol=1e-5)


@pytest.mark.parametrize("q", DRAWN_FROM)
class TestExpectedGradients:
    def test_acceptance(self, q):
        draws = all_texts(DRAWN_FROM[q])
        assert_equal_to(expected_gradient(learning.acceptance_loss, alone(draws), chances(draws)), exact_acceptance)

    def test_soft_values(self, q):
        draws = all_texts(DRAWN_FROM[q])
        loss = learning.soft_value_loss(LM)
        assert_equal_to(expected_gradient(loss, alone(draws), chances(draws)), exact_soft_values(chances(draws)))

    def test_density_ratio(self, q):
        """One positive from the target and one negative, in all pairs."""
        draws, sigma = all_texts(DRAWN_FROM[q]), P * PHI / Z
        i, j = (x.ravel() for x in np.indices((len(P), len(P))))
        one = lambda k: jax.tree.map(lambda x: x[k][:, None, None], draws)
        pairs = learning.Contrast(one(i), jnp.zeros((len(i), 1, 1)), one(j))
        found = expected_gradient(learning.density_ratio_loss, pairs, sigma[i] * chances(draws)[j])
        assert_equal_to(found, exact_ratio)

    def test_contrast(self, q):
        """Two draws, in all pairs: the estimates of each Z_t and of its gradient are unbiased, and are properly weighted."""
        draws = all_texts(DRAWN_FROM[q])
        i, j = (x.ravel() for x in np.indices((len(P), len(P))))
        pairs = jax.tree.map(lambda x: jnp.stack([x[i], x[j]], 1), draws)
        z = lambda table, pair: jnp.exp(twists.log_normalisers(Table(table), pair)) * has_any(pair)
        values, gradients = jax.vmap(lambda pair: (z(SOME.log_psi, pair), jax.jacobian(z)(SOME.log_psi, pair)))(pairs)
        chance = chances(draws)[i] * chances(draws)[j]
        for t, level in enumerate(LEVELS):
            over = sum(p(x) * np.exp(log_phi(x)) for x in TEXTS if len(x) <= t)
            exact = lambda table: sum(p(s) * jnp.exp(at(table, s)) for s in level) + over
            value, gradient = jax.value_and_grad(exact)(SOME.log_psi)
            np.testing.assert_allclose(chance @ np.asarray(values)[:, t], value, rtol=1e-5)
            np.testing.assert_allclose(np.tensordot(chance, np.asarray(gradients)[:, t], 1), gradient, atol=1e-5)


def has_any(draws):
    """float32[T]: 0 where all draws are over, with phi = 0."""
    return (draws.inside | (draws.log_phi > -jnp.inf)[:, None]).any(0)


def test_contrast_of_all_texts_is_the_definition():
    batch = one_prompt(learning.Contrast.of(ONCE))
    value, gradient = jax.jit(jax.value_and_grad(learning.contrastive_twist_loss, argnums=1))(KEY, SOME, batch)
    assert_equal_to((value, gradient.log_psi), exact_contrast)


def test_contrast_is_at_rest_at_the_best_twist():
    """Whatever two draws from its proposal are the negatives: each tells Z_t exactly, so that nothing is biased."""
    draws, sigma = all_texts(BEST), P * PHI / Z
    chance = chances(draws)
    np.testing.assert_allclose(chance[PHI > 0], sigma[PHI > 0], rtol=1e-4)
    i, j = np.nonzero((chance[:, None] > 1e-6) & (chance > 1e-6))
    pairs = jax.tree.map(lambda x: jnp.stack([x[i], x[j]], 1), draws)
    normalisers = jax.vmap(lambda pair: twists.log_normalisers(BEST, pair))(pairs)
    np.testing.assert_allclose(normalisers, np.log(Z), atol=1e-5)

    def loss(table):
        batch = lambda pair: learning.Contrast(one_prompt(draws), jnp.log(sigma)[None], one_prompt(pair))
        each = jax.vmap(lambda pair: learning.contrastive_twist_loss(KEY, Table(table), batch(pair)))(pairs)
        return (chance[i] * chance[j]) @ each

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(BEST.log_psi), 0.0, atol=1e-5)


@pytest.mark.parametrize("loss", ["contrast", "ratio", "acceptance", "soft values"])
def test_the_best_twist_is_the_minimum(loss):
    """The gradient is 0 there, and the loss is larger nearby. Entries that no text of the target has are not determined."""
    exact = {"contrast": exact_contrast, "ratio": exact_ratio, "acceptance": exact_acceptance}
    exact["soft values"] = exact_soft_values(P)
    best = BEST.log_psi.at[row(()), EOS].set(-10.0 if loss == "soft values" else -20.0)
    best = best - (np.log(Z) if loss == "ratio" else 0.0)
    gradient = np.array(jax.grad(exact[loss])(best))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-4)
    assert exact[loss](best + 0.1 * SOME.log_psi) > exact[loss](best) + 1e-4


class TestTraining:
    """On all texts at once, which are exact expectations."""

    def fitted(self, loss, batch, twist=None, steps=1500):
        twist = Table(jnp.zeros((T * (V + 1), V))) if twist is None else twist
        rate = optax.cosine_decay_schedule(0.05, steps)
        return learning.fit(loss, twist, optax.adam(rate), num_steps=steps, rng_key=KEY, data=one_prompt(batch)).params

    def assert_best(self, log_psi, up_to=0.0, determined=lambda s: psi_star(s) > 0):
        for t, level in enumerate(LEVELS):
            seen = [s for s in level if determined(s)]
            off = np.array([float(at(log_psi, s)) - np.log(psi_star(s)) for s in seen])
            if up_to == "t" and t < 2:
                off -= off.mean()  # no text of the target is over by then, so that nothing fixes the factor
            np.testing.assert_allclose(off, 0.0 if up_to == "t" else up_to, atol=0.01)

    def test_contrast(self):
        found = self.fitted(learning.contrastive_twist_loss, learning.Contrast.of(ONCE))
        self.assert_best(found.log_psi, "t")
        assert at(found.log_psi, (EOS,)) < -4 + float(at(found.log_psi, (1,))), "what is refused sinks"

    def test_density_ratio(self):
        self.assert_best(self.fitted(learning.density_ratio_loss, learning.Contrast.of(ONCE)).log_psi, -np.log(Z))

    def test_acceptance(self):
        start = learning.AcceptanceTwist(Table(jnp.zeros((T * (V + 1), V))))
        found = self.fitted(learning.acceptance_loss, ONCE, start)
        self.assert_best(jax.nn.log_sigmoid(found.odds.log_psi))

    def test_soft_values(self):
        found = self.fitted(learning.soft_value_loss(LM), ONCE, steps=3000)
        # what is refused counts with exp(-10), which is little
        self.assert_best(found.log_psi)
        assert at(found.log_psi, (EOS,)) == pytest.approx(-10, abs=0.02)


@ppl.program
def target(head):
    text, _ = ppl.generate("x", ppl.prompt(LM), max_tokens=T, twist=head)
    words = jnp.where((jnp.arange(T) < text.length) & (text.tokens != EOS), text.tokens, EOS)
    count = (words != EOS).sum()
    last = jnp.where(count > 0, words[jnp.maximum(count - 1, 0)], EOS)
    ppl.factor("likes", jnp.asarray(LIKES, jnp.float32)[text.length, last])
    return text


def test_bounds_close_in_as_a_twist_learns_from_its_own_draws():
    """From end to end: draws of the twist so far are positives, by importance, and negatives; SMC gets better by it."""
    host_phi = lambda b, texts: [log_phi(x) for x in texts.ids()]

    def draws(step, rng_key, twist):
        return learning.Contrast.of(
            learning.draw_examples(rng_key, LM, [""], host_phi, num_texts=256, max_tokens=T, twist=twist, progress=False)
        )

    start = ppl.proposals.twist_head(KEY, LM)
    found = learning.fit(learning.contrastive_twist_loss, start, optax.adam(0.1), num_steps=120, rng_key=KEY, data=draws,
                         segment=20)  # fmt: skip
    exact = inference.Exact().run(KEY, target, None)
    assert exact.log_evidence == pytest.approx(np.log(Z), abs=1e-5)
    assert found.losses[-1] < found.losses[0] - 0.1
    trace = {"x": exact.sample(jax.random.key(7), 1).values["x"][0]}
    smc = inference.SMC(4, resample="multinomial")
    before, after = (
        inference.smc.evidence_bounds(jax.random.key(2), target, twist, trace=trace, smc=smc, num_runs=32)
        for twist in (start, found.params)
    )
    assert after.gap < 0.5 * before.gap, (before, after)
    assert abs(after.lower - np.log(Z)) < abs(before.lower - np.log(Z))


def test_prompts_without_positives_are_left_out():
    refused = ONCE._replace(log_phi=jnp.full(len(TEXTS), -jnp.inf))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), learning.Contrast.of(ONCE), learning.Contrast.of(refused))
    for loss in (learning.contrastive_twist_loss, learning.density_ratio_loss):
        with_gradient = jax.jit(jax.value_and_grad(loss, argnums=1))
        alone = with_gradient(KEY, SOME, one_prompt(learning.Contrast.of(ONCE)))
        found = with_gradient(KEY, SOME, both)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-4, atol=1e-6), found, alone)


def test_prompts_of_different_lengths():
    """What precedes a text is its own prompt, however the batch is padded."""
    lm, prompts = TimedLM(LM.weights), [[START], [START, 1]]
    found = learning.draw_examples(KEY, lm, prompts, lambda b, texts: np.zeros(4), num_texts=4, max_tokens=2, progress=False)
    first = np.asarray(found.features)[:, :, 0].argmax(-1)
    np.testing.assert_array_equal(first, [[row(())] * 4, [row((1,))] * 4])
    again = learning.examples_of(lm, prompts[1], ppl.Text(found.tokens[1], found.length[1], None, None, lm), np.zeros(4))
    np.testing.assert_array_equal(again.log_p, found.log_p[1])


@pytest.mark.parametrize(
    ("log_phi", "message"), [(np.zeros(3), r"float\[15\].*found shape \[3\]"), (np.full(15, np.nan), "nan")]
)
def test_bad_potentials_are_refused(log_phi, message):
    with pytest.raises(SiteError, match=message):
        learning.examples_of(LM, "", written(TEXTS), log_phi)
