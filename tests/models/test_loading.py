"""Directories on disk: round trips, and errors that name what is wrong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from latentrace import models
from latentrace.models.transformer import _logits

from .helpers import markov, transformer

TOKENS = [0, 5, 2, 9]


def small_tokenizer():
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(ord("a") + i): i + 2 for i in range(8)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return models.Tokenizer(backend.to_str(), bos_id=0, eos_id=1)


@pytest.fixture
def directory(tmp_path):
    lm = transformer()
    models.save(models.TransformerLM(lm.weights, lm.graph, lm.config, small_tokenizer()), tmp_path)
    return tmp_path


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"tied": False, "out_bias": True, "qkv_bias": True, "mlp_bias": True}])
def test_round_trip(changes, tmp_path):
    lm = transformer(**changes)
    models.save(lm, tmp_path)
    again = models.load(tmp_path)
    assert again.config == lm.config
    np.testing.assert_array_equal(again.logits(TOKENS), lm.logits(TOKENS))


def test_round_trip_with_a_tokenizer(directory):
    lm = models.load(directory)
    assert lm.tokenizer == small_tokenizer()
    assert lm.adds_start
    assert lm.encode("abc") == [2, 3, 4]
    assert lm.decode(np.array([0, 2, 3, 1])) == "ab"
    assert lm.token_bytes() == [b"", b""] + [bytes([b]) for b in b"abcdefgh"] + [b""]


@pytest.mark.parametrize("dtype", [jnp.float16, "bfloat16"])
def test_round_trip_in_half_precision(dtype, tmp_path):
    lm = transformer()
    models.save(lm, tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {jnp.dtype(dtype)}
    again = models.load(tmp_path)
    assert again.logits(TOKENS).dtype == jnp.float32
    np.testing.assert_allclose(again.logits(TOKENS), lm.logits(TOKENS), atol=0.1)
    models.save(again, tmp_path / "again")
    np.testing.assert_array_equal(models.load(tmp_path / "again").logits(TOKENS), again.logits(TOKENS))


def test_two_loads_compile_once(directory):
    models.load(directory).logits(TOKENS)
    before = _logits._cache_size()
    models.load(directory).logits(TOKENS)
    assert _logits._cache_size() == before


def test_without_a_tokenizer(directory):
    (directory / "tokenizer.json").unlink()
    lm = models.load(directory)
    assert lm.logits(TOKENS).shape == (4, 11)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        lm.encode("a")


def test_unknown_name_gives_near_misses(tmp_path):
    with pytest.raises(models.CheckpointError, match="did you mean 'reasoner'"):
        models.load("reasonr")
    (tmp_path / "stories").mkdir()
    with pytest.raises(models.CheckpointError, match="did you mean 'stories'"):
        models.load(tmp_path / "storie")


def test_a_file_is_not_a_directory(directory):
    with pytest.raises(models.CheckpointError, match="is a file"):
        models.load(directory / "config.json")


CONFIG_ERRORS = {
    "model_type": ({"model_type": "mamba"}, "model_type is 'mamba'; supported are llama, mistral"),
    "hidden_act": ({"hidden_act": "tanh"}, "hidden_act is 'tanh'; supported are silu"),
    "rope": ({"rope_scaling": {"rope_type": "xpos", "factor": 2.0}}, "rotary positions have type 'xpos'"),
    "incomplete rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "type 'llama3' lack low_freq_factor"),
    "encoder": ({"add_cross_attention": True}, "add_cross_attention is set; only decoders"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is set; save the model unquantised"),
    "size": ({"hidden_size": None}, "hidden_size is None"),
    "text for a size": ({"hidden_size": "__import__('os').system('true')"}, "expected a positive integer"),
    "list for a size": ({"num_key_value_heads": [2]}, r"config\.json: .*list"),
    "heads": ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
    "layer types": ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types must name each of the 2"),
    "shape": ({"intermediate_size": 25}, r"mlp.* has shape \(24, 16\), config.json implies \(25, 16\)"),
    "layers": ({"num_hidden_layers": 3}, r"lacks 9 tensor\(s\): layers\.2"),
    "fewer layers": ({"num_hidden_layers": 1}, r"no place for: model\.layers\.1"),
    "head": ({"tie_word_embeddings": False}, "lm_head.weight; set tie_word_embeddings to true"),
    "vocabulary": ({"vocab_size": 5}, "10 tokens but vocab_size in config.json is 5"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_config_errors(name, directory):
    changes, message = CONFIG_ERRORS[name]
    edit_config(directory, **changes)
    with pytest.raises(models.CheckpointError, match=message):
        models.load(directory)


def test_missing_end_token(directory):
    for name in ("generation_config.json", "tokenizer_config.json"):
        (directory / name).unlink()
    edit_config(directory, eos_token_id=None)
    with pytest.raises(models.CheckpointError, match="eos_token_id is None"):
        models.load(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", r"config\.json is missing"), ("model.safetensors", r"neither model\.safetensors nor")],
)
def test_missing_files(name, message, directory):
    (directory / name).unlink()
    with pytest.raises(models.CheckpointError, match=message):
        models.load(directory)


def test_pickled_weights_are_not_read(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(models.CheckpointError, match=r"pytorch_model\.bin cannot be read, convert to safetensors"):
        models.load(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_files_are_named(name, directory):
    (directory / name).write_text("{ nonsense")
    with pytest.raises(models.CheckpointError, match=name.replace(".", r"\.")):
        models.load(directory)


def test_integer_tensor(directory):
    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    edit_tensors(directory, edit)
    with pytest.raises(models.CheckpointError, match=r"model\.norm\.weight .* stored as I8"):
        models.load(directory)


def test_shards(directory):
    tensors = load_file(directory / "model.safetensors")
    expected = models.load(directory).logits(TOKENS)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:7], "two.safetensors": names[7:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(models.load(directory).logits(TOKENS), expected)
    (directory / "two.safetensors").unlink()
    with pytest.raises(models.CheckpointError, match=r"names two\.safetensors, which is missing"):
        models.load(directory)


def test_only_transformers_are_saved(tmp_path):
    with pytest.raises(TypeError, match="MarkovLM"):
        models.save(markov(), tmp_path)
