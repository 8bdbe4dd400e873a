"""The reasoner's two tasks behind one small interface, and the test splits that its figures refer to."""

import random
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from latentrace.models.reasoner import countdown, splits, verifier, word_problems
from latentrace.models.reasoner.countdown import LARGEST_CARD, Puzzle
from latentrace.models.reasoner.data import LARGEST_EXTRA


class CountdownProblem(NamedTuple):
    """A puzzle of three to five numbers."""

    puzzle: Puzzle

    @property
    def prompt(self) -> str:
        return countdown.format_prompt(*self.puzzle)

    @property
    def prompt_tokens(self) -> int:
        """What prompts are padded to."""
        return 16

    @property
    def lines(self) -> int:
        """Lines of a solution, that of the end token included."""
        return len(self.puzzle.numbers)

    @property
    def line_length(self) -> int:
        """Most tokens of a line."""
        return verifier.step_length(len(self.puzzle.numbers))

    def is_right(self, text: str) -> bool:
        return countdown.verify(self.puzzle.numbers, text, self.puzzle.target)

    def answer(self, text: str) -> Hashable:
        """What a trace says, for votes: its expression, right or wrong; None where it has none."""
        try:
            return countdown.expression(countdown.parse_trace(text))
        except (ValueError, StopIteration):
            return None


class WordProblem(NamedTuple):
    """A word problem of two to six steps."""

    question: str

    @property
    def prompt(self) -> str:
        return word_problems.format_prompt(self.question)

    @property
    def prompt_tokens(self) -> int:
        """What prompts are padded to."""
        return word_problems.PROMPT_TOKENS

    @property
    def lines(self) -> int:
        """Lines of the longest solution, those of the answer and of the end token included."""
        return word_problems.MOST_STEPS + 2

    @property
    def line_length(self) -> int:
        """Most tokens of a line."""
        return verifier.LINE_LENGTH

    def is_right(self, text: str) -> bool:
        return word_problems.verify(self.question, text)

    def answer(self, text: str) -> Hashable:
        """The number that a trace answers, for votes; None where it has none."""
        try:
            return word_problems.parse_trace(text).answer
        except ValueError:
            return None


Problem = CountdownProblem | WordProblem
LARGEST_NEW = 24
"""The largest number of the Games of 24 that `new_problem` makes."""


def _games(puzzles: Sequence[splits.Puzzle]) -> Callable[[int], list[Problem]]:
    return lambda count: [CountdownProblem(Puzzle(numbers)) for numbers in puzzles[:count]]


def _countdown(numbers: int) -> Callable[[int], list[Problem]]:
    return lambda count: [CountdownProblem(puzzle) for puzzle in countdown.puzzles(numbers, count, numbers)]


SPLITS: dict[str, Callable[[int], list[Problem]]] = {
    "hard": _games(splits.HARD),
    "fresh": _games(splits.FRESH),
    **{f"countdown{numbers}": _countdown(numbers) for numbers in countdown.COUNTS},
    "words": lambda count: [WordProblem(question) for question in word_problems.problems(0, count)],
}
"""Held-out problems by split, at most so many. "hard" and "fresh" are Games of 24, of which there are 100 each."""


def new_problem(rng: random.Random) -> Problem:
    """A random problem outside of every test split: half of them Countdown, a quarter Games of 24, a quarter word problems.

    One number of those games is larger than any in the reasoner's training set, which it knows too well to tell how it does
    on new ones; it solves about as many of them as of the hard ones.
    """
    kind = rng.choice(("words", "game", "countdown", "countdown"))
    if kind == "words":
        return WordProblem(word_problems.generate(rng)[0])
    while True:
        if kind == "countdown":
            puzzle, _ = countdown.random_trace(rng, rng.choice(countdown.COUNTS))
            if splits.may_train(*puzzle):
                return CountdownProblem(puzzle)
        else:
            small = [rng.randint(1, LARGEST_CARD) for _ in range(3)]
            numbers = (*sorted(small), rng.randint(LARGEST_EXTRA + 1, LARGEST_NEW))
            if countdown.solve(numbers, whole=True):
                return CountdownProblem(Puzzle(numbers))
