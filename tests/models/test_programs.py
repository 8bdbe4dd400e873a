"""The Game of 24 program and the command line."""

import importlib
import json

import jax
import pytest

from latentrace import inference, models
from latentrace.inference import driver
from latentrace.models.programs import cli, expression_of, game_of_24
from latentrace.models.reasoner import game24

run_module = importlib.import_module("latentrace.ppl.run")


@pytest.fixture(scope="module")
def lm():
    return models.load("reasoner")


@pytest.fixture(scope="module")
def posterior(lm):
    return inference.SMC(64).run(jax.random.key(0), game_of_24, lm, "4 6 8 10")


def test_every_particle_of_positive_weight_is_a_solution(posterior):
    for lines in posterior.of("step"):
        assert game24.verify((4, 6, 8, 10), "".join(lines))


def test_solutions_are_expressions_of_the_puzzle(posterior):
    for row in posterior.marginal(expression_of):
        assert eval(row.value) == 24
        assert sorted(int(n) for n in "".join(c if c.isdigit() else " " for c in row.value).split()) == [4, 6, 8, 10]


def test_another_puzzle_compiles_nothing_and_answers_within_a_second(lm, posterior):
    before = run_module.traced
    other = inference.SMC(64).run(jax.random.key(1), game_of_24, lm, "1 2 4 6")
    assert run_module.traced == before
    assert other.ledger.seconds < 1


def test_a_reloaded_model_compiles_nothing(posterior):
    before = run_module.traced
    inference.SMC(64).run(jax.random.key(1), game_of_24, models.load("reasoner"), "1 2 4 6")
    assert run_module.traced == before


def test_solve_prints_a_posterior(capsys):
    assert cli.main(["solve", "4 6 8 10", "--particles", "64", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sum(s["probability"] for s in answer["solutions"]) == pytest.approx(1)
    assert all(eval(s["expression"]) == 24 for s in answer["solutions"])
    assert {"log_evidence", "ess", "tokens", "seconds"} <= answer.keys()
    assert cli.main(["solve", "4 6 8 10", "--particles", "64"]) == 0
    assert "log evidence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("puzzle", "words"),
    [
        ("4 6 8", "expected four whole numbers"),
        ("4 6 8 x", "'x' is not a whole number"),
        ("4 6 8 99", "99 is out of range"),
        ("1 1 1 1", "no way to make 24 exists"),
        ("3 3 8 8", "fractions"),
    ],
)
def test_bad_puzzles_get_one_line(capsys, puzzle, words):
    assert cli.main(["solve", puzzle]) != 0
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_sample_names_an_unknown_model(capsys):
    assert cli.main(["sample", "--model", "no-such-model"]) != 0
    captured = capsys.readouterr()
    assert "no-such-model" in captured.err
    assert captured.err.count("\n") == 1


def test_a_model_without_a_chat_template(capsys):
    assert cli.main(["sample", "--model", "reasoner", "--prompt", "hello", "--chat"]) != 0
    assert "has no chat template" in capsys.readouterr().err


def test_sample_writes_texts(capsys):
    arguments = ["sample", "--model", "reasoner", "--prompt", "4 6 8 10\n", "--particles", "2", "--max-tokens", "12"]
    arguments += ["--dtype", "bfloat16"]
    assert cli.main([*arguments, "--until", "\n", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["samples"]) == 2
    assert all(sample["log_prob"] <= 0 for sample in answer["samples"])


def test_progress_shows_and_changes_nothing(lm, posterior, monkeypatch, capsys):
    monkeypatch.setattr(driver.PROGRESS, "delay", 0.0)
    shown = inference.SMC(64).run(jax.random.key(0), game_of_24, lm, "4 6 8 10", progress=True)
    assert "model calls" in capsys.readouterr().err
    assert shown.log_evidence == posterior.log_evidence
