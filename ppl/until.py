"""Stop conditions: an automaton over tokens that notices a stop string wherever token boundaries fall."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import SiteError


def stop_table(lm: Any, until: Any, name: str) -> np.ndarray | None:
    """int32[Q, V]: the next state of each state and token; state 0 is the start, state Q means that the text is over.

    `until` is a string, several strings, a token id, several token ids, or None.
    """
    if until is None:
        return None
    items: Sequence[Any] = [until] if isinstance(until, (str, int, np.integer)) else list(until)
    if not items or any(isinstance(i, str) and not i for i in items):
        raise SiteError(f"site {name!r}: `until` must hold at least one non-empty string or token id, found {until!r}")
    if all(isinstance(i, str) for i in items):
        return _table_of_strings(lm, tuple(sorted(set(items))))
    if all(isinstance(i, (int, np.integer)) for i in items):
        wrong = [int(i) for i in items if not 0 <= i < lm.vocab_size]
        if wrong:
            raise SiteError(f"site {name!r}: token id {wrong[0]} is outside the vocabulary of {lm.vocab_size} tokens")
        table = np.zeros((1, lm.vocab_size), np.int32)
        table[0, [int(i) for i in items]] = 1
        return table
    raise SiteError(f"site {name!r}: `until` takes strings or token ids, not a mixture: {until!r}")


@lru_cache(maxsize=64)
def _table_of_strings(lm: Any, strings: tuple[str, ...]) -> np.ndarray:
    transitions = aho_corasick([s.encode() for s in strings])
    over = len(transitions)  # one state more than the automaton has: a stop string was completed
    padded = np.vstack([transitions, np.full((1, 256), over, np.int32)])
    spellings = lm.token_bytes()
    longest = max(map(len, spellings), default=0)
    letters = np.full((len(spellings), longest), -1)
    for i, spelling in enumerate(spellings):
        letters[i, : len(spelling)] = list(spelling)
    state = np.repeat(np.arange(over)[:, None], len(spellings), axis=1)  # [Q, V]
    for letter in letters.T:
        state = np.where(letter >= 0, padded[state, letter], state)
    return state.astype(np.int32)


def aho_corasick(words: list[bytes]) -> np.ndarray:
    """int32[Q, 256]: the automaton that finds any of `words`; Q itself stands for "found"."""
    children: list[dict[int, int]] = [{}]
    final = [False]
    for word in words:
        node = 0
        for letter in word:
            if letter not in children[node]:
                children[node][letter] = len(children)
                children.append({})
                final.append(False)
            node = children[node][letter]
        final[node] = True
    table = np.zeros((len(children), 256), np.int32)
    fail = [0] * len(children)
    queue = [0]
    for node in queue:  # breadth first: shorter suffixes are finished before they are needed
        final[node] |= final[fail[node]]
        if node:
            table[node] = table[fail[node]]
        for letter, child in children[node].items():
            fail[child] = table[node, letter] if node else 0
            table[node, letter] = child
            queue.append(child)
    # number the states that are not final from 0; every final one becomes Q
    live = [i for i in range(len(children)) if not final[i]]
    number = np.full(len(children), len(live), np.int32)
    number[live] = np.arange(len(live))
    return number[table[live]]
