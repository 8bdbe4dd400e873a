"""The model programs and the command line."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import inference, models
from latentrace.inference import driver
from latentrace.models.programs import (
    cli,
    countdown,
    direct_answer,
    expression_of,
    plan_then_solve,
    self_check,
    step_by_step,
)
from latentrace.models.reasoner import tasks, verifier, word_problems
from latentrace.models.reasoner.countdown import verify
from latentrace.models.reasoner.process_reward import load_process_reward

comparison = importlib.import_module("latentrace.models.programs.compare")
run_module = importlib.import_module("latentrace.ppl.run")

QUESTION = "Ann has 12 pens. Bob has 5 more pens than Ann. Eve has 3 cups. Bob gives Ann 4 pens. How many pens does Bob have?"


@pytest.fixture(scope="module")
def lm():
    return models.load("reasoner")


@pytest.fixture(scope="module")
def reward():
    return load_process_reward()


@pytest.fixture(scope="module")
def posterior(lm):
    return inference.SMC(64).run(jax.random.key(0), countdown, lm, "4 6 8 10")


@pytest.fixture(scope="module")
def answers(lm):
    return inference.ImportanceSampling(2000, batch_size=500).run(jax.random.key(0), step_by_step, lm, QUESTION)


class TestCountdown:
    def test_every_particle_of_positive_weight_is_a_solution(self, posterior):
        for lines in posterior.of("step"):
            assert verify((4, 6, 8, 10), "".join(lines))

    def test_solutions_are_expressions_of_the_puzzle(self, posterior):
        for row in posterior.marginal(expression_of):
            assert eval(row.value) == 24
            assert sorted(int(n) for n in "".join(c if c.isdigit() else " " for c in row.value).split()) == [4, 6, 8, 10]

    def test_another_puzzle_compiles_nothing_and_answers_within_two_seconds(self, lm, posterior):
        before = run_module.traced
        other = inference.SMC(64).run(jax.random.key(1), countdown, lm, "1 2 4 6")
        assert run_module.traced == before
        assert other.ledger.seconds < 2

    def test_a_reloaded_model_compiles_nothing(self, posterior):
        before = run_module.traced
        inference.SMC(64).run(jax.random.key(1), countdown, models.load("reasoner"), "1 2 4 6")
        assert run_module.traced == before

    @pytest.mark.slow
    def test_where_the_verifier_looks_and_what_steers_leave_the_posterior_alone(self, lm, reward):
        """Evidence is the probability that the model solves the puzzle, whatever kills and steers on the way."""
        estimates = {}
        for name, arguments in {"steered": (reward, "end")}.items():
            keys = jax.random.split(jax.random.key(3), 4)
            runs = [inference.SMC(128).run(key, countdown, lm, "2 3 4 7", *arguments) for key in keys]
            estimates[name] = np.exp([run.log_evidence for run in runs])
        plain = inference.ImportanceSampling(512).run(jax.random.key(4), countdown, lm, "2 3 4 7", None, "none")
        share = (np.asarray(plain.returned[1])[:, 0] == 24).mean()
        for name, found in estimates.items():
            error = np.hypot(found.std(ddof=1) / 2, np.sqrt(share * (1 - share) / 512))
            assert abs(found.mean() - share) < 4 * error + 0.01, (name, found, share)

    def test_other_counts_and_targets(self, lm, reward):
        posterior = inference.SMC(256).run(jax.random.key(0), countdown, lm, "3 5 10=45", reward)
        assert all(eval(row.value) == 45 for row in posterior.marginal(expression_of))
        before = run_module.traced
        posterior = inference.SMC(256).run(jax.random.key(0), countdown, lm, "3 8 11=22", reward)
        assert all(eval(row.value) == 22 for row in posterior.marginal(expression_of))
        assert run_module.traced == before, "another target is another input"


def probabilities(posterior, name="answer"):
    return {row.value: row.probability for row in posterior.marginal(name)}


class TestWordProblems:
    def test_step_by_step_answers_as_its_lines_say(self, answers):
        for lines, answer in zip(answers.of("line"), answers.of("answer")):
            said = [line for line in lines if line.startswith("answer ")]
            assert answer == (int(said[0].split()[1]) if said and said[0].endswith("\n") else verifier.NO_ANSWER)
        assert max(probabilities(answers), key=probabilities(answers).get) == 13

    def test_a_process_reward_multiplies_the_posterior(self, lm, reward, answers):
        """Reweighting plain samples by the reward of their last line, computed afresh, gives the same posterior."""
        steered = inference.SMC(500).run(jax.random.key(5), step_by_step, lm, QUESTION, reward)
        weighted = inference.ImportanceSampling(500).run(jax.random.key(6), step_by_step, lm, QUESTION, reward)
        for answer, probability in probabilities(weighted).items():
            if probability > 0.05:
                assert probabilities(steered)[answer] == pytest.approx(probability, abs=0.15)
        assert steered.log_evidence == pytest.approx(weighted.log_evidence, abs=0.25)
        assert steered.log_evidence < 0

    def test_direct_answers_are_numbers(self, lm):
        posterior = inference.Exact(max_traces=300**2).run(jax.random.key(0), direct_answer, lm, QUESTION)
        assert sum(probabilities(posterior).values()) == pytest.approx(1)
        assert all(0 <= answer <= 199 for answer in probabilities(posterior))
        ids = lm.encode(word_problems.format_prompt(QUESTION) + "answer ")
        log_probs = jax.nn.log_softmax(lm.logits([lm.start_id, *ids])[-1])
        thirteen, newline = lm.encode("13\n")
        after = jax.nn.log_softmax(lm.logits([lm.start_id, *ids, thirteen])[-1])
        expected = float(jnp.exp(log_probs[thirteen] + after[newline] - posterior.log_evidence))
        assert probabilities(posterior)[13] == pytest.approx(expected, rel=1e-3)

    def test_plans_are_the_number_of_steps(self, lm, answers):
        posterior = inference.SMC(600).run(jax.random.key(1), plan_then_solve, lm, QUESTION)
        for lines, plan, answer in zip(*(posterior.of(name) for name in ("line", "plan", "answer"))):
            assert lines[plan + 2] == f"answer {answer}\n"
        for answer, probability in probabilities(posterior).items():
            assert probability == pytest.approx(probabilities(answers).get(answer, 0), abs=0.1)

    @pytest.mark.slow
    def test_agreement_squares_the_distribution_of_answers(self, lm, answers):
        checked = inference.ImportanceSampling(2000, batch_size=500).run(jax.random.key(2), self_check, lm, QUESTION)
        plain = {answer: p for answer, p in probabilities(answers).items() if answer != verifier.NO_ANSWER}
        total = sum(p**2 for p in plain.values())
        assert np.exp(checked.log_evidence) == pytest.approx(total, abs=0.05)
        for answer, p in plain.items():
            assert probabilities(checked).get(answer, 0) == pytest.approx(p**2 / total, abs=0.07)


class TestComparison:
    @pytest.mark.slow
    def test_runs_every_method_with_every_size_prints_and_draws(self, lm, reward, tmp_path):
        results = {task: comparison.compare(lm, reward, tasks.SPLITS[task](4), [2, 4]) for task in ("countdown3", "words")}
        for task, rows in results.items():
            by = {(r.method, r.samples): r for r in rows}
            methods = comparison.METHODS + (comparison.VERIFIED if task != "words" else ())
            assert set(by) == {(m, n) for m in methods for n in (2, 4)}
            for row in rows:
                assert row.solved.shape == (4,)
                assert 0 <= row.interval[0] <= row.accuracy <= row.interval[1] <= 1
            assert by["plain sampling", 4].tokens == 2 * by["plain sampling", 2].tokens
            assert by["SMC", 4].tokens == pytest.approx(by["plain sampling", 4].tokens, rel=0.3), "equal budgets"
        by = {(r.method, r.samples): r for r in results["countdown3"]}
        for n in (2, 4):  # a verifier that picks is at least as good as any other choice
            for method in comparison.METHODS[:-1]:
                assert (by["any of N", n].solved >= by[method, n].solved).all()
            assert (by["any of SMC", n].solved >= by["SMC", n].solved).all()
        text = comparison.table(results["words"])
        assert text.count("SMC") == 3
        assert len(text.splitlines()) == 13
        comparison.figure(results, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000

    def test_votes(self):
        right = np.array([True, False, False, True])
        assert comparison._vote([7, 8, 8, 7], np.array([1.0, 1.0, 1.5, 1.0]), right) is False
        assert comparison._vote([7, 8, 8, 7], np.ones(4), right) is True, "the first one said wins a tie"
        assert comparison._vote([None, None], np.ones(2), right[:2]) is False


class TestCommandLine:
    def test_solve_prints_a_posterior(self, capsys):
        assert cli.main(["solve", "4 6 8 10", "--particles", "64", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert sum(s["probability"] for s in answer["solutions"]) == pytest.approx(1)
        assert all(eval(s["expression"]) == 24 for s in answer["solutions"])
        assert {"log_evidence", "ess", "tokens", "seconds"} <= answer.keys()
        assert cli.main(["solve", "4 6 8 10", "--particles", "64"]) == 0
        assert "log evidence" in capsys.readouterr().out

    def test_solve_answers_word_problems(self, capsys):
        assert cli.main(["solve", QUESTION, "--particles", "64", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert sum(s["probability"] for s in answer["answers"]) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("puzzle", "words"),
        [
            ("4 6", "expected three to five whole numbers"),
            ("4 6 8 -1", "'-1' is not a whole number"),
            ("4 6 8 99", "99 is out of range"),
            ("4 6 8=1000", "1000 is out of range"),
            ("1 1 1 1", "no way to make 24 exists"),
            ("3 3 8 8", "fractions"),
            ("Ann has 12 pens.", "expected sentences and a question"),
            ("Zoe has 12 pens. How many pens does Zoe have?", "is none that the reasoner was trained on"),
            ("Ann has 300 pens. How many pens does Ann have?", "300 is out of range"),
        ],
    )
    def test_bad_problems_get_one_line(self, capsys, puzzle, words):
        assert cli.main(["solve", puzzle]) != 0
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""

    def test_compare_prints_a_table_or_json(self, capsys, monkeypatch):
        def compare(lm, reward, problems, sizes, seed):
            assert len(problems) == 3
            return [comparison.Result(m, n, 10.0 * n, np.ones(3)) for m in comparison.METHODS for n in sizes]

        monkeypatch.setattr(comparison, "compare", compare)
        assert cli.main(["compare", "--problems", "3", "--samples", "4", "2", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["task"], row["samples"]) for row in rows[:2]] == [("game24", 2), ("game24", 4)]
        assert {row["method"] for row in rows} == set(comparison.METHODS)
        assert cli.main(["compare", "--problems", "3", "--tasks", "words"]) == 0
        assert "words: 3 held-out problems" in capsys.readouterr().out


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
    shown = inference.SMC(64).run(jax.random.key(0), countdown, lm, "4 6 8 10", progress=True)
    assert "model calls" in capsys.readouterr().err
    assert shown.log_evidence == posterior.log_evidence
