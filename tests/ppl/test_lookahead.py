"""What a hidden Markov model foresees of an automaton, against sums over all texts, and as a constraint."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from latentrace import inference, models, ppl
from latentrace.ppl.constraints import compile_regex, count_texts, lookahead, most_probable, regex
from latentrace.ppl.errors import SiteError

LONGEST, EOS = 4, 0
WORDS = ("", "a", "b", "ab")


def hidden_markov(seed, states=3):
    """Uneven random logits; some moves and some emissions are impossible."""
    rng = np.random.default_rng(seed)
    initial, transition, emission = (1.5 * rng.normal(size=n) for n in (states, (states, states), (states, len(WORDS))))
    transition[0, 1] = transition[2, 2] = emission[1, 3] = -np.inf
    return models.HMMLM(initial, transition, emission, EOS, vocabulary=WORDS)


def texts(pattern, longest):
    """Every accepted text, ended by EOS or cut where it is accepted."""
    for length in range(longest + 1):
        for ids in itertools.product(range(1, len(WORDS)), repeat=length):
            if re.fullmatch(pattern, "".join(WORDS[i] for i in ids)):
                yield (*ids, EOS) if length < longest else ids


def log_prob(lm, ids, context=()):
    """log p(ids after context), by the model's own logits."""
    with np.errstate(divide="ignore"):
        return sum(np.log(programs.next_probs(lm, (*context, *ids[:i]))[token]) for i, token in enumerate(ids))


CASES = [("(ab)+", 1), ("a*b?", 2), ("b|aab.*", 3)]


@pytest.mark.parametrize(("pattern", "seed"), CASES)
class TestAgainstAllTexts:
    def test_potentials(self, pattern, seed):
        """For every allowed text so far and next token: log p(accepted | text so far, token)."""
        lm = hidden_markov(seed)
        constraint = lookahead(regex(lm, pattern), lm, max_tokens=LONGEST + 1)  # and for fewer tokens than it was made for
        whole = [(ids, np.exp(log_prob(lm, ids))) for ids in texts(pattern, LONGEST)]
        potentials, step = jax.jit(constraint.log_potentials), jax.jit(constraint.next)
        frontier, compared = [((), constraint.start(LONGEST))], 0
        while frontier:
            prefix, state = frontier.pop()
            found = potentials(state)
            assert ((found > -jnp.inf) == constraint.mask(state)).all()
            for token in np.flatnonzero(constraint.mask(state)):
                now = (*prefix, int(token))
                accepted = sum(p for ids, p in whole if ids[: len(now)] == now)
                if accepted > 0:
                    assert found[token] == pytest.approx(np.log(accepted) - log_prob(lm, now), abs=1e-5), now
                    compared += 1
                if token != EOS and len(now) < LONGEST:
                    frontier.append((now, step(state, jnp.int32(token))))
        assert compared > 5

    def test_probability_and_number_of_accepted_texts(self, pattern, seed):
        lm = hidden_markov(seed)
        automaton = regex(lm, pattern)
        constraint = lookahead(automaton, lm, max_tokens=LONGEST)
        for longest in range(automaton.about.shortest, LONGEST + 1):
            listed = list(texts(pattern, longest))
            evidence = np.log(sum(np.exp(log_prob(lm, ids)) for ids in listed))
            assert constraint.log_evidence(longest) == pytest.approx(evidence, abs=1e-5)
            assert count_texts(automaton, longest) == len(listed)

    @pytest.mark.parametrize("prefix", [(), (2, 3)])
    def test_most_probable_text_and_hidden_states(self, pattern, seed, prefix):
        lm = hidden_markov(seed)
        initial, transition, emission = (jax.nn.log_softmax(x) for x in (lm.initial, lm.transition, lm.emission))
        if prefix:
            initial = lookahead(regex(lm, pattern), lm, max_tokens=LONGEST, prefix=prefix).belief
            features = lm.forward(jnp.array([lm.start_id, *prefix]), ppl.language_model.empty_memory())[0]
            np.testing.assert_allclose(initial, np.exp(features[-1]), atol=1e-6)
            initial = features[-1]
        initial, transition, emission = (np.asarray(x, np.float64) for x in (initial, transition, emission))

        def joint(ids, path):
            moves = sum(transition[path[i], path[i + 1]] for i in range(len(path) - 1))
            return initial[path[0]] + moves + sum(emission[s, token] for s, token in zip(path, ids))

        pairs = [(joint(ids, path), ids, path) for ids in texts(pattern, LONGEST)
                 for path in itertools.product(range(3), repeat=len(ids))]  # fmt: skip
        best = most_probable(regex(lm, pattern), lm, max_tokens=LONGEST, prefix=prefix)
        assert (best.tokens, best.states) == max(pairs)[1:]
        assert best.log_prob == pytest.approx(max(pairs)[0], abs=1e-5)


def test_many_tokens_of_a_class_and_many_classes():
    """Against the same recursion token by token, without classes, in float64."""
    rng = np.random.default_rng(5)
    spellings = [""] + [x for n in range(1, 6) for x in map("".join, itertools.product("abc", repeat=n))]
    states, longest, machine = 2, 3, compile_regex("[abc]*ca|b")
    lm = models.HMMLM(*(rng.normal(size=n) for n in (states, (states, states), (states, len(spellings)))), 0, spellings)
    constraint = lookahead(ppl.constraints.automaton(lm, machine), lm, max_tokens=longest)
    assert constraint.emission.shape[0] * 128 > len(spellings) > 2 * 128
    initial, transition, emission = (
        np.asarray(jax.nn.softmax(x), np.float64) for x in (lm.initial, lm.transition, lm.emission)
    )

    def read(state, spelling):
        for byte in spelling.encode():
            state = machine.next[state, byte] if state >= 0 else -1
        return state

    before = np.repeat(machine.accepting[:, None], states, 1).astype(float)  # [Q, S]
    for left in range(longest):
        behind = before @ transition.T
        before = machine.accepting[:, None] * emission[:, 0]
        for state in range(len(machine.next)):
            for token in range(1, len(spellings)):
                if (to := read(state, spellings[token])) >= 0:
                    before[state] += emission[:, token] * behind[to]
                    if state == 0 and left == longest - 1:
                        found = constraint.log_potentials(constraint.start(longest))[token]
                        expected = np.log((initial * emission[:, token]) @ behind[to] / (initial @ emission[:, token]))
                        assert found == pytest.approx(expected, abs=1e-5)
    assert constraint.log_evidence() == pytest.approx(np.log(initial @ before[0]), abs=1e-5)


class TestDecoding:
    @staticmethod
    def program(lm, constraint, prompt=()):
        @ppl.program
        def program():
            return ppl.generate("x", ppl.prompt(lm, list(prompt)), max_tokens=LONGEST, constraint=constraint)[0]

        return program

    @pytest.mark.parametrize("prompt", [(), (2, 3)])
    def test_where_the_model_is_the_guide_every_draw_is_exact(self, prompt):
        """A particle's weight is p / q. Where it is the evidence for every text, texts are drawn from the posterior itself;
        and where intermediate weights agree too, nothing is ever resampled."""
        pattern, lm = CASES[0][0] + "|b+", hidden_markov(7)
        automaton = regex(lm, pattern)
        constraint = lookahead(automaton, lm, max_tokens=6, prefix=prompt)
        exact = inference.Exact().run(jax.random.key(0), self.program(lm, automaton, prompt))
        support, evidence = {x for x in exact.values["x"].ids()}, exact.log_evidence
        seen = set()
        for seed in range(4):
            run = inference.SMC(500, ess_threshold=0.999).run(jax.random.key(seed), self.program(lm, constraint, prompt))
            np.testing.assert_allclose(run.log_weights, evidence, atol=1e-5)
            np.testing.assert_array_equal(run.roots, np.arange(500))
            assert not run.restricted
            seen |= set(run.values["x"].ids())
        assert seen <= support
        assert sum(p for x, p in zip(exact.values["x"].ids(), exact.weights) if x in seen) > 0.99
        alone = inference.SMC(1).run(jax.random.key(9), self.program(lm, constraint, prompt))
        assert alone.log_evidence == pytest.approx(evidence, abs=1e-5)

    def test_a_guide_that_rules_out_what_the_model_writes_restricts_nothing(self):
        """This one thinks that `b` is never written, so that only the floor of the potentials leads to it."""
        blind = models.HMMLM([0.0], [[0.0]], [[0.0, 1.0, -np.inf, -np.inf]], EOS, vocabulary=WORDS)
        lm = models.MarkovLM([0.0, -200.0, 1.0, 0.5], np.zeros((4, 4)), EOS, vocabulary=WORDS)
        constraint = lookahead(regex(lm, "a|bb"), blind, max_tokens=LONGEST)
        run = inference.SMC(20).run(jax.random.key(0), self.program(lm, constraint))
        exact = inference.Exact().run(jax.random.key(0), self.program(lm, regex(lm, "a|bb")))
        assert not run.restricted
        assert set(run.values["x"].decode()) == {"bb"}
        assert run.log_evidence == pytest.approx(exact.log_evidence, abs=1e-5)


def test_what_cannot_be_is_said():
    lm = hidden_markov(1)
    automaton = regex(lm, "(ab)+")
    with pytest.raises(SiteError, match=r"shapes \[S\], \[S, S\] and \[S, 4\], found \[2\], \[2, 2\], \[2, 3\]"):
        lookahead(automaton, programs.hmm(2, 3), max_tokens=4)
    constraint = lookahead(automaton, lm, max_tokens=2)
    with pytest.raises(SiteError, match=r"site 'x': the lookahead of pattern '\(ab\)\+' was made for at most 2 tokens, fewer"):
        inference.SMC(2).run(jax.random.key(0), TestDecoding.program(lm, constraint))
    with pytest.raises(SiteError, match="token id 4 of the prefix is outside the vocabulary of 4"):
        constraint.after([1, 4])
    never = models.HMMLM([0.0], [[0.0]], [[0.0, -np.inf, 0.0, 0.0]], EOS, vocabulary=WORDS)
    with pytest.raises(SiteError, match="pattern 'aa' has probability 0"):
        most_probable(regex(lm, "aa"), never, max_tokens=3)
