"""Automata over a model's tokens.

Most tokens do the same in every state of an automaton, so tables are over *classes* of tokens: a few hundred columns, not
50,000. A mask is one row of the table, spread over the vocabulary.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import SiteError
from ..language_model import LanguageModel
from .automata import ByteAutomaton
from .regex import compile_regex

Array = jax.Array
NEVER = 2**30
"""More tokens than any text has."""
TOO_MANY = 2**15 - 1
"""The same, in 16 bits."""
CHUNK = 2048
"""Tokens that are walked through an automaton together."""


class ConstraintError(SiteError):
    """A constraint that no text of this model can meet."""


@dataclass(frozen=True)
class About:
    """What errors say of a constraint. All are equal, so that another pattern is another input of the same compiled program."""

    description: str = field(compare=False)
    shortest: int = field(compare=False)
    """fewest tokens of an accepted text"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """The constraint that a text, when it ends, is accepted by an automaton: a pytree of tables.

    The text may end with EOS where it is accepted, and is cut at `max_tokens` only there: tokens after which acceptance is
    out of reach within the tokens that are left are masked, so there are no dead ends.
    """

    after: Array
    """int16 or int32[Q, C]: the state after a token of each class, -1 where it is not allowed"""
    class_of: Array
    """uint8 or int32[V]: the class of each token; EOS has one of its own"""
    need: Array
    """int16[Q, C]: how many tokens have to be left for one of each class to be allowed, itself included; 0 for EOS where the
    text is accepted"""
    distance: Array
    """int32[Q]: fewest tokens from a state to an accepting one"""
    eos_id: int = field(metadata={"static": True})
    about: About = field(metadata={"static": True})

    def start(self, max_tokens: int) -> tuple[Array, Array]:
        """The first state, and the tokens that are left."""
        if max_tokens >= TOO_MANY:
            raise ConstraintError(f"{self.about.description} counts up to {TOO_MANY - 1} tokens; lower max_tokens={max_tokens}")
        if self.about.shortest > max_tokens:
            raise ConstraintError(
                f"{self.about.description} takes at least {self.about.shortest} tokens, more than max_tokens={max_tokens}; "
                "raise max_tokens"
            )
        return jnp.int32(0), jnp.int32(max_tokens)

    def mask(self, state: tuple[Array, Array]) -> Array:
        """bool[V]: the tokens allowed next."""
        number, left = state
        return self.need[number][self.class_of] <= left

    def next(self, state: tuple[Array, Array], token: Array) -> tuple[Array, Array]:
        """The state after an allowed token."""
        number, left = state
        return self.after[number, self.class_of[token]].astype(jnp.int32), left - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WeightedAutomaton:
    """An automaton whose states have potentials: it allows what the automaton allows, and steers inside the text."""

    automaton: TokenAutomaton
    log_psi: Array
    """float32[Q], nats"""

    def start(self, max_tokens: int) -> tuple[Array, Array]:
        return self.automaton.start(max_tokens)

    def mask(self, state: tuple[Array, Array]) -> Array:
        return self.automaton.mask(state)

    def log_potentials(self, state: tuple[Array, Array]) -> Array:
        """float32[V]: that of the state after each token; 0 for a token that ends the text, which promises nothing more."""
        number, left = state
        after = self.automaton.after[number]
        by_class = jnp.where((left > 1) & (after >= 0), self.log_psi[after], 0.0)  # EOS leads nowhere
        return jnp.where(self.mask(state), jax.lax.optimization_barrier(by_class)[self.automaton.class_of], -jnp.inf)

    def next(self, state: tuple[Array, Array], token: Array) -> tuple[Array, Array]:
        return self.automaton.next(state, token)


def weighted(automaton: TokenAutomaton, log_psi: Any) -> WeightedAutomaton:
    """The constraint `automaton`, with a potential for each of its states, by which `generate` steers inside the text.

    `log_psi` (float[Q], nats) says how promising a text is that stands in state q; an ended text has 0. Good potentials
    guess the log probability that the text will be accepted and liked. They change the proposal and what SMC resamples
    by, never the posterior. States are those of the `ByteAutomaton` that the constraint was made of, or, where there are
    more, of its tables, which are padded.

    Raises `SiteError` for another shape, and for potentials that are NaN or infinite.

    >>> from latentrace import models
    >>> lm = models.load("reasoner")
    >>> numbers = regex(lm, "[0-9]+(?:-[0-9]+)*")
    >>> near_the_end_first = weighted(numbers, -0.5 * numbers.distance)
    >>> state = numbers.next(numbers.start(5), lm.encode("7")[0])
    >>> near_the_end_first.log_potentials(state)[jnp.array(lm.encode("1-"))].tolist()
    [-0.0, -0.5]
    """
    states = automaton.after.shape[0]
    log_psi = jnp.asarray(log_psi, jnp.float32)
    if log_psi.ndim != 1 or log_psi.size > states:
        raise ConstraintError(
            f"weighted: expected one log potential for each of the {states} states of {automaton.about.description} or for its "
            f"first few, found shape {list(log_psi.shape)}"
        )
    if not isinstance(log_psi, jax.core.Tracer) and not jnp.isfinite(log_psi).all():
        wrong = int(jnp.argmin(jnp.isfinite(log_psi)))
        raise ConstraintError(
            f"weighted: the log potential of state {wrong} is {log_psi[wrong]}; potentials are finite, and what must not be is "
            "left to the automaton"
        )
    return WeightedAutomaton(automaton, jnp.pad(log_psi, (0, states - log_psi.size)))


def regex(lm: LanguageModel, pattern: str) -> TokenAutomaton:
    """The constraint that the whole text matches `pattern`, as `re.fullmatch` would.

    Tokens may span several characters, or parts of one. Raises `SiteError` for a pattern that is no regular language, that
    accepts nothing, or that this model's tokens cannot spell.

    >>> from latentrace import models
    >>> lm = models.load("reasoner")
    >>> constraint = regex(lm, "[0-9]+-[0-9]+=[0-9]+")
    >>> bool(constraint.mask(constraint.start(5))[lm.encode("7")[0]])
    True
    """
    return automaton(lm, compile_regex(pattern), f"pattern {pattern!r}")


def words(lm: LanguageModel, choices: Iterable[str]) -> TokenAutomaton:
    """The constraint that the text is one of some strings."""
    listed = sorted(set(choices))
    if not listed:
        raise ConstraintError("words: expected at least one string, found none")
    return automaton(lm, compile_regex("|".join(map(re.escape, listed))), f"a list of {len(listed)} words")


def automaton(lm: LanguageModel, machine: ByteAutomaton, description: str = "the automaton") -> TokenAutomaton:
    """The constraint of a deterministic automaton over bytes, for the tokens of a model."""
    after, class_of = token_table(machine.next, lm.token_bytes(), lm.eos_id)
    distance = distances(after, machine.accepting)
    if distance[0] >= NEVER:
        raise ConstraintError(f"{description} cannot be spelled with this model's {len(class_of)} tokens")
    shortest, (states, classes) = int(distance[0]), after.shape
    # padded to a few sizes: automata of one size share a compiled program
    more = (max(16, 1 << (states - 1).bit_length()) - states, -classes % 32)
    after = np.pad(after, [(0, n) for n in more], constant_values=-1)
    distance = np.pad(distance, (0, more[0]), constant_values=NEVER)
    need = np.where(after >= 0, np.minimum(distance[after] + 1, TOO_MANY), TOO_MANY)
    need[:, class_of[lm.eos_id]] = np.where(distance == 0, 0, TOO_MANY)
    with jax.ensure_compile_time_eval():  # constants, in a program too
        return TokenAutomaton(
            jnp.asarray(after, np.int16 if states < 2**15 else np.int32),
            jnp.asarray(class_of, np.uint8 if after.shape[1] <= 2**8 else np.int32),
            jnp.asarray(need, np.int16),
            jnp.asarray(distance, np.int32),
            lm.eos_id,
            About(description, shortest),
        )


def token_table(table: np.ndarray, spellings: list[bytes], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """States after tokens by class, int32[Q, C], and the class of each token, int32[V].

    `table` int32[Q, 256] holds the states after bytes, -1 where none follows. Tokens without bytes are never allowed; nor is
    EOS, which has the last class for itself.
    """
    count = len(table)
    padded = np.vstack([table, np.full((1, 256), -1)]).astype(np.int16 if count < 2**15 else np.int32)  # row -1 stays -1
    columns: dict[bytes, int] = {np.full(count, -1, padded.dtype).tobytes(): 0}
    class_of = np.zeros(len(spellings), np.int32)
    order = sorted((i for i, spelling in enumerate(spellings) if spelling), key=lambda i: spellings[i])
    for first in range(0, len(order), CHUNK):
        chunk = order[first : first + CHUNK]
        lengths = np.array([len(spellings[i]) for i in chunk])
        letters = np.zeros((len(chunk), lengths.max()), np.uint8)
        for row, i in zip(letters, chunk):
            row[: len(spellings[i])] = list(spellings[i])
        state = np.broadcast_to(np.arange(count, dtype=padded.dtype), (len(chunk), count)).copy()  # [tokens, Q]
        for place in range(letters.shape[1]):
            going = np.flatnonzero(lengths > place)
            state[going] = padded[state[going], letters[going, place, None]]
        for i, column in zip(chunk, state):
            class_of[i] = columns.setdefault(column.tobytes(), len(columns))
    class_of[eos_id] = len(columns)
    after = np.stack([np.frombuffer(column, padded.dtype) for column in [*columns, next(iter(columns))]], axis=1)
    return after.astype(np.int32), class_of


def distances(after: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """int32[Q]: fewest tokens from each state to an accepting one, `NEVER` where there is no way."""
    distance = np.where(accepting, 0, NEVER).astype(np.int32)
    while True:
        through = np.where(after >= 0, distance[after], NEVER).min(axis=1, initial=NEVER)
        shorter = np.minimum(distance, np.minimum(through + 1, NEVER))
        if np.array_equal(shorter, distance):
            return distance
        distance = shorter
