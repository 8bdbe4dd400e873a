"""Proposals and constraints of `ppl.generate`: what a token is drawn from in place of the model.

A proposal is a function of the model's next-token logits float32[V] that returns the logits to draw from, or a `Draft`: another
context, whose model drafts the text. Whatever it does, the token pays log p - log q, so the posterior stays that of the model
on the proposal's support.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .errors import SiteError
from .language_model import LanguageModel, feature_size

Array = jax.Array
Proposal = Callable[[Array], Array]


def temperature(value: Any) -> Proposal:
    """Draw from p^(1/value), normalised per token."""
    return lambda logits: logits / value


def top_k(k: int) -> Proposal:
    """Draw among the k most probable tokens (ties at the k-th are kept)."""
    if k < 1:
        raise SiteError(f"top_k: k must be at least 1, not {k}")

    def proposal(logits: Array) -> Array:
        least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][-1]
        return jnp.where(logits >= least, logits, -jnp.inf)

    return proposal


def top_p(mass: float) -> Proposal:
    """Draw among the fewest most probable tokens whose probabilities sum to at least `mass` (nucleus sampling)."""
    if not 0 < mass <= 1:
        raise SiteError(f"top_p: mass must be in (0, 1], not {mass}")

    def proposal(logits: Array) -> Array:
        ordered = jnp.sort(jax.nn.softmax(logits))[::-1]
        before = jnp.cumsum(ordered) - ordered  # mass of the tokens ranked before each
        least = jnp.min(jnp.where(before < mass, ordered, jnp.inf))
        return jnp.where(jax.nn.softmax(logits) >= least, logits, -jnp.inf)

    return proposal


class Draft(NamedTuple):
    """Another context to draw tokens from; made by `draft`."""

    context: Any
    then: Proposal | None


def draft(context: Any, then: Proposal | None = None) -> Draft:
    """Draw each token from what another context says: of a smaller model, or of the same one with a hint in its prompt.

    The tokens are fed to that context as they are drawn, in the same compiled loop, and each pays log p - log q: what the draft
    likes and the model does not is weighed down, so the posterior is the model's (the proposals of LLaMPPL: Lew et al. 2023,
    and DisCIPL: Grand et al. 2025). Constraints and potentials apply on top. The posterior is `restricted` where the draft
    rules out a token that the model allows.

    `context` itself stays as it is, like every context: to go on with it, `ppl.extend` it by the text. One that has ended goes
    on too, with its EOS as a token. Where values are given it is not read, and costs nothing. Its passes count as model calls.

    Args:
        context: of a model with the same vocabulary.
        then: a function of its logits float32[V], such as `temperature(0.8)`, that gives the logits to draw from.

    >>> import jax
    >>> from latentrace import inference, models, ppl
    >>> lm, small = (models.MarkovLM([0.0, a, 1.0], [[0.0, a, 1.0]] * 3, eos_id=0) for a in (0.5, 1.0))
    >>> @ppl.program
    ... def drafted():
    ...     return ppl.generate("x", ppl.prompt(lm), max_tokens=3, proposal=draft(ppl.prompt(small), temperature(1.2)))[0]
    >>> inference.SMC(8).run(jax.random.key(0), drafted).values["x"].tokens.shape
    (8, 3)
    """
    return Draft(context, then)


class Constraint(Protocol):
    """A set of texts, as an automaton that reads tokens; a pytree, so that its arrays are inputs of the program.

    `generate(constraint=...)` conditions the text on every token being allowed where it stands, and proposes allowed
    tokens only. One with `log_potentials` steers inside the text too: see `Potentials`.
    """

    def start(self, max_tokens: int) -> Any:
        """The state before the first of at most `max_tokens` tokens: a pytree of arrays.

        `SiteError` where no text is short enough.
        """
        ...

    def mask(self, state: Any) -> Array:
        """bool[V]: the tokens allowed next."""
        ...

    def next(self, state: Any, token: Array) -> Any:
        """The state after an allowed token."""
        ...


class Potentials(Constraint, Protocol):
    """A constraint that also says how promising each next token is.

    `generate` draws from the model's logits (or the proposal's) plus these potentials, the locally optimal proposal, and after
    each token the site's twist is the token's potential: SMC sees the intermediate target p * psi. The text's end takes the
    twist back, so that the posterior is p restricted to the mask, whatever the potentials are.
    """

    def log_potentials(self, state: Any) -> Array:
        """float32[V], nats: log psi of the text after each possible next token; -inf where it is not allowed.

        The best ones are the log probabilities that a text which goes on like this ends as it should, with 0 for a token
        that ends it. An allowed token of potential -inf is never drawn: the posterior is `restricted`.
        """
        ...


class TokenCheck(Protocol):
    """A constraint that is asked about one token at a time, in place of `mask`, because it is costly.

    `generate` draws from the proposal until a token is allowed, and weighs it by an unbiased estimate of how much is allowed
    (adaptive weighted rejection sampling: Lipkin et al. 2025; `drawing.draw_by_rejection` has the derivation). It takes a few
    checks where most of what the model proposes is allowed, and at most one for each token that the proposal may draw: a
    `top_k` proposal bounds them. The ledger counts them as potential calls.

    One with `log_potentials` steers as `Potentials` do. Given and enumerated texts are checked token by token, and are exact.
    A trace of tokens does not say which ones were rejected, so `ParticleGibbs` and `evidence_bounds`, which have to repeat
    one, refuse such a site.
    """

    def start(self, max_tokens: int) -> Any:
        """The state before the first token, as in `Constraint`."""
        ...

    def allows(self, state: Any, token: Array) -> Array:
        """bool[]: whether a token (int32[]) may come next; -1 where nobody asks, and any answer will do."""
        ...

    def next(self, state: Any, token: Array) -> Any:
        """The state after an allowed token."""
        ...


class LearnedTwist(Protocol):
    """A twist that the model's features tell, as a constraint's potentials are told by its state: a pytree, so that its
    parameters are inputs of the program, and a training loop may change them.

    `generate(twist=...)` draws from p * psi, the twist-induced proposal, and SMC sees p * psi (Zhao, Brekelmans, Makhzani and
    Grosse 2024, section 3), all as for `Potentials`, to which it adds where there are both. It costs no pass of the model: the
    features are those that predict the next token.
    """

    def log_potentials(self, features: Array) -> Array:
        """float32[V], nats: log psi of the text after each possible next token, from features float32[D]; finite, or the
        posterior is `restricted`.

        The best ones are the log of what the target still multiplies p with, on average over how the text goes on. Those of a
        token that ends the text are for the proposal alone: the twist is taken back there.
        """
        ...


@partial(jax.tree_util.register_dataclass, data_fields=("kernels", "biases"), meta_fields=())
@dataclass(frozen=True)
class TwistHead:
    """A `LearnedTwist` of dense layers with GELU between them, from the model's features to one number per token."""

    kernels: tuple[Array, ...]
    """float32[D, H], ..., [H, V]"""
    biases: tuple[Array, ...]

    def log_potentials(self, features: Array) -> Array:
        """float32[V], nats."""
        x = jnp.where(jnp.isfinite(features), features, 0.0)  # those of a table of logits may be -inf
        for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases)):
            x = (jax.nn.gelu(x) if i else x) @ kernel + bias
        return x


def twist_head(rng_key: Array, lm: LanguageModel, hidden: tuple[int, ...] = ()) -> TwistHead:
    """A `TwistHead` for a model, with layers of `hidden` sizes between its features and its vocabulary; linear with none.

    The last layer is 0: it starts with psi = 1, which steers nothing.

    >>> from latentrace import models
    >>> lm = models.MarkovLM([0.0, 0.0, 1.0], [[0.0, 0.0, 1.0]] * 3, eos_id=0)
    >>> twist_head(jax.random.key(0), lm, hidden=(8,)).log_potentials(jnp.ones(3)).tolist()
    [0.0, 0.0, 0.0]
    """
    if any(n < 1 for n in hidden):
        raise SiteError(f"twist_head: the sizes of hidden layers must be at least 1, found {hidden}")
    sizes = (feature_size(lm), *hidden, lm.vocab_size)
    keys = jax.random.split(rng_key, len(sizes))
    kernels = [jax.random.normal(k, (n, m)) / np.sqrt(n) for k, n, m in zip(keys, sizes, sizes[1:])]
    return TwistHead((*kernels[:-1], jnp.zeros_like(kernels[-1])), tuple(jnp.zeros(m) for m in sizes[1:]))


def has_potentials(constraint: Any) -> bool:
    """Whether a constraint or a twist, or the structure of one (a pytree definition), has log potentials."""
    return hasattr(_instance(constraint), "log_potentials")


def checks_tokens(constraint: Any) -> bool:
    """Whether a constraint, or the structure of one, is asked about one token at a time."""
    constraint = _instance(constraint)
    return hasattr(constraint, "allows") and not hasattr(constraint, "mask")


def _instance(constraint: Any) -> Any:
    if isinstance(constraint, jax.tree_util.PyTreeDef):
        return constraint.unflatten([None] * constraint.num_leaves)
    return constraint


class AllowedTokens(NamedTuple):
    """The constraint that every token is one of a set."""

    allowed: Array
    """bool[V]"""

    def start(self, max_tokens: int) -> Any:
        return ()

    def mask(self, state: Any) -> Array:
        return self.allowed

    def next(self, state: Any, token: Array) -> Any:
        return ()
