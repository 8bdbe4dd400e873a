"""Which Games of 24 train the reasoner and which only ever test it."""

import itertools
from collections.abc import Sequence

from latentrace.models.reasoner.countdown import LARGEST_CARD, is_held_out, solve

Puzzle = tuple[int, ...]
"""Four numbers, ascending."""


def _parse(block: str) -> tuple[Puzzle, ...]:
    return tuple(tuple(int(number) for number in word.split("-")) for word in block.split())


# Puzzles 901 to 1000 by rank of the Game of 24 collection of Yao et al. 2023 (Tree of Thoughts), the usual hard split.
HARD = _parse("""
1-2-2-9 1-2-3-13 1-2-4-7 1-2-6-10 1-2-7-11 1-2-7-12 1-2-8-13 1-3-5-9 1-3-6-11 1-3-7-10 1-3-8-13 1-3-9-9 1-4-4-8
1-4-4-11 1-4-5-13 1-5-6-7 1-5-9-13 1-5-10-11 1-5-12-12 1-6-6-6 1-7-9-11 1-7-10-13 1-8-10-11 1-9-10-13 1-11-11-13
2-2-5-12 2-2-7-12 2-2-8-8 2-2-8-9 2-3-3-10 2-3-4-7 2-3-4-9 2-3-6-6 2-3-6-9 2-3-6-13 2-3-9-10 2-3-10-12 2-4-5-6
2-4-6-7 2-4-6-11 2-4-6-12 2-4-8-9 2-4-9-12 2-5-6-6 2-5-7-7 2-5-8-11 2-5-10-10 2-6-7-11 2-6-8-12 2-6-8-13 2-7-12-13
3-3-4-11 3-3-6-7 3-3-7-12 3-3-9-12 3-4-4-13 3-4-6-6 3-4-6-8 3-4-6-11 3-4-8-12 3-4-9-13 3-5-7-10 3-6-9-12 3-9-10-13
4-4-7-10 4-4-8-12 4-4-9-12 4-5-6-8 4-5-6-10 4-5-7-9 4-5-10-12 4-6-6-9 4-7-9-13 4-8-11-13 4-9-10-13 4-10-12-13
5-5-8-10 5-5-8-13 5-6-6-8 5-6-7-13 5-6-8-10 5-6-8-12 5-8-8-8 5-8-10-11 5-8-11-12 5-9-12-12 5-10-12-13 6-6-7-12
6-7-8-9 6-7-8-11 6-7-10-12 6-8-8-12 6-9-9-11 6-9-12-13 6-10-12-13 6-11-12-13 7-7-8-11 7-8-8-12 7-9-9-13 8-8-10-12
""")
"""The 100 published hard puzzles."""

# Drawn once, uniformly, from the other 1,262 solvable puzzles of numbers 1 to 13.
FRESH = _parse("""
1-1-4-8 1-2-2-13 1-2-4-4 1-2-4-5 1-2-4-13 1-3-3-10 1-3-5-12 1-3-6-10 1-3-8-10 1-3-13-13 1-4-4-12 1-4-5-5 1-4-6-7
1-4-6-11 1-4-7-8 1-4-8-11 1-5-9-10 1-6-12-13 1-7-9-9 1-8-9-12 1-10-12-13 1-11-13-13 1-12-12-13 2-2-2-9 2-2-4-8
2-2-4-11 2-2-4-12 2-2-10-11 2-2-12-13 2-3-4-13 2-3-5-12 2-3-8-12 2-4-4-5 2-4-5-7 2-4-5-12 2-4-7-10 2-4-9-10 2-5-7-9
2-5-8-12 2-5-10-12 2-5-12-13 2-6-6-12 2-6-9-9 2-6-9-12 2-7-7-11 2-7-12-12 2-8-13-13 2-9-9-11 3-3-4-8 3-3-4-12
3-3-4-13 3-3-6-9 3-3-6-13 3-3-7-7 3-3-8-9 3-4-4-8 3-4-4-11 3-4-5-5 3-4-5-7 3-4-9-12 3-4-11-13 3-6-6-9 3-6-7-12
3-6-9-11 3-6-13-13 3-7-9-11 3-8-9-10 3-8-12-13 3-9-13-13 4-4-4-6 4-4-4-7 4-5-7-10 4-5-8-12 4-5-9-13 4-5-11-13
4-6-7-7 4-6-8-8 4-7-11-12 4-7-12-13 4-8-10-11 4-9-9-12 5-5-6-11 5-5-7-11 5-5-9-10 5-5-11-12 5-6-6-6 5-6-9-9
5-6-10-12 5-7-9-12 5-8-9-13 5-11-12-12 6-6-8-12 6-6-10-13 6-9-12-12 7-8-10-11 7-8-12-12 7-12-12-13 9-9-10-13
10-10-10-13 11-11-12-12
""")
"""100 further puzzles of ordinary difficulty."""

HELD_OUT = frozenset(HARD) | frozenset(FRESH)


def may_train(numbers: Sequence[int], target: int) -> bool:
    """Whether a Countdown puzzle may train: it is in no test split, and no held-out Game of 24 has its numbers."""
    return not is_held_out(numbers, target) and tuple(sorted(numbers)) not in HELD_OUT


def training_puzzles(largest: int = LARGEST_CARD) -> list[Puzzle]:
    """Every puzzle of numbers from 1 to `largest` with a solution in whole numbers, less the held-out ones."""
    puzzles = itertools.combinations_with_replacement(range(1, largest + 1), 4)
    return [puzzle for puzzle in puzzles if puzzle not in HELD_OUT and solve(puzzle, whole=True)]
