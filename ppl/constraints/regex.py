"""Regular expressions as automata: Python's syntax and meaning of `re.fullmatch`, over the bytes of UTF-8.

Python's own parser reads the pattern, and Python's own engine says which characters a class holds, so that flags, classes and
escapes mean what they mean in `re`. What is no regular language, look-around and back-references, is refused.
"""

import re
from collections.abc import Iterator
from functools import cache
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]  # the only way to Python's own syntax tree
from typing import Any, NamedTuple

import numpy as np

from ..errors import SiteError
from .automata import ByteAutomaton, CharacterAutomaton, minimize, to_bytes

MOST_STATES = 20_000
SURROGATES = range(0xD800, 0xE000)
_BLOCKS = ((0, SURROGATES[0]), (SURROGATES[-1] + 1, 0x110000))
Ranges = tuple[tuple[int, int], ...]
"""Inclusive ranges of code points."""


class RegexError(SiteError):
    """A pattern that is no regular language, is wrong, or makes too large an automaton."""


# --- the pattern as a nondeterministic automaton over characters -------------------------------------------------------


class Node(NamedTuple):
    """One instruction.

    "char" reads a character of a set, "split" and "loop" go on at any of `to` (preferred first), "assert" goes on where a
    zero-width condition holds, "mark" notes that a group has matched, "test" goes on at `to[0]` if one has and else at `to[1]`,
    "atomic" runs a part that is not tried again, "match" ends a part.
    """

    kind: str
    what: Any = None
    to: tuple[int, ...] = ()


class _Builder:
    """Instructions of a syntax tree, built from its end to its start."""

    def __init__(self, pattern: str, bits: dict[int, int] | None = None):
        self.pattern, self.nodes = pattern, [Node("match")]
        self.sets: dict[Any, Ranges] = {}
        self.bits = dict(bits or {})
        """of the groups that conditionals ask for"""

    def add(self, kind: str, what: Any = None, to: tuple[int, ...] = ()) -> int:
        if len(self.nodes) > 10 * MOST_STATES:
            raise RegexError(f"pattern {self.pattern!r}: its repetitions are too large; lower their bounds")
        self.nodes.append(Node(kind, what, to))
        return len(self.nodes) - 1

    def sequence(self, items: Any, after: int, flags: int) -> int:
        for op, argument in reversed(list(items)):
            after = self.item(op, argument, after, flags)
        return after

    def item(self, op: Any, argument: Any, after: int, flags: int) -> int:
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self.add("char", self.characters(op, argument, flags), (after,))
        if name == "BRANCH":
            return self.add("split", to=tuple(self.sequence(branch, after, flags) for branch in argument[1]))
        if name == "SUBPATTERN":
            group, added, removed, inner = argument
            if group in self.bits:
                after = self.add("mark", self.bits[group], (after,))
            return self.sequence(inner, after, (flags | added) & ~removed)
        if name == "GROUPREF_EXISTS":
            group, yes, no = argument
            bit = self.bits.setdefault(group, 1 << len(self.bits))
            return self.add("test", bit, (self.sequence(yes, after, flags), self.sequence(no or (), after, flags)))
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self.repeat(argument, after, flags, name == "MAX_REPEAT")
        if name in ("ATOMIC_GROUP", "POSSESSIVE_REPEAT"):
            end = self.add("match")
            if name == "ATOMIC_GROUP":
                return self.add("atomic", self.sequence(argument, end, flags), (after,))
            return self.add("atomic", self.repeat(argument, end, flags, True), (after,))
        if name == "AT":
            kind = str(argument)
            multiline = {"AT_BEGINNING": "line start", "AT_END": "line end"}
            single = {"AT_BEGINNING": "start", "AT_BEGINNING_STRING": "start", "AT_END": "end", "AT_END_STRING": "end"}
            words = {"AT_BOUNDARY": "boundary", "AT_NON_BOUNDARY": "no boundary"}
            table = {**single, **words, **(multiline if flags & re.MULTILINE else {})}
            return self.add("assert", (table[kind], bool(flags & re.ASCII)), (after,))
        raise RegexError(
            f"pattern {self.pattern!r}: {name.lower().replace('_', ' ')} is no part of a regular language; "
            "look-around and back-references cannot be constraints"
        )

    def repeat(self, argument: Any, after: int, flags: int, greedy: bool) -> int:
        least, most, inner = argument
        order = (lambda into, past: (into, past)) if greedy else (lambda into, past: (past, into))
        if most is _constants.MAXREPEAT:
            start = self.add("loop")
            self.nodes[start] = Node("loop", after, order(self.sequence(inner, start, flags), after))
        else:
            start = after
            for _ in range(most - least):
                start = self.add("split", to=order(self.sequence(inner, start, flags), after))
        for _ in range(least):
            start = self.sequence(inner, start, flags)
        return start

    def characters(self, op: Any, argument: Any, flags: int) -> Ranges:
        key = (str(op), str(argument), flags & (re.I | re.S | re.A | re.U | re.L))
        if key not in self.sets:
            self.sets[key] = characters_of(op, argument, flags)
        return self.sets[key]


@cache
def every_character() -> tuple[str, ...]:
    """The characters of each block, in order."""
    return tuple("".join(map(chr, range(first, stop))) for first, stop in _BLOCKS)


def characters_of(op: Any, argument: Any, flags: int) -> Ranges:
    """What a part that reads one character may read: Python's engine is asked about every character there is."""
    state = _parser.State()
    state.flags = flags
    state.str = ""
    one = _parser.SubPattern(state, [(op, argument)])
    many = _parser.SubPattern(state, [(_constants.MAX_REPEAT, (1, _constants.MAXREPEAT, one))])
    compiled = _compiler.compile(many, flags)
    found = ((first, m) for (first, _), text in zip(_BLOCKS, every_character()) for m in compiled.finditer(text))
    return tuple((first + m.start(), first + m.end() - 1) for first, m in found)


# --- the same, deterministic over classes of characters ---------------------------------------------------------------

START = END = None
"""In place of a character before the first and after the last."""


class Kind(NamedTuple):
    """What zero-width conditions see of a character."""

    newline: bool
    word: bool
    ascii_word: bool


class Atomic(NamedTuple):
    """A part that is tried once: of its threads, the first in order of preference that matches decides how the text goes on.

    Its body holds nodes, nested `Atomic`s, and last perhaps a `Matched`.
    """

    body: tuple[Any, ...]
    after: int


class Matched(NamedTuple):
    """The part has matched: what goes on after it, unless a preferred thread matches too."""

    rest: Any


Threads = frozenset[Any] | tuple[Any, ...]
"""Where a text stands: a set of which any may succeed, or, inside an atomic part, a list in order of preference. A thread is an
`Atomic`, or the number of a node that has not looked at the next character yet, plus the bits of the groups that have matched
times the number of nodes."""
Afters = tuple[int, ...]
"""The nodes that follow the enclosing atomic parts, innermost last."""


class _Reader:
    """Moves threads over characters, of which only class and kind matter."""

    def __init__(self, nodes: list[Node]):
        self.nodes, self.size = nodes, len(nodes)

    def reached(self, start: int, before: Kind | None, after: Kind | None, seen: set[int]) -> Iterator[int]:
        """The threads that read, match or begin an atomic part, reached from one without reading; preferred first."""
        stack = [start]
        while stack:
            thread = stack.pop()
            node, groups = self.at(thread)
            if thread in seen:
                if node.kind == "loop":  # its body has matched nothing: `re` leaves the loop then
                    stack.append(groups + node.what)
                continue
            seen.add(thread)
            if node.kind in ("split", "loop"):
                stack.extend(groups + to for to in reversed(node.to))
            elif node.kind == "assert":
                condition, ascii_only = node.what
                if holds(condition, ascii_only, before, after):
                    stack.append(groups + node.to[0])
            elif node.kind == "mark":
                stack.append((groups // self.size | node.what) * self.size + node.to[0])
            elif node.kind == "test":
                stack.append(groups + node.to[0 if groups // self.size & node.what else 1])
            else:
                yield thread

    def at(self, thread: int) -> tuple[Node, int]:
        """A thread's node, and what to add to another node for its groups."""
        number = thread % self.size
        return self.nodes[number], thread - number

    def step(
        self, threads: Threads, afters: Afters, before: Kind | None, cls: int, kind: Kind, begun: frozenset[int] = frozenset()
    ) -> Threads:
        """The threads after one more character. An atomic part that has `begun` here matches nothing if it is begun again."""
        out: list[Any] = []
        seen: set[int] = set(begun)

        def atomic(body: tuple[Any, ...], after: int, begun: frozenset[int]) -> bool:
            stepped = tuple(self.step(body, (*afters, after), before, cls, kind, begun))
            if stepped and isinstance(stepped[0], Matched):  # nobody is preferred to what has matched: the part is over
                out.extend(stepped[0].rest)
                return bool(out) and isinstance(out[-1], Matched)
            if stepped:
                out.append(Atomic(stepped, after))
            return False

        def follow(thread: Any) -> bool:
            """Whether the part has matched, so that less preferred threads are dropped."""
            if isinstance(thread, Matched):
                out.append(Matched(self.step(thread.rest, afters[:-1], before, cls, kind)))
                return True
            if isinstance(thread, Atomic):
                return atomic(*thread, begun)
            for ready in self.reached(thread, before, kind, seen):
                node, groups = self.at(ready)
                if node.kind == "char" and cls in node.what:
                    out.append(groups + node.to[0])
                elif node.kind == "atomic":
                    if atomic((groups + node.what,), node.to[0], begun | {ready}):
                        return True
                elif node.kind == "match" and afters:
                    rest = self.step(resume(afters, groups), afters[:-1], before, cls, kind, begun)
                    out.append(Matched(rest))
                    return True
            return False

        for thread in threads:
            if follow(thread):
                break
        # a dead end after the outermost part stays: it still says that nobody less preferred counts
        kept = [x for x in dict.fromkeys(out) if not (isinstance(x, Matched) and x.rest == ())]
        return tuple(kept) if afters else frozenset(kept)

    def ends(self, threads: Threads, afters: Afters, before: Kind | None, begun: frozenset[int] = frozenset()) -> bool | None:
        """Whether the text may end here; None inside an atomic part that has not matched."""
        seen: set[int] = set(begun)
        for thread in threads:
            result: bool | None = None
            if isinstance(thread, Matched):
                return self.ends(thread.rest, afters[:-1], before, begun)
            if isinstance(thread, Atomic):
                result = self.ends(thread.body, (*afters, thread.after), before, begun)
            else:
                for ready in self.reached(thread, before, END, seen):
                    node, groups = self.at(ready)
                    if node.kind == "match":
                        return self.ends(resume(afters, groups), afters[:-1], before, begun) if afters else True
                    if node.kind == "atomic":
                        result = self.ends((groups + node.what,), (*afters, node.to[0]), before, begun | {ready})
                    if result is not None and (afters or result):
                        break
            if result is not None and (afters or result):
                return result
        return None if afters else False


def resume(afters: Afters, groups: int) -> Threads:
    """The thread that begins where the innermost atomic part ends."""
    return (groups + afters[-1],) if len(afters) > 1 else frozenset({groups + afters[-1]})


def holds(condition: str, ascii_only: bool, before: Kind | None, after: Kind | None) -> bool:
    """Whether a zero-width condition holds between two characters."""
    word = lambda kind: kind is not None and (kind.ascii_word if ascii_only else kind.word)
    newline = lambda kind: kind is not None and kind.newline
    return {
        "start": before is START,
        "end": after is END,
        "line start": before is START or newline(before),
        "line end": after is END or newline(after),
        "boundary": word(before) != word(after),
        "no boundary": word(before) == word(after),
    }[condition]


def determinize(pattern: str) -> CharacterAutomaton:
    """The smallest automaton that accepts what `re.fullmatch(pattern, ...)` does."""
    try:
        tree = _parser.parse(pattern)
    except re.error as error:
        raise RegexError(f"pattern {pattern!r} is no regular expression: {error}") from None
    builder, groups = _Builder(pattern), -1
    while len(builder.bits) != groups:  # once more where a conditional asked for a group that had been built without its mark
        groups, builder = len(builder.bits), _Builder(pattern, builder.bits)
        start = builder.sequence(tree, 0, tree.state.flags)
    conditional = any(node.kind == "assert" for node in builder.nodes)
    word = lambda flags: characters_of(_constants.IN, [(_constants.CATEGORY, _constants.CATEGORY_WORD)], flags)
    special: list[Ranges] = [((10, 10),), word(re.U), word(re.A)] if conditional else []
    read = list(dict.fromkeys(builder.sets.values()))
    class_of, members = partition([*special, *read])
    seen_as = members[:3] if conditional else [frozenset()] * 3
    kinds = [Kind(*(cls in member for member in seen_as)) for cls in range(class_of.max() + 1)]
    number = dict(zip(read, members[len(special) :]))
    reader = _Reader([n._replace(what=number[n.what]) if n.kind == "char" else n for n in builder.nodes])

    first: tuple[Threads, Kind | None] = (frozenset({start}), START)
    states, rows, accepting = {first: 0}, [], []
    queue = [first]
    for threads, before in queue:
        accepting.append(bool(reader.ends(threads, (), before)))
        row = [-1]
        for cls in range(1, len(kinds)):
            after = reader.step(threads, (), before, cls, kinds[cls])
            if not after:
                row.append(-1)
                continue
            state = (after, kinds[cls] if conditional else START)
            if state not in states:
                if len(states) >= MOST_STATES:
                    raise RegexError(f"pattern {pattern!r} needs more than {MOST_STATES} states")
                states[state] = len(states)
                queue.append(state)
            row.append(states[state])
        rows.append(row)
    found = minimize(np.array(rows, np.int32), np.array(accepting))
    if found is None:
        raise RegexError(f"pattern {pattern!r} accepts no text at all")
    return CharacterAutomaton(*found, class_of)


def partition(sets: list[Ranges]) -> tuple[np.ndarray, list[frozenset[int]]]:
    """Classes of characters that no set tells apart, numbered from 1, and the classes of which each set consists."""
    member = np.zeros((len(sets) + 1, 0x110000), bool)
    for row, ranges in zip(member, sets):
        for first, last in ranges:
            row[first : last + 1] = True
    member[-1, SURROGATES.start : SURROGATES.stop] = True
    edges = np.flatnonzero((member[:, 1:] != member[:, :-1]).any(axis=0)) + 1
    starts = np.concatenate([[0], edges])
    signature = {}
    surrogate = (*[False] * len(sets), True)
    signature[surrogate] = 0
    numbers = [signature.setdefault(tuple(column), len(signature)) for column in member[:, starts].T.tolist()]
    class_of = np.repeat(np.array(numbers, np.int16), np.diff([*starts, 0x110000]))
    members = [frozenset(c for key, c in signature.items() if key[i]) for i in range(len(sets))]
    return class_of, members


def compile_regex(pattern: str) -> ByteAutomaton:
    """The smallest automaton over bytes that accepts the UTF-8 of what `re.fullmatch(pattern, ...)` accepts.

    `$` and `\\Z` both mean the end of the text. Raises `RegexError` for what is no regular expression or no regular language,
    for patterns that accept nothing, and for automata of more than `MOST_STATES` states.

    >>> automaton = compile_regex("é|[ab]+")
    >>> automaton.next[0, ord("a")] >= 0, automaton.next[0, ord("c")]
    (np.True_, np.int32(-1))
    """
    return to_bytes(determinize(pattern))
