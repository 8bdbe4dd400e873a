"""Exact verifiers on tokens, in JAX: jittable, and right under `vmap`.

They agree with `countdown.verify` and `word_problems.verify` on the text of the tokens. Numbers must be single tokens, as
the tokenizer writes them: the tokens "1", "0" in a row are refused although their text reads "10".
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.models.reasoner import tokenizer, word_problems
from latentrace.models.reasoner.countdown import TARGET

Array = jax.Array

_NUMBERS = tokenizer.NUMBER_OF_TOKEN
_OPERATORS = tokenizer.OPERATOR_OF_TOKEN
_EQUALS, _BAR, _SPACE, _NEWLINE, _ANSWER = (
    tokenizer.TOKEN_ID[text]
    for text in (tokenizer.EQUALS, tokenizer.BAR, tokenizer.SPACE, tokenizer.NEWLINE, word_problems.ANSWER)
)
_ACTOR_IDS = [tokenizer.TOKEN_ID[word] for word in (*word_problems.NAMES, word_problems.TOGETHER)]
_ACTORS = np.isin(np.arange(tokenizer.VOCAB_SIZE), _ACTOR_IDS)
_ABSENT = -1
NO_ANSWER = -1

LINE_LENGTH = 8
"""Tokens of a step of a word problem, such as `Ann 12+5=17`, newline included; its answer's line has 4."""


# --- Countdown and the Game of 24 -------------------------------------------------------------------------------------


def step_length(count: Any) -> Any:
    """Tokens of a line from `count` numbers (an integer or int32[]): 12 from four of them, newline included."""
    return 6 + 2 * (count - 1)


def trace_length(count: int) -> int:
    """Tokens of a whole trace from `count` numbers, without the end token."""
    return sum(step_length(k) for k in range(2, count + 1))


def puzzle_state(numbers: Sequence[int] | Array) -> Array:
    """int32[K]: the numbers that remain before the first step, ascending."""
    return jnp.sort(jnp.asarray(numbers, jnp.int32))


def is_solved(remaining: Array, target: Array | int = TARGET) -> Array:
    """bool[]: whether `target` is the only number of `remaining` (int32[K])."""
    return (remaining[0] == target) & jnp.all(remaining[1:] == _ABSENT)


def step_is_valid(remaining: Array, tokens: Array, length: Array | int) -> tuple[Array, Array]:
    """Whether the line `tokens[:length]` is a right step from `remaining`, and what then remains.

    `remaining` int32[K]: the numbers that remain, absent ones -1, in any order. `tokens` int32[T]: the line, newline
    included; what follows `length` is ignored. Returns bool[] and int32[K], ascending and then -1; after a wrong step
    nothing remains, so that every later step is wrong too.
    """
    remaining = jnp.asarray(remaining, jnp.int32)
    size = remaining.shape[0]
    line = _window(tokens, step_length(size))
    numbers = jnp.asarray(_NUMBERS)[line]
    count = jnp.sum(remaining != _ABSENT)
    well_formed = _has_shape(line, numbers, count, size) & (length == step_length(count)) & (count >= 2)

    left, right, result = numbers[0], numbers[2], numbers[4]
    without_left, has_left = _remove(remaining, left)
    left_over, has_right = _remove(without_left, right)
    # Two numbers are gone, so the last slot is free for the result.
    correct = _ascending(_ascending(left_over).at[-1].set(result))
    slot = jnp.arange(size - 1)
    listed = jnp.where(slot < count - 1, numbers[6::2], _ABSENT)
    lists_it = jnp.array_equal(_ascending(jnp.append(listed, _ABSENT)), correct)

    valid = well_formed & has_left & has_right & _is_right(left, line[1], right, result) & lists_it
    return valid, jnp.where(valid, correct, _ABSENT)


def trace_is_valid(numbers: Array, tokens: Array, length: Array | int, target: Array | int = TARGET) -> Array:
    """bool[]: whether `tokens[:length]` (int32[T], without the prompt) makes `target` from `numbers` (int32[K]).

    The end token may follow the lines and be counted in `length`, or not.
    """
    remaining, start = puzzle_state(numbers), 0
    size, total = remaining.shape[0], trace_length(remaining.shape[0])
    trace = _window(tokens, total + 1)
    ended = (length == total + 1) & (trace[-1] == tokenizer.END_ID)
    valid = (length == total) | ended
    for count in range(size, 1, -1):
        line = trace[start : start + step_length(count)]
        step_valid, remaining = step_is_valid(remaining, line, step_length(count))
        valid, start = valid & step_valid, start + step_length(count)
    return valid & is_solved(remaining, target)


def _window(tokens: Array, length: int) -> Array:
    """The first `length` tokens, filled up with the end token."""
    tokens = jnp.asarray(tokens, jnp.int32)[:length]
    return jnp.pad(tokens, (0, length - tokens.shape[0]), constant_values=tokenizer.END_ID)


def _has_shape(line: Array, numbers: Array, count: Array, size: int) -> Array:
    """Whether numbers and separators of a line stand where `count - 1` listed numbers put them."""
    is_number = numbers >= 0
    head = is_number[0] & is_number[2] & (line[3] == _EQUALS) & is_number[4] & (line[5] == _BAR)
    slot = jnp.arange(size - 1)
    separator = jnp.where(slot == count - 2, _NEWLINE, _SPACE)
    listed = is_number[6::2] & (line[7::2] == separator)
    return head & jnp.all(listed | (slot >= count - 1))


def _is_right(left: Array, operator_token: Array, right: Array, result: Array) -> Array:
    """Whether the operation is one and gives `result`; products of numbers up to 199 fit int32 easily."""
    operator = jnp.asarray(_OPERATORS)[operator_token]
    outcomes = jnp.stack(
        [left + right == result, left - right == result, left * right == result, (right * result == left) & (right > 0)]
    )
    return (operator >= 0) & outcomes[operator]


def _remove(remaining: Array, number: Array) -> tuple[Array, Array]:
    """`remaining` without one copy of `number`, and whether it had one."""
    hits = remaining == number
    return remaining.at[jnp.argmax(hits)].set(_ABSENT), jnp.any(hits) & (number >= 0)


def _ascending(remaining: Array) -> Array:
    """Numbers ascending, absent ones last."""
    largest = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(remaining == _ABSENT, largest, remaining))
    return jnp.where(ordered == largest, _ABSENT, ordered)


# --- word problems ----------------------------------------------------------------------------------------------------


def answer_of(tokens: Array, length: Array | int) -> Array:
    """int32[]: the answer that the line `tokens[:length]` (int32[T]) gives, `NO_ANSWER` where it is another line."""
    line = _window(tokens, 4)
    number = jnp.asarray(_NUMBERS)[line[2]]
    is_answer = (line[0] == _ANSWER) & (line[1] == _SPACE) & (line[3] == _NEWLINE) & (length == 4)
    return jnp.where(is_answer, number, NO_ANSWER)


def arithmetic_is_right(tokens: Array, length: Array | int) -> Array:
    """bool[]: whether the line `tokens[:length]` (int32[T]) of a word problem is a step whose arithmetic is right.

    It does not look at the question: a right sum of the wrong numbers passes.
    """
    line = _window(tokens, LINE_LENGTH)
    left, right, result = (jnp.asarray(_NUMBERS)[line[place]] for place in (2, 4, 6))
    return _is_step(line) & (length == LINE_LENGTH) & _is_right(left, line[3], right, result)


def solution_is_right(answer: Array | int, tokens: Array, length: Array | int) -> Array:
    """bool[]: whether `tokens[:length]` (int32[T], without the prompt) are steps and then the right `answer`.

    Its steps may be wrong, or others than the solver's. The end token may be counted in `length`, or not.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    length = jnp.asarray(length, jnp.int32)
    length = length - ((length > 0) & (tokens[jnp.maximum(length - 1, 0)] == tokenizer.END_ID))
    steps, rest = jnp.divmod(length, LINE_LENGTH)
    last = jax.lax.dynamic_slice_in_dim(jnp.pad(tokens, (0, 4), constant_values=tokenizer.END_ID), length - 4, 4)
    lines = _window(tokens, -(-tokens.shape[0] // LINE_LENGTH) * LINE_LENGTH).reshape(-1, LINE_LENGTH)
    shaped = jax.vmap(_is_step)(lines) | (jnp.arange(lines.shape[0]) >= steps)
    return (rest == 4) & jnp.all(shaped) & (answer_of(last, 4) == answer)


def _is_step(line: Array) -> Array:
    """Whether eight tokens have the form of a step, right or wrong."""
    numbers = jnp.asarray(_NUMBERS)[line]
    head = jnp.asarray(_ACTORS)[line[0]] & (line[1] == _SPACE) & (jnp.asarray(_OPERATORS)[line[3]] >= 0)
    return head & (numbers[2] >= 0) & (numbers[4] >= 0) & (line[5] == _EQUALS) & (numbers[6] >= 0) & (line[7] == _NEWLINE)
