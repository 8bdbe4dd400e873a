"""Word problems: the generator, the exact solver, and the verifiers."""

import random
from collections import Counter

import jax
import numpy as np
import pytest

from latentrace.models.reasoner import tokenizer, verifier, word_problems
from latentrace.models.reasoner.word_problems import Solution, Step, format_prompt, format_trace, parse_trace, solve, verify

QUESTION = (
    "Ann has 12 pens. Bob has 5 more pens than Ann. Eve finds 3 cups. Bob gives Ann 4 pens. "
    "Ann sells half of the pens. How many pens do Ann and Bob have?"
).replace("Eve finds 3 cups", "Eve has 3 cups")
TRACE = "Bob 12+5=17\nBob 17-4=13\nAnn 12+4=16\nAnn 16/2=8\ntogether 8+13=21\nanswer 21\n"

text_tokens = tokenizer.build_tokenizer()


def encode(text):
    return text_tokens.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def found():
    rng = random.Random(0)
    return [word_problems.generate(rng) for _ in range(400)]


class TestSolver:
    def test_reads_every_kind_of_sentence(self):
        assert format_trace(solve(QUESTION)) == TRACE
        assert solve("Dan has 30 keys. Eve has 2 times as many keys as Dan. Hugo has 9 fewer keys than Eve. Hugo loses 1 keys. "
                     "How many keys does Hugo have?").answer == 50  # fmt: skip

    def test_takes_only_the_steps_that_matter(self):
        question = "Ann has 9 cups. Bob has 7 cups. Bob buys 2 cups. Ann sells 3 cups. How many cups does Ann have?"
        assert solve(question) == Solution((Step("Ann", 9, "-", 3, 6),), 6)
        assert solve("Ann has 9 cups. How many cups does Ann have?") == Solution((), 9)

    @pytest.mark.parametrize(
        ("question", "words"),
        [
            ("", "expected sentences and a question"),
            ("Ann has 9 cups.", "expected sentences and a question"),
            ("Ann has 9 cups. Ann eats 2 cups. How many cups does Ann have?", "sentence 2, 'Ann eats 2 cups.', is none"),
            ("Ann has 9 cups. How many cups does Bob have?", "how many cups Bob has is not said"),
            ("Ann has 9 cups. Ann loses 10 cups. How many cups does Ann have?", "Ann would have -1"),
            ("Ann has 9 cups. Ann sells half of the cups. How many cups does Ann have?", "no half"),
            (
                "Ann has 190 cups. Ann buys 10 cups. How many cups does Ann have?",
                "Ann would have 200; numbers go from 0 to 199",
            ),
            ("Ann has 1000 cups. How many cups does Ann have?", "1000 is out of range"),
            ("Ann has 9 cups. Ann has 8 cups. How many cups does Ann have?", "is said twice"),
            ("How many cups does Ann have? Ann has 9 cups.", "expected sentences and a question"),
            ("Ann has 9 cups? How many cups does Ann have?", "sentence 1"),
            ("4 6 8 10?", "is none that the reasoner was trained on"),
        ],
    )
    def test_says_what_it_cannot_read(self, question, words):
        with pytest.raises(ValueError, match=words.replace("?", r"\?").replace("'", "'")):
            solve(question)


class TestGenerator:
    def test_the_solver_reads_what_was_generated(self, found):
        for question, solution in found:
            assert solve(question) == solution
            assert all(step.is_right for step in solution.steps)
            assert 0 <= solution.answer <= 199

    def test_difficulty_is_spread_and_texts_differ(self, found):
        counts = Counter(len(solution.steps) for _, solution in found)
        assert sorted(counts) == [2, 3, 4, 5, 6]
        assert min(counts.values()) > 40
        assert len({question for question, _ in found}) == len(found)
        assert Counter(solution.answer for _, solution in found).most_common(1)[0][1] < 20

    def test_most_problems_hold_distractors(self, found):
        def sentences(question):
            return question.count(".")

        needed = [len(solution.steps) + 1 for _, solution in found]
        assert np.mean([sentences(q) > n for (q, _), n in zip(found, needed)]) > 0.4

    def test_held_out_problems_never_train(self, found):
        assert not any(word_problems.is_held_out(question) for question, _ in found)
        tests = word_problems.problems(0, 20)
        assert all(word_problems.is_held_out(question) for question in tests)
        assert tests == word_problems.problems(0, 20)
        assert {len(solve(q).steps) for q in word_problems.problems(1, 5, steps=3)} == {3}

    def test_their_words_are_all_in_the_vocabulary(self, found):
        for question, solution in found[:100]:
            for text in (format_prompt(question), format_trace(solution)):
                ids = encode(text)
                assert tokenizer.TOKEN_ID[tokenizer.UNKNOWN] not in ids
                assert text_tokens.decode(ids) == text


class TestVerifiers:
    def test_only_the_answer_counts(self):
        assert verify(QUESTION, TRACE)
        assert verify(QUESTION, "answer 21\n")
        assert verify(QUESTION, "Ann 1+1=3\nanswer 21\n")
        assert not verify(QUESTION, TRACE.replace("answer 21", "answer 22"))
        assert not verify(QUESTION, TRACE + "answer 21\n")
        assert not verify(QUESTION, TRACE[:-1])
        assert not verify(QUESTION, "")

    def test_traces_round_trip(self):
        assert format_trace(parse_trace(TRACE)) == TRACE
        with pytest.raises(ValueError, match="expected a step such as"):
            parse_trace("Zoe 1+1=2\nanswer 2\n")

    def test_the_token_verifier_agrees_with_the_text(self, found):
        rng = np.random.default_rng(0)
        cases, width = [], 60
        for question, solution in found:
            pieces = [tokenizer.VOCABULARY[i] for i in encode(format_trace(solution))]
            kind = rng.integers(5)
            if kind == 1:
                pieces[rng.integers(len(pieces))] = tokenizer.VOCABULARY[rng.integers(3, tokenizer.VOCAB_SIZE)]
            elif kind == 2:
                pieces[-2] = str(rng.integers(0, 199))
            elif kind == 3:
                del pieces[rng.integers(len(pieces))]
            elif kind == 4:
                pieces = pieces[8:] + pieces[:8] * rng.integers(0, 2)
            cases.append((question, "".join(pieces), [tokenizer.TOKEN_ID[piece] for piece in pieces]))
        tokens = np.array([ids + [tokenizer.END_ID] * (width - len(ids)) for *_, ids in cases], np.int32)
        lengths = np.array([len(ids) for *_, ids in cases])
        answers = np.array([solve(question).answer for question, *_ in cases])
        check = jax.jit(jax.vmap(verifier.solution_is_right))
        expected = [verify(question, text) for question, text, _ in cases]
        assert check(answers, tokens, lengths).tolist() == expected
        assert check(answers, tokens, lengths + 1).tolist() == expected, "the end token may be counted"
        assert 80 < sum(expected) < 320

    def test_lines(self):
        answer = jax.jit(verifier.answer_of)
        right = jax.jit(verifier.arithmetic_is_right)

        def line(text):
            ids = encode(text)
            return np.array(ids + [tokenizer.END_ID] * (8 - len(ids))), len(ids)

        assert answer(*line("answer 21\n")) == 21
        assert answer(*line("Bob 12+5=17\n")) == answer(*line("answer 21")) == verifier.NO_ANSWER
        assert right(*line("Bob 12+5=17\n"))
        assert right(*line("together 16/2=8\n"))
        assert not right(*line("Bob 12+5=18\n"))
        assert not right(*line("answer 21\n"))
        assert not right(*line("pens 12+5=17"))
