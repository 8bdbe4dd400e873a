"""Deterministic automata: over characters, over the bytes of UTF-8, and the smallest ones that accept the same."""

from typing import NamedTuple

import numpy as np


class CharacterAutomaton(NamedTuple):
    """A deterministic automaton over classes of characters; state 0 is the start."""

    next: np.ndarray
    """int32[Q, C], -1 where no text goes on like this"""
    accepting: np.ndarray
    """bool[Q]"""
    class_of: np.ndarray
    """int16[0x110000]: the class of each code point; surrogates have class 0, which nothing reads"""


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes; state 0 is the start."""

    next: np.ndarray
    """int32[Q, 256]: the state after each byte, -1 where no text goes on like this"""
    accepting: np.ndarray
    """bool[Q]: whether the text may end here"""


def minimize(table: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Merge states that accept the same texts (Moore's refinement), and drop those that accept none or are never reached; None
    where none is left."""
    sink = len(table)
    full = np.vstack([np.where(table < 0, sink, table), np.full((1, table.shape[1]), sink, table.dtype)])
    block: np.ndarray = np.append(accepting, False).astype(np.int32)
    letters = np.unique(full, axis=1)  # those that no state tells apart are looked at once
    while True:
        _, refined = np.unique(np.column_stack([block, block[letters]]), axis=0, return_inverse=True)
        refined = refined.ravel()
        if refined.max() == block.max():  # labels have no gaps, so there are as many blocks as before
            break
        block = refined
    dead = block[sink]
    if block[0] == dead:
        return None
    # number the blocks that can be reached, the start first
    example = {b: i for i, b in reversed(list(enumerate(block.tolist())))}
    queue = [int(block[0])]
    known = {dead, *queue}
    for b in queue:
        new = [n for n in dict.fromkeys(block[full[example[b]]].tolist()) if n not in known]
        known.update(new)
        queue.extend(new)
    name = np.full(block.max() + 1, -1, np.int32)
    name[queue] = np.arange(len(queue))
    kept = [example[b] for b in queue]
    return name[block[full[kept]]], np.append(accepting, False)[kept]


def to_bytes(characters: CharacterAutomaton) -> ByteAutomaton:
    """The smallest automaton over bytes that accepts the UTF-8 of what one over characters accepts."""
    count = len(characters.accepting)
    rows: list[np.ndarray] = [np.full(256, -1, np.int32) for _ in range(count)]
    known: dict[tuple[int, ...], int] = {}

    def state(continuations: np.ndarray) -> int:
        """The state that reads one of 64 continuation bytes, -1 where all of them lead nowhere."""
        if (continuations < 0).all():
            return -1
        key = tuple(continuations.tolist())
        if key not in known:
            known[key] = len(rows)
            rows.append(np.full(256, -1, np.int32))
            rows[-1][0x80:0xC0] = continuations
        return known[key]

    blocks, high = np.unique(characters.class_of.reshape(-1, 64), axis=0, return_inverse=True)
    planes, top = np.unique(high.reshape(-1, 64), axis=0, return_inverse=True)  # one row for each 4,096 characters
    high, top = high.ravel(), top.ravel()
    for number in range(count):
        after = characters.next[number]
        last = np.array([state(row) for row in after[blocks]])  # by kind of block of 64
        rows[number][:0x80] = after[characters.class_of[:0x80]]
        rows[number][0xC2:0xE0] = last[high[2:32]]  # two bytes: 0x80 to 0x7FF
        middle = np.array([state(row) for row in last[planes]])  # by kind of 4,096 characters
        rows[number][0xE1:0xF0] = middle[top[1:16]]
        rows[number][0xE0] = state(np.where(np.arange(64) < 32, -1, last[high[:64]]))
        for lead in range(0xF0, 0xF5):
            planes_of = np.full(64, -1)
            first = (lead - 0xF0) * 64
            inside = middle[top[first : min(first + 64, 0x110)]]
            planes_of[: len(inside)] = inside
            if lead == 0xF0:
                planes_of[:16] = -1  # shorter spellings exist
            rows[number][lead] = state(planes_of)
    table = np.array(rows, np.int32)
    accepting = np.append(characters.accepting, np.zeros(len(rows) - count, bool))
    found = minimize(table, accepting)
    assert found is not None
    return ByteAutomaton(*found)
