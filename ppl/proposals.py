"""Proposals and constraints of `ppl.generate`: what a token is drawn from in place of the model.

A proposal is a function of the model's next-token logits float32[V] that returns the logits to draw from. Whatever it
does, the token pays log p - log q, so the posterior stays that of the model on the proposal's support.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from .errors import SiteError

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

    `generate` draws from the model's logits plus these potentials, the locally optimal proposal, and after each token the
    site's twist is the token's potential: SMC sees the intermediate target p * psi. The text's end takes the twist back, so
    that the posterior is p restricted to the mask, whatever the potentials are.
    """

    def log_potentials(self, state: Any) -> Array:
        """float32[V], nats: log psi of the text after each possible next token; -inf where it is not allowed.

        The best ones are the log probabilities that a text which goes on like this ends as it should, with 0 for a token
        that ends it. An allowed token of potential -inf is never drawn: the posterior is `restricted`.
        """
        ...


def has_potentials(constraint: Any) -> bool:
    """Whether a constraint, or the structure of one (a pytree definition), has log potentials."""
    if isinstance(constraint, jax.tree_util.PyTreeDef):
        constraint = constraint.unflatten([None] * constraint.num_leaves)
    return hasattr(constraint, "log_potentials")


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
