"""Constraints that a parser on the host decides: one callback for all particles before each token.

For what is no finite automaton. As far as JAX is concerned nothing has a state: particles carry their tokens, and the host
finds the parser that has read them, or makes it from that of a token less. A callback costs tens of microseconds beside what
the parser takes, where a table row costs a few.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import RunError
from ..language_model import LanguageModel

Array = jax.Array
Prefix = tuple[int, ...]
T = TypeVar("T")


class CallbackError(RunError):
    """What a constraint asks on the host raised, took too long, or answered with something else than it should."""


class Callee:
    """What answers a constraint's callbacks on the host, within a time limit."""

    asked: str
    """what errors call the user's part"""

    def __init__(self, description: str, seconds: float):
        self.description, self.seconds = description, seconds
        self.calls, self.spent, self.stuck = 0, 0.0, False

    def within_limit(self, work: Callable[[], T]) -> T:
        """What `work` returns; `CallbackError` for what it raises, and where it takes too long."""
        answer: list[T] = []
        fault: list[BaseException] = []

        def run() -> None:
            try:
                answer.append(work())
            except BaseException as error:  # handed to the callback, which waits
                fault.append(error)

        if self.stuck:
            raise CallbackError(f"{self.description}: an earlier callback still has not answered; make the constraint anew")
        start = time.perf_counter()
        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        worker.join(self.seconds)
        self.calls, self.spent = self.calls + 1, self.spent + time.perf_counter() - start
        if worker.is_alive():
            self.stuck = True
            raise CallbackError(
                f"{self.description}: its {self.asked} has not answered within {self.seconds} s; raise time_limit"
            )
        if fault:
            if isinstance(fault[0], CallbackError):
                raise fault[0]
            raise CallbackError(
                f"{self.description}: its {self.asked} raised {type(fault[0]).__name__}: {fault[0]}"
            ) from fault[0]
        return answer[0]


class Parser(Protocol):
    """Where a text stands in a language. Never changed, and never calls JAX, which waits for its answer."""

    def allowed(self) -> np.ndarray:
        """bool[V]: the tokens that may come next; EOS where the text may end."""
        ...

    def after(self, token: int) -> "Parser":
        """The parser that has read an allowed token, not EOS, too."""
        ...


class QuickParser(Parser, Protocol):
    """A parser that tells sooner than by trying them all which tokens complete the text."""

    def completed_by(self, tokens: list[int]) -> list[bool]:
        """For each of some allowed tokens other than EOS, whether the text may end after it."""
        ...


class Cost(NamedTuple):
    """What a constraint has taken since it was made."""

    calls: int
    """callbacks, each for all particles"""
    seconds: float
    masks: int
    """masks that were computed, rather than known"""


class Entry:
    """A parser, and its mask once it has been asked for; no parser where the text is not allowed."""

    __slots__ = ("bits", "parser")

    def __init__(self, parser: Parser | None):
        self.parser = parser
        self.bits: np.ndarray | None = None


class Host(Callee):
    """The parsers of one language, by the tokens that they have read; the least recently used are dropped."""

    asked = "parser"

    def __init__(self, parser: Parser, vocab_size: int, eos_id: int, description: str, seconds: float, most_prefixes: int):
        super().__init__(description, seconds)
        self.root, self.vocab_size, self.eos_id, self.most_prefixes = Entry(parser), vocab_size, eos_id, most_prefixes
        self.known: OrderedDict[Prefix, Entry] = OrderedDict()
        self.computed = 0

    def masks(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool[N, V] of int[N, T] and int[N], within the time limit."""
        work = lambda: np.stack([self.mask(t, int(n)) for t, n in zip(tokens.tolist(), lengths)])
        return self.within_limit(work)

    def mask(self, tokens: list[int], length: int) -> np.ndarray:
        """bool[V]: the tokens that may follow the first `length` ones. The last token of all has to complete the text."""
        nothing = np.zeros(self.vocab_size, bool)
        if length >= len(tokens) or (length and tokens[length - 1] == self.eos_id):
            return nothing
        entry = self.find(tuple(tokens[:length]))
        allowed = self.allowed(entry)
        if length + 1 < len(tokens) or entry.parser is None:
            return allowed
        nothing[self.eos_id], allowed[self.eos_id] = allowed[self.eos_id], False
        nothing[allowed] = self.completed_by(entry.parser, np.flatnonzero(allowed).tolist())
        return nothing

    def completed_by(self, parser: Parser, tokens: list[int]) -> list[bool]:
        if hasattr(parser, "completed_by"):
            return parser.completed_by(tokens)  # type: ignore[no-any-return]
        return [bool(self.allowed(Entry(parser.after(token)))[self.eos_id]) for token in tokens]

    def find(self, prefix: Prefix) -> Entry:
        """The entry of a prefix, made from its longest known part."""
        known = len(prefix)
        while known and prefix[:known] not in self.known:
            known -= 1
        entry = self.known[prefix[:known]] if known else self.root
        for end in range(known + 1, len(prefix) + 1):
            goes_on = prefix[end - 1] != self.eos_id and self.allowed(entry)[prefix[end - 1]]
            entry = Entry(entry.parser.after(prefix[end - 1]) if goes_on and entry.parser else None)
            self.known[prefix[:end]] = entry
        if prefix:
            self.known.move_to_end(prefix)
        while len(self.known) > self.most_prefixes:
            self.known.popitem(last=False)
        return entry

    def allowed(self, entry: Entry) -> np.ndarray:
        """bool[V]"""
        if entry.parser is None:
            return np.zeros(self.vocab_size, bool)
        if entry.bits is None:
            found = np.asarray(entry.parser.allowed())
            if found.shape != (self.vocab_size,) or found.dtype != bool:
                answer = f"{found.dtype}{list(found.shape)}"
                raise CallbackError(f"{self.description}: its parser must answer bool[{self.vocab_size}], found {answer}")
            entry.bits = np.packbits(found)
            self.computed += 1
        return np.unpackbits(entry.bits, count=self.vocab_size).view(bool)


_numbers = count()
_callees: WeakValueDictionary[int, Callee] = WeakValueDictionary()
"""By the number that a compiled program knows them by: another language is another input of the same program."""
_recent: deque[Callee] = deque(maxlen=64)
"""Kept alive although the program that made them has been forgotten, since a run may still be under way."""


def registered(callee: Callee) -> Array:
    """int32[]: the number by which callbacks find it."""
    number = next(_numbers)
    _callees[number] = callee
    _recent.append(callee)
    with jax.ensure_compile_time_eval():
        return jnp.int32(number)


def ask_each(numbers: np.ndarray, ask: Callable[[Any, np.ndarray], np.ndarray]) -> np.ndarray:
    """The answers of all particles (leading axis), of which `ask(callee, rows)` gives those of some rows."""
    answers: np.ndarray | None = None
    for number in np.unique(numbers).tolist():
        if number not in _callees:
            raise CallbackError("a host constraint was used after it had been deleted; keep it until its runs are over")
        rows = numbers == number
        found = ask(_callees[number], rows)
        answers = np.zeros((len(numbers), *found.shape[1:]), bool) if answers is None else answers
        answers[rows] = found
    assert answers is not None
    return answers


def _callback(numbers: Any, tokens: Any, lengths: Any) -> np.ndarray:
    """bool[*batch, V]: the masks of all particles."""
    numbers, tokens, lengths = np.asarray(numbers), np.asarray(tokens), np.asarray(lengths)
    batch = lengths.shape
    tokens, lengths = tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)
    masks = ask_each(numbers.reshape(-1), lambda host, rows: host.masks(tokens[rows], lengths[rows]))
    return masks.reshape(*batch, -1)


@dataclass(frozen=True)
class About:
    """The host's part of a constraint. All are equal, so that compiled programs do not depend on it."""

    host: Host = field(compare=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class HostConstraint:
    """The constraint that a text, when it ends, belongs to a language of which a parser on the host decides.

    The text may end with EOS where the parser allows it, and is cut at `max_tokens` only there. The parser does not know how
    many tokens are left: a particle that cannot complete its text with its last token has probability 0.
    """

    number: Array
    """int32[]: which language"""
    vocab_size: int = field(metadata={"static": True})
    about: About = field(metadata={"static": True})

    @property
    def cost(self) -> Cost:
        """What callbacks have cost so far; a snapshot."""
        host = self.about.host
        return Cost(host.calls, host.spent, host.computed)

    def start(self, max_tokens: int) -> tuple[Array, Array]:
        """The tokens so far, int32[max_tokens], and how many there are."""
        return jnp.zeros(max_tokens, jnp.int32), jnp.int32(0)

    def mask(self, state: tuple[Array, Array]) -> Array:
        """bool[V]: the tokens allowed next, by a callback."""
        shape = jax.ShapeDtypeStruct((self.vocab_size,), jnp.bool_)
        return jax.pure_callback(_callback, shape, self.number, *state, vmap_method="broadcast_all")  # type: ignore[no-any-return]

    def next(self, state: tuple[Array, Array], token: Array) -> tuple[Array, Array]:
        """The state after a token."""
        tokens, length = state
        return tokens.at[length].set(token.astype(jnp.int32), mode="drop"), length + 1


def host(
    lm: LanguageModel, parser: Parser, description: str, *, time_limit: float = 60.0, most_prefixes: int = 4096
) -> HostConstraint:
    """The constraint of a `Parser` written in Python, such as an incremental one of a language of your own.

    Args:
        parser: one that has read nothing.
        description: what errors call it.
        time_limit: seconds after which one callback, for all particles, is given up.
        most_prefixes: parsers and masks that are kept, about V / 8 bytes each.

    A parser that raises, takes too long or answers with another shape ends the run with a `CallbackError`, inside the
    `JaxRuntimeError` that JAX makes of it.

    >>> from latentrace import models
    >>> lm = models.MarkovLM([0.0, 0.0, 0.0], [[0.0] * 3] * 3, 0, ("", "(", ")"))
    >>> class Balanced:
    ...     def __init__(self, depth=0):
    ...         self.depth = depth
    ...     def allowed(self):
    ...         return np.array([self.depth == 0, True, self.depth > 0])
    ...     def after(self, token):
    ...         return Balanced(self.depth + (1 if token == 1 else -1))
    >>> balanced = host(lm, Balanced(), "balanced brackets")
    >>> balanced.mask(balanced.next(balanced.start(4), jnp.int32(1))).tolist()
    [False, True, True]
    >>> balanced.cost.calls, balanced.cost.masks
    (1, 2)
    """
    made = Host(parser, lm.vocab_size, lm.eos_id, description, time_limit, most_prefixes)
    return HostConstraint(registered(made), lm.vocab_size, About(made))
