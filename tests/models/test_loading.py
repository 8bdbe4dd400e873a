"""Directories on disk: round trips, and errors that name what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from latentrace import models
from latentrace.models.transformer import _logits

from .helpers import config as helper_config
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, directory):
    def edit(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    edit_tensors(directory, edit)
    with pytest.raises(models.CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight in .* holds NaN or infinity"):
        models.load(directory)


def test_truncated_file(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(models.CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        models.load(directory)


def test_dtype_and_length_of_a_load(directory):
    lm = models.load(directory, dtype=jnp.bfloat16, max_length=20)
    assert lm.max_length == 20
    assert {leaf.dtype for leaf in jax.tree.leaves(lm) if leaf.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="dtype is float16; a model computes in float32 or bfloat16"):
        models.load(directory, dtype="float16")
    with pytest.raises(models.CheckpointError, match="max_position_embeddings is 64, less than the max_length of 65"):
        models.load(directory, max_length=65)


def test_options_that_a_family_lacks(tmp_path):
    lm = transformer(logit_cap=30.0)
    with pytest.raises(models.CheckpointError, match="family 'llama' cannot express this model's logit_cap"):
        models.save(lm, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_names_of_other_classes(directory):
    """The text part of a multimodal checkpoint, and one saved without its head's class."""
    expected = models.load(directory).logits(TOKENS)
    tensors = load_file(directory / "model.safetensors")
    for prefix, config in [("language_model.model.", "text_config"), ("", None)]:
        renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
        extra = {"vision_tower.patch.weight": np.ones((2, 2), np.float32)} if config else {}
        save_file(renamed | extra, directory / "model.safetensors")
        if config:
            raw = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps({"model_type": "composite", config: raw}))
        np.testing.assert_array_equal(models.load(directory).logits(TOKENS), expected)


PEAK = """
import sys, threading, time
import jax.numpy as jnp
from latentrace import models

jnp.zeros(1).block_until_ready()

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

before, peak, loading = anonymous(), 0.0, True
def watch():
    global peak
    while loading:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
lm = models.load(sys.argv[1])
loading = False; thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_never_two_copies_in_memory(tmp_path):
    """Beside the weights there is room for a few of their arrays (some 40 MB here), not for all 256 MB of them again."""
    sizes = dict(hidden_size=1024, intermediate_size=2048, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64)
    lm = models.TransformerLM.from_module(models.Transformer(helper_config(**sizes), rngs=nnx.Rngs(0)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm)) / 2**20
    models.save(lm, tmp_path)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc gives freed arrays back at once
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.4 * size
