"""Constraints that a function on the host decides, asked about one token of each particle at a time.

For what is too costly to ask about the whole vocabulary: compile, run, prove or look up the text that a token makes. One
callback serves all particles, and what was asked before is remembered.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import SiteError
from .host import CallbackError, Callee, ask_each, registered

Array = jax.Array
Allows = Callable[[tuple[int, ...], int], bool]


class CheckCost(NamedTuple):
    """What a constraint has taken since it was made."""

    calls: int
    """callbacks, each for all particles"""
    seconds: float
    checks: int
    """calls of the function: answers that were not remembered"""


class Checker(Callee):
    """A function of token ids, and its latest answers."""

    asked = "function"

    def __init__(self, allows: Allows, description: str, seconds: float, most_known: int):
        super().__init__(description, seconds)
        self.allows, self.most_known, self.computed = allows, most_known, 0
        self.known: OrderedDict[tuple[tuple[int, ...], int], bool] = OrderedDict()

    def answers(self, tokens: np.ndarray, lengths: np.ndarray, nexts: np.ndarray) -> np.ndarray:
        """bool[N] of int[N, T], int[N] and int[N]: whether each token may follow the first ones, within the time limit."""
        if (nexts < 0).all():
            return np.zeros(len(nexts), bool)
        most = tokens.shape[1]
        texts = [(*t[:n], token) for t, n, token in zip(tokens.tolist(), lengths.tolist(), nexts.tolist())]
        work = lambda: np.array([ids[-1] >= 0 and self.answer(ids, most - len(ids)) for ids in texts])
        return self.within_limit(work)

    def answer(self, ids: tuple[int, ...], left: int) -> bool:
        if (ids, left) not in self.known:
            found = self.allows(ids, left)
            if not isinstance(found, (bool, np.bool_)):
                raise CallbackError(f"{self.description}: its function must answer a bool, found {type(found).__name__}")
            self.known[ids, left] = bool(found)
            self.computed += 1
            if len(self.known) > self.most_known:
                self.known.popitem(last=False)
        self.known.move_to_end((ids, left))
        return self.known[ids, left]


def _callback(numbers: Any, tokens: Any, lengths: Any, nexts: Any) -> np.ndarray:
    """bool[*batch]: the answers of all particles."""
    numbers, tokens, lengths, nexts = map(np.asarray, (numbers, tokens, lengths, nexts))
    batch = nexts.shape
    tokens, lengths, nexts = tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1), nexts.reshape(-1)
    ask = lambda checker, rows: checker.answers(tokens[rows], lengths[rows], nexts[rows])
    return ask_each(numbers.reshape(-1), ask).reshape(batch)


@dataclass(frozen=True)
class About:
    """The host's part of a constraint. All are equal, so that compiled programs do not depend on it."""

    checker: Checker = field(compare=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Check:
    """A `ppl.TokenCheck` that a function on the host decides."""

    number: Array
    """int32[]: which function"""
    about: About = field(metadata={"static": True})

    @property
    def cost(self) -> CheckCost:
        """What callbacks have cost so far; a snapshot."""
        checker = self.about.checker
        return CheckCost(checker.calls, checker.spent, checker.computed)

    def start(self, max_tokens: int) -> tuple[Array, Array]:
        """The tokens so far, int32[max_tokens], and how many there are."""
        return jnp.zeros(max_tokens, jnp.int32), jnp.int32(0)

    def allows(self, state: tuple[Array, Array], token: Array) -> Array:
        """bool[]: whether a token may come next, by a callback; -1 is not asked about."""
        shape = jax.ShapeDtypeStruct((), jnp.bool_)
        return jax.pure_callback(_callback, shape, self.number, *state, token, vmap_method="broadcast_all")  # type: ignore[no-any-return]

    def next(self, state: tuple[Array, Array], token: Array) -> tuple[Array, Array]:
        """The state after a token."""
        tokens, length = state
        return tokens.at[length].set(token.astype(jnp.int32), mode="drop"), length + 1


def check(allows: Allows, description: str, *, time_limit: float = 60.0, most_known: int = 65536) -> Check:
    """The constraint that a function on the host allows every token where it stands, asked as seldom as can be.

    Tokens are drawn by adaptive weighted rejection sampling: see `ppl.TokenCheck`, also for which algorithms refuse it.

    Args:
        allows: from the token ids of a text, the one in question last, and how many may still follow it, to whether the text
            may go on like this. Where the last one is the model's EOS the text would end; where none may follow, it would be
            cut. Pure, and never calls JAX, which waits for its answer.
        description: what errors call it.
        time_limit: seconds after which one callback, for all particles, is given up.
        most_known: answers that are remembered.

    A function that raises, takes too long or answers with something else than a bool ends the run with a `CallbackError`,
    inside the `JaxRuntimeError` that JAX makes of it.

    >>> from latentrace import inference, models, ppl
    >>> lm = models.MarkovLM([0.0, 0.0, 0.0], [[0.0] * 3] * 3, 0, ("", "a", "b"))
    >>> no_repeat = check(lambda ids, left: ids[-1] not in ids[:-1], "no letter twice")
    >>> program = ppl.program(lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=3, constraint=no_repeat)[0])
    >>> sorted(set(inference.SMC(64).run(jax.random.key(0), program).values["x"].decode()))
    ['', 'a', 'ab', 'b', 'ba']
    >>> no_repeat.cost.checks <= 15
    True
    """
    if not callable(allows):
        raise SiteError(f"check: `allows` must be a function of token ids and a number, found {type(allows).__name__}")
    made = Checker(allows, description, time_limit, most_known)
    return Check(registered(made), About(made))
