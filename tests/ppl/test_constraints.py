"""Regular expressions as automata over bytes and tokens, and as constraints of texts."""

import importlib
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.constraints import SHARED, random_writer, regular_patterns, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrace import inference, models, ppl
from latentrace.ppl.constraints import RegexError, automaton, compile_regex, regex, words
from latentrace.ppl.errors import SiteError

run_module = importlib.import_module("latentrace.ppl.run")
tokens_module = importlib.import_module("latentrace.ppl.constraints.tokens")


def accepts(machine, text):
    state = 0
    for byte in text.encode() if isinstance(text, str) else text:
        state = machine.next[state, byte]
        if state < 0:
            return False
    return bool(machine.accepting[state])


PATTERNS = [
    "", "a(bc)?d*", "(a|b)*abb", "[^a]b", "é[à-ü]|ab", ".", r"\w\d?\s", "(?s).b", "(?i)aB[c-d]", "a{2,3}b{0}", "a??b",
    "(?x) a b # c",
    # zero-width conditions
    "^a$", "^(?:a|b)+$", r"\bab\b", r"(?m)^a$\n?b*", r"a\b b", r"é(?a:\b)a|bé\b", r"a\Bb", r"\Aab\Z",
    # atomic groups and possessive repetitions: what has matched is not tried again
    "(?>a|ab)c", "(?>a*?)b", "a++b", "(?>a|)a", "(?>(?:a|ab)(?>c|b)?)+c", "(?>a{1,3}+)b", "(?>ab|a)(?>b|bc)c?", "(?>(a|b)*)c",
    "(?>(?>a|ab)b?|abc)c*", "(?>(a|ab)(c|bcd))(d*)", "^(?>a|ab|abc)+$", "(?>a(?>b(?>c)))+", "(?>(?>a|ab)|abc)d?",
    # conditionals on groups
    "(a)?(?(1)b|c)", "(?:(a)|b)(?(1)c|d)", "(a)?(?(1)(b)?(?(2)c|d)|a)", "((a)|b)+(?(2)c|d)", "(?>(a)?)(?(1)b|c)",
    "(?>(a)|ab)(?(1)b|c)", "(?:(?(1)a|b)(c)?)+",
]  # fmt: skip
LETTERS = ["a", "b", "c", "d", " ", "\n"]
OTHERS = [
    "é",
    "éà",
    "éü",
    "éé",
    "A",
    "aBC",
    "ABd",
    "\U0001f600",
    "\U0010ffff",
    "\u07ff",
    "\u0800",
    "\uffff",
    "٣",
    "a1 ",
    "ébé",
    "aaaab",
]


class TestRegex:
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_accepts_what_fullmatch_does(self, pattern):
        machine, compiled = compile_regex(pattern), re.compile(pattern)
        for length in range(5):
            for letters in itertools.product(LETTERS, repeat=length):
                text = "".join(letters)
                assert accepts(machine, text) == bool(compiled.fullmatch(text)), text
        for text in OTHERS:
            assert accepts(machine, text) == bool(compiled.fullmatch(text)), text

    def test_dollar_is_the_end_of_the_text(self):
        assert accepts(compile_regex("a$"), "a")
        assert not accepts(compile_regex("a$\\n|b"), "a\n")

    def test_bytes_that_are_no_text_are_refused(self):
        machine = compile_regex("(?s).*")
        for wrong in (
            b"\xff",
            b"\xc0\x80",
            b"\xe0\x80\x80",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
            b"\xc3",
            b"a\x80",
            b"\xf0\x80\x80\x80",
        ):
            assert not accepts(machine, wrong), wrong
            with pytest.raises(UnicodeDecodeError):
                wrong.decode()

    def test_every_character_once(self):
        """One character of each kind and of each length in bytes, the borders included."""
        machine = compile_regex(r"\w")
        rng = np.random.default_rng(0)
        borders = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
        for code in [*borders, *rng.integers(0, 0xD800, 3000).tolist(), *rng.integers(0xE000, 0x110000, 3000).tolist()]:
            assert accepts(machine, chr(code)) == bool(re.fullmatch(r"\w", chr(code))), hex(code)

    def test_is_the_smallest(self):
        assert len(compile_regex("(a|b)*abb").next) == 4
        assert len(compile_regex("a{3}|aaa|a(aa)").next) == 4

    leaf = st.sampled_from(["a", "b", "c", "[ab]", "[^a]", ".", "", r"\b", "^", "$", "ab"])
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
            inner.map("(?>{})".format),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "??", "{1,2}", "?+", "*+", "{1,2}+"])).map(
                "(?:{0[0]}){0[1]}".format
            ),
        ),
        max_leaves=6,
    )

    @settings(deadline=None, max_examples=60)
    @given(tree)
    def test_any_pattern(self, pattern):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                machine, compiled = compile_regex(pattern), re.compile(pattern)
        except RegexError:  # it accepts nothing
            machine, compiled = None, re.compile(pattern)
        for length in range(5):
            for letters in itertools.product("abc", repeat=length):
                text = "".join(letters)
                assert (machine is not None and accepts(machine, text)) == bool(compiled.fullmatch(text)), text

    @pytest.mark.parametrize(
        ("pattern", "words_"),
        [
            ("a(", "is no regular expression: missing \\)"),
            ("(?=a)b", "assert is no part of a regular language"),
            ("(?<!a)b", "assert not is no part"),
            (r"(a)\1", "groupref is no part"),
            ("a(?!)", "is no part"),
            ("[^\\s\\S]", "accepts no text at all"),
            ("^a^b", "accepts no text at all"),
            ("(a{1000}){1000}", "repetitions are too large"),
            ("(a|b)*a(a|b){20}", "needs more than 20000 states"),
        ],
    )
    def test_what_cannot_be_is_said(self, pattern, words_):
        with pytest.raises(SiteError, match=words_):
            compile_regex(pattern)


class Spelled:
    """What a constraint needs of a model: token spellings and the end token."""

    def __init__(self, spellings, eos_id=0):
        self.spellings, self.eos_id = spellings, eos_id

    def token_bytes(self):
        return self.spellings


def allowed(lm, pattern, prefix, left):
    """By brute force: the tokens after which a completion of the whole text exists within `left` tokens."""
    spellings = lm.spellings
    tails = {b"".join(t) for n in range(left) for t in itertools.product([s for s in spellings if s], repeat=n)}

    def fits(text):
        try:
            return bool(re.fullmatch(pattern, text.decode()))
        except UnicodeDecodeError:
            return False

    return [
        fits(prefix) if i == lm.eos_id else bool(s) and any(fits(prefix + s + tail) for tail in tails)
        for i, s in enumerate(spellings)
    ]


class TestMasks:
    @pytest.mark.parametrize("pattern", ["(ab)+c?", "é|aé?", "a{4}|b", r"b\b.*", "(?>a|ab)c"])
    def test_equal_brute_force_with_tokens_of_several_and_of_part_characters(self, pattern):
        lm = Spelled([b"", b"a", b"b", b"c", b"ab", b"\xc3", b"\xa9", b"bc", b"\xc3\xa9a", b""])
        constraint, longest = regex(lm, pattern), 4
        mask, step = jax.jit(constraint.mask), jax.jit(constraint.next)
        frontier, seen = [(b"", constraint.start(longest), longest)], 0
        while frontier:
            prefix, state, left = frontier.pop()
            expected = allowed(lm, pattern, prefix, left) if left else None
            if left == 0:
                assert re.fullmatch(pattern, prefix.decode()), "a text that is cut is accepted"
                continue
            found = mask(state).tolist()
            assert found == expected, (prefix, left)
            assert any(found), "no dead ends"
            seen += 1
            for token in np.flatnonzero(found):
                if token != lm.eos_id:
                    frontier.append((prefix + lm.spellings[token], step(state, jnp.int32(token)), left - 1))
        assert seen >= 2

    def test_words(self):
        lm = Spelled([b"", b"a", b"b", b"."])
        constraint = words(lm, ["ab", "a.", "b"])
        state = constraint.start(2)
        assert constraint.mask(state).tolist() == [False, True, True, False]
        state = constraint.next(state, jnp.int32(1))
        assert constraint.mask(state).tolist() == [False, False, True, True]
        assert constraint.mask(constraint.next(state, jnp.int32(3))).tolist() == [True, False, False, False]
        with pytest.raises(SiteError, match="at least one string"):
            words(lm, [])

    def test_what_the_tokens_cannot_spell_is_said(self):
        with pytest.raises(SiteError, match="pattern 'z' cannot be spelled with this model's 2 tokens"):
            regex(Spelled([b"", b"a"]), "z")

    def test_the_largest_vocabulary_of_states_is_small(self):
        machine = compile_regex("a{1000}")
        constraint = automaton(Spelled([b"", b"a", b"aa", b"b"]), machine)
        assert constraint.about.shortest == 500
        assert constraint.after.dtype == jnp.int16


@pytest.fixture(scope="module")
def lm():
    rng = np.random.default_rng(3)
    vocabulary = ("", "a", "b", "ab")
    return models.MarkovLM(rng.normal(size=4), 1.5 * rng.normal(size=(4, 4)), eos_id=0, vocabulary=vocabulary)


class TestPosteriors:
    def program(self, lm, pattern, constrained):
        @ppl.program
        def program():
            constraint = regex(lm, pattern) if constrained else None
            text, context = ppl.generate("text", ppl.prompt(lm), max_tokens=4, constraint=constraint)
            rest, _ = ppl.generate("rest", context, max_tokens=1)
            ppl.factor("liking", 0.5 * rest.length)
            return text

        return program

    @pytest.mark.parametrize("pattern", ["(ab)+", "a*b?", "b|aab.*", "(?>a|ab)b"])
    def test_the_posterior_is_the_models_on_texts_that_match(self, lm, pattern):
        exact = inference.Exact().run(jax.random.key(0), self.program(lm, pattern, True))
        free = inference.Exact().run(jax.random.key(0), self.program(lm, pattern, False))
        matches = np.array([bool(re.fullmatch(pattern, text)) for text in free.values["text"].decode()])
        weights = np.where(matches, np.exp(free.log_weights), 0)
        assert exact.log_evidence == pytest.approx(np.log(weights.sum()), abs=1e-5)
        found = {(r.value): r.probability for r in exact.marginal("text")}
        for text in found:
            same = np.array([t == text for t in free.values["text"].decode()])
            assert found[text] == pytest.approx(weights[same].sum() / weights.sum(), abs=1e-5)
        runs = [inference.SMC(200).run(key, self.program(lm, pattern, True)) for key in jax.random.split(jax.random.key(1), 8)]
        for run in runs:
            assert all(re.fullmatch(pattern, text) for text in run.of("text"))
        evidence = np.exp([run.log_evidence for run in runs])
        assert abs(evidence.mean() - weights.sum()) < 5 * evidence.std(ddof=1) / 8**0.5 + 1e-6

    def test_another_pattern_is_another_input(self, lm):
        def run(pattern):
            return inference.SMC(8).run(jax.random.key(1), self.program(lm, pattern, True))

        run("(ab)+")
        before = run_module.traced
        assert all(re.fullmatch("b(a|b)*", text) for text in run("b(a|b)*").of("text"))
        assert run_module.traced == before

    def test_too_few_tokens_are_refused_before_anything_runs(self, lm):
        before = run_module.traced
        with pytest.raises(SiteError, match="counts up to 32766 tokens"):
            regex(lm, "b*").start(2**15 - 1)
        with pytest.raises(SiteError, match=r"site 'text': pattern 'b\{5\}' takes at least 5 tokens, more than max_tokens=4"):
            inference.SMC(8).run(jax.random.key(0), self.program(lm, "b{5}", True))
        assert run_module.traced == before


@pytest.fixture(scope="module")
def writer():
    """A random model over a real vocabulary of 50,000 tokens, and the spellings of these."""
    if not (SHARED / "grammars" / "patterns.csv").exists():
        pytest.skip("the reference data does not lie beside this checkout")
    jax.config.update("jax_disable_most_optimizations", False)
    lm = random_writer(SHARED)
    yield lm, lm.token_bytes()
    jax.config.update("jax_disable_most_optimizations", True)


HANDFUL = [
    r"^\d{4}-\d{2}-\d{2}$",
    r"^[^<>{}\[\]]+$",
    r"^(?>a+?|b+?)c$",
    r"^(?:\+\d{1,3}\s?)?(?:\(\d{1,4}\)|\d{1,4})[\s.-]?\d{3}[\s.-]?\d{4}$",
]


@pytest.mark.shared
class TestPublishedPatterns:
    @pytest.mark.parametrize("pattern", HANDFUL)
    def test_every_sample_matches(self, writer, pattern):
        lm, spellings = writer
        texts = samples(lm, spellings, regex(lm, pattern), 50)
        assert len(set(texts)) > 1
        assert all(re.fullmatch(pattern, text) for text in texts), texts

    @pytest.mark.slow
    def test_all_that_are_regular(self, writer):
        lm, spellings = writer
        found = list(regular_patterns(SHARED))
        assert len(found) == 117
        for pattern, machine, _ in found:
            constraint = automaton(lm, machine)
            assert sum(x.nbytes for x in jax.tree.leaves(constraint)) < 3 * 2**20, pattern
            texts = samples(lm, spellings, constraint, 40)
            assert all(re.fullmatch(pattern, text) for text in texts), (pattern, texts)
