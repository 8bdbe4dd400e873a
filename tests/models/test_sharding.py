"""Eight simulated devices give the results of one. Each check runs in a process of its own, which has the devices."""

import os
import subprocess
import sys

import pytest

SETUP = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from latentrace import inference, models, ppl

config = models.TransformerConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_length=64, eos_id=1, bos_id=0, tied=False,
)
lm = models.TransformerLM.from_module(models.Transformer(config, rngs=nnx.Rngs(0)))
lm = jax.tree.map(lambda x: x + 0.2 * np.random.RandomState(x.size).normal(size=x.shape).astype(np.float32), lm)
"""
CHECKS = {
    "weights are split and logits are equal": """
tokens = np.arange(20) % 32
expected = lm.logits(tokens)
models.save(lm, sys.argv[1])
with jax.set_mesh(models.make_mesh(particles=4, model=2)):
    for placed in (models.shard(lm), models.load(sys.argv[1])):
        layer = placed.weights["layers"][0]
        parts = {name: layer[a][name]["kernel"].addressable_shards[0].data.shape
                 for a, name in [("attention", "qkv"), ("attention", "out"), ("mlp", "up"), ("mlp", "down")]}
        assert parts == {"qkv": (1, 4, 8, 16), "out": (16, 16), "up": (2, 12, 16), "down": (16, 12)}, parts
        assert placed.weights["embedding"].addressable_shards[0].data.shape == (16, 16)
        np.testing.assert_allclose(placed.logits(tokens), expected, atol=1e-5)
""",
    "smc gives the same particles": """
@ppl.program
def program(lm):
    text, context = ppl.generate("text", ppl.prompt(lm, [0, 5, 9]), max_tokens=6, twist=lambda text: 0.5 * text.length)
    more, _ = ppl.generate("more", context, max_tokens=3)
    ppl.factor("even", jnp.where(more.tokens[0] % 2 == 0, 0.0, -2.0))
    return text.tokens, more.tokens

from latentrace.inference import driver
outputs, execute = [], driver.execute
driver.execute = lambda *args, **options: outputs.append(execute(*args, **options)) or outputs[-1]

def run(lm):
    return inference.SMC(16, ess_threshold=0.9).run(jax.random.key(0), program, lm)

alone = run(lm)
with jax.set_mesh(models.make_mesh(particles=4, model=2)):
    spread = run(models.shard(lm))
parts = {shard.data.shape for shard in outputs[-1].log_weight.addressable_shards}
assert len(outputs[-1].log_weight.sharding.device_set) == 8 and parts == {(4,)}, parts
jax.tree.map(np.testing.assert_array_equal, spread.returned, alone.returned)
np.testing.assert_allclose(spread.log_weights, alone.log_weights, atol=1e-4)
np.testing.assert_allclose(spread.log_evidence, alone.log_evidence, atol=1e-4)
""",
    "what does not fit is refused": """
@ppl.program
def program(lm):
    return ppl.generate("text", ppl.prompt(lm, [0]), max_tokens=2)[0].tokens

with jax.set_mesh(models.make_mesh(particles=8)):
    try:
        inference.ImportanceSampling(12).run(jax.random.key(0), program, models.shard(lm))
    except ValueError as error:
        assert "num_particles=12 is not a multiple of the 8 devices" in str(error), error
    else:
        raise AssertionError
with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))):
    try:
        models.shard(lm)
    except ValueError as error:
        assert "make it with models.make_mesh" in str(error), error
    else:
        raise AssertionError
""",
}


@pytest.mark.parametrize("name", CHECKS)
def test_eight_devices(name, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    code = "import sys\n" + SETUP + CHECKS[name]
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
