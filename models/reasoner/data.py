"""Training sequences of three kinds, a pure function of (seed, step): Games of 24, Countdown puzzles and word problems."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from latentrace.models.reasoner import countdown, tokenizer, word_problems
from latentrace.models.reasoner.countdown import COUNTS, LARGEST_CARD, expression, format_trace, solve
from latentrace.models.reasoner.splits import Puzzle, may_train, training_puzzles

LARGEST_EXTRA = 20
"""Games of 24 with numbers up to this are also trained on: more puzzles, fewer to learn by heart."""
CORE_SHARE = 0.7
"""The share of those whose numbers go up to 13, as in the game."""

PROMPT_LENGTH = 9
"""Tokens of the prompt of a Game of 24: start, four numbers, three spaces, newline."""
TRACE_LENGTH = 31
"""Tokens of its trace: lines of 12, 10 and 8 tokens, then the end token."""
WIDTHS = {"game24": PROMPT_LENGTH + TRACE_LENGTH, "countdown": 58, "words": 128}
"""Tokens of a row of each kind; word problems that are longer (1 in 1,000) are left out."""


class Examples(NamedTuple):
    """Sequences: prompt, trace, end token, and end tokens that fill up the row."""

    tokens: np.ndarray
    """int32[B, T]"""
    paid: np.ndarray
    """bool[B, T]: the tokens that the model learns to write: the trace and its end token"""


class TraceTable(NamedTuple):
    """Every trace of the training puzzles, and how often each is drawn."""

    numbers: np.ndarray
    """uint8[N, 4]: the puzzle of each trace."""
    traces: np.ndarray
    """int16[N, 31]: the tokens of each trace, end token included."""
    cumulative: np.ndarray
    """float64[N]: cumulative probabilities, the last one 1."""


def trace_table(puzzles: Sequence[Puzzle], puzzle_weights: Sequence[float] | None = None) -> TraceTable:
    """The traces of Games of 24.

    A puzzle is drawn in proportion to its weight, then one of its solutions (expressions) uniformly, then one of the
    step orders that reach that expression.
    """
    encode = _text().encode
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
    return TraceTable(np.array(numbers, np.uint8), np.array(traces, np.int16), cumulative / cumulative[-1])


def training_table(largest: int = LARGEST_EXTRA) -> TraceTable:
    """The Games of 24 that the shipped reasoner is trained on; `largest` = 13 leaves out the extra puzzles."""
    puzzles = training_puzzles(largest)
    core = np.array([max(puzzle) <= LARGEST_CARD for puzzle in puzzles])
    if core.all():
        return trace_table(puzzles)
    weights = np.where(core, CORE_SHARE / core.sum(), (1 - CORE_SHARE) / (~core).sum())
    return trace_table(puzzles, weights.tolist())


@cache
def _text() -> Tokenizer:
    return tokenizer.build_tokenizer()


def prompt_tokens(numbers: np.ndarray) -> np.ndarray:
    """int32[B, 9]: the prompts of Games of 24, int[B, 4], numbers in the order given."""
    prompts = np.full((len(numbers), PROMPT_LENGTH), tokenizer.TOKEN_ID[tokenizer.SPACE], np.int32)
    prompts[:, 0] = tokenizer.START_ID
    prompts[:, 1:-1:2] = np.asarray(numbers, np.int32) + tokenizer.TOKEN_ID["0"]  # numbers have consecutive ids
    prompts[:, -1] = tokenizer.TOKEN_ID[tokenizer.NEWLINE]
    return prompts


def game24_examples(table: TraceTable, size: int, rng: np.random.Generator) -> Examples:
    """Games of 24 in random order, each with one of its solutions: rows of 40."""
    rows = np.searchsorted(table.cumulative, rng.random(size), side="right")
    numbers = rng.permuted(table.numbers[rows], axis=1)
    tokens = np.concatenate([prompt_tokens(numbers), table.traces[rows].astype(np.int32)], axis=1)
    return Examples(tokens, np.broadcast_to(np.arange(tokens.shape[1]) >= PROMPT_LENGTH, tokens.shape))


def countdown_examples(size: int, rng: random.Random) -> Examples:
    """Countdown puzzles of three to five numbers, each with the steps that made its target: rows of 58."""

    def texts() -> Iterable[tuple[str, str]]:
        while True:
            puzzle, steps = countdown.random_trace(rng, rng.choice(COUNTS))
            if may_train(*puzzle):
                yield countdown.format_prompt(*puzzle), format_trace(steps)

    return _rows(texts(), size, WIDTHS["countdown"])


def word_examples(size: int, rng: random.Random) -> Examples:
    """Word problems of two to six steps with their solutions: rows of 128."""

    def texts() -> Iterable[tuple[str, str]]:
        while True:
            question, solution = word_problems.generate(rng)
            yield word_problems.format_prompt(question), word_problems.format_trace(solution)

    return _rows(texts(), size, WIDTHS["words"])


def _rows(texts: Iterable[tuple[str, str]], size: int, width: int) -> Examples:
    """The first `size` prompts with traces that fit into `width` tokens."""
    encode = _text().encode
    tokens, paid, count = np.full((size, width), tokenizer.END_ID, np.int32), np.zeros((size, width), bool), 0
    for prompt, trace in texts:
        start = encode(prompt).ids
        ids = [*start, *encode(trace, add_special_tokens=False).ids, tokenizer.END_ID]
        if len(ids) <= width:
            tokens[count, : len(ids)] = ids
            paid[count, len(start) : len(ids)] = True
            count += 1
        if count == size:
            return Examples(tokens, paid)
    raise AssertionError("unreachable: texts never end")


class Sizes(NamedTuple):
    """Sequences of each kind in a batch."""

    game24: int
    countdown: int
    words: int


def batch(table: TraceTable, sizes: Sizes, seed: int, step: int) -> dict[str, Examples]:
    """One training batch: examples of each kind whose size is not 0."""
    rng, dice = np.random.default_rng((seed, step)), random.Random(seed * 1_000_003 + step)
    makers = {
        "game24": lambda size: game24_examples(table, size, rng),
        "countdown": lambda size: countdown_examples(size, dice),
        "words": lambda size: word_examples(size, dice),
    }
    return {kind: makers[kind](size) for kind, size in sizes._asdict().items() if size}
