"""Objectives of policy learning: expected gradients over every group of rollouts, against gradients of enumerated targets."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.flatten_util import ravel_pytree

from latentrace.inference.learning import policies
from latentrace.ppl.errors import SiteError
from latentrace.ppl.language_model import log_probs_after

T, V = 2, 3
PROMPT = jnp.array([1])
LM = programs.markov(V, seed=3)
REFERENCE, OLD = programs.markov(V, seed=4), programs.markov(V, seed=5)
TEXTS = [(0, 0), *[(a, b) for a in (1, 2) for b in range(V)]]  # token 0 ends a text
TOKENS = jnp.array(TEXTS)
MASK = jnp.arange(T) < jnp.array([1 if text[0] == 0 else 2 for text in TEXTS])[:, None]
REWARDS = jnp.asarray(np.random.default_rng(0).normal(size=len(TEXTS)), jnp.float32)
RIGHT = jnp.array([0, 0, 1.0, 0, 1, 0, 0])
BETA = 0.7
GROUPS = {size: jnp.array(list(itertools.product(range(len(TEXTS)), repeat=size))) for size in (2, 3)}


def token_log_probs(lm):
    """float32[texts, T]"""
    return jnp.where(MASK, log_probs_after(lm, PROMPT, TOKENS), 0.0)


def log_p(lm):
    return token_log_probs(lm).sum(-1)


def gradient(fn, at=LM):
    return ravel_pytree(jax.jit(jax.grad(fn))(at))[0]


def expected_gradient(loss, size, *, drawn_by=LM, keep=None):
    """E over every group of `size` texts of the gradient at LM of `loss(token log-probs [1, G, T], group int[G])`.

    With `keep`, of groups for which it holds.
    """
    groups, p_old = GROUPS[size], jnp.exp(log_p(drawn_by))
    p = p_old[groups].prod(-1)
    if keep is not None:
        p = jnp.where(jax.vmap(keep)(groups), p, 0.0)
        p = p / p.sum()

    def mean(lm):
        rows = token_log_probs(lm)
        return (p * jax.vmap(lambda group: loss(rows[group][None], group))(groups)).sum()

    return gradient(mean)


def given(loss, group, rewards=REWARDS):
    """A loss of a group's rewards and mask."""
    return partial(loss, rewards=rewards[group][None], mask=MASK[group][None])


def of(lm, group):
    return token_log_probs(lm)[group][None]


def divergence(lm):
    """KL(p || p_reference) of texts."""
    return (jnp.exp(log_p(lm)) * (log_p(lm) - log_p(REFERENCE))).sum()


def reward_of(rewards):
    return lambda lm: (jnp.exp(log_p(lm)) * rewards).sum()


def close(found, expected):
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_texts_are_all_there():
    np.testing.assert_allclose(jnp.exp(log_p(LM)).sum(), 1.0, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_follows_expected_reward(size):
    found = expected_gradient(lambda log_probs, group: given(policies.rloo, group)(log_probs), size)
    close(found, gradient(lambda lm: -reward_of(REWARDS)(lm)))


def test_rloo_with_texts_of_another_policy_and_a_reference():
    def loss(log_probs, group):
        others = {"old_log_probs": of(OLD, group), "reference_log_probs": of(REFERENCE, group)}
        return given(policies.rloo, group)(log_probs, **others, beta=BETA)

    found = expected_gradient(loss, 2, drawn_by=OLD)
    close(found, gradient(lambda lm: BETA * divergence(lm) - reward_of(REWARDS)(lm)))


def test_rloo_with_a_reference_rests_at_the_tilted_reference():
    """At p_reference exp(R / beta), normalised, every group's gradient vanishes, not only the expected one."""
    target = jax.nn.log_softmax(log_p(REFERENCE) + REWARDS / BETA)

    def loss(whole, group):
        log_probs = whole[group][None, :, None]
        reference = log_p(REFERENCE)[group][None, :, None]
        mask = jnp.ones((1, 2, 1), bool)
        return policies.rloo(log_probs, REWARDS[group][None], mask, reference_log_probs=reference, beta=BETA)

    gradients = jax.vmap(lambda group: jax.grad(loss)(target, group))(GROUPS[2])
    np.testing.assert_allclose(gradients, 0.0, atol=1e-5)


@cache
def tie_broken_scores():
    """Scores that order texts otherwise than rewards do, with ties."""
    return jnp.array([0.0, 2, 1, 1, 0, 3, 2])


@pytest.mark.parametrize(("size", "n", "scored"), [(2, 2, False), (3, 2, False), (3, 3, True), (3, 2, True)])
def test_best_of_n_follows_the_reward_of_the_chosen_text(size, n, scored):
    scores = tie_broken_scores() if scored else REWARDS

    def loss(log_probs, group):
        others = {"scores": scores[group][None]} if scored else {}
        return given(policies.best_of_n, group)(log_probs, n=n, **others)

    def target(lm):  # every tuple of n texts; argmax takes the first of equal scores
        tuples = GROUPS[n]
        chosen = jnp.take_along_axis(tuples, scores[tuples].argmax(-1)[:, None], axis=-1)[:, 0]
        return -(jnp.exp(log_p(lm))[tuples].prod(-1) * REWARDS[chosen]).sum()

    close(expected_gradient(loss, size), gradient(target))


def test_best_of_n_of_a_verifier_off_policy():
    """1 - (1 - P)^n, and its gradient n (1 - P)^(n - 1) times that of P, from another policy's texts."""
    whole = lambda log_probs, group: given(policies.best_of_n, group, RIGHT)(log_probs, n=2)
    p = reward_of(RIGHT)
    close(expected_gradient(whole, 3), gradient(lambda lm: (1 - p(lm)) ** 2))
    close(expected_gradient(whole, 3), -2 * (1 - p(LM)) * gradient(p))


def test_best_of_n_with_texts_of_another_policy():
    """Each text is reweighted by its own ratio, so that what the others of a subset do is the old policy's."""

    def loss(log_probs, group):
        return given(policies.best_of_n, group)(log_probs, n=2, old_log_probs=of(OLD, group))

    def target(lm):
        p, old = jnp.exp(log_p(lm)), jnp.exp(log_p(OLD))
        added = lambda i, j: jnp.maximum(REWARDS[i] - REWARDS[j], 0.0)
        first, second = GROUPS[2].T
        return -2 * (p[first] * old[second] * added(first, second)).sum()

    close(expected_gradient(loss, 2, drawn_by=OLD), gradient(target))


@pytest.mark.parametrize("log_z", [None, 0.4])
def test_trajectory_balance_follows_twice_the_divergence(log_z):
    def loss(log_probs, group):
        constant = None if log_z is None else jnp.array([log_z])
        return given(policies.trajectory_balance, group)(log_probs, of(REFERENCE, group), beta=BETA, log_z=constant)

    def target(lm):  # 2 KL(p || q)
        log_q = jax.nn.log_softmax(log_p(REFERENCE) + REWARDS / BETA)
        return 2 * (jnp.exp(log_p(lm)) * (log_p(lm) - log_q)).sum()

    close(expected_gradient(loss, 3), gradient(target))


def test_trajectory_balance_is_zero_at_its_target_alone():
    log_z = jax.nn.logsumexp(log_p(REFERENCE) + REWARDS / BETA)
    target = log_p(REFERENCE) + REWARDS / BETA - log_z
    every, mask = jnp.arange(len(TEXTS))[None], jnp.ones((1, len(TEXTS), 1), bool)
    rows = lambda x: x[every][..., None]
    for constant in (None, log_z[None]):
        known = {"reference_log_probs": rows(log_p(REFERENCE)), "rewards": REWARDS[every], "mask": mask}
        loss = partial(policies.trajectory_balance, **known, beta=BETA, log_z=constant)
        assert loss(rows(target)) < 1e-9
        assert loss(rows(log_p(LM))) > 0.1
    assert loss(rows(target), log_z=log_z[None] + 0.1) > 0.009


def test_trajectory_balance_without_a_constant_is_rloo():
    """Group by group: 2 / beta times the gradient of RLOO with the same reference."""

    def gradients(loss):
        one = lambda group: jax.grad(lambda lm: loss(of(lm, group), group))(LM).transition
        return jax.jit(jax.vmap(one))(GROUPS[3])

    balance = gradients(lambda x, g: given(policies.trajectory_balance, g)(x, of(REFERENCE, g), beta=BETA))
    reinforce = gradients(lambda x, g: given(policies.rloo, g)(x, reference_log_probs=of(REFERENCE, g), beta=BETA))
    close(balance, 2 / BETA * reinforce)


def test_rejection_sampling_follows_the_divergence_from_accepted_texts():
    def loss(log_probs, group):
        return given(policies.rejection_sampling, group, RIGHT)(log_probs)

    def target(lm):  # E[R] KL(q || p), with q the old policy's accepted texts
        old = jnp.exp(log_p(OLD)) * RIGHT
        q = old / old.sum()
        return old.sum() * jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1.0)) - log_p(lm)), 0.0).sum()

    close(expected_gradient(loss, 2, drawn_by=OLD), gradient(target))
    close(expected_gradient(loss, 2), gradient(lambda lm: -reward_of(RIGHT)(lm)))  # its first step


# --- GRPO and DAPO ----------------------------------------------------------------------------------------------------


def by_the_book(name, log_probs, old, reference, rewards, mask, *, low, high, beta=0.0):
    """A group's loss, text by text and token by token, in NumPy."""
    texts, lengths = range(len(rewards)), mask.sum(-1)
    total = 0.0
    for i in texts:
        advantage = (rewards[i] - rewards.mean()) / rewards.std() if len(set(rewards)) > 1 else 0.0
        for t in range(lengths[i]):
            ratio = np.exp(log_probs[i, t] - old[i, t])
            gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            back = np.exp(reference[i, t] - log_probs[i, t])
            gain -= beta * (back - np.log(back) - 1)
            total += gain / (len(rewards) * lengths[i]) if name == "grpo" else gain / lengths.sum()
    return -total


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_losses_are_their_definitions(name):
    """On every group of three texts, with ratios on every side of the bounds of both."""
    groups = GROUPS[3]
    now, reference = (np.asarray(token_log_probs(lm), np.float64)[groups] for lm in (LM, REFERENCE))
    old = now - np.log(np.random.default_rng(1).choice([0.6, 0.9, 1.1, 1.24, 1.5], size=(len(TEXTS), T)))[groups]
    rewards, mask = np.asarray(REWARDS)[groups], np.asarray(MASK)[groups]
    one = lambda x: x[:, None]
    if name == "grpo":
        loss = lambda a, b, r, m, ref: policies.grpo(a, b, r, m, reference_log_probs=ref, beta=0.3)
        options = {"low": 0.2, "high": 0.2, "beta": 0.3}
    else:
        loss, options = lambda a, b, r, m, ref: policies.dapo(a, b, r, m), {"low": 0.2, "high": 0.28}
    found = jax.vmap(loss)(*map(one, (now, old, rewards, mask, reference)))
    expected = [by_the_book(name, *row, **options) for row in zip(now, old, reference, rewards, mask)]
    np.testing.assert_allclose(found, expected, atol=2e-5)


OBJECTIVES = {"grpo": policies.grpo, "dapo": policies.dapo}


def on_policy(name, log_probs, group, rewards):
    return OBJECTIVES[name](log_probs, jax.lax.stop_gradient(log_probs), rewards[group][None], MASK[group][None])


def test_expected_gradients_and_their_bias():
    """With texts of unequal lengths each gradient is its definition's, and no multiple of that of E[R]."""
    lengths, p = MASK.sum(-1), jnp.exp(log_p(LM))
    uneven = jnp.array([5.0, 0.0, 1.0, 0.2, -0.3, 0.5, -1.0])
    truth = gradient(lambda lm: -reward_of(uneven)(lm))
    for name, size in (("grpo", 2), ("dapo", 3)):
        groups = GROUPS[size]
        rewards, tokens = uneven[groups], lengths[groups]
        deviation = jnp.sqrt(((rewards - rewards.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True))
        advantages = (rewards - rewards.mean(-1, keepdims=True)) / jnp.maximum(deviation, 1e-3)
        share = 1 / (size * tokens) if name == "grpo" else 1 / tokens.sum(-1, keepdims=True)
        weight = p[groups].prod(-1, keepdims=True) * advantages * share
        expected = gradient(lambda lm: -(weight * log_p(lm)[groups]).sum())
        found = expected_gradient(lambda log_probs, group: on_policy(name, log_probs, group, uneven), size)
        close(found, expected)
        cosine = found @ truth / jnp.linalg.norm(found) / jnp.linalg.norm(truth)
        assert 0.5 < cosine < 0.99, (name, cosine)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_how_prompts_are_weighted(name):
    """Rewards 0 and 1 and texts of one length: E[s] / (P (1 - P)), and by dynamic sampling over the chance of a mixed group."""
    long = jnp.arange(1, len(TEXTS))  # the texts of two tokens, renormalised
    right = RIGHT.at[2].set(0.0)

    def setting(lm):
        rows = token_log_probs(lm)[long]
        inside = jax.nn.logsumexp(rows.sum(-1))
        return rows - inside / T  # sums to a distribution over these texts

    size, groups = 3, jnp.array(list(itertools.product(range(len(long)), repeat=3)))
    probability = lambda lm: (jnp.exp(setting(lm).sum(-1)) * right[long]).sum()
    weight = jnp.exp(setting(LM).sum(-1))[groups].prod(-1)
    rewards = right[long][groups]
    mask = jnp.ones((1, size, T), bool)

    def mean(lm, weight):
        rows = setting(lm)
        one = lambda group, r: OBJECTIVES[name](rows[group][None], jax.lax.stop_gradient(rows[group][None]), r[None], mask)
        return (weight * jax.vmap(one)(groups, rewards)).sum()

    chance = probability(LM)
    deviation = (weight * rewards.std(-1)).sum()
    factor = deviation / (chance * (1 - chance)) / T
    close(gradient(lambda lm: mean(lm, weight)), -factor * gradient(probability))
    if name == "dapo":
        mixed = jnp.where(policies.is_mixed(rewards), weight, 0.0)
        np.testing.assert_allclose(mixed.sum(), 1 - chance**size - (1 - chance) ** size, atol=1e-6)
        found = gradient(lambda lm: mean(lm, mixed / mixed.sum()))
        close(found, -factor / mixed.sum() * gradient(probability))


def test_gradient_of_the_k3_estimate():
    """It follows KL(p_reference || p) of next tokens after what p writes, not KL(p || p_reference), whose value it has."""

    def loss(log_probs, group):  # equal rewards: only the divergence is left
        rewards = jnp.zeros((1, 2))
        reference, mask = of(REFERENCE, group), jnp.ones((1, 2, T), bool)
        return policies.grpo(
            log_probs, jax.lax.stop_gradient(log_probs), rewards, mask, reference_log_probs=reference, beta=1.0
        )

    def rows(lm):  # log-probabilities after the prompt, and after each first token
        return jax.nn.log_softmax(lm.transition)

    first = jnp.exp(rows(LM)[1])
    reach = jnp.stack([jnp.zeros(V).at[1].set(1.0), first.at[0].set(0.0)]).sum(0)  # an ended text has no second token

    def forward(lm):
        return (reach * (jnp.exp(rows(REFERENCE)) * (rows(REFERENCE) - rows(lm))).sum(-1)).sum() / T

    def value(lm):
        return (reach * (jnp.exp(rows(lm)) * (rows(lm) - rows(REFERENCE))).sum(-1)).sum() / T

    close(expected_gradient(loss, 2), gradient(forward))
    p = jnp.exp(log_p(LM))
    estimate = (p * policies.k3(token_log_probs(LM), token_log_probs(REFERENCE)).sum(-1)).sum() / T
    np.testing.assert_allclose(estimate, value(LM), atol=1e-6)
    assert np.abs(gradient(forward) - gradient(value)).max() > 0.01


def test_overlong_penalty():
    lengths = jnp.array([0, 12, 16, 17, 18, 19, 20])
    found = policies.overlong_penalty(lengths, max_tokens=20, buffer=4, factor=2.0)
    np.testing.assert_allclose(found, [0, 0, 0, -0.5, -1.0, -1.5, -2.0])


def test_prompts_are_averaged():
    """A batch's loss is the mean of its groups' losses."""
    groups = GROUPS[3][jnp.array([5, 100, 200])]
    rows, old, ref = (token_log_probs(lm)[groups] for lm in (LM, OLD, REFERENCE))
    losses = {
        "rloo": lambda i: policies.rloo(rows[i], REWARDS[groups][i], MASK[groups][i], old_log_probs=old[i]),
        "grpo": lambda i: policies.grpo(rows[i], old[i], REWARDS[groups][i], MASK[groups][i]),
        "dapo": lambda i: policies.dapo(rows[i], old[i], REWARDS[groups][i], MASK[groups][i]),
        "best of n": lambda i: policies.best_of_n(rows[i], REWARDS[groups][i], MASK[groups][i], n=2, old_log_probs=old[i]),
        "balance": lambda i: policies.trajectory_balance(rows[i], ref[i], REWARDS[groups][i], MASK[groups][i], beta=BETA),
        "rejection": lambda i: policies.rejection_sampling(rows[i], REWARDS[groups][i], MASK[groups][i]),
    }
    for name, loss in losses.items():
        parts = [float(loss(slice(i, i + 1))) for i in range(3)]
        assert len({round(part, 4) for part in parts}) == 3, name
        np.testing.assert_allclose(loss(slice(None)), np.mean(parts), rtol=1e-5, atol=1e-6, err_msg=name)


def test_errors():
    x, rewards, mask = jnp.zeros((1, 3, T)), jnp.zeros((1, 3)), jnp.ones((1, 3, T), bool)
    with pytest.raises(SiteError, match=r"rloo: rewards must be float32\[B, G\] with groups of G >= 2 texts, found \[1, 1\]"):
        policies.rloo(x[:, :1], rewards[:, :1], mask[:, :1])
    with pytest.raises(SiteError, match=r"beta=0.5 .* give reference_log_probs"):
        policies.rloo(x, rewards, mask, beta=0.5)
    with pytest.raises(SiteError, match="n must be from 2 to the group's 3 texts, not 4"):
        policies.best_of_n(x, rewards, mask, n=4)
    with pytest.raises(SiteError, match="beta must be positive"):
        policies.trajectory_balance(x, x, rewards, mask, beta=0.0)
    with pytest.raises(SiteError, match="buffer must be from 1 to max_tokens=4, not 5"):
        policies.overlong_penalty(jnp.array([1]), 4, 5)
