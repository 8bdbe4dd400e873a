"""Speed on one workload, as ratios taken in one run: a 135M-shaped decoder, 64-token prompt, 32 particles, 32 tokens, float32.

Task "plain" samples; task "forbid" bans every seventh token and pays the lost mass into the weight, with resampling when
the effective sample size is low. Peers run in an environment of their own, by a script that prints one JSON line per run:

    python tests/benchmarks/workload.py CHECKPOINT --peers-python VENV/bin/python --peers-script peers.py
    python tests/benchmarks/workload.py --small                 # random weights of a small shape; no peers
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latentrace import inference, models, ppl
from latentrace.models import Transformer, TransformerConfig, TransformerLM

PROMPT_TOKENS, PARTICLES, NEW_TOKENS = 64, 32, 32
SHAPES = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64),
    "small": dict(hidden_size=192, intermediate_size=512, num_layers=6, num_heads=6, num_kv_heads=2, head_dim=32),
}


def random_model(shape: str) -> TransformerLM:
    """A model of a shape with random weights: speed does not depend on them."""
    config = TransformerConfig(vocab_size=50257, max_length=2048, eos_id=50256, bos_id=50256, tied=True, **SHAPES[shape])
    return TransformerLM.from_module(Transformer(config, rngs=nnx.Rngs(0)))


@ppl.program
def plain(lm: Any, ids: Any) -> Any:
    return ppl.generate("text", ppl.prompt(lm, ids), max_tokens=NEW_TOKENS)[0]


@ppl.program
def forbid(lm: Any, ids: Any, allowed: Any) -> Any:
    return ppl.generate("text", ppl.prompt(lm, ids), max_tokens=NEW_TOKENS, constraint=allowed)[0]


@ppl.program
def twisted(lm: Any, ids: Any) -> Any:
    """Weights move at every token."""
    noise = lambda text: 0.1 * (text.tokens * 7919 % 13).sum()
    return ppl.generate("text", ppl.prompt(lm, ids), max_tokens=NEW_TOKENS, twist=noise)[0]


def seconds(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, given its seed; compiled first, then taken in turn, so that a slow spell hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(seed)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def matrix_rate(n: int = 2048, repeats: int = 10) -> float:
    """Float32 operations per second of a large matrix product."""
    a = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(lambda x: x @ a)
    x = jax.block_until_ready(product(a))
    start = time.perf_counter()
    for _ in range(repeats):
        x = product(x / 50)
    jax.block_until_ready(x)
    return 2 * n**3 * repeats / (time.perf_counter() - start)


def peer(args: argparse.Namespace, system: str, task: str) -> float | None:
    """Best tokens per second that a peer system reaches on a task."""
    command = [args.peers_python, args.peers_script, system, args.checkpoint, "-n", PARTICLES, "-t", NEW_TOKENS]
    command += ["--task", task, "--repeats", args.peers_repeats]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if not rows:
        print(f"{system} on {task} failed: {run.stderr.strip().splitlines()[-1:]}")
        return None
    return max(row["tokens_per_second"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python")
    parser.add_argument("--peers-script")
    parser.add_argument("--peers-repeats", type=int, default=2)
    args = parser.parse_args()
    lm = models.load(args.checkpoint) if args.checkpoint else random_model("small" if args.small else "135m")
    ids = (np.arange(PROMPT_TOKENS) * 37 % 50000).tolist()
    allowed = jnp.arange(lm.vocab_size) % 7 != 0
    tokens = PARTICLES * NEW_TOKENS
    sampling, smc = inference.ImportanceSampling(PARTICLES), inference.SMC(PARTICLES)

    def timed(algorithm: Any, program: Any, *args: Any) -> Callable[[int], Any]:
        return lambda seed: algorithm.run(jax.random.key(seed), program, *args, progress=False)

    ours = seconds(
        {
            "plain, sampling": timed(sampling, plain, lm, ids),
            "forbid, sampling": timed(sampling, forbid, lm, ids, allowed),
            "forbid, SMC": timed(smc, forbid, lm, ids, allowed),
            "twisted, never resampled": timed(inference.SMC(PARTICLES, 0.0), twisted, lm, ids),
            "twisted, resampled at every token": timed(inference.SMC(PARTICLES, 1.1), twisted, lm, ids),
        },
        args.repeats,
    )
    parameters = sum(x.size for x in jax.tree.leaves(lm))
    limit = matrix_rate() / (2 * parameters)
    print(f"{parameters / 1e6:.0f}M parameters; arithmetic limit {limit:.0f} tokens/s")
    for name, s in ours.items():
        print(f"{name:36} {s:7.3f} s {tokens / s:8.0f} tokens/s {tokens / s / limit:6.0%} of the limit")
    print(f"SMC / sampling, both on forbid: {ours['forbid, SMC'] / ours['forbid, sampling']:.3f}")
    print(f"SMC on forbid / plain sampling: {ours['forbid, SMC'] / ours['plain, sampling']:.3f}")
    always, never = ours["twisted, resampled at every token"], ours["twisted, never resampled"]
    print(f"one resampling: {1e3 * (always - never) / NEW_TOKENS:.2f} ms beside {1e3 * never / NEW_TOKENS:.2f} ms for a step")
    if args.peers_python:
        for system, task, mine in [
            ("llamppl", "forbid", "forbid, SMC"),
            ("genlm", "forbid", "forbid, SMC"),
            ("hf", "plain", "plain, sampling"),
        ]:
            rate = peer(args, system, task)
            if rate:
                print(f"{system} on {task}: {rate:.1f} tokens/s; ours is {tokens / ours[mine] / rate:.1f} times that")


if __name__ == "__main__":
    main()
