"""Objectives of policy learning, each a loss whose gradient follows a stated target.

A policy p(y | x) writes G texts y for each of B prompts x (`learning.rollouts`). `log_probs` float32[B, G, T] are those of the
tokens under the policy that learns, differentiable (`learning.log_probs`); `old_log_probs` those under the policy that wrote
them, `reference_log_probs` those under a fixed one. Rewards are float32[B, G], in units of the user's; `mask` bool[B, G, T]
says which tokens count. A loss is float32[], to be minimised; means go over prompts, so that B only reduces variance.

With `learning.fit`, which draws anew before each step:

>>> import jax, optax
>>> from latentrace import models
>>> from latentrace.inference import learning
>>> lora = models.LoRA(models.load("reasoner"), rank=2)
>>> def loss(rng_key, params, batch):
...     log_probs = learning.log_probs(lora.apply(params), batch)
...     return learning.policies.rloo(log_probs, batch.rewards, batch.mask)
>>> def data(step, rng_key, params):
...     right = lambda prompt, text: text.startswith("12/4=3 ")
...     return learning.rollouts(rng_key, lora.apply(params), ["4 12 8\\n"], right, group_size=4, max_tokens=6)
>>> start = lora.init(jax.random.key(0))
>>> found = learning.fit(loss, start, optax.adam(1e-3), num_steps=2, rng_key=jax.random.key(1), data=data)
>>> found.losses.shape
(2,)
"""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.errors import SiteError

Array = jax.Array


def rloo(
    log_probs: Array,
    rewards: Array,
    mask: Array,
    *,
    old_log_probs: Array | None = None,
    reference_log_probs: Array | None = None,
    beta: float = 0.0,
) -> Array:
    """REINFORCE with the mean reward of the other texts of a group as baseline (RLOO, arXiv:2402.14740).

    Target: E[R], the expected reward of a text. The gradient is unbiased for every G >= 2. With a reference, the reward also
    pays -beta log(p / p_reference), and the target is E[R] - beta KL(p || p_reference), at its highest where p is
    p_reference exp(R / beta), normalised.

    With `old_log_probs` each text is weighted by p / p_old, unclipped, so that the gradient is unbiased also when another
    policy wrote the texts; without, they must come from the present one.

    >>> log_probs, mask = jnp.log(jnp.full((1, 2, 1), 0.5)), jnp.ones((1, 2, 1), bool)
    >>> jax.grad(rloo)(log_probs, jnp.array([[3.0, 1.0]]), mask).ravel().tolist()
    [-1.0, 1.0]
    """
    _check_groups("rloo", rewards)
    whole = _total(log_probs, mask)
    if reference_log_probs is not None:
        rewards = rewards - beta * jax.lax.stop_gradient(whole - _total(reference_log_probs, mask))
    elif beta:
        raise SiteError(f"rloo: beta={beta} weighs a divergence from a reference; give reference_log_probs too")
    others = (rewards.sum(-1, keepdims=True) - rewards) / (rewards.shape[-1] - 1)
    old = None if old_log_probs is None else _total(old_log_probs, mask)
    return -((rewards - others) * _ratio(whole, old)).mean()


def grpo(
    log_probs: Array,
    old_log_probs: Array,
    rewards: Array,
    mask: Array,
    *,
    clip: float = 0.2,
    reference_log_probs: Array | None = None,
    beta: float = 0.04,
) -> Array:
    """Group relative policy optimisation (arXiv:2402.03300, equations 3 and 4): advantages normalised in the group, clipped
    ratios of each token, the mean over a text's tokens, and, with a reference, `beta` times the k3 estimate of the divergence
    from it.

    Target: none in closed form; the gradient is biased for E[R] in three ways. Division by the standard deviation weighs
    prompts: for rewards 0 and 1 and texts of one length the gradient is E[s] / (P (1 - P)) times that of P, the probability of
    reward 1, per token, where s is the group's standard deviation; with large G that is 1 / sqrt(P (1 - P)). Division by a
    text's length makes a token of a long text count less, so that of wrong texts long ones are discouraged least. Clipping
    stops the gradient of tokens whose probability has moved far enough. The divergence is differentiated as it stands, at the
    drawn tokens: its gradient is that of KL(p_reference || p) of each next token after what p wrote, not of
    KL(p || p_reference).

    >>> log_probs, mask = jnp.log(jnp.full((1, 2, 1), 0.5)), jnp.ones((1, 2, 1), bool)
    >>> jax.grad(grpo)(log_probs, log_probs, jnp.array([[3.0, 1.0]]), mask).ravel().tolist()
    [-0.5, 0.5]
    """
    _check_groups("grpo", rewards)
    gains = _clipped(log_probs, old_log_probs, _normalised(rewards), clip, clip)
    if reference_log_probs is not None:
        gains = gains - beta * k3(log_probs, reference_log_probs)
    lengths = jnp.maximum(mask.sum(-1), 1)
    return -(_total(gains, mask) / lengths).mean()


def dapo(
    log_probs: Array,
    old_log_probs: Array,
    rewards: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Array:
    """Decoupled clip and dynamic sampling policy optimisation (DAPO, arXiv:2503.14476, equation 8): GRPO's advantages, ratios
    clipped to [1 - clip_low, 1 + clip_high], the mean over all tokens of a group, and no divergence.

    Its other two parts stand beside it: `learning.mixed_rollouts` draws the groups, and `overlong_penalty` is added to the
    rewards afterwards.

    Target: none in closed form. The gradient is biased for E[R] by the division by the standard deviation, as GRPO's, by that
    by the group's number of tokens, which correlates with the rewards, and by clipping. Dynamic sampling adds no bias of its
    own: groups of equal rewards have gradient 0, so that leaving them out multiplies the whole by one over the share of the
    others.

    >>> log_probs, mask = jnp.log(jnp.full((1, 2, 1), 0.5)), jnp.ones((1, 2, 1), bool)
    >>> jax.grad(dapo)(log_probs, log_probs, jnp.array([[3.0, 1.0]]), mask).ravel().tolist()
    [-0.5, 0.5]
    """
    _check_groups("dapo", rewards)
    gains = _total(_clipped(log_probs, old_log_probs, _normalised(rewards), clip_low, clip_high), mask)
    tokens = jnp.maximum(mask.sum((-2, -1)), 1)
    return -(gains.sum(-1) / tokens).mean()


def overlong_penalty(lengths: Array, max_tokens: int, buffer: int, factor: float = 1.0) -> Array:
    """What DAPO adds to the reward of a text by its length, int32[...] tokens (arXiv:2503.14476, equation 13): 0 up to
    `max_tokens - buffer`, then falling linearly to -factor at `max_tokens`.

    >>> import jax.numpy as jnp
    >>> [round(float(x), 2) for x in overlong_penalty(jnp.array([6, 8, 10]), max_tokens=10, buffer=4)]
    [0.0, -0.5, -1.0]
    """
    if not 0 < buffer <= max_tokens:
        raise SiteError(f"overlong_penalty: buffer must be from 1 to max_tokens={max_tokens}, not {buffer}")
    return factor * jnp.clip((max_tokens - buffer - lengths) / buffer, -1.0, 0.0)


def best_of_n(
    log_probs: Array,
    rewards: Array,
    mask: Array,
    *,
    n: int,
    scores: Array | None = None,
    old_log_probs: Array | None = None,
) -> Array:
    """Policy gradient through best-of-n sampling (arXiv:2412.15287).

    Target: E[reward of the best-scored of n texts]. Where rewards are the scores, 0 and 1, that is 1 - (1 - P)^n, and its
    gradient n (1 - P)^(n - 1) times that of P. The estimate is unbiased for every G >= n: it is the mean over all subsets of n
    texts of a group, and in each the best one is credited with what it adds to the second best, which does not depend on it.
    Among equal scores the first text of the group is the best.

    Args:
        scores: float32[B, G], what texts are chosen by at inference time, such as a verifier's; None: the rewards.
        old_log_probs: as of `rloo`; but the other texts of a subset stay the old policy's, so that the gradient is unbiased
            where the two policies are the same, and only near it elsewhere.

    >>> log_probs, mask = jnp.log(jnp.full((1, 3, 1), 0.5)), jnp.ones((1, 3, 1), bool)
    >>> gradient = jax.grad(lambda x: best_of_n(x, jnp.array([[2.0, 8.0, 5.0]]), mask, n=3))(log_probs)
    >>> gradient.ravel().tolist() == [0, -3, 0]  # what the best adds to the second best
    True
    """
    _check_groups("best_of_n", rewards)
    size = rewards.shape[-1]
    if not 2 <= n <= size:
        raise SiteError(f"best_of_n: n must be from 2 to the group's {size} texts, not {n}; for n = 1 take `rloo`")
    order = jnp.argsort(-(rewards if scores is None else scores), axis=-1, stable=True)
    ranked = jnp.take_along_axis(rewards, order, axis=-1)
    # a subset's best is rank i and its second rank j, the others come after: as many subsets as choices of n - 2 of those
    seconds = np.array([comb(size - 1 - j, n - 2) for j in range(size)]) / comb(size, n)
    share = jnp.asarray(np.triu(np.broadcast_to(seconds, (size, size)), k=1), jnp.float32)
    added = (share * (ranked[..., :, None] - ranked[..., None, :])).sum(-1)
    added = jnp.take_along_axis(added, jnp.argsort(order, axis=-1), axis=-1)
    old = None if old_log_probs is None else _total(old_log_probs, mask)
    return -(added * _ratio(_total(log_probs, mask), old)).sum(-1).mean()


def trajectory_balance(
    log_probs: Array,
    reference_log_probs: Array,
    rewards: Array,
    mask: Array,
    *,
    beta: float,
    log_z: Array | None = None,
) -> Array:
    """Trajectory balance (arXiv:2201.13259; of language models arXiv:2310.04363): the mean of
    (log_z + log p - log p_reference - R / beta)^2.

    Target: q = p_reference exp(R / beta) / Z, prompt by prompt. The loss is 0 on all texts exactly where p is q and log_z is
    log Z, whoever wrote them: there is no need of `old_log_probs`, and texts of another policy, of a replay buffer or of
    MCMC may be mixed in. On texts of the present policy the expected gradient is that of 2 KL(p || q), whatever log_z is.

    Args:
        beta: temperature of the reward, in its units per nat.
        log_z: float32[B], learned besides the policy, by this loss. None: estimated as the group's mean, and the loss is the
            unbiased variance of the other terms over the group (VarGrad, arXiv:2010.10436); on texts of the present policy
            its gradient is exactly 2 / beta times that of `rloo` with the same reference.

    >>> reference, mask = jnp.log(jnp.array([[[0.75], [0.25]]])), jnp.ones((1, 2, 1), bool)
    >>> rewards = jnp.log(jnp.array([[1.0, 9.0]]))
    >>> target = jnp.log(jnp.array([[[0.25], [0.75]]]))
    >>> bool(trajectory_balance(target, reference, rewards, mask, beta=1.0) < 1e-9)
    True
    """
    if beta <= 0:
        raise SiteError(f"trajectory_balance: beta must be positive, not {beta}")
    gap = _total(log_probs, mask) - _total(reference_log_probs, mask) - rewards / beta
    if log_z is not None:
        return jnp.square(log_z[..., None] + gap).mean()
    _check_groups("trajectory_balance", rewards)
    return gap.var(-1, ddof=1).mean()


def rejection_sampling(log_probs: Array, rewards: Array, mask: Array) -> Array:
    """Fine-tuning on accepted texts (rejection-sampling fine-tuning, arXiv:2308.01825; expert iteration): the mean of
    -R log p, with rewards of at least 0, such as 1 for accepted and 0 for other texts.

    Target: the distribution of accepted texts, q = p_old R / E[R], where p_old wrote them: the gradient is unbiased for that of
    the mean over prompts of E[R] KL(q || p), so that prompts count by how often they are solved. Its first step, where p is
    p_old, follows the gradient of E[R], without a baseline; drawing anew after each step is policy gradient, and
    fitting until it converges is a step of expectation maximisation.

    >>> log_probs, mask = jnp.log(jnp.full((1, 2, 1), 0.5)), jnp.ones((1, 2, 1), bool)
    >>> jax.grad(rejection_sampling)(log_probs, jnp.array([[1.0, 0.5]]), mask).ravel().tolist()
    [-0.5, -0.25]
    """
    return -(rewards * _total(log_probs, mask)).mean()


def k3(log_probs: Array, reference_log_probs: Array) -> Array:
    """An estimate of KL(p || p_reference) from tokens of p, of each token, in nats: r - 1 - log r with r = p_reference / p.

    Never negative; unbiased in value (but see `grpo` about its gradient).
    """
    log_ratio = reference_log_probs - log_probs
    return jnp.exp(log_ratio) - 1 - log_ratio


def is_mixed(rewards: Array) -> Array:
    """bool[B]: the groups whose rewards float32[B, G] are not all equal. Others have no advantages, and teach nothing.

    >>> import jax.numpy as jnp
    >>> is_mixed(jnp.array([[0.0, 1.0], [1.0, 1.0]])).tolist()
    [True, False]
    """
    return rewards.max(-1) > rewards.min(-1)


def _total(values: Array, mask: Array) -> Array:
    """Sums over the tokens of each text: float32[B, G]."""
    return jnp.where(mask, values, 0.0).sum(-1)


def _ratio(log_p: Array, old: Array | None) -> Array:
    """p / p_old; 1 where the present policy is the old one, with the gradient of log p."""
    return jnp.exp(log_p - (jax.lax.stop_gradient(log_p) if old is None else old))


def _normalised(rewards: Array) -> Array:
    """Advantages: rewards less the group's mean, over its standard deviation (that of G values, not of an estimate); 0 where
    rewards are all equal, whatever the mean's rounding."""
    mixed = is_mixed(rewards)[..., None]
    return jnp.where(mixed, rewards - rewards.mean(-1, keepdims=True), 0.0) / jnp.where(
        mixed, rewards.std(-1, keepdims=True), 1.0
    )


def _clipped(log_probs: Array, old_log_probs: Array, advantages: Array, low: float, high: float) -> Array:
    """The clipped surrogate of each token: min(r A, clip(r, 1 - low, 1 + high) A)."""
    ratio, advantage = jnp.exp(log_probs - old_log_probs), advantages[..., None]
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def _check_groups(name: str, rewards: Array) -> None:
    if rewards.ndim != 2 or rewards.shape[-1] < 2:
        raise SiteError(f"{name}: rewards must be float32[B, G] with groups of G >= 2 texts, found {list(rewards.shape)}")
