"""Scalar heads on hidden states, and hooks on the residual stream."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrace import inference, models, ppl
from latentrace.models.transformer import _logits

from .families import write_checkpoint
from .helpers import transformer
from .test_families import golden

TOKENS = jnp.array([0, 3, 2, 4, 1, 0, 2, 2, 3], jnp.int32)


def test_steering_edits_one_layer():
    """Adding a vector after the last layer adds it to what the final norm reads."""
    lm, vector = transformer(), jnp.linspace(-1.0, 1.0, 16)
    plain, steered = lm.hidden(TOKENS, [0, 1]), lm.with_hook(0, jnp.add, vector).hidden(TOKENS, [0, 1])
    np.testing.assert_allclose(steered[0], plain[0] + vector, atol=1e-6)
    assert np.abs(steered[1] - plain[1] - vector).max() > 1e-2  # the second layer has read it
    features = lm.to_module().norm(plain[1] + vector)
    np.testing.assert_allclose(lm.with_hook(-1, jnp.add, vector).logits(TOKENS), lm.unembed(features), atol=1e-5)


def test_hooks_follow_in_order_and_share_the_weights():
    lm = transformer()
    double = lambda x: 2 * x
    edited = lm.with_hook(1, jnp.add, jnp.ones(16)).with_hook(1, double)
    np.testing.assert_allclose(edited.hidden(TOKENS, [1])[0], 2 * (lm.hidden(TOKENS, [1])[0] + 1), rtol=1e-6)
    assert all(a is b for a, b in zip(jax.tree.leaves(edited.weights), jax.tree.leaves(lm.weights)))
    assert not lm.hooks


def test_another_vector_compiles_nothing():
    lm = transformer()
    first = lm.with_hook(0, jnp.add, jnp.zeros(16)).logits(TOKENS)
    before = _logits._cache_size()
    second = lm.with_hook(0, jnp.add, jnp.arange(16.0)).logits(TOKENS)
    assert _logits._cache_size() == before
    assert np.abs(second - first).max() > 1e-3


def test_a_steered_model_in_a_program():
    """The cached steps of a program see the hook."""

    @ppl.program
    def text(lm):
        return ppl.generate("text", ppl.prompt(lm, [0, 5]), max_tokens=4)[0]

    steered = transformer().with_hook(0, jnp.add, jnp.linspace(-2.0, 2.0, 16))
    texts = inference.ImportanceSampling(3).run(jax.random.key(0), text, steered).returned
    for tokens, length, log_probs in zip(texts.tokens, texts.length, texts.log_probs):
        expected = jax.nn.log_softmax(steered.logits([0, 5, *tokens[:-1]]))[jnp.arange(1, 5), tokens]
        np.testing.assert_allclose(log_probs[:length], expected[:length], atol=1e-5)
        unsteered = jax.nn.log_softmax(transformer().logits([0, 5, *tokens[:-1]]))[jnp.arange(1, 5), tokens]
        assert np.abs(log_probs[:length] - unsteered[:length]).max() > 1e-2


def test_no_such_layer():
    with pytest.raises(ValueError, match="layer is 2; this model has layers 0 to 1"):
        transformer().with_hook(2, jnp.add, 1.0)


def classifier(path, case, labels=3):
    """A sequence classifier made of a case's checkpoint."""
    directory = write_checkpoint(path / "classifier", case, golden()[1][case], seed=0)
    tensors = {name: x for name, x in load_file(directory / "model.safetensors").items() if "lm_head" not in name}
    kernel = np.random.RandomState(0).standard_normal((labels, 32)).astype(np.float32)
    save_file(tensors | {"score.weight": kernel}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_labels": labels, "pad_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, kernel


def test_reward_model(tmp_path):
    directory, kernel = classifier(tmp_path, "llama")
    reward = models.load_reward(directory)
    features = reward.trunk.to_module().norm(reward.trunk.hidden(TOKENS, [-1])[0])
    np.testing.assert_allclose(reward.values(TOKENS), features @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(reward(TOKENS), reward.values(TOKENS)[-1], atol=1e-6)
    padded = jnp.concatenate([TOKENS, jnp.full(5, 1)])
    np.testing.assert_allclose(reward(padded, len(TOKENS)), reward(TOKENS), atol=1e-5)


def test_reward_in_a_program(tmp_path):
    """Importance weights are the rewards, and the model's weights are inputs of the compiled run."""
    reward = models.load_reward(classifier(tmp_path, "llama", labels=1)[0])

    @ppl.program
    def judged(lm, reward):
        text, _ = ppl.generate("text", ppl.prompt(lm, [0]), max_tokens=4)
        ppl.factor("reward", reward(text.tokens, text.length)[0])
        return text.tokens, text.length

    posterior = inference.ImportanceSampling(5).run(jax.random.key(0), judged, transformer(), reward)
    expected = [reward(tokens, length)[0] for tokens, length in zip(*posterior.returned)]
    np.testing.assert_allclose(posterior.log_weights, expected, atol=1e-5)


def test_a_language_model_has_no_reward_head(tmp_path):
    directory = write_checkpoint(tmp_path, "llama", golden()[1]["llama"], seed=0)
    with pytest.raises(models.CheckpointError, match=r"no tensor score\.weight"):
        models.load_reward(directory)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox"])
def test_classifiers_equal_transformers(case, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    directory, _ = classifier(tmp_path, case)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager").eval()
    tokens = np.array([2, 5, 9, 30, 12])  # no padding token inside
    with torch.no_grad():
        expected = network(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(models.load_reward(directory)(tokens), expected, atol=1e-4)
