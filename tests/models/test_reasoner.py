"""The reasoner: its training data and training run, and the shipped checkpoint."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import models
from latentrace.models.reasoner import data, evaluate, tokenizer, train
from latentrace.models.reasoner.game24 import format_prompt, verify
from latentrace.models.reasoner.splits import FRESH, HARD, HELD_OUT, training_puzzles
from latentrace.ppl.language_model import LanguageModel

CHECKPOINT = Path(models.__file__).parent / "reasoner" / "checkpoint"
PUZZLES = [(1, 2, 3, 4), (4, 6, 8, 9), (2, 4, 6, 12)]
TINY = train.Settings(steps=3, batch_size=4, hidden=16, layers=1, heads=2, intermediate=16)


@pytest.fixture(scope="module")
def table():
    return data.training_table(largest=13)


@pytest.fixture(scope="module")
def lm():
    return models.load("reasoner")


class TestData:
    def test_held_out_puzzles_never_train(self, table):
        assert not HELD_OUT & set(training_puzzles(15))
        assert not HELD_OUT & {tuple(sorted(row)) for row in table.numbers.tolist()}
        drawn = [data.batch(table, 1000, seed=0, step=step) for step in range(20)]
        numbers = tokenizer.NUMBER_OF_TOKEN[np.concatenate(drawn)[:, 1:8:2]]
        assert not HELD_OUT & {tuple(sorted(row)) for row in numbers.tolist()}

    def test_sequences_are_prompts_with_right_traces(self, table):
        text = tokenizer.build_tokenizer()
        batch = data.batch(table, 200, seed=1, step=2)
        assert batch.shape == (200, data.SEQUENCE_LENGTH)
        for row in batch:
            numbers = tokenizer.NUMBER_OF_TOKEN[row[1:8:2]].tolist()
            assert text.decode(row[: data.PROMPT_LENGTH]) == format_prompt(numbers)
            assert verify(numbers, text.decode(row[data.PROMPT_LENGTH : -1]))
        assert (batch[:, 0] == tokenizer.START_ID).all()
        assert (batch[:, -1] == tokenizer.END_ID).all()

    def test_a_batch_is_a_function_of_seed_and_step(self, table):
        first = data.batch(table, 50, seed=0, step=7)
        assert np.array_equal(first, data.batch(table, 50, seed=0, step=7))
        assert not np.array_equal(first, data.batch(table, 50, seed=0, step=8))
        assert not np.array_equal(first, data.batch(table, 50, seed=1, step=7))

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
        assert records[-1]["loss"] == json.loads((tmp_path / "straight" / "metrics.jsonl").read_text())["loss"]

        with pytest.raises(ValueError, match=r"'seed': \(0, 1\).*choose another --out"):
            train.train(TINY._replace(seed=1), tmp_path / "stopped", table)

        train.export(resumed, tmp_path / "export", "float16")
        lm = models.load(tmp_path / "export")
        assert lm.encode("4 6\n") == [tokenizer.TOKEN_ID[piece] for piece in ("4", " ", "6", "\n")]
        np.testing.assert_allclose(lm.logits([1, 15, 4])[None], resumed(jnp.array([[1, 15, 4]])), atol=0.01)

    def test_only_tokens_after_the_prompt_are_paid_for(self):
        tokens = jnp.asarray(data.batch(data.trace_table(PUZZLES), 2, 0, 0))
        logits = jnp.zeros((2, data.SEQUENCE_LENGTH - 1, tokenizer.VOCAB_SIZE))
        uniform = math.log(tokenizer.VOCAB_SIZE)
        np.testing.assert_allclose(train.trace_loss(logits, tokens), uniform, rtol=1e-5)
        in_prompt = logits.at[:, : data.PROMPT_LENGTH - 1, 0].set(50.0)
        np.testing.assert_allclose(train.trace_loss(in_prompt, tokens), uniform, rtol=1e-5)
        assert train.trace_loss(logits.at[:, data.PROMPT_LENGTH - 1, 0].set(50.0), tokens) > uniform + 1


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
        assert (figures.puzzles, figures.samples, figures.success, figures.solved) == (2, 2, 0.25, 0.5)


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

    def test_the_sampler_follows_the_logits_of_the_model(self, lm):
        """Greedy continuation with a cache equals greedy continuation by recomputing everything."""
        prompts = data.prompt_tokens(np.array(HARD))
        found = evaluate.sample(lm, jax.random.key(0), jnp.asarray(prompts), temperature=0.0)
        whole = np.concatenate([prompts, np.asarray(found)], axis=1)[7]
        greedy = np.asarray(lm.logits(whole)).argmax(axis=-1)
        assert np.array_equal(greedy[data.PROMPT_LENGTH - 1 : -1], whole[data.PROMPT_LENGTH :])

    def test_solves_puzzles_it_never_saw(self, lm):
        solved = evaluate.successes(lm, [*HARD[::2], *FRESH[::2]], samples=5, batch_size=100)
        assert 0.2 < solved.mean() < 0.45  # 0.32 over many samples
