"""Countdown and the Game of 24: puzzles, exact solutions, and the text in which a solution is written.

A puzzle is three to five whole numbers and a target; combine them with + - * / to make the target, each number used once.
Four numbers and the target 24 are the Game of 24. A *trace* has one line for each step: an operation, then the numbers
that remain.

    4 6 8 10          the prompt; another target than 24 follows the numbers: 4 6 8 10=32
    10-4=6 | 6 6 8    a step: operation, then what remains, ascending
    8-6=2 | 2 6       ...
"""

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

TARGET = 24
"""The target where a puzzle names none."""
TARGETS = range(10, 101)
COUNTS = range(3, 6)
"""How many numbers a puzzle has."""
LARGEST_INPUT = 50
"""The largest number of a puzzle."""
LARGEST_CARD = 13
"""The largest number of a Game of 24, as in a deck of cards."""
LARGEST_NUMBER = 199
"""The largest number that the reasoner can write."""
HELD_OUT_SHARE = 20
"""One problem in so many, Games of 24 apart, is held out of training."""

Number = int | Fraction
State = tuple[Number, ...]

_NUMBER = r"(?:0|[1-9][0-9]*)"
_STEP = re.compile(rf"({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER}) \| ({_NUMBER}(?: {_NUMBER})*)\n")


class Step(NamedTuple):
    """One reduction: `left op right = result`, and the numbers that remain after it."""

    left: Number
    op: str
    right: Number
    result: Number
    remaining: State
    """Ascending in canonical steps."""


class Puzzle(NamedTuple):
    """Numbers in the order given, and what to make of them."""

    numbers: tuple[int, ...]
    target: int = TARGET


def check_puzzle(puzzle: str | Sequence[int]) -> Puzzle:
    """A puzzle given as text ("4 6 8 10" or "4 6 8 10=32") or as numbers; ValueError where it is none."""
    expected = f"expected three to five whole numbers from 1 to {LARGEST_INPUT}, such as 4 6 8 10 or 4 6 8 10=32"
    if isinstance(puzzle, Puzzle):
        words, goal = [str(number) for number in puzzle.numbers], str(puzzle.target)
    elif isinstance(puzzle, str):
        before, equals, after = puzzle.replace(",", " ").partition("=")
        words, goal = before.split(), after.strip() if equals else str(TARGET)
    else:
        words, goal = [str(number) for number in puzzle], str(TARGET)
    if len(words) not in COUNTS:
        raise ValueError(f"{expected}; found {len(words)} in {puzzle!r}")
    for word in [*words, goal]:
        if not re.fullmatch(r"[0-9]+", word):
            raise ValueError(f"{expected}; {word!r} is not a whole number")
    for word in words:
        if not 1 <= int(word) <= LARGEST_INPUT:
            raise ValueError(f"{expected}; {word} is out of range")
    if int(goal) not in TARGETS:
        raise ValueError(f"{expected}; the target {goal} is out of range: it goes from {TARGETS[0]} to {TARGETS[-1]}")
    return Puzzle(tuple(int(word) for word in words), int(goal))


def format_prompt(numbers: Sequence[int], target: int = TARGET) -> str:
    """The prompt of a puzzle: its numbers in the order given, the target where it is not 24, and a newline."""
    goal = "" if target == TARGET else f"={target}"
    return " ".join(str(number) for number in numbers) + f"{goal}\n"


def parse_prompt(text: str) -> Puzzle:
    """The puzzle of a prompt such as "4 6 8 10\\n"."""
    return check_puzzle(text)


def format_step(step: Step) -> str:
    """The line of a step whose numbers are whole, newline included."""
    numbers = (step.left, step.right, step.result, *step.remaining)
    if any(Fraction(number).denominator != 1 or number < 0 for number in numbers):
        raise ValueError(f"a step is written in non-negative whole numbers only; found {step}")
    remaining = " ".join(str(number) for number in step.remaining)
    return f"{step.left}{step.op}{step.right}={step.result} | {remaining}\n"


def parse_step(line: str) -> Step:
    """The step that a line says (right or wrong); ValueError where the line is no step."""
    match = _STEP.fullmatch(line)
    if match is None:
        raise ValueError(f"expected a step such as '10-4=6 | 6 6 8' and a newline; found {line!r}")
    left, op, right, result, remaining = match.groups()
    return Step(int(left), op, int(right), int(result), tuple(int(word) for word in remaining.split()))


def format_trace(steps: Sequence[Step]) -> str:
    """The lines of several steps."""
    return "".join(format_step(step) for step in steps)


def parse_trace(text: str) -> tuple[Step, ...]:
    """The steps of a text of whole lines; ValueError where a line is no step."""
    return tuple(parse_step(line) for line in text.splitlines(keepends=True))


def is_right(left: Number, op: str, right: Number, result: Number) -> bool:
    """Whether `left op right = result`."""
    return {
        "+": left + right == result,
        "-": left - right == result,
        "*": left * right == result,
        "/": right != 0 and right * result == left,
    }[op]


def outcome(left: int, op: str, right: int) -> int:
    """`left op right`; ValueError where it is no whole number."""
    if op == "/" and (right == 0 or left % right):
        raise ValueError(f"{left}/{right} is no whole number")
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[op]


def only_tests(prompt: str) -> bool:
    """Whether a problem other than a Game of 24 is held out of training: a fixed function of its text."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def apply_step(remaining: Sequence[Number], step: Step) -> State | None:
    """The numbers that remain after a step, ascending; None where the step is wrong."""
    left_over = list(remaining)
    for operand in (step.left, step.right):
        if operand not in left_over:
            return None
        left_over.remove(operand)
    correct = is_right(step.left, step.op, step.right, step.result)
    state = tuple(sorted([*left_over, step.result]))
    return state if correct and state == tuple(sorted(step.remaining)) else None


def verify(numbers: Sequence[int], trace: str, target: int = TARGET) -> bool:
    """Whether `trace` makes `target` from `numbers`: each line a right step from the numbers that remain, to the last.

    Operands and remaining numbers may stand in any order. Every line ends in a newline.
    """
    try:
        steps = parse_trace(trace)
    except ValueError:
        return False
    state: State = tuple(numbers)
    for step in steps:
        after = apply_step(state, step)
        if after is None:
            return False
        state = after
    return len(steps) == len(numbers) - 1 and state == (target,)


def solve(numbers: Sequence[int], target: int = TARGET, whole: bool = False) -> list[tuple[Step, ...]]:
    """All distinct traces, in canonical form, that make `target` from `numbers`; empty where there are none.

    Intermediate results are never negative, which loses no solution. With `whole`, they are also whole numbers up to
    `LARGEST_NUMBER`: the traces that the reasoner can write.
    """
    return list(_traces(tuple(sorted(numbers)), target, whole))


def needs_fractions(numbers: Sequence[int], target: int = TARGET) -> bool:
    """Whether a puzzle has solutions but none in whole numbers up to `LARGEST_NUMBER`."""
    return not solve(numbers, target, whole=True) and bool(solve(numbers, target))


def is_held_out(numbers: Sequence[int], target: int) -> bool:
    """Whether a puzzle other than a Game of 24 only ever tests: a fixed function of its numbers and target."""
    return only_tests(format_prompt(sorted(numbers), target))


def random_trace(rng: random.Random, count: int) -> tuple[Puzzle, tuple[Step, ...]]:
    """A random puzzle of `count` numbers with one of its solutions: random steps, whose outcome becomes the target."""
    while True:
        numbers = tuple(rng.randint(1, LARGEST_INPUT) for _ in range(count))
        state: State = tuple(sorted(numbers))
        steps: list[Step] = []
        while len(state) > 1:
            step = _random_step(rng, state)
            if step is None:
                break
            steps.append(step)
            state = step.remaining
        if len(state) == 1 and state[0] in TARGETS and state[0] != TARGET:
            return Puzzle(numbers, int(state[0])), tuple(steps)


def _random_step(rng: random.Random, state: State) -> Step | None:
    """A random canonical step of whole numbers up to `LARGEST_NUMBER`, or None where the dice show none."""
    i, j = sorted(rng.sample(range(len(state)), 2))
    op = rng.choice("+-*/")
    small, large = state[i], state[j]
    left, right = (small, large) if op in "+*" else (large, small)
    try:
        result = outcome(int(left), op, int(right))
    except ValueError:
        return None
    rest = (*state[:i], *state[i + 1 : j], *state[j + 1 :], result)
    return Step(left, op, right, result, tuple(sorted(rest))) if result <= LARGEST_NUMBER else None


def puzzles(seed: int, count: int, numbers: int) -> list[Puzzle]:
    """`count` held-out Countdown puzzles of so many numbers."""
    rng = random.Random(seed)
    found: list[Puzzle] = []
    while len(found) < count:
        puzzle, _ = random_trace(rng, numbers)
        if is_held_out(*puzzle):
            found.append(puzzle)
    return found


@lru_cache(maxsize=1 << 16)
def _traces(state: State, target: int, whole: bool) -> tuple[tuple[Step, ...], ...]:
    if len(state) == 1:
        return ((),) if state[0] == target else ()
    return tuple((step, *rest) for step in _steps(state, whole) for rest in _traces(step.remaining, target, whole))


def _steps(state: State, whole: bool) -> Iterator[Step]:
    """Every distinct canonical step from an ascending state."""
    seen = set()
    for i in range(len(state)):
        for j in range(i + 1, len(state)):
            small, large = state[i], state[j]
            if (small, large) in seen:
                continue
            seen.add((small, large))
            rest = state[:i] + state[i + 1 : j] + state[j + 1 :]
            for left, op, right, result in _operations(small, large):
                if whole and (Fraction(result).denominator != 1 or result > LARGEST_NUMBER):
                    continue
                yield Step(left, op, right, result, tuple(sorted((*rest, result))))


def _operations(small: Number, large: Number) -> Iterator[tuple[Number, str, Number, Number]]:
    """Operations on two ascending numbers: + and * take the smaller first, - the larger."""
    yield small, "+", large, small + large
    yield large, "-", small, large - small
    yield small, "*", large, small * large
    if small != 0:
        yield large, "/", small, _quotient(large, small)
    if large not in (0, small):
        yield small, "/", large, _quotient(small, large)


def _quotient(a: Number, b: Number) -> Number:
    quotient = Fraction(a) / Fraction(b)
    return int(quotient) if quotient.denominator == 1 else quotient


class _Node(NamedTuple):
    """A number ("leaf"), a sum of signed terms ("+") or a product of factors to the power 1 or -1 ("*")."""

    kind: str
    value: Number
    parts: tuple[tuple[int, "_Node"], ...] = ()

    def text(self) -> str:
        if self.kind == "leaf":
            return str(self.value)
        positive, negative = ("+", "-") if self.kind == "+" else ("*", "/")
        words = []
        for sign, part in self.parts:
            body = part.text()
            grouped = f"({body})" if self.kind == "*" and part.kind == "+" else body
            words.append((positive if sign > 0 else negative) + grouped)
        return "".join(words)[1:]


def expression(steps: Sequence[Step]) -> str:
    """The infix expression of a valid trace, such as "(10-4)*(8-4)".

    Nested sums and products are flattened and their parts ordered (positive first, then the largest), so step order,
    associativity and commutativity do not matter: a-(b-c) and a+c-b are one expression. Where an input number
    equals an earlier result, a step takes the input number.
    """
    if not steps:
        raise ValueError("expected at least one step; found none")
    inputs = [*steps[0].remaining, steps[0].left, steps[0].right]
    inputs.remove(steps[0].result)
    pool = [_Node("leaf", number) for number in inputs]

    def take(value: Number) -> _Node:
        return pool.pop(next(index for index, node in enumerate(pool) if node.value == value))

    for step in steps:
        left, right = take(step.left), take(step.right)
        pool.append(_combine(left, step.op, right, step.result))
    return pool[-1].text()


def _combine(left: _Node, op: str, right: _Node, value: Number) -> _Node:
    kind = "+" if op in "+-" else "*"
    sign = 1 if op in "+*" else -1
    parts = _parts(left, kind) + [(sign * inner, part) for inner, part in _parts(right, kind)]
    ordered = sorted(parts, key=lambda item: (-item[0], -Fraction(item[1].value), item[1].text()))
    return _Node(kind, value, tuple(ordered))


def _parts(node: _Node, kind: str) -> list[tuple[int, _Node]]:
    return list(node.parts) if node.kind == kind else [(1, node)]
