"""The reasoner: its training data and training run, the shipped checkpoint and its process reward."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import models
from latentrace.models.reasoner import (
    countdown,
    data,
    evaluate,
    imperfect,
    process_reward,
    rollouts,
    tasks,
    tokenizer,
    train,
    train_reward,
    word_problems,
)
from latentrace.models.reasoner.countdown import format_prompt, verify
from latentrace.models.reasoner.splits import HELD_OUT, training_puzzles
from latentrace.ppl.language_model import LanguageModel, empty_memory

CHECKPOINT = Path(models.__file__).parent / "reasoner" / "checkpoint"
PUZZLES = [(1, 2, 3, 4), (4, 6, 8, 9), (2, 4, 6, 12)]
TINY = train.Settings(steps=3, game24=2, countdown=1, words=1, hidden=16, layers=1, heads=2, intermediate=16)
SIZES = data.Sizes(50, 20, 20)


@pytest.fixture(scope="module")
def table():
    return data.training_table(largest=13)


@pytest.fixture(scope="module")
def lm():
    return models.load("reasoner")


def texts_of(examples):
    """Prompts and traces of rows."""
    text = tokenizer.build_tokenizer()
    for tokens, paid in zip(*examples):
        first = int(np.argmax(paid))
        yield text.decode(tokens[:first]), text.decode(tokens[paid])


class TestData:
    def test_held_out_puzzles_never_train(self, table):
        assert not HELD_OUT & set(training_puzzles(15))
        assert not HELD_OUT & {tuple(sorted(row)) for row in table.numbers.tolist()}
        for step in range(5):
            batch = data.batch(table, data.Sizes(500, 200, 50), seed=0, step=step)
            numbers = tokenizer.NUMBER_OF_TOKEN[batch["game24"].tokens[:, 1:8:2]]
            assert not HELD_OUT & {tuple(sorted(row)) for row in numbers.tolist()}
            puzzles = [countdown.parse_prompt(prompt) for prompt, _ in texts_of(batch["countdown"])]
            assert not any(countdown.is_held_out(*p) or tuple(sorted(p.numbers)) in HELD_OUT for p in puzzles)
            assert not any(word_problems.is_held_out(prompt) for prompt, _ in texts_of(batch["words"]))

    def test_sequences_are_prompts_with_right_traces(self, table):
        batch = data.batch(table, SIZES, seed=1, step=2)
        for kind, examples in batch.items():
            assert examples.tokens.shape == examples.paid.shape == (getattr(SIZES, kind), data.WIDTHS[kind])
            assert (examples.tokens[:, 0] == tokenizer.START_ID).all()
            assert (examples.tokens != tokenizer.TOKEN_ID[tokenizer.UNKNOWN]).all()
            last = examples.paid.shape[1] - 1 - examples.paid[:, ::-1].argmax(axis=1)
            assert (np.take_along_axis(examples.tokens, last[:, None], 1) == tokenizer.END_ID).all()
            for prompt, trace in texts_of(examples):
                if kind == "words":
                    assert word_problems.verify(prompt, trace)
                else:
                    numbers, target = countdown.check_puzzle(prompt)
                    assert verify(numbers, trace, target)

    def test_a_batch_is_a_function_of_seed_and_step(self, table):
        def batch(seed, step):
            return np.concatenate([rows.tokens.ravel() for rows in data.batch(table, SIZES, seed, step).values()])

        first = batch(0, 7)
        assert np.array_equal(first, batch(0, 7))
        assert not np.array_equal(first, batch(0, 8))
        assert not np.array_equal(first, batch(1, 7))

    def test_expressions_are_drawn_evenly(self):
        table = data.trace_table([(4, 6, 8, 10)])
        shares = np.diff(table.cumulative, prepend=0)
        assert len(shares) == 2
        np.testing.assert_allclose(shares, 0.5)


class TestTraining:
    def test_a_stopped_run_resumes_bit_identically(self, tmp_path):
        table = data.trace_table(PUZZLES)
        straight = train.train(TINY, tmp_path / "straight", table)
        train.train(TINY, tmp_path / "stopped", table, stop_at=2)
        resumed = train.train(TINY, tmp_path / "stopped", table)
        weights = [jax.tree.leaves(models.TransformerLM.from_module(m).weights) for m in (straight, resumed)]
        assert all(np.array_equal(a, b) for a, b in zip(*weights))
        records = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [2, 3]
        assert {"loss", "game24", "countdown", "words", "seconds"} <= records[-1].keys()
        assert records[-1]["loss"] == json.loads((tmp_path / "straight" / "metrics.jsonl").read_text())["loss"]

        with pytest.raises(ValueError, match=r"'seed': \(0, 1\).*choose another --out"):
            train.train(TINY._replace(seed=1), tmp_path / "stopped", table)

        train.export(resumed, tmp_path / "export", "float16")
        lm = models.load(tmp_path / "export")
        assert lm.encode("4 6\n") == [tokenizer.TOKEN_ID[piece] for piece in ("4", " ", "6", "\n")]
        np.testing.assert_allclose(lm.logits([1, 15, 4])[None], resumed(jnp.array([[1, 15, 4]])), atol=0.01)

    def test_a_killed_run_and_a_broken_checkpoint(self, tmp_path):
        table, out = data.trace_table(PUZZLES), tmp_path / "run"
        train.train(TINY, out, table, checkpoint_every=1, log_every=1, stop_at=2)
        straight = (out / "metrics.jsonl").read_text()
        (out / "metrics.jsonl").write_text(straight + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
        for path in (out / "checkpoints" / "2").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.warns(UserWarning, match="2 cannot be read"):
            train.train(TINY, out, table, checkpoint_every=1, log_every=1)
        assert list((out / "checkpoints").glob("unreadable-2-*")), "nothing is thrown away"
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3]
        before = [json.loads(line)["loss"] for line in straight.splitlines()]
        assert [record["loss"] for record in records[:2]] == before, "the same loss curve"

        for step in ("2", "3"):
            for path in (out / "checkpoints" / step).rglob("*"):
                if path.is_file():
                    path.write_bytes(b"")
        broken = pytest.raises(ValueError, match=r"none of the checkpoints \[3, 2\].*can be read")
        with broken, pytest.warns(UserWarning, match="cannot be read"):
            train.train(TINY, out, table)

    def test_only_tokens_after_the_prompt_are_paid_for(self):
        examples = data.batch(data.trace_table(PUZZLES), data.Sizes(2, 0, 0), 0, 0)["game24"]
        logits = jnp.zeros((2, data.WIDTHS["game24"] - 1, tokenizer.VOCAB_SIZE))

        def loss(logits):
            total, count = train.trace_loss(logits, *examples)
            return total / count

        uniform = math.log(tokenizer.VOCAB_SIZE)
        np.testing.assert_allclose(loss(logits), uniform, rtol=1e-5)
        in_prompt = logits.at[:, : data.PROMPT_LENGTH - 1, 0].set(50.0)
        np.testing.assert_allclose(loss(in_prompt), uniform, rtol=1e-5)
        assert loss(logits.at[:, data.PROMPT_LENGTH - 1, 0].set(50.0)) > uniform + 1


class TestIntervals:
    def test_wilson(self):
        np.testing.assert_allclose(evaluate.wilson_interval(10, 100), (0.0552, 0.1744), atol=5e-4)
        assert evaluate.wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-9)

    def test_bootstrap_over_puzzles(self):
        values = np.repeat([0.0, 1.0], 50)
        low, high = evaluate.bootstrap_interval(values)
        assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
        assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)

    def test_report(self):
        figures = evaluate.report(np.array([[True, False], [False, False]]))
        assert (figures.problems, figures.samples, figures.success, figures.solved) == (2, 2, 0.25, 0.5)


class TestShippedCheckpoint:
    def test_is_a_language_model_with_the_vocabulary_of_the_task(self, lm):
        assert isinstance(lm, LanguageModel)
        assert lm.vocab_size == tokenizer.VOCAB_SIZE
        assert (lm.start_id, lm.eos_id, lm.adds_start) == (tokenizer.START_ID, tokenizer.END_ID, True)
        definition = json.loads((CHECKPOINT / "tokenizer.json").read_text())
        assert definition["model"]["vocab"] == tokenizer.TOKEN_ID
        assert definition == json.loads(tokenizer.build_tokenizer().to_str())
        text = format_prompt((10, 4, 8, 6)) + "8-6=2 | 2 4 10\n"
        assert lm.decode(lm.encode(text)) == text
        assert b"".join(lm.token_bytes()[i] for i in lm.encode(text)).decode() == text

    def test_has_the_files_of_the_layout_and_is_small(self):
        names = {path.name for path in CHECKPOINT.iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        assert "generation_config.json" in names
        assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8 * 2**20

    def test_solves_problems_it_never_saw(self, lm):
        problems = [*tasks.SPLITS["hard"](100)[::4], *tasks.SPLITS["fresh"](100)[::4]]
        solved = evaluate.successes(lm, problems, samples=10)
        assert 0.2 < solved.mean() < 0.6
        assert 0.15 < evaluate.successes(lm, tasks.SPLITS["words"](60), samples=10).mean() < 0.45


class TestRollouts:
    def test_features_are_those_at_the_ends_of_lines(self, lm):
        problem = tasks.SPLITS["fresh"](1)[0]
        found = rollouts.rollouts(lm, problem, 5, jax.random.key(0))
        assert found.features.shape == (5, 4, 128)
        assert found.right.shape == (5,)
        for i, text in enumerate(found.texts):
            lines = text.splitlines(keepends=True)
            assert found.is_line[i].sum() == sum(line.endswith("\n") for line in lines)
            ids = jnp.asarray([lm.start_id, *lm.encode(problem.prompt + lines[0])])
            features = lm.forward(ids, empty_memory())[0][-1]  # at the newline
            np.testing.assert_allclose(found.features[i, 0], features, atol=1e-4)

    def test_answers_of_texts(self):
        puzzle = tasks.CountdownProblem(countdown.Puzzle((4, 6, 8, 10)))
        solution = "8-6=2 | 2 4 10\n2*10=20 | 4 20\n4+20=24 | 24\n"
        assert puzzle.is_right(solution)
        assert puzzle.answer(solution) == "10*(8-6)+4"
        assert puzzle.answer("nonsense") is None
        assert puzzle.answer("8-6=2 | 2 4 10\n3*10=30 | 4 30\n4+30=34 | 34\n") is None
        problem = tasks.WordProblem("Ann has 12 pens. Ann buys 3 pens. How many pens does Ann have?")
        assert problem.is_right("Ann 12+3=15\nanswer 15\n")
        assert problem.answer("Ann 12+3=16\nanswer 16\n") == 16
        assert problem.answer("Ann 12+3=16\n") is None


class TestProcessReward:
    def test_learns_what_there_is_to_learn_and_is_calibrated(self):
        rng = np.random.default_rng(0)
        features = rng.normal(size=(20_000, 4)).astype(np.float32)
        true = 1 / (1 + np.exp(-2 * features[:, 0] * features[:, 1]))
        right = rng.random(20_000) < true
        fitted = train_reward.fit(
            train_reward.Examples(features[:16_000], right[:16_000], np.zeros(16_000), np.arange(16_000)), 1500, 0, members=2
        )
        stated = np.asarray(fitted.probability(features[16_000:]))
        assert train_reward.calibration(stated, right[16_000:]).error < 0.05
        best = train_reward.area_under_curve(true[16_000:], right[16_000:])
        assert train_reward.area_under_curve(stated, right[16_000:]) > best - 0.03
        assert np.array_equal(fitted.mean, features[:16_000].mean(0)), "normalisation is not trained"

    def test_shipped_one_is_calibrated_on_problems_it_never_saw(self, lm):
        reward = process_reward.load_process_reward()
        for split in ("hard", "words"):
            figures = train_reward.assess(lm, reward, split, 40, 20, 5)
            assert figures["calibration_error"] < 0.1, figures  # with few problems; 0.05 with many
            assert figures["area_under_curve"] > 0.65, figures

    def test_figures(self):
        probability, holds = np.array([0.05, 0.1, 0.95, 0.85]), np.array([False, False, True, False])
        found = train_reward.calibration(probability, holds)
        assert found.counts == [1, 1, 1, 1]
        assert found.error == pytest.approx((0.05 + 0.1 + 0.05 + 0.85) / 4)
        assert train_reward.area_under_curve(probability, holds) == 1.0
        assert train_reward.area_under_curve(np.zeros(4), holds) == 0.5
        assert math.isnan(train_reward.area_under_curve(probability, ~holds | holds))

    def test_files(self, tmp_path):
        reward = process_reward.initial_reward(np.zeros((2, 3), np.float32), jax.random.key(0))
        reward.save(tmp_path / "reward.safetensors")
        loaded = process_reward.load_process_reward(tmp_path / "reward.safetensors")
        assert np.array_equal(loaded.inner, reward.inner)
        with pytest.raises(models.CheckpointError, match="cannot be read as a process reward"):
            process_reward.load_process_reward(tmp_path / "missing.safetensors")
        (tmp_path / "cut.safetensors").write_bytes((tmp_path / "reward.safetensors").read_bytes()[:50])
        with pytest.raises(models.CheckpointError, match="cannot be read as a process reward"):
            process_reward.load_process_reward(tmp_path / "cut.safetensors")
        with pytest.raises(models.CheckpointError, match="expected the tensors"):
            process_reward.load_process_reward(CHECKPOINT / "model.safetensors")


class TestImperfectVerifier:
    def test_errs_at_the_stated_rates_and_always_on_the_same_texts(self):
        verifier = imperfect.ImperfectVerifier(completeness=0.9, soundness=0.7)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (20_000, 6)))
        verdict = jax.jit(jax.vmap(verifier.accepts, (None, 0, None)))
        right, wrong = verdict(True, tokens, 5), verdict(False, tokens, 5)
        assert float(right.mean()) == pytest.approx(0.9, abs=0.01)
        assert float(wrong.mean()) == pytest.approx(0.3, abs=0.01)
        assert np.array_equal(right, verdict(True, tokens.at[:, 5].set(0), 5)), "what follows the text does not matter"
        other = imperfect.ImperfectVerifier(0.9, 0.7, seed=1)
        assert not np.array_equal(right, jax.vmap(other.accepts, (None, 0, None))(True, tokens, 5))

    def test_perfect_ones_are(self):
        perfect = imperfect.ImperfectVerifier(1.0, 1.0)
        tokens = jnp.arange(4)
        assert perfect.accepts(jnp.asarray(True), tokens, 4)
        assert not perfect.accepts(jnp.asarray(False), tokens, 4)
