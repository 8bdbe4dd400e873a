"""Training sequences: a puzzle in random order and one of its solutions, a pure function of (seed, step)."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from latentrace.models.reasoner import tokenizer
from latentrace.models.reasoner.game24 import LARGEST_INPUT, expression, format_trace, solve
from latentrace.models.reasoner.splits import Puzzle, training_puzzles

LARGEST_EXTRA = 20
"""Puzzles with numbers up to this are also trained on: more puzzles, fewer to learn by heart."""
CORE_SHARE = 0.7
"""The share of training sequences whose numbers go up to 13, as in the game."""

PROMPT_LENGTH = 9
"""Tokens of a prompt: start, four numbers, three spaces, newline."""
TRACE_LENGTH = 31
"""Tokens of a trace: lines of 12, 10 and 8 tokens, then the end token."""
SEQUENCE_LENGTH = PROMPT_LENGTH + TRACE_LENGTH


class TraceTable(NamedTuple):
    """Every trace of the training puzzles, and how often each is drawn."""

    numbers: np.ndarray
    """uint8[N, 4]: the puzzle of each trace."""
    traces: np.ndarray
    """uint8[N, 31]: the tokens of each trace, end token included."""
    cumulative: np.ndarray
    """float64[N]: cumulative probabilities, the last one 1."""


def trace_table(puzzles: Sequence[Puzzle], puzzle_weights: Sequence[float] | None = None) -> TraceTable:
    """The traces of `puzzles`.

    A puzzle is drawn in proportion to its weight, then one of its solutions (expressions) uniformly, then one of the
    step orders that reach that expression.
    """
    encode = tokenizer.build_tokenizer().encode
    weights = [1.0] * len(puzzles) if puzzle_weights is None else puzzle_weights
    numbers, traces, probabilities = [], [], []
    for puzzle, weight in zip(puzzles, weights):
        solutions = solve(puzzle, whole=True)
        expressions = [expression(steps) for steps in solutions]
        orders = Counter(expressions)
        for steps, text in zip(solutions, expressions):
            numbers.append(puzzle)
            traces.append([*encode(format_trace(steps), add_special_tokens=False).ids, tokenizer.END_ID])
            probabilities.append(weight / len(orders) / orders[text])
    cumulative = np.cumsum(probabilities)
    return TraceTable(np.array(numbers, np.uint8), np.array(traces, np.uint8), cumulative / cumulative[-1])


def training_table(largest: int = LARGEST_EXTRA) -> TraceTable:
    """The table that the shipped reasoner is trained on; `largest` = 13 leaves out the extra puzzles."""
    puzzles = training_puzzles(largest)
    core = np.array([max(puzzle) <= LARGEST_INPUT for puzzle in puzzles])
    if core.all():
        return trace_table(puzzles)
    weights = np.where(core, CORE_SHARE / core.sum(), (1 - CORE_SHARE) / (~core).sum())
    return trace_table(puzzles, weights.tolist())


def prompt_tokens(numbers: np.ndarray) -> np.ndarray:
    """int32[B, 9]: the prompts of puzzles int[B, 4], numbers in the order given."""
    prompts = np.full((len(numbers), PROMPT_LENGTH), tokenizer.TOKEN_ID[tokenizer.SPACE], np.int32)
    prompts[:, 0] = tokenizer.START_ID
    prompts[:, 1:-1:2] = np.asarray(numbers, np.int32) + tokenizer.TOKEN_ID["0"]  # numbers have consecutive ids
    prompts[:, -1] = tokenizer.TOKEN_ID[tokenizer.NEWLINE]
    return prompts


def batch(table: TraceTable, size: int, seed: int, step: int) -> np.ndarray:
    """int32[size, 40]: prompts in random order, each with one of its solutions."""
    rng = np.random.default_rng((seed, step))
    rows = np.searchsorted(table.cumulative, rng.random(size), side="right")
    numbers = rng.permuted(table.numbers[rows], axis=1)
    return np.concatenate([prompt_tokens(numbers), table.traces[rows].astype(np.int32)], axis=1)
