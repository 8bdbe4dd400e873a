"""Which random choices a payment may depend on: a gradient estimate leaves the others out of what a choice has cost.

A program's density at a trace that another program drew is paid site by site. What is paid before the site of a value, in the
program's own order, does not depend on it; but it depends on whatever its drawer drew after it only if some of that is known by
then. So payments are booked under the latest of the drawer's choices that has been met.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Known(NamedTuple):
    """A given value that another program drew, and as which of its choices."""

    value: Array
    number: Array
    """int32[], or int32[max_tokens] for a text"""


class Redrawn(NamedTuple):
    """A given text that the walk itself draws from its program, known beforehand: it is read at once, and pays nothing."""

    tokens: Array


class Credit(NamedTuple):
    """What has been paid, by the latest choice that was known then."""

    slots: Array
    """float32[M + 1], nats: slot n + 1 for choice n of M, slot 0 before any"""
    known: Array
    """int32[]: the latest choice so far, -1 for none"""

    @staticmethod
    def nothing(choices: int) -> "Credit":
        return Credit(jnp.zeros(choices + 1, jnp.float32), jnp.int32(-1))

    def meet(self, number: Array, active: Array) -> "Credit":
        """The same, one more choice being known where it is active."""
        return self._replace(known=jnp.where(active, jnp.maximum(self.known, number), self.known))

    def book(self, paid: Array) -> "Credit":
        """The same, with float32[] nats more."""
        return self._replace(slots=self.slots.at[self.known + 1].add(jax.lax.stop_gradient(paid)))

    def book_text(self, log_probs: Array, numbers: Array, inside: Array) -> "Credit":
        """The same, with what each token pays that is `inside` a text; all are float32 or int32 [max_tokens]."""
        latest = jnp.maximum(self.known, jax.lax.cummax(jnp.where(inside, numbers, -1)))
        paid = jnp.where(inside, jax.lax.stop_gradient(log_probs), 0.0)
        return Credit(self.slots.at[latest + 1].add(paid), jnp.maximum(self.known, latest[-1]))

    def inside_plate(self) -> "Credit":
        """What an element of a plate begins with."""
        return self._replace(slots=jnp.zeros_like(self.slots))

    def after_plate(self, elements: "Credit") -> "Credit":
        """The same after a plate, from what its elements (leading axis) ended with."""
        return Credit(self.slots + elements.slots.sum(axis=0), jnp.maximum(self.known, elements.known.max()))
