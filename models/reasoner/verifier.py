"""The exact verifier on tokens, in JAX: jittable, and right under `vmap`.

It agrees with `game24.verify` on the text of the tokens. Numbers must be single tokens, as the tokenizer writes them:
the tokens "1", "0" in a row are refused although their text reads "10".
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from latentrace.models.reasoner import tokenizer
from latentrace.models.reasoner.game24 import TARGET

Array = jax.Array

STEP_LENGTHS = (12, 10, 8)
"""Tokens of the first, second and third line, newline included."""
TRACE_LENGTH = sum(STEP_LENGTHS)

_NUMBERS = tokenizer.NUMBER_OF_TOKEN
_OPERATORS = tokenizer.OPERATOR_OF_TOKEN
_EQUALS, _BAR, _SPACE, _NEWLINE = (
    tokenizer.TOKEN_ID[text] for text in (tokenizer.EQUALS, tokenizer.BAR, tokenizer.SPACE, tokenizer.NEWLINE)
)
_ABSENT = -1


def puzzle_state(numbers: Sequence[int] | Array) -> Array:
    """int32[4]: the numbers that remain before the first step, ascending."""
    return jnp.sort(jnp.asarray(numbers, jnp.int32))


def is_solved(remaining: Array) -> Array:
    """bool[]: whether 24 is the only number of `remaining` (int32[4])."""
    return jnp.array_equal(remaining, jnp.array([TARGET, _ABSENT, _ABSENT, _ABSENT]))


def step_is_valid(remaining: Array, tokens: Array, length: Array | int) -> tuple[Array, Array]:
    """Whether the line `tokens[:length]` is a right step from `remaining`, and what then remains.

    `remaining` int32[4]: the numbers that remain, absent ones -1, in any order. `tokens` int32[T]: the line, newline
    included; what follows `length` is ignored. Returns bool[] and int32[4], ascending and then -1; after a wrong step
    nothing remains, so that every later step is wrong too.
    """
    remaining = jnp.asarray(remaining, jnp.int32)
    line = _window(tokens, STEP_LENGTHS[0])
    numbers = jnp.asarray(_NUMBERS)[line]
    count = jnp.sum(remaining != _ABSENT)
    well_formed = _has_shape(line, numbers, count) & (length == 6 + 2 * (count - 1)) & (count >= 2)

    left, right, result = numbers[0], numbers[2], numbers[4]
    without_left, has_left = _remove(remaining, left)
    left_over, has_right = _remove(without_left, right)
    # Two numbers are gone, so the last slot is free for the result.
    correct = _ascending(_ascending(left_over).at[3].set(result))
    slot = jnp.arange(3)
    listed = jnp.where(slot < count - 1, numbers[6:12:2], _ABSENT)
    lists_it = jnp.array_equal(_ascending(jnp.append(listed, _ABSENT)), correct)

    valid = well_formed & has_left & has_right & _is_right(left, line[1], right, result) & lists_it
    return valid, jnp.where(valid, correct, _ABSENT)


def trace_is_valid(numbers: Array, tokens: Array, length: Array | int) -> Array:
    """bool[]: whether `tokens[:length]` (int32[T], without the prompt) makes 24 from `numbers` (int32[4]).

    The end token may follow the three lines and be counted in `length`, or not.
    """
    trace = _window(tokens, TRACE_LENGTH + 1)
    ended = (length == TRACE_LENGTH + 1) & (trace[-1] == tokenizer.END_ID)
    valid = (length == TRACE_LENGTH) | ended
    remaining, start = puzzle_state(numbers), 0
    for step_length in STEP_LENGTHS:
        step_valid, remaining = step_is_valid(remaining, trace[start : start + step_length], step_length)
        valid, start = valid & step_valid, start + step_length
    return valid & is_solved(remaining)


def _window(tokens: Array, length: int) -> Array:
    """The first `length` tokens, filled up with the end token."""
    tokens = jnp.asarray(tokens, jnp.int32)[:length]
    return jnp.pad(tokens, (0, length - tokens.shape[0]), constant_values=tokenizer.END_ID)


def _has_shape(line: Array, numbers: Array, count: Array) -> Array:
    """Whether numbers and separators of a line stand where `count - 1` listed numbers put them."""
    is_number = numbers >= 0
    head = is_number[0] & is_number[2] & (line[3] == _EQUALS) & is_number[4] & (line[5] == _BAR)
    slot = jnp.arange(3)
    separator = jnp.where(slot == count - 2, _NEWLINE, _SPACE)
    listed = is_number[6:12:2] & (line[7:12:2] == separator)
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
