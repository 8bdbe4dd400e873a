"""Constraints that the host decides: grammars and JSON schemas by llguidance, and parsers of one's own."""

import importlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import inference, models, ppl
from latentrace.ppl.constraints import CallbackError, grammar, host, regex
from latentrace.ppl.constraints.grammar import GrammarParser
from latentrace.ppl.errors import AllParticlesDeadError, SiteError

pytest.importorskip("llguidance")
run_module = importlib.import_module("latentrace.ppl.run")
KEY = jax.random.key(0)


def markov(*vocabulary, seed=3):
    """A Markov chain with uneven random logits over EOS and some strings."""
    rng, size = np.random.default_rng(seed), len(vocabulary) + 1
    return models.MarkovLM(rng.normal(size=size), 1.5 * rng.normal(size=(size, size)), 0, ("", *vocabulary))


def program(lm, constraint, longest):
    @ppl.program
    def program():
        text, context = ppl.generate("text", ppl.prompt(lm), max_tokens=longest, constraint=constraint)
        rest, _ = ppl.generate("rest", context, max_tokens=1)
        ppl.factor("liking", 0.5 * rest.length)
        return text

    return program


LETTERS = markov("a", "b", "ab")
BRACKETS = markov("(", ")", "()", "((")


def balanced(text):
    depths = np.cumsum([1 if c == "(" else -1 for c in text])
    return len(text) == 0 or (depths.min() >= 0 and depths[-1] == 0)


class Balanced:
    """A parser of balanced brackets over the tokens of `BRACKETS`."""

    steps = (0, 1, -1, 0, 2)

    def __init__(self, depth=0):
        self.depth = depth

    def allowed(self):
        return np.array([self.depth == 0, True, self.depth > 0, True, True])

    def after(self, token):
        return Balanced(self.depth + self.steps[token])


NESTED = 'start: ("(" start ")")*'


class TestPosteriors:
    @pytest.mark.parametrize("pattern", ["(ab)+", "a*b?", "b|aab.*"])
    def test_a_grammar_means_what_the_same_regular_expression_means(self, pattern):
        by_table, by_host = (
            inference.Exact().run(KEY, program(LETTERS, constraint, 4))
            for constraint in (regex(LETTERS, pattern), grammar(LETTERS, f"start: /{pattern}/"))
        )
        assert by_host.log_evidence == pytest.approx(by_table.log_evidence, abs=1e-6)
        rows = [{row.value: row.probability for row in run.marginal("text")} for run in (by_table, by_host)]
        assert rows[1] == pytest.approx(rows[0], abs=1e-6)

    @pytest.mark.parametrize("most_prefixes", [4096, 2])
    @pytest.mark.parametrize("written_in", ["Lark", "Python"])
    def test_what_no_automaton_accepts(self, written_in, most_prefixes):
        free = inference.Exact().run(KEY, program(BRACKETS, None, 4))
        weights = np.exp(free.log_weights) * [balanced(text) for text in free.values["text"].decode()]
        if written_in == "Lark":
            constraint = grammar(BRACKETS, NESTED)
            constraint.about.host.most_prefixes = most_prefixes
        else:
            constraint = host(BRACKETS, Balanced(), "brackets", most_prefixes=most_prefixes)
        assert len(constraint.about.host.known) <= most_prefixes
        exact = inference.Exact().run(KEY, program(BRACKETS, constraint, 4))
        assert exact.log_evidence == pytest.approx(np.log(weights.sum()), abs=1e-5)
        runs = [inference.SMC(100).run(key, program(BRACKETS, constraint, 4)) for key in jax.random.split(KEY, 6)]
        alive = lambda run: run.values["text"][np.isfinite(run.log_weights)].decode()
        assert all(balanced(text) for run in runs for text in alive(run))
        evidence = np.exp([run.log_evidence for run in runs])
        assert abs(evidence.mean() - weights.sum()) < 5 * evidence.std(ddof=1) / 6**0.5 + 1e-6

    def test_json(self):
        lm = markov("{", "}", '"n"', '"m"', ":", "1", "-2", ",", '"n":1', " ")
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
        for source in (schema, json.dumps(schema)):
            run = inference.SMC(100).run(KEY, program(lm, grammar(lm, source), 7))
            texts = run.values["text"][np.isfinite(run.log_weights)].decode()
            parsed = [json.loads(text) for text in texts]
            assert all(set(value) == {"n"} and isinstance(value["n"], int) for value in parsed)
            assert len(set(texts)) > 3
            assert any('"n":1' in text for text in texts), "every spelling is allowed"

    def test_in_loops_and_plates(self):
        constraint = grammar(BRACKETS, NESTED)

        @ppl.program
        def many():
            def step(context, _):
                text, _ = ppl.generate("looped", context, max_tokens=2, constraint=constraint)
                return context, text

            _, looped = jax.lax.scan(step, ppl.prompt(BRACKETS), length=2)
            write = lambda: ppl.generate("plated", ppl.prompt(BRACKETS), max_tokens=2, constraint=constraint)[0].tokens
            ppl.vmap(write, axis_size=3)()
            return looped

        run = inference.SMC(20).run(KEY, many)
        alive = np.isfinite(run.log_weights)
        for site in ("looped", "plated"):
            assert all(balanced(text) for texts in run.values[site][alive].decode() for text in texts)


class TestCost:
    def test_one_call_for_all_particles_and_no_compilation_for_another_grammar(self):
        constraints = [grammar(LETTERS, f"start: {what}") for what in ('"ab" "b"', "/b+a/")]
        for i, constraint in enumerate(constraints):
            before = run_module.traced
            run = inference.ImportanceSampling(50).run(KEY, program(LETTERS, constraint, 3))
            assert run_module.traced == before or i == 0
            assert 0 < constraint.cost.calls <= run.values["text"].length.max()
            assert 0 < constraint.cost.masks < 50
            assert 0 < constraint.cost.seconds < run.ledger.seconds
        assert {text for text in run.values["text"].decode()} <= {"ba", "bba"}


class Wrong:
    """A parser that does something else than to answer, after so many tokens."""

    def __init__(self, act, tokens):
        self.act, self.tokens = act, tokens

    def allowed(self):
        return np.ones(4, bool) if self.tokens else self.act()

    def after(self, token):
        return Wrong(self.act, self.tokens - 1)


class TestFaults:
    @pytest.mark.parametrize(
        ("act", "message"),
        [
            (lambda: 1 / 0, "the wrong one: its parser raised ZeroDivisionError: division by zero"),
            (lambda: time.sleep(3), "the wrong one: its parser has not answered within 0.5 s"),
            (lambda: np.ones(5, bool), r"the wrong one: its parser must answer bool\[4\], found bool\[5\]"),
            (lambda: np.ones(4), r"the wrong one: its parser must answer bool\[4\], found float64\[4\]"),
        ],
    )
    @pytest.mark.parametrize("tokens", [0, 1])
    def test_end_the_run_and_are_said(self, act, message, tokens):
        constraint = host(LETTERS, Wrong(act, tokens), "the wrong one", time_limit=0.5)
        start = time.perf_counter()
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            inference.SMC(4).run(KEY, program(LETTERS, constraint, 3))
        assert time.perf_counter() - start < 60
        right = inference.SMC(4).run(KEY, program(LETTERS, grammar(LETTERS, "start: /b+a/"), 3))
        assert set(right.values["text"].decode()) <= {"ba", "bba"}

    def test_a_text_that_is_cut_before_it_is_complete_has_probability_0(self):
        constraint = grammar(LETTERS, 'start: "abab"')
        with pytest.raises(AllParticlesDeadError, match="last one died at site 'text'"):
            inference.SMC(4).run(KEY, program(LETTERS, constraint, 1))
        assert set(inference.SMC(50).run(KEY, program(LETTERS, constraint, 2)).of("text")) == {"abab"}

    def test_a_parser_that_gives_up(self):
        class Exhausted:
            compute_bitmask = staticmethod(lambda: bytes([1, 0, 0, 0]))
            is_error = staticmethod(lambda: True)
            get_error = staticmethod(lambda: "LexerTooComplex\n<state>")

        with pytest.raises(CallbackError, match=r"llguidance stopped: LexerTooComplex$"):
            GrammarParser(Exhausted(), 4, 0).allowed()

    def test_tokens_that_cannot_go_on_are_no_fault(self):
        parser = grammar(LETTERS, 'start: "a" "z" | "b"').about.host.root.parser
        assert parser.allowed().tolist() == [False, True, True, False]
        assert parser.after(1).allowed().tolist() == [False] * 4

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("start: foo", 'grammar .*start: foo.*unknown name: "foo"'),
            ({"type": "objectx"}, "JSON schema .*Invalid type: objectx"),
            ("{bad", "JSON schema '{bad' is no JSON"),
            ('start: "z"', "no token of this model begins a text of it"),
        ],
    )
    def test_wrong_grammars(self, source, message):
        with pytest.raises(SiteError, match=message):
            grammar(LETTERS, source)

    def test_a_mask_outside_of_a_run(self):
        constraint = grammar(LETTERS, "start: /b+a/")
        state = constraint.next(constraint.start(3), jnp.int32(2))
        assert jax.jit(constraint.mask)(state).tolist() == [False, True, True, False]
