"""Countdown and the Game of 24: numbers and text, exact solutions, and the two verifiers."""

import csv
import random
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrace.models.reasoner import countdown, data, tokenizer, verifier
from latentrace.models.reasoner.countdown import (
    Puzzle,
    Step,
    check_puzzle,
    expression,
    format_prompt,
    format_step,
    format_trace,
    needs_fractions,
    parse_prompt,
    parse_step,
    parse_trace,
    solve,
    verify,
)
from latentrace.models.reasoner.splits import FRESH, HARD

COLLECTION = Path(__file__).parents[3] / "shared" / "data" / "game24" / "24.csv"
TRACE = "10-4=6 | 6 6 8\n8-6=2 | 2 6\n2*6=12 | 12\n"
SOLUTION = "8-6=2 | 2 4 10\n2*10=20 | 4 20\n4+20=24 | 24\n"

text_tokens = tokenizer.build_tokenizer()
token_verdict = jax.jit(verifier.trace_is_valid)


def collection():
    if not COLLECTION.exists():
        pytest.skip("the Game of 24 collection does not lie beside this checkout")
    with COLLECTION.open() as file:
        return [tuple(int(n) for n in row["Puzzles"].split()) for row in csv.DictReader(file)]


def encode(text):
    return text_tokens.encode(text, add_special_tokens=False).ids


class TestText:
    def test_steps_and_prompts_round_trip(self):
        assert format_prompt((4, 6, 8, 10)) == "4 6 8 10\n"
        for puzzle in (Puzzle((4, 6, 8, 10)), Puzzle((50, 3, 7, 7, 1), 99)):
            assert parse_prompt(format_prompt(*puzzle)) == puzzle
        steps = parse_trace(SOLUTION)
        assert steps[0] == Step(8, "-", 6, 2, (2, 4, 10))
        assert format_trace(steps) == SOLUTION

    @pytest.mark.parametrize("line", ["8-6=2 | 2 4 10", "08-6=2 | 2\n", "8-6=-2 | 2\n", "8^6=2 | 2\n", "8-6=2 |\n", ""])
    def test_what_is_no_step_is_refused(self, line):
        with pytest.raises(ValueError, match="expected a step such as"):
            parse_step(line)

    def test_fractions_are_not_written(self):
        with pytest.raises(ValueError, match="whole numbers only"):
            format_step(solve((3, 3, 8, 8))[0][0]._replace(result=Fraction(8, 3)))

    @pytest.mark.parametrize(
        ("numbers", "found"),
        [
            ("4 6", "found 2"),
            ("1 2 3 4 5 6", "found 6"),
            ([4, 6, 8, 51], "51 is out of range"),
            ("0 1 2 3", "0 is"),
            ("4 6 8 x", "'x' is not"),
            ("4 6 8=", "'' is not"),
            ("4 6 8=9", "target 9 is out of range"),
            (Puzzle((4, 6, 8), 101), "target 101 is out of range"),
        ],
    )
    def test_what_is_no_puzzle_is_refused(self, numbers, found):
        with pytest.raises(ValueError, match=f"expected three to five whole numbers from 1 to 50.*{found}"):
            check_puzzle(numbers)

    def test_puzzles_come_as_text_or_integers(self):
        assert check_puzzle(" 4, 6 8 10\n") == check_puzzle(np.array([4, 6, 8, 10])) == Puzzle((4, 6, 8, 10))
        assert check_puzzle("4 6 8 = 32") == check_puzzle(Puzzle((4, 6, 8), 32)) == Puzzle((4, 6, 8), 32)


class TestTokenizer:
    def test_decode_inverts_encode(self):
        for text in (format_prompt((1, 12, 13, 7)) + SOLUTION, "199/1=199 | 0 1 199\n", "10-", " ", "6 | ", ""):
            assert text_tokens.decode(encode(text)) == text

    @given(st.lists(st.sampled_from(tokenizer.VOCABULARY[3:]), max_size=30).map("".join))
    def test_decode_inverts_encode_on_any_text_of_known_tokens(self, text):
        ids = encode(text)
        if tokenizer.TOKEN_ID[tokenizer.UNKNOWN] not in ids:
            assert text_tokens.decode(ids) == text

    def test_known_ids(self):
        assert [tokenizer.VOCABULARY[i] for i in encode("10-4=6 | 6 6\n")] == [
            "10", "-", "4", "=", "6", " | ", "6", " ", "6", "\n",
        ]  # fmt: skip
        assert text_tokens.encode("4").ids == [tokenizer.START_ID, tokenizer.TOKEN_ID["4"]]
        assert encode("200 x") == [0, 0]

    def test_lengths(self):
        assert len(encode(SOLUTION)) + 1 == data.TRACE_LENGTH == verifier.trace_length(4) + 1
        assert len(encode(format_prompt((4, 6, 8, 10)))) + 1 == data.PROMPT_LENGTH


class TestSolutions:
    def test_the_collection_is_solvable_and_sixteen_puzzles_need_fractions(self):
        puzzles = collection()
        assert len(puzzles) == 1362
        assert all(solve(puzzle, whole=True) or solve(puzzle) for puzzle in puzzles)
        assert sum(needs_fractions(puzzle) for puzzle in puzzles) == 16
        assert not any(needs_fractions(puzzle) for puzzle in HARD)
        assert sum(needs_fractions(puzzle) for puzzle in FRESH) == 3

    def test_the_hard_split_is_rows_900_to_999(self):
        puzzles = [tuple(sorted(puzzle)) for puzzle in collection()]
        assert set(HARD) == set(puzzles[900:1000])
        assert set(FRESH) <= set(puzzles) - set(HARD)
        assert len(set(FRESH)) == len(FRESH) == 100

    @pytest.mark.parametrize("puzzle", [*HARD[::10], (3, 3, 8, 8), (1, 1, 4, 6)])
    def test_expressions_are_worth_24_and_use_the_numbers(self, puzzle):
        for steps in solve(puzzle):
            text = expression(steps)
            assert eval(re.sub(r"(\d+)", r"Fraction(\1)", text)) == 24
            assert sorted(int(number) for number in re.findall(r"\d+", text)) == sorted(puzzle)

    def test_expressions_forget_the_order_of_steps(self):
        assert {expression(steps) for steps in solve((4, 6, 8, 10))} >= {"10*(8-6)+4"}
        first = parse_trace("10-4=6 | 4 6 8\n8-4=4 | 4 6\n4*6=24 | 24\n")
        other = parse_trace("8-4=4 | 4 4 10\n10-4=6 | 4 6\n6*4=24 | 24\n")
        assert expression(first) == expression(other) == "(10-4)*(8-4)"
        assert expression(solve((3, 3, 8, 8))[0]) == "8/(3-8/3)"

    def test_unsolvable(self):
        assert solve((1, 1, 1, 1)) == []
        assert not needs_fractions((1, 1, 1, 1))


def both_verifiers(cases):
    """(text verdicts, token verdicts) of [(numbers, text)]."""
    ids = [encode(text)[:40] for _, text in cases]
    tokens = np.array([row + [tokenizer.END_ID] * (40 - len(row)) for row in ids], np.int32)
    lengths = np.array([len(row) for row in ids], np.int32)
    numbers = np.array([numbers for numbers, _ in cases], np.int32)
    check = jax.jit(jax.vmap(verifier.trace_is_valid))
    return [verify(numbers, text) for numbers, text in cases], check(numbers, tokens, lengths).tolist()


def corrupted(rng, text):
    """One random edit of a trace: a number or operator replaced, a line dropped or swapped, operands turned."""
    pieces = [tokenizer.VOCABULARY[i] for i in encode(text)]
    kind, where = rng.integers(6), rng.integers(len(pieces))
    if kind == 0:
        numbers = [i for i, piece in enumerate(pieces) if piece.isdigit()]
        pieces[rng.choice(numbers)] = str(rng.integers(0, 30))
    elif kind == 1:
        operators = [i for i, piece in enumerate(pieces) if piece in tuple("+-*/")]
        pieces[rng.choice(operators)] = str(rng.choice(list("+-*/")))
    elif kind == 2:
        pieces[where] = tokenizer.VOCABULARY[rng.integers(3, tokenizer.VOCAB_SIZE)]
    elif kind == 3:
        del pieces[where]
    elif kind == 4:
        start = [0, 12, 22][rng.integers(3)]
        pieces[start], pieces[start + 2] = pieces[start + 2], pieces[start]
    else:
        first, second = rng.choice([6, 8, 10], 2)
        pieces[first], pieces[second] = pieces[second], pieces[first]
    return "".join(pieces)


class TestCountdown:
    def test_random_traces_are_solutions_that_the_solver_knows(self):
        rng = random.Random(0)
        for count in (3, 4, 5):
            for _ in range(20):
                (numbers, target), steps = countdown.random_trace(rng, count)
                assert len(numbers) == count
                assert verify(numbers, format_trace(steps), target)
                assert check_puzzle(Puzzle(numbers, target))
                if count < 5:
                    assert steps in solve(numbers, target, whole=True)

    def test_held_out_puzzles_are_few_and_their_order_does_not_matter(self):
        rng = random.Random(1)
        puzzles = [countdown.random_trace(rng, 4)[0] for _ in range(2000)]
        held_out = [countdown.is_held_out(*puzzle) for puzzle in puzzles]
        assert 0.03 < np.mean(held_out) < 0.07
        assert held_out == [countdown.is_held_out(puzzle.numbers[::-1], puzzle.target) for puzzle in puzzles]
        assert all(countdown.is_held_out(*puzzle) for puzzle in countdown.puzzles(0, 5, 3))

    @pytest.mark.parametrize("count", [3, 4, 5])
    def test_the_verifiers_agree_on_other_counts_and_targets(self, count):
        rng, dice = np.random.default_rng(count), random.Random(count)
        cases = []
        for _ in range(300):
            (numbers, target), steps = countdown.random_trace(dice, count)
            text = format_trace(steps)
            if rng.random() < 0.7:
                pieces = [tokenizer.VOCABULARY[i] for i in encode(text)]
                digits = [i for i, piece in enumerate(pieces) if piece.isdigit()]
                pieces[rng.choice(digits)] = str(rng.integers(0, 60))
                text = "".join(pieces)
            cases.append((numbers, text, target if rng.random() < 0.9 else target + 1))
        width = verifier.trace_length(count) + 1
        ids = np.array([[*encode(text), tokenizer.END_ID] for _, text, _ in cases], np.int32)
        assert ids.shape[1] == width
        check = jax.jit(jax.vmap(verifier.trace_is_valid))
        found = check(np.array([c[0] for c in cases]), ids, np.full(len(ids), width), np.array([c[2] for c in cases]))
        expected = [verify(*case) for case in cases]
        assert found.tolist() == expected
        assert 50 < sum(expected) < 250


class TestVerifiers:
    def test_a_wrong_end_is_wrong(self):
        assert not verify((4, 6, 8, 10), TRACE)
        assert verify((10, 4, 8, 6), SOLUTION)
        assert not verify((4, 6, 8, 11), SOLUTION)
        assert not verify((4, 6, 8, 10), SOLUTION[:-1])
        assert not verify((4, 6, 8, 10), "4*6=24 | 8 10 24\n")
        assert not verify((24, 1, 0, 1), "1/0=24 | 1 24 24\n24-1=23 | 23 24\n24/24=1 | 24\n")

    def test_they_agree_on_right_corrupted_and_reordered_traces(self):
        rng = np.random.default_rng(0)
        table = data.trace_table(FRESH[:40])
        traces = [text_tokens.decode(trace) for trace in table.traces]
        rows = rng.integers(len(traces), size=3000)
        cases = [(rng.permutation(table.numbers[row]).tolist(), traces[row]) for row in rows]
        cases = cases[:500] + [(numbers, corrupted(rng, text)) for numbers, text in cases[500:]]
        expected, found = both_verifiers(cases)
        assert found == expected
        assert all(expected[:500])
        assert 100 < sum(expected[500:]) < 2000, "edits that keep a trace right, and edits that do not"

    def test_they_agree_on_random_walks_that_miss_24(self):
        rng = np.random.default_rng(1)
        cases = []
        for _ in range(1000):
            numbers = state = rng.integers(1, 7, size=4).tolist()
            lines = []
            while len(state) > 1:
                state = rng.permutation(state).tolist()
                left, right, *rest = state
                op, result = [("+", left + right), ("-", left - right), ("*", left * right)][rng.integers(3)]
                state = [*rest, abs(result) if rng.random() < 0.9 else 24]
                lines.append(f"{left}{op}{right}={state[-1]} | {' '.join(str(n) for n in state)}\n")
            text = "".join(lines)
            if all(int(number) <= 199 for number in re.findall(r"\d+", text)):
                cases.append((numbers, text))
        expected, found = both_verifiers(cases)
        assert found == expected
        assert any(expected)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(0, tokenizer.VOCAB_SIZE - 1), min_size=1, max_size=12), st.integers(0, 12))
    def test_token_verdicts_imply_text_verdicts(self, noise, start):
        trace = np.array([*encode(SOLUTION), tokenizer.END_ID], np.int32)
        trace[start : start + len(noise)] = noise
        valid = token_verdict(jnp.array([4, 6, 8, 10]), trace, len(trace))
        assert not valid or verify((4, 6, 8, 10), text_tokens.decode(trace[:-1]))

    def test_steps_return_what_remains(self):
        step = jax.jit(verifier.step_is_valid)
        remaining = verifier.puzzle_state([10, 4, 8, 6])
        states = []
        for line in SOLUTION.splitlines(keepends=True):
            ids = encode(line)
            tokens = jnp.array(ids + [tokenizer.END_ID] * (24 - len(ids)))
            valid, remaining = step(remaining, tokens, len(ids))
            assert valid
            states.append(remaining.tolist())
        assert states == [[2, 4, 10, -1], [4, 20, -1, -1], [24, -1, -1, -1]]
        assert verifier.is_solved(remaining)
        assert not verifier.is_solved(jnp.array([2, 24, -1, -1]))

    def test_after_a_wrong_step_nothing_remains(self):
        tokens = jnp.array(encode("8-6=3 | 3 4 10\n"))
        valid, remaining = jax.jit(verifier.step_is_valid)(verifier.puzzle_state([4, 6, 8, 10]), tokens, 12)
        assert not valid
        assert remaining.tolist() == [-1] * 4

    def test_the_end_token_may_be_counted(self):
        trace = jnp.array([*encode(SOLUTION), tokenizer.END_ID])
        check = jax.jit(partial(verifier.trace_is_valid, jnp.array([6, 4, 8, 10])))
        assert check(trace, 31)
        assert check(trace, 30)
        assert check(trace[:30], 30)
        assert not check(trace, 29)
        assert not check(trace.at[30].set(tokenizer.TOKEN_ID["4"]), 31)
