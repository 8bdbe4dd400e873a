"""Every supported family against transformers: stored outputs in every run, fresh ones where transformers is installed."""

import json
from functools import cache

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from latentrace import models
from latentrace.models.hf_config import parse

from .families import CASES, GOLDEN, LLAMA3, MAX_LENGTH, config_of, write_checkpoint
from .helpers import logits_in_two_blocks


@cache
def golden():
    return np.load(GOLDEN / "families.npz"), json.loads((GOLDEN / "families.json").read_text())


def load(directory, case, **options):
    return models.load(directory, max_length=MAX_LENGTH.get(case), **options)


@pytest.mark.parametrize("case", CASES)
def test_stored_outputs(case, tmp_path):
    """Logits at every third token, and the greedy continuation of the first 8 tokens."""
    arrays, shapes = golden()
    lm = load(write_checkpoint(tmp_path, case, shapes[case], seed=0), case)
    tokens = arrays[f"{case}/tokens"].astype(int)
    logits = lm.logits(tokens)
    np.testing.assert_allclose(logits[::3], arrays[f"{case}/logits"], atol=1e-4)
    np.testing.assert_array_equal(logits[7:-1].argmax(-1), tokens[8:])


def rest_is_slow(*quick):
    """All cases; those that are not named run with the slow tests."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", rest_is_slow("llama-tied-biases-head_dim", "gemma3", "gpt2", "gpt_neox"))
def test_stored_outputs_in_bfloat16(case, tmp_path):
    """Near the reference in bfloat16, and nearer than that to the reference in float32: sums are taken in float32 here."""
    arrays, shapes = golden()
    lm = load(write_checkpoint(tmp_path, case, shapes[case], seed=0), case, dtype="bfloat16")
    logits = lm.logits(arrays[f"{case}/tokens"].astype(int))[::3]
    assert logits.dtype == np.float32
    exact, rounded = arrays[f"{case}/logits"], arrays[f"{case}/bfloat16"]
    np.testing.assert_allclose(logits, rounded, atol=3e-2)
    assert np.square(logits - exact).mean() < np.square(rounded - exact).mean()


@pytest.mark.parametrize("case", rest_is_slow("gemma2", "qwen2-window", "gpt2"))
def test_cached_steps_equal_the_full_pass(case, tmp_path):
    arrays, shapes = golden()
    lm = load(write_checkpoint(tmp_path, case, shapes[case], seed=0), case)
    tokens = arrays[f"{case}/tokens"][:40].astype(np.int32)
    stepped = jax.jit(logits_in_two_blocks, static_argnums=(2, 3))(lm, tokens, 8, 64)
    np.testing.assert_allclose(stepped, lm.logits(tokens)[8:], atol=1e-4)


@pytest.mark.parametrize("case", rest_is_slow("qwen3-biases", "gemma3-scaled", "phi3-short", "gpt2-options", "gpt_neox"))
def test_round_trip(case, tmp_path):
    """What `save` writes is what was read: the same tensors under the same names, the same options."""
    _, shapes = golden()
    lm = load(write_checkpoint(tmp_path, case, shapes[case], seed=0), case)
    models.save(lm, tmp_path / "saved")
    stored, saved = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "saved"))
    assert set(saved) == set(stored) - {"lm_head.weight"} if lm.config.tied else set(saved) == set(stored)
    assert all((stored[name] == value).all() for name, value in saved.items())
    assert load(tmp_path / "saved", case).config == lm.config


NEW_SPELLING = {
    "llama-llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "gpt_neox-sequential": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gemma3-scaled": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("case", NEW_SPELLING)
def test_both_spellings_of_rotary_options(case):
    old = config_of(case)
    new = {
        key: value for key, value in old.items() if "rope" not in key and key not in {"rotary_pct", "sliding_window_pattern"}
    }
    assert parse(new) != parse(old)
    assert parse(new | NEW_SPELLING[case]) == parse(old)


@pytest.fixture
def reference(monkeypatch):
    """The script that makes the stored outputs; needs torch and transformers."""
    pytest.importorskip("torch", reason="parity needs torch")
    pytest.importorskip("transformers", reason="parity needs transformers")
    monkeypatch.syspath_prepend(GOLDEN)
    return pytest.importorskip("make_families")


@pytest.mark.parity
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_fresh_outputs(case, seed, reference, tmp_path):
    """Other weights: logits in both precisions, greedy text step by step from the cache, and the saved model read back."""
    network, _ = reference.network_of(case, seed, tmp_path)
    lm = load(tmp_path, case)
    tokens = np.array(reference.greedy(network, np.random.RandomState(seed).randint(0, 40, 8).tolist(), 64), np.int32)
    exact = reference.logits_of(network, tokens)
    np.testing.assert_allclose(lm.logits(tokens), exact, atol=1e-4)
    stepped = jax.jit(logits_in_two_blocks, static_argnums=(2, 3))(lm, tokens, 8, 128)
    np.testing.assert_allclose(stepped, exact[8:], atol=1e-4)
    np.testing.assert_array_equal(lm.logits(tokens)[7:-1].argmax(-1), tokens[8:])
    rounded = reference.logits_of(reference.network_of(case, seed, tmp_path, "bfloat16")[0], tokens)
    np.testing.assert_allclose(load(tmp_path, case, dtype="bfloat16").logits(tokens), rounded, atol=3e-2)
    network.config.save_pretrained(tmp_path)  # its own spelling of every option
    assert load(tmp_path, case).config == lm.config
    models.save(lm, tmp_path / "saved")
    np.testing.assert_allclose(reference.logits_of(reference.read(tmp_path / "saved"), tokens), exact, atol=1e-4)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_shorter_context(case, tmp_path):
    arrays, shapes = golden()
    lm = models.load(write_checkpoint(tmp_path, case, shapes[case], seed=0), max_length=80)
    np.testing.assert_allclose(lm.logits(arrays[f"{case}/tokens"])[::3], arrays[f"{case}/logits"], atol=1e-4)
    models.save(lm, tmp_path / "saved")
    assert models.load(tmp_path / "saved", max_length=80).config == lm.config
