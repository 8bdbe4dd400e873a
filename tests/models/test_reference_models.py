"""Real checkpoints against references from elsewhere: greedy text, logits of transformers, bytes of tokenizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import models
from latentrace.ppl.language_model import Block, Memory

from .helpers import GOLDEN, shared, write

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
