"""Programs of word problems whose answers alone are known, against scored texts."""

import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import models, ppl
from latentrace.models.reasoner import answers, word_problems

QUESTION = "Ann has 12 pens. Bob has 5 more pens than Ann. How many pens does Bob have?"
THOUGHT = "Bob 12+5=17\nanswer"


@pytest.fixture(scope="module")
def lm():
    return models.load("reasoner")


@pytest.fixture(scope="module")
def item(lm):
    rows = answers.arrays(lm, [(QUESTION, word_problems.solve(QUESTION))] * 2)
    return {name: jnp.asarray(x[1]) for name, x in rows.items()}


def scored(lm, prompt, text):
    """log p(text given prompt), nats."""

    @ppl.program
    def program():
        ppl.score("text", ppl.prompt(lm, prompt), text)

    return float(program.log_density({}))


def test_rows_are_the_problem_and_what_follows_the_word_before_its_answer(lm, item):
    ids = [int(i) for i in item["prompt"] if i >= 0]
    assert lm.decode(ids[1:]) == QUESTION + "\n"
    assert lm.decode([int(i) for i in item["answer"]][:-1]) == " 17\n"
    assert item["answer"][-1] == lm.eos_id


def test_the_guide_reads_the_answer_after_the_question(lm, item):
    found = float(answers.hinted.log_density({"thought": THOUGHT}, lm, lm, item))
    assert found == pytest.approx(scored(lm, QUESTION + "17\n", THOUGHT), abs=1e-4)


def test_the_answer_is_observed_save_for_misprints(lm, item):
    before = QUESTION + "\n" + THOUGHT
    prior = scored(lm, QUESTION + "\n", THOUGHT)
    for number in (17, 18):
        given = item | {"answer": jnp.asarray([*lm.encode(f" {number}\n"), lm.eos_id])}
        right = np.exp(scored(lm, before + " ", f"{number}"))
        expected = prior + np.log((1 - answers.MISPRINTS) * right + answers.MISPRINTS / 200)
        found = float(answers.answered.log_density({"thought": THOUGHT}, lm, lm, given))
        assert found == pytest.approx(expected, abs=1e-3)
    assert float(answers.thinking.log_density({"thought": THOUGHT}, lm, lm, item)) == pytest.approx(prior, abs=1e-4)
