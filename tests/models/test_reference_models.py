"""Real checkpoints against references from elsewhere: greedy text, logits of transformers, bytes of tokenizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import models
from latentrace.ppl.language_model import Block, Memory

from .helpers import GOLDEN, config, shared, transformer, write

REAL = ["stories260k", "babyllama105"]
TEXTS = ["Once upon a time", 'Tom\'s 3 dogs, "Max" and others.', " two  spaces\nand lines"]
BYTE_TEXTS = ["naïve café — 日本語 🎉", "    indented\n\n\tcode() {x: 1}"]


@jax.jit
def greedy(lm, start):
    """The 200 most probable continuation tokens of a start token, in one loop over a cache."""
    length = 200
    head = (lm.config.num_kv_heads, length, lm.config.head_dim)
    cache = tuple((jnp.zeros(head), jnp.zeros(head)) for _ in range(lm.config.num_layers))

    def step(carry, position):
        token, cache = carry
        block = Block(cache, jnp.arange(length) < position)
        features, entry = lm.forward(token[None], Memory((block,), position, None))
        token = jnp.argmax(lm.unembed(features)[0]).astype(jnp.int32)
        return (token, write(cache, entry, position)), token

    return jax.lax.scan(step, (start, cache), jnp.arange(length))[1]


@pytest.mark.shared
def test_greedy_text_of_stories260k():
    directory = shared("models/stories260k")
    lm = models.load(directory)
    tokens = greedy(lm, jnp.int32(lm.start_id))
    assert lm.decode(tokens) == (directory / "golden_greedy_200.txt").read_text()


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_logits_equal_the_stored_reference(name):
    lm = models.load(shared(f"models/{name}"))
    golden = np.load(GOLDEN / "logits.npz")
    found = lm.logits(golden[f"{name}_tokens"])[golden["positions"]]
    np.testing.assert_allclose(found, golden[f"{name}_logits"], atol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_special_tokens_of_real_models(name):
    lm = models.load(shared(f"models/{name}"))
    assert (lm.start_id, lm.eos_id, lm.adds_start) == (1, 2, True)
    assert lm.token_bytes()[:3] == [b"", b"", b""]
    assert lm.decode([lm.start_id, *lm.encode("a dog"), lm.eos_id]) == "a dog"


def tokenizer(path):
    return models.Tokenizer.from_file(shared(path))


@pytest.mark.shared
@pytest.mark.parametrize("path", [f"models/{name}/tokenizer.json" for name in REAL])
def test_bytes_of_marked_tokenizers(path):
    """A SentencePiece-like tokenizer puts one space before a text."""
    tok = tokenizer(path)
    table = tok.token_bytes()
    assert len(table) == tok.vocab_size
    texts = TEXTS + BYTE_TEXTS if "stories" in path else [TEXTS[0]]  # babyllama105 has no byte fallback
    for text in texts:
        ids = tok.encode(text)
        assert b"".join(table[i] for i in ids) == b" " + text.encode()
        assert tok.decode(ids) == text


@pytest.mark.shared
def test_bytes_of_the_byte_level_tokenizer():
    tok = tokenizer("tokenizers/gpt2_style_50k_tokenizer.json")
    table = tok.token_bytes()
    assert not tok.adds_start
    assert table[50256] == b""
    assert set(table) >= {bytes([byte]) for byte in range(256)}
    for text in TEXTS + BYTE_TEXTS:
        ids = tok.encode(text)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert tok.decode(ids) == text


@pytest.mark.shared
def test_equal_tokenizers_are_equal():
    path = "models/stories260k/tokenizer.json"
    assert tokenizer(path) == tokenizer(path)
    assert hash(tokenizer(path)) == hash(tokenizer(path))
    assert tokenizer(path) != models.Tokenizer.from_file(shared(path), bos_id=1)


def torch_logits(directory, tokens):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return network(torch.tensor(np.asarray(tokens))[None]).logits[0].numpy()


@pytest.mark.parity
@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_models_equal_transformers(name):
    directory = shared(f"models/{name}")
    lm = models.load(directory)
    tokens = np.random.default_rng(1).integers(0, lm.vocab_size, 200)
    np.testing.assert_allclose(lm.logits(tokens), torch_logits(directory, tokens), atol=1e-4)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CHECKPOINTS = {
    "llama grouped, untied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama biases, own head_dim": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama rescaled positions": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_random_checkpoints_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    kind, changes = CHECKPOINTS[name]
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.3)  # fmt: skip
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | changes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    tokens = np.random.default_rng(1).integers(0, 40, 100)
    lm = models.load(tmp_path)
    np.testing.assert_allclose(lm.logits(tokens), torch_logits(tmp_path, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"tied": False, "rope_theta": 300.0}])
def test_saved_models_read_by_transformers(changes, tmp_path):
    lm = transformer(**changes)
    assert lm.config == config(**changes)
    models.save(lm, tmp_path)
    tokens = np.random.default_rng(1).integers(0, lm.vocab_size, 30)
    np.testing.assert_allclose(lm.logits(tokens), torch_logits(tmp_path, tokens), atol=1e-4)
