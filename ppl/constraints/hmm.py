"""What a hidden Markov model foresees of an automaton: how probable it is that a text which goes on like this is accepted.

A language model does not know whether the text that it is writing will meet a constraint, but a hidden Markov model that
imitates it does, exactly: a sum over all completions, by dynamic programming over (hidden state, state of the automaton,
tokens left). As potentials of a constraint these probabilities steer a text from its first token on, and the posterior stays
that of the language model. Zhang et al. 2023, "Tractable Control for Autoregressive Language Generation" (GeLaTo), condition on
key words like this; Zhang et al. 2024, "Adaptable Logical Control for Large Language Models" (Ctrl-G), on automata.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .tokens import ConstraintError, TokenAutomaton

Array = jax.Array
BLOCK = 128
"""Tokens of one class that are looked at together."""
FLOOR = 60.0
"""Nats by which the least potential of an allowed token is below that of the worst state: even 10^20 such tokens are not drawn,
and float32 holds their weight."""
HIGHEST = jax.lax.Precision.HIGHEST


class HMM(Protocol):
    """A hidden state emits each token, then moves. Logits need not be normalised; -inf is an impossible event."""

    @property
    def initial(self) -> Array:
        """float32[S]: of the state that emits the first token."""
        ...

    @property
    def transition(self) -> Array:
        """float32[S, S]: row s is where state s moves."""
        ...

    @property
    def emission(self) -> Array:
        """float32[S, V]: row s is what state s emits."""
        ...


class Chances(NamedTuple):
    """The log probabilities of a hidden Markov model, in nats."""

    initial: Array
    transition: Array
    emission: Array


def chances(hmm: HMM, automaton: TokenAutomaton) -> Chances:
    """The model's arrays, normalised and checked."""
    found = [jnp.asarray(x, jnp.float32) for x in (hmm.initial, hmm.transition, hmm.emission)]
    states, tokens = found[0].size, automaton.class_of.size
    shapes, expected = [x.shape for x in found], [(states,), (states, states), (states, tokens)]
    if shapes != expected:
        raise ConstraintError(
            f"lookahead: initial, transition and emission must have shapes [S], [S, S] and [S, {tokens}], found "
            + ", ".join(str(list(shape)) for shape in shapes)
        )
    totals = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in found]
    return Chances(*[x - jnp.where(jnp.isfinite(total), total, 0.0) for x, total in zip(found, totals)])


# --- sums over all completions ----------------------------------------------------------------------------------------


class Semiring(NamedTuple):
    """How the log weights of alternatives are put together."""

    add: Callable[..., Array]
    """over an axis"""
    by_class: Callable[[Array, Array, int], Array]
    """over the tokens of each class: float32[S, C] of float32[S, V], int[V] and C"""
    move: Callable[[Array, Array], Array]
    """over the states that a state moves to: float32[Q, S] of transitions [S, S] and values [Q, S]"""


def _sum_by_class(x: Array, class_of: Array, classes: int) -> Array:
    top = x.max(axis=1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return (jnp.log(jax.ops.segment_sum(jnp.exp(x - top).T, class_of, classes)) + top.T).T


def _sum_over_moves(transition: Array, values: Array) -> Array:
    top = values.max(axis=1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(jnp.matmul(jnp.exp(values - top), jnp.exp(transition).T, precision=HIGHEST)) + top


def _best_by_class(x: Array, class_of: Array, classes: int) -> Array:
    return jax.ops.segment_max(x.T, class_of, classes).T


def _best_move(transition: Array, values: Array) -> Array:
    return jax.lax.map(lambda row: (transition + row).max(axis=1), values)


SUM = Semiring(jax.nn.logsumexp, _sum_by_class, _sum_over_moves)
"""All completions: log probabilities."""
BEST = Semiring(jnp.max, _best_by_class, _best_move)
"""The best completion and the hidden states behind it (Viterbi)."""


@partial(jax.jit, static_argnames=("length", "semiring"))
def completions(p: Chances, automaton: TokenAutomaton, length: int, semiring: Semiring) -> tuple[Array, Array]:
    """Log weight of all accepted completions, in nats.

    Returns `before` float32[length + 1, Q, S], with so many tokens left and from the automaton's state q, given the hidden
    state that emits the next token, and `behind` float32[length, Q, S], given the one that has emitted the last token. The
    work is S * Q * (S + C) for each token, with C the classes of tokens.
    """
    after, accepting = automaton.after.astype(jnp.int32), automaton.distance == 0
    end = p.emission[:, automaton.eos_id]
    emission = semiring.by_class(p.emission, automaton.class_of.astype(jnp.int32), after.shape[1])

    def one_more(values: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        behind = semiring.move(p.transition, values)

        def from_state(state: tuple[Array, Array]) -> Array:
            to, accepts = state
            on = semiring.add(jnp.where(to[:, None] >= 0, emission.T + behind[to], -jnp.inf), axis=0)
            return semiring.add(jnp.stack([on, jnp.where(accepts, end, -jnp.inf)]), axis=0)

        before = jax.lax.map(from_state, (after, accepting))
        return before, (before, behind)

    at_the_cut = jnp.broadcast_to(jnp.where(accepting, 0.0, -jnp.inf)[:, None], (accepting.size, end.size))
    _, (before, behind) = jax.lax.scan(one_more, at_the_cut, None, length=length)
    return jnp.concatenate([at_the_cut[None], before]), behind


def token_ids(prefix: Sequence[int] | Array, vocab_size: int) -> Array:
    """int32[T] of the tokens before a text."""
    if not isinstance(prefix, jax.core.Tracer) and (outside := [int(i) for i in prefix if not 0 <= i < vocab_size]):
        raise ConstraintError(f"lookahead: token id {outside[0]} of the prefix is outside the vocabulary of {vocab_size}")
    return jnp.asarray(prefix if len(prefix) else np.zeros(0), jnp.int32)


def bayes(belief: Array, likelihood: Array, transition: Array) -> Array:
    """The belief after a token that hidden state s emits with probability proportional to likelihood[s]: float32[S].

    A token that no hidden state emits says nothing.
    """
    joint = belief * likelihood
    total = joint.sum()
    emitter = jnp.where(total > 0, joint / jnp.where(total > 0, total, 1.0), belief)
    return jnp.matmul(emitter, transition, precision=HIGHEST)


# --- as a constraint --------------------------------------------------------------------------------------------------

State = tuple[tuple[Array, Array], Array]
"""The automaton's state, and the belief float32[S]: probabilities of the hidden state that emits the next token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Lookahead:
    """An automaton whose potentials are what a hidden Markov model foresees: log p(text is accepted | text so far, token).

    A pytree of tables, for texts of up to `length` tokens.
    """

    automaton: TokenAutomaton
    belief: Array
    """float32[S]: probabilities of the hidden state that emits the first token"""
    transition: Array
    """float32[S, S]: probabilities"""
    emission: Array
    """float32[J, S, BLOCK]: probabilities of tokens, those of one class together, each token's largest scaled to 1"""
    class_of_block: Array
    """int32[J]"""
    place: Array
    """int32[V]: each token's place in the blocks"""
    table: Array
    """float32[length, Q, S]: probability of acceptance within so many tokens, from state q, given the hidden state that has
    emitted the last token; the largest over hidden states scaled to 1"""
    scale: Array
    """float32[length, Q]: log of what the table was divided by"""
    least: Array
    """float32[length]: what an allowed token has at least, so that what the hidden Markov model rules out or float32 cannot
    hold stays possible"""
    total: Array
    """float32[length + 1, S]: log probability of acceptance of a whole text of at most so many tokens, by first hidden state"""

    def start(self, max_tokens: int) -> State:
        length = self.table.shape[0]
        if max_tokens > length:
            raise ConstraintError(
                f"the lookahead of {self.automaton.about.description} was made for at most {length} tokens, fewer than "
                f"max_tokens={max_tokens}; make it with max_tokens={max_tokens}"
            )
        return self.automaton.start(max_tokens), self.belief

    def mask(self, state: State) -> Array:
        return self.automaton.mask(state[0])

    def log_potentials(self, state: State) -> Array:
        """float32[V], nats: log p(text is accepted | text so far, token); -inf where the automaton does not allow it.

        A token that no hidden state emits is taken to say nothing about the hidden state.
        """
        (number, left), belief = state
        after = self.automaton.after[number].astype(jnp.int32)
        accepted = belief * self.table[left - 1, after]  # [C, S]
        # sums over hidden states of p(state, token) and of p(state, token, acceptance), as one product for each block
        rows = jnp.stack([jnp.broadcast_to(belief, accepted.shape), accepted], axis=1)[self.class_of_block]
        token, both = jnp.einsum("jks,jsb->kjb", rows, self.emission, precision=HIGHEST)
        of_block = lambda by_class: by_class[self.class_of_block][:, None]
        ratio = jnp.where(token > 0, both / jnp.where(token > 0, token, 1.0), of_block(accepted.sum(-1)))
        log_psi = jnp.maximum(jnp.log(ratio) + of_block(self.scale[left - 1, after]), self.least[left - 1])
        ends = self.automaton.class_of[self.automaton.eos_id] == self.class_of_block
        log_psi = jnp.where(ends[:, None], 0.0, log_psi)
        allowed = of_block(self.automaton.need[number]) <= left
        return jnp.where(allowed, log_psi, -jnp.inf).ravel()[self.place]

    def next(self, state: State, token: Array) -> State:
        return self.automaton.next(state[0], token), self.read(state[1], token)

    def read(self, belief: Array, token: Array) -> Array:
        """The belief after a token."""
        likelihood = self.emission[self.place[token] // BLOCK, :, self.place[token] % BLOCK]
        return bayes(belief, likelihood, self.transition)

    def after(self, prefix: Sequence[int] | Array) -> "Lookahead":
        """The same for a text that follows `prefix` (token ids, int[T]), by which the hidden state is known better.

        Costs no new tables. Raises `SiteError` for ids outside the vocabulary.
        """
        ids = token_ids(prefix, self.place.size)
        belief, _ = jax.lax.scan(lambda belief, token: (self.read(belief, token), None), self.belief, ids)
        return replace(self, belief=belief)

    def log_evidence(self, max_tokens: int | None = None) -> Array:
        """log p(text is accepted) under the hidden Markov model, float32[], nats; texts of at most `max_tokens` tokens."""
        length = self.table.shape[0] if max_tokens is None else max_tokens
        return jax.nn.logsumexp(jnp.log(self.belief) + self.total[length])


def lookahead(automaton: TokenAutomaton, hmm: HMM, *, max_tokens: int, prefix: Sequence[int] | Array = ()) -> Lookahead:
    """The constraint `automaton`, steered by what a hidden Markov model over the same tokens foresees (Ctrl-G).

    Where the language model is that hidden Markov model, each particle is an exact draw from the posterior, and its weight the
    evidence. Where it is not, the posterior stays the language model's, and the better the imitation the less the weights vary.

    Args:
        automaton: such as `constraints.regex` returns.
        hmm: anything with logits `initial` [S], `transition` [S, S] and `emission` [S, V], such as `models.HMMLM`.
        max_tokens: the tables, float32[max_tokens, Q, S], serve texts of up to so many tokens.
        prefix: token ids before the text, which tell the hidden state; see `Lookahead.after` for changing it at no cost.

    Raises `SiteError` for arrays of other shapes.

    >>> from latentrace import models
    >>> from latentrace.ppl.constraints import regex
    >>> lm = models.HMMLM([0.0, 0.0], [[2.0, 0.0], [0.0, 2.0]], [[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]], 0, ("", "a", "b"))
    >>> constraint = lookahead(regex(lm, "a*b"), lm, max_tokens=4)
    >>> [round(float(x), 2) for x in constraint.log_potentials(constraint.start(4))]
    [-inf, -2.12, -1.7]
    >>> round(float(constraint.log_evidence()), 2)
    -2.09
    """
    with jax.ensure_compile_time_eval():  # once, in a program too
        p = chances(hmm, automaton)
        before, behind = completions(p, automaton, max_tokens, SUM)
        scale = behind.max(axis=-1)
        finite = jnp.where(jnp.isfinite(scale), scale, 0.0)
        made = Lookahead(
            automaton,
            jnp.exp(p.initial),
            jnp.exp(p.transition),
            *_blocks(np.asarray(p.emission), automaton),
            table=jnp.exp(behind - finite[..., None]),
            scale=scale,
            least=finite.min(axis=1) - FLOOR,
            total=before[:, 0],
        )
    return made.after(prefix)


def _blocks(emission: np.ndarray, automaton: TokenAutomaton) -> tuple[Array, Array, Array]:
    """Emissions with the tokens of a class side by side, the class of each block, and the place of each token.

    There are as many blocks as any automaton with so many classes may need, so that all share a compiled program.
    """
    class_of, classes = np.asarray(automaton.class_of), automaton.after.shape[1]
    states, tokens = emission.shape
    size = np.bincount(class_of, minlength=classes)
    blocks = -(-size // BLOCK)
    first = np.concatenate([[0], np.cumsum(blocks)[:-1]]) * BLOCK
    order = np.argsort(class_of, kind="stable")
    rank = np.arange(tokens) - (np.cumsum(size) - size)[class_of[order]]
    place = np.zeros(tokens, np.int32)
    place[order] = first[class_of[order]] + rank
    count = -(-tokens // BLOCK) + classes
    top = emission.max(axis=0)
    spread = np.zeros((states, count * BLOCK), np.float32)
    spread[:, place] = np.exp(emission - np.where(np.isfinite(top), top, 0.0))
    class_of_block = np.zeros(count, np.int32)
    class_of_block[: blocks.sum()] = np.repeat(np.arange(classes), blocks)
    emission = spread.reshape(states, count, BLOCK).transpose(1, 0, 2)
    return jnp.asarray(emission), jnp.asarray(class_of_block), jnp.asarray(place)


# --- what is known exactly --------------------------------------------------------------------------------------------


class Best(NamedTuple):
    """An accepted text and the hidden states behind it."""

    tokens: tuple[int, ...]
    """EOS included where it ended the text"""
    states: tuple[int, ...]
    """the hidden state that emitted each token"""
    log_prob: float
    """nats, of both together; given the prefix, if there is one"""


def most_probable(automaton: TokenAutomaton, hmm: HMM, *, max_tokens: int, prefix: Sequence[int] | Array = ()) -> Best:
    """The most probable pair of an accepted text and the hidden states behind it (Viterbi over both).

    The most probable text by itself, summed over hidden states, is in general hard to find (Lyngsø and Pedersen 2002).

    >>> from latentrace import models
    >>> from latentrace.ppl.constraints import regex
    >>> lm = models.HMMLM([0.0, 0.0], [[2.0, 0.0], [0.0, 2.0]], [[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]], 0, ("", "a", "b"))
    >>> most_probable(regex(lm, "a*b"), lm, max_tokens=4).tokens
    (2, 0)
    """
    with jax.ensure_compile_time_eval():
        p = chances(hmm, automaton)
        before, behind = (np.asarray(x) for x in completions(p, automaton, max_tokens, BEST))
        belief = jnp.exp(p.initial)
        for token in token_ids(prefix, p.emission.shape[1]):
            belief = bayes(belief, jnp.exp(p.emission[:, token]), jnp.exp(p.transition))
        weights = np.asarray(jnp.log(belief)) + before[max_tokens, 0]
    if weights.max() == -np.inf:
        raise ConstraintError(f"{automaton.about.description} has probability 0 under the hidden Markov model")
    transition, emission, after = (np.asarray(x) for x in (p.transition, p.emission, automaton.after))
    accepting = np.asarray(automaton.distance) == 0
    state, number = int(weights.argmax()), 0
    tokens, states = [], []
    for left in range(max_tokens, 0, -1):
        to = after[number][np.asarray(automaton.class_of)]  # by token
        on = np.where(to >= 0, emission[state] + behind[left - 1][to, state], -np.inf)
        states.append(state)
        if accepting[number] and emission[state, automaton.eos_id] >= on.max():
            tokens.append(automaton.eos_id)
            break
        tokens.append(int(on.argmax()))
        number = int(to[tokens[-1]])
        state = int((transition[state] + before[left - 1, number]).argmax())
    return Best(tuple(tokens), tuple(states), float(weights.max()))


def count_texts(automaton: TokenAutomaton, max_tokens: int) -> int:
    """How many texts of at most `max_tokens` tokens, EOS included, the constraint allows; texts are sequences of tokens.

    >>> from latentrace import models
    >>> from latentrace.ppl.constraints import regex
    >>> lm = models.MarkovLM([0.0, 0.0, 0.0], [[0.0] * 3] * 3, 0, ("", "a", "b"))
    >>> count_texts(regex(lm, "[ab]*a"), 2)
    3
    """
    after, accepting = np.asarray(automaton.after), np.asarray(automaton.distance) == 0
    size = np.bincount(automaton.class_of, minlength=after.shape[1])
    edges = []
    for row in after:
        ways = np.bincount(row[row >= 0], size[row >= 0]).astype(int)
        edges.append([(int(to), int(ways[to])) for to in np.flatnonzero(ways)])
    count = [int(a) for a in accepting]  # of completions from each state; Python's integers do not overflow
    for _ in range(max_tokens):
        count = [int(a) + sum(ways * count[to] for to, ways in outgoing) for a, outgoing in zip(accepting, edges)]
    return count[0]
