"""Losses of learned twists, for `learning.fit`: what is trained is a `ppl.proposals.LearnedTwist`, such as a `twist_head`.

A model p writes x_1, x_2, ..., and a final potential phi makes sigma(x) = p(x) phi(x) / Z of it. The twist that leaves nothing
to chance is psi*(x_1:t) = E_p[phi | x_1:t], and phi itself at the end. It is the minimiser of each loss, up to a factor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from latentrace.ppl.language_model import LanguageModel
from latentrace.ppl.proposals import LearnedTwist

from ..vi.objectives import importance_weights
from .examples import Contrast, TwistExamples, pick

Array = jax.Array


def contrastive_twist_loss(rng_key: Array, twist: LearnedTwist, batch: Contrast) -> Array:
    """The loss of contrastive twist learning (CTL; Zhao, Brekelmans, Makhzani and Grosse 2024, section 4), float32[], nats.

    It is sum_t KL(sigma_t | pi_t), less what does not depend on the twist: sigma_t is the target's distribution of the first t
    tokens, and pi_t that of p psi / Z_t. Its gradient is sum_t E_{pi_t}[grad log psi] - E_{sigma_t}[grad log psi]. Positives
    stand for sigma_t. Independent draws from any proposal, best the twist's own, stand for pi_t, normalised by their weights at
    each t (sequential importance sampling). The estimates of Z_t and of its gradient are unbiased; that of log Z_t and of its
    gradient has a bias of order 1 / N, which is 0 where the draws come from the best twist's proposal.

    Minimiser: psi*, times any number for each t at which no text of the target can be over yet: where one can, it stands in
    pi_t with its phi, which fixes the factor. Prompts with no positive are left out.
    """
    del rng_key
    weights = importance_weights(batch.log_weights)
    positives = batch.positives
    log_psi = jnp.where(positives.inside, log_twist(twist, positives), positives.log_phi[..., None])
    weighted = jnp.where(weights[..., None] > 0, log_psi, 0.0) * weights[..., None]
    any_positive = (batch.log_weights > -jnp.inf).any(-1)
    loss = log_normalisers(twist, batch.negatives).sum(-1) - weighted.sum((-1, -2))
    return jnp.where(any_positive, loss, 0.0).mean()


def log_normalisers(twist: LearnedTwist, draws: TwistExamples) -> Array:
    """Estimates of log Z_t from independent draws: float32[..., T], nats; exp of them, and its gradient, is unbiased.

    Z_t is E_p[psi(x_1:t)], a text of fewer than t tokens counting with its phi. 0 where all that is left has phi = 0.
    """
    log_psi = jnp.where(draws.inside, log_twist(twist, draws), draws.log_phi[..., None])
    return _log_total(jax.lax.stop_gradient(draws.log_ratio) + log_psi, axis=-2) - jnp.log(draws.length.shape[-1])


def density_ratio_loss(rng_key: Array, twist: LearnedTwist, batch: Contrast) -> Array:
    """The loss of SIXO's density ratio estimation (Lawson, Raventós, Warrington and Linderman 2022), float32[], nats.

    sum_t of the cross entropy of telling prefixes of the target (positives) from those of the model (negatives, weighed where
    they were drawn from something else), the log odds being log psi.

    Minimiser: psi* / Z, the density ratio. Prompts with no positive are left out.
    """
    del rng_key
    weights = importance_weights(batch.log_weights)
    positives, negatives = batch.positives, batch.negatives
    true = jnp.where(positives.inside, jax.nn.softplus(-log_twist(twist, positives)), 0.0).sum(-1)
    false = jnp.exp(negatives.log_ratio) * jax.nn.softplus(log_twist(twist, negatives))
    false = jnp.where(negatives.inside, false, 0.0).sum(-1)
    any_positive = (batch.log_weights > -jnp.inf).any(-1)
    return jnp.where(any_positive, (weights * true).sum(-1) + false.mean(-1), 0.0).mean()


def acceptance_loss(rng_key: Array, twist: LearnedTwist, batch: TwistExamples) -> Array:
    """The loss of FUDGE (Yang and Klein 2021), float32[], nats: the cross entropy of whether a text will be accepted, in sum
    over its prefixes.

    phi is the probability of acceptance, at most 1, mostly 0 or 1; psi has to be below 1, as an `AcceptanceTwist` is. Texts
    that were drawn from something else than the model are weighed.

    Minimiser: psi*.
    """
    del rng_key
    log_psi = log_twist(twist, batch)
    accepted = jnp.exp(batch.log_phi)[..., None]
    # a probability that rounds to 1 would cost an infinite number of nats
    log_refused = jnp.log(-jnp.expm1(jnp.minimum(log_psi, -1e-7)))
    cross_entropy = -jnp.where(batch.inside, accepted * log_psi + (1 - accepted) * log_refused, 0.0).sum(-1)
    return (jnp.exp(batch.log_ratio[..., -1]) * cross_entropy).mean()


def soft_value_loss(lm: LanguageModel, floor: float = -10.0) -> Callable[[Array, LearnedTwist, TwistExamples], Array]:
    """The loss of soft values: squared violations, in nats^2, of the soft Bellman equation, summed over a text.

    log psi(x_1:t) is a soft value: it is to be log sum_x p(x | x_1:t) psi(x_1:t, x), and log phi at the end (path consistency:
    Nachum et al. 2017, with entropy relative to the model; among the twist losses of Zhao et al. 2024 as soft RL).
    The sum over x is exact, so texts may come from anywhere, on-policy or off, and the gradient runs through both sides.

    Minimiser: psi*, with phi no lower than exp(floor), on all prefixes of the texts that may come.

    >>> from latentrace import models, ppl
    >>> lm = models.MarkovLM([0.0, 0.5, 1.0], [[0.0, 0.5, 1.0]] * 3, eos_id=0)
    >>> loss = soft_value_loss(lm, floor=-5.0)  # loss(rng_key, twist, batch)
    """

    def loss(rng_key: Array, twist: LearnedTwist, batch: TwistExamples) -> Array:
        del rng_key
        table = log_potentials(twist, batch)
        values = jax.nn.logsumexp(jax.nn.log_softmax(_over_tokens(lm.unembed, batch.features)) + table, axis=-1)
        following = jnp.roll(values, -1, axis=-1)  # of what comes after each token
        is_last = jnp.arange(batch.tokens.shape[-1]) == batch.length[..., None] - 1
        expected = jnp.where(is_last, jnp.maximum(batch.log_phi, floor)[..., None], following)
        return jnp.where(batch.inside, (pick(table, batch.tokens) - expected) ** 2, 0.0).sum(-1).mean()

    return loss


@partial(jax.tree_util.register_dataclass, data_fields=("odds",), meta_fields=())
@dataclass(frozen=True)
class AcceptanceTwist:
    """A `LearnedTwist` that is a probability: another one's potentials are its log odds.

    >>> import jax.numpy as jnp
    >>> from latentrace import models, ppl
    >>> lm = models.MarkovLM([0.0, 0.0, 1.0], [[0.0, 0.0, 1.0]] * 3, eos_id=0)
    >>> twist = AcceptanceTwist(ppl.proposals.twist_head(jax.random.key(0), lm))
    >>> jnp.exp(twist.log_potentials(jnp.ones(3))).tolist()
    [0.5, 0.5, 0.5]
    """

    odds: LearnedTwist

    def log_potentials(self, features: Array) -> Array:
        """float32[V], nats: at most 0."""
        return jax.nn.log_sigmoid(self.odds.log_potentials(features))


def log_twist(twist: LearnedTwist, examples: TwistExamples) -> Array:
    """float32[..., T], nats: log psi of each text up to each token, that one included; no meaning after its end."""
    return pick(log_potentials(twist, examples), examples.tokens)


def log_potentials(twist: LearnedTwist, examples: TwistExamples) -> Array:
    """float32[..., T, V], nats: log psi of each possible next token."""
    return _over_tokens(jax.vmap(twist.log_potentials), examples.features)


def _over_tokens(fn: Callable[[Array], Array], features: Array) -> Array:
    """A function of features [M, D] to [M, V], for any leading axes."""
    flat = fn(features.reshape(-1, features.shape[-1]))
    return flat.reshape(*features.shape[:-1], flat.shape[-1])


def _log_total(log_weights: Array, axis: int = -1) -> Any:
    """log of a sum of weights; 0 where all are 0, with no gradient there."""
    some = (log_weights > -jnp.inf).any(axis, keepdims=True)
    return jax.nn.logsumexp(jnp.where(some, log_weights, 0.0), axis=axis) * some.squeeze(axis)
