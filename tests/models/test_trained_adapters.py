"""LoRA and soft prompts: what they start from, what gradients reach, programs that take them, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from latentrace import inference, models, ppl
from latentrace.inference import learning, vi
from latentrace.ppl import run
from latentrace.ppl.errors import SiteError

from .families import write_checkpoint
from .helpers import markov, transformer
from .test_families import golden

TOKENS = np.array([3, 5, 2, 7, 4, 9, 10, 2])
SMALL = transformer(num_layers=1)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def small_models(quick_compilation):
    jax.config.update("jax_disable_most_optimizations", True)  # until the module's end, as for the core's tests


def moved(params, seed=1):
    """Parameters away from the start."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


@ppl.program
def likes_late_tokens(lm, prompt):
    """A text, which is liked to have late tokens."""
    text, _ = ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=3)
    ppl.factor("late", 0.1 * text.tokens.sum())


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_starts_at_the_base():
    lm = SMALL
    adapted = models.LoRA(lm, 3).apply(models.LoRA(lm, 3).init(KEY))
    jax.tree.map(np.testing.assert_array_equal, adapted.weights, lm.weights)
    np.testing.assert_array_equal(adapted.logits(TOKENS), lm.logits(TOKENS))


def test_what_is_added():
    """W + alpha / rank * B A for matrices that are targets, one by one where several lie in one array; nothing for others."""
    lm = transformer()
    lora = models.LoRA(lm, 3, alpha=6, targets=["k_proj", r"layers\.1\.mlp\.(up|down)_proj"])
    assert lora.modules == (
        "layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"
    )  # fmt: skip
    params = moved(lora.init(KEY))
    product = {module: 2 * pair["B"] @ pair["A"] for module, pair in params.items()}
    found, base = lora.apply(params).weights["layers"], lm.weights["layers"]
    change = jax.tree.map(lambda a, b: np.asarray(a - b), found, base)
    for layer in (0, 1):
        keys = product[f"layers.{layer}.self_attn.k_proj"].reshape(2, 6, 16)  # kv_heads, head_dim, inputs
        qkv = change[layer]["attention"]["qkv"]["kernel"]
        np.testing.assert_allclose(qkv[:, -2], keys, atol=1e-5)
        assert not qkv[:, :-2].any()
        assert not qkv[:, -1].any()
        assert not change[layer]["attention"]["out"]["kernel"].any()
    assert not change[0]["mlp"]["up"]["kernel"].any()
    np.testing.assert_allclose(change[1]["mlp"]["up"]["kernel"][1], product["layers.1.mlp.up_proj"], atol=1e-5)
    assert not change[1]["mlp"]["up"]["kernel"][0].any()  # the gate
    np.testing.assert_allclose(change[1]["mlp"]["down"]["kernel"], product["layers.1.mlp.down_proj"], atol=1e-5)


def test_gradients_reach_the_adapter_only():
    lora = models.LoRA(SMALL, 3)
    loss = lambda lora, params: lora.apply(params).logits(TOKENS)[:, 3].sum()
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_base, of_params = gradients(lora, moved(lora.init(KEY)))
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(of_base))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(of_params))
    start = gradients(lora, lora.init(KEY))[1]  # where B is 0, A has no effect yet
    assert all(pair["B"].any() and not pair["A"].any() for pair in start.values())


def test_a_program_takes_an_adapted_model():
    """As an argument: other parameters compile nothing, and the run is that of the merged weights."""
    lm, prompt = SMALL, [2, 3, 4]
    lora = models.LoRA(lm, 2)
    params, smc = moved(lora.init(KEY)), inference.SMC(8)
    merged = jax.tree.map(jnp.asarray, lora.apply(params))
    first = smc.run(KEY, likes_late_tokens, lm, prompt)
    before = run.traced
    found = smc.run(KEY, likes_late_tokens, lora.apply(params), prompt)
    again = smc.run(KEY, likes_late_tokens, lora.apply(moved(params, 2)), prompt)
    assert run.traced == before
    expected = smc.run(KEY, likes_late_tokens, merged, prompt)
    np.testing.assert_array_equal(found.values["text"].tokens, expected.values["text"].tokens)
    assert len({first.log_evidence, found.log_evidence, again.log_evidence}) == 3


def test_log_density_is_differentiable_in_an_adapter():
    lora, prompt = models.LoRA(SMALL, 2), [2, 3, 4]
    text = {"text": [3, 5, 7]}
    density = lambda params: likes_late_tokens.log_density(text, lora.apply(params), prompt)

    def by_hand(params):
        ids = [*prompt, 3, 5, 7]
        rows = jax.nn.log_softmax(lora.apply(params).logits(ids))
        return sum(rows[i - 1, ids[i]] for i in range(3, len(ids))) + 1.5

    params = moved(lora.init(KEY))
    found, expected = (jax.value_and_grad(f)(params) for f in (density, jax.jit(by_hand)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize("case", ["llama", "gpt2", "phi3"])
def test_lora_files(case, tmp_path):
    """Written, added to the weights by `load`, and read again to train on: matrices apart, fused, and stored by input."""
    base = write_checkpoint(tmp_path / "base", case, golden()[1][case], seed=0)
    lm, tokens = models.load(base), np.arange(20)
    lora = models.LoRA(lm, 3, alpha=7)
    params = moved(lora.init(KEY))
    expected = lora.apply(params).logits(tokens)
    assert np.abs(expected - lm.logits(tokens)).max() > 0.1
    lora.save(params, tmp_path / "adapter")
    np.testing.assert_allclose(models.load(base, adapter=tmp_path / "adapter").logits(tokens), expected, atol=1e-4)
    again, read = models.LoRA.load(lm, tmp_path / "adapter")
    assert (again.rank, again.alpha, again.modules) == (lora.rank, lora.alpha, lora.modules)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), read, params)
    # a matrix of another rank and scale, as peft's patterns write them
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"alpha_pattern": {"layers.1.*": 2.0}, "r": 3'))
    merged = models.load(base, adapter=tmp_path / "adapter").logits(tokens)
    other, read = models.LoRA.load(lm, tmp_path / "adapter")
    np.testing.assert_allclose(other.apply(read).logits(tokens), merged, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")  # of peft about itself
def test_adapters_that_peft_reads(case, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    peft = pytest.importorskip("peft", reason="parity needs peft")
    base = write_checkpoint(tmp_path / "base", case, golden()[1][case], seed=0)
    lora = models.LoRA(models.load(base), 3, alpha=7)
    params = moved(lora.init(KEY))
    lora.save(params, tmp_path / "adapter")
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(torch.arange(20)[None]).logits[0].numpy()
    np.testing.assert_allclose(lora.apply(params).logits(np.arange(20)), expected, atol=1e-4)


def test_lora_errors(tmp_path):
    lm = SMALL
    with pytest.raises(ValueError, match=r"target 'query' matches no matrix; each layer has .*self_attn.q_proj"):
        models.LoRA(lm, 2, targets=["q_proj", "query"])
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        models.LoRA(lm, 0)
    with pytest.raises(TypeError, match="LoRA: lm must be a TransformerLM, not MarkovLM"):
        models.LoRA(markov(), 2)
    lora = models.LoRA(lm, 2)
    with pytest.raises(ValueError, match=r"those of another adapter: layers.0.mlp.down_proj is in one of them only"):
        lora.apply(models.LoRA(lm, 2, targets=["q_proj"]).init(KEY))
    lora.save(lora.init(KEY), tmp_path)
    with pytest.raises(models.CheckpointError, match=r"q_proj has shape \(24, 16\), the base model's is \(16, 16\)"):
        models.LoRA.load(transformer(head_dim=4), tmp_path)


@pytest.mark.parametrize("adapter", [models.LoRA(SMALL, 2), models.SoftPrompt(SMALL, 2)], ids=["LoRA", "soft prompt"])
def test_a_guide_with_an_adapter_learns_the_posterior(adapter):
    prompt = [2, 3, 4] if isinstance(adapter, models.LoRA) else [*adapter.ids, 2, 3, 4]

    @ppl.program
    def model(guide_lm):
        likes_late_tokens(SMALL, [2, 3, 4])

    @ppl.program
    def guide(guide_lm):
        ppl.generate("text", ppl.prompt(guide_lm, prompt), max_tokens=3)

    best = inference.Exact().run(KEY, model, None).log_evidence
    objective = vi.elbo(model, guide, num_samples=64)
    loss = lambda rng_key, params: -objective(rng_key, adapter.apply(params))
    fitted = learning.fit(loss, adapter.init(KEY), optax.adam(0.03), num_steps=80, rng_key=KEY, progress=False)
    gaps = [best + float(loss(jax.random.key(9), params)) for params in (adapter.init(KEY), fitted.params)]
    assert gaps[0] > 0.15
    assert -0.05 < gaps[1] < 0.4 * gaps[0], gaps


# --- soft prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_soft_prompt_reads_more_and_writes_no_more(tied):
    """Vectors that are those of tokens act as these tokens do."""
    lm = transformer(num_layers=1, tied=tied)
    soft, prompted = as_tokens(lm, 4, 7)
    assert soft.ids == [11, 12]
    assert (prompted.vocab_size, prompted.num_embeddings) == (11, 13)
    np.testing.assert_array_equal(prompted.logits([*soft.ids, *TOKENS]), lm.logits([4, 7, *TOKENS]))


def as_tokens(lm, *tokens):
    """A soft prompt that says what tokens say, and the model that knows it."""
    soft = models.SoftPrompt(lm, len(tokens))
    return soft, soft.apply({"prompt_embeddings": lm.weights["embedding"][jnp.array(tokens)]})


def test_a_program_takes_a_soft_prompt():
    soft, prompted = as_tokens(SMALL, 4, 7)
    found = inference.SMC(8).run(KEY, likes_late_tokens, prompted, [*soft.ids, 2])
    expected = inference.SMC(8).run(KEY, likes_late_tokens, SMALL, [4, 7, 2])
    np.testing.assert_array_equal(found.values["text"].tokens, expected.values["text"].tokens)
    assert found.log_evidence == pytest.approx(expected.log_evidence, abs=1e-5)


def test_gradients_reach_the_soft_prompt_only():
    soft = models.SoftPrompt(SMALL, 2)
    loss = lambda soft, params: soft.apply(params).logits([*soft.ids, *TOKENS])[:, 3].sum()
    of_base, of_params = jax.grad(loss, argnums=(0, 1))(soft, soft.init(KEY))
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(of_base))
    assert (np.abs(of_params["prompt_embeddings"]).max(axis=1) > 1e-4).all()


def test_log_density_is_differentiable_in_a_soft_prompt():
    soft = models.SoftPrompt(SMALL, 2)
    text = {"text": [3, 5, 4]}
    density = lambda params: likes_late_tokens.log_density(text, soft.apply(params), [*soft.ids, 2])

    def by_hand(params):
        ids = [*soft.ids, 2, 3, 5, 4]
        rows = jax.nn.log_softmax(soft.apply(params).logits(ids))
        return sum(rows[i - 1, ids[i]] for i in range(3, len(ids))) + 1.2

    params = soft.init(KEY)
    found, expected = (jax.value_and_grad(f)(params) for f in (density, jax.jit(by_hand)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_soft_prompt_files(tmp_path):
    lm = SMALL
    soft = models.SoftPrompt(lm, 3)
    params = moved(soft.init(KEY))
    soft.save(params, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 16)
    again, read = models.SoftPrompt.load(lm, tmp_path / "adapter")
    assert again.ids == soft.ids
    np.testing.assert_array_equal(read["prompt_embeddings"], params["prompt_embeddings"])
    with pytest.raises(models.CheckpointError, match="peft_type is 'PROMPT_TUNING'"):
        models.LoRA.load(lm, tmp_path / "adapter")
    with pytest.raises(models.CheckpointError, match=r"has shape \(3, 16\), the model's vectors have 8"):
        models.SoftPrompt.load(transformer(hidden_size=8), tmp_path / "adapter")


def test_soft_prompt_errors(tmp_path):
    lm = SMALL
    with pytest.raises(ValueError, match="length must be from 1 to less than the context of 64, not 64"):
        models.SoftPrompt(lm, 64)
    soft = models.SoftPrompt(lm, 2)
    prompted = soft.apply(soft.init(KEY))
    with pytest.raises(ValueError, match="holds a soft prompt"):
        models.save(prompted, tmp_path)
    with pytest.raises(SiteError, match="token id 13 is outside"):
        inference.SMC(2).run(KEY, likes_late_tokens, prompted, [13])

    @ppl.program
    def scores_it(lm):
        ppl.score("text", ppl.prompt(lm, [2]), [12])

    with pytest.raises(SiteError, match="site 'text': token id 12 is outside the vocabulary of 11 tokens"):
        inference.SMC(2).run(KEY, scores_it, prompted)
