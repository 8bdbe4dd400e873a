"""Low-rank adapters in PEFT's layout: what they add, and what is refused."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrace import models

from .families import write_checkpoint
from .test_families import golden

TOKENS = np.arange(20)
RANK = 3


def base(path, case="llama"):
    return write_checkpoint(path / "base", case, golden()[1][case], seed=0)


def write_adapter(path, pairs, **options):
    """An adapter of random pairs for tensors given as {module: (outputs, inputs)}; returns its directory and B A of each."""
    rng, tensors, products = np.random.RandomState(1), {}, {}
    for module, (outputs, inputs) in pairs.items():
        a, b = rng.standard_normal((RANK, inputs)), rng.standard_normal((outputs, RANK))
        embedding = module.endswith(("embed_tokens", "wte"))
        name = f"base_model.model.{module}.lora_" + ("embedding_" if embedding else "")
        suffix = "" if embedding else ".weight"
        tensors |= {f"{name}A{suffix}": a.astype(np.float32), f"{name}B{suffix}": b.astype(np.float32)}
        products[module] = b @ a
    directory = path / "adapter"
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none"} | options
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory, products


def merged(base, changes):
    """The base model with tensors changed on disk."""
    tensors = load_file(base / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = (tensors[name] + change).astype(np.float32)
    save_file(tensors, base / "model.safetensors")
    return models.load(base)


SETTINGS = {
    "plain": ({}, 6 / RANK, 6 / RANK),
    "rank-stabilised": ({"use_rslora": True}, 6 / math.sqrt(RANK), 6 / math.sqrt(RANK)),
    "alpha of its own": ({"alpha_pattern": {"layers.1.self_attn.v_proj": 1.5}}, 6 / RANK, 1.5 / RANK),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_adapter_is_added(name, tmp_path):
    options, first, second = SETTINGS[name]
    q, v, table = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"
    adapter, products = write_adapter(tmp_path, {q: (32, 32), v: (16, 32), table: (32, 40)}, **options)
    found = models.load(base(tmp_path), adapter=adapter).logits(TOKENS)
    changes = {q: first * products[q], v: second * products[v], table: first * products[table].T}
    expected = merged(tmp_path / "base", {f"{module}.weight": change for module, change in changes.items()})
    np.testing.assert_allclose(found, expected.logits(TOKENS), atol=1e-5)


def test_matrices_stored_by_input(tmp_path):
    """GPT-2's matrices lie [inputs, outputs], so its adapters have fan_in_fan_out."""
    module = "transformer.h.1.attn.c_attn"
    adapter, products = write_adapter(tmp_path, {module: (96, 32)}, fan_in_fan_out=True)
    found = models.load(base(tmp_path, "gpt2"), adapter=adapter).logits(TOKENS)
    expected = merged(tmp_path / "base", {f"{module}.weight": 2 * products[module].T})
    np.testing.assert_allclose(found, expected.logits(TOKENS), atol=1e-5)


ERRORS = {
    "kind": ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
    "dora": ({"use_dora": True}, {}, "use_dora is set, but weight-decomposed adapters are not supported"),
    "bias": ({"bias": "all"}, {}, "bias is 'all'"),
    "another model": ({}, {"model.layers.7.self_attn.q_proj": (32, 32)}, "layers.7.*fits no tensor of the base model"),
    "shape": (
        {},
        {"model.layers.0.self_attn.q_proj": (32, 30)},
        r"q_proj.* has shape \(32, 30\), the base model's is \(32, 32\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_adapter_errors(name, tmp_path):
    options, pairs, message = ERRORS[name]
    adapter, _ = write_adapter(tmp_path, pairs or {"model.layers.0.self_attn.q_proj": (32, 32)}, **options)
    with pytest.raises(models.CheckpointError, match=message):
        models.load(base(tmp_path), adapter=adapter)


def test_half_an_adapter(tmp_path):
    adapter, _ = write_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (32, 32)})
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: x for name, x in tensors.items() if "lora_A" in name}, adapter / "adapter_model.safetensors")
    with pytest.raises(models.CheckpointError, match=r"q_proj\.weight lacks its lora_B"):
        models.load(base(tmp_path), adapter=adapter)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case", "targets"), [("llama", ["q_proj", "down_proj", "embed_tokens"]), ("gpt2", ["c_attn", "c_proj"])]
)
@pytest.mark.filterwarnings("ignore")  # of peft about itself
def test_adapters_that_peft_writes(case, targets, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    peft = pytest.importorskip("peft", reason="parity needs peft")
    network = transformers.AutoModelForCausalLM.from_pretrained(base(tmp_path, case))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, init_lora_weights=False, use_rslora=True, fan_in_fan_out=case == "gpt2"
    )
    adapted = peft.get_peft_model(network, config)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(torch.tensor(TOKENS)[None]).logits[0].numpy()
    found = models.load(tmp_path / "base", adapter=tmp_path / "adapter").logits(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
