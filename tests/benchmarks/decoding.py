"""Decoding, prefill and compilation of one checkpoint, in float32 and bfloat16, beside transformers in the same run.

    python tests/benchmarks/decoding.py CHECKPOINT --reference-python VENV/bin/python

CHECKPOINT is a directory with 135M parameters or so; without it a random model of that shape is made (and --shape 1b or 8b
chooses a larger one, for a GPU; `--dtypes bfloat16` and `--particles 1 64 256` go with it). The reference's environment has
torch and transformers. Every figure is the best of the repeats, taken in turn.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latentrace import inference, models, ppl
from latentrace.models import Transformer, TransformerConfig, TransformerLM
from latentrace.ppl.language_model import empty_memory

SHAPES = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
}
PREFILL = 1024


def random_model(shape: str, dtype: str) -> TransformerLM:
    """A model of a shape with constant weights, made where they are used: speed does not depend on them."""
    config = TransformerConfig(vocab_size=50257, max_length=2048, eos_id=50256, bos_id=50256, dtype=dtype, **SHAPES[shape])
    module = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    weights = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), nnx.to_pure_dict(state))
    return TransformerLM(weights, graph, config)


@ppl.program
def plain(lm: Any, ids: Any, count: int) -> Any:
    return ppl.generate("text", ppl.prompt(lm, ids), max_tokens=count)[0].tokens


def best(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least seconds of each run, taken in turn after one that compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
            if not repeat:
                print(f"# first {name}: {times[name][0]:.1f} s", flush=True)
    return {name: min(taken[1:]) for name, taken in times.items()}


def limits(dtype: str, n: int = 2048) -> tuple[float, float]:
    """Operations per second of a large matrix product, and bytes per second of a sum over a large array."""
    accelerated = jax.default_backend() != "cpu"
    n = 4 * n if accelerated else n
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x: jnp.dot(x, a, preferred_element_type=jnp.float32).astype(dtype) * 1e-4)
    big = jnp.ones((2**30 if accelerated else 2**27) // jnp.dtype(dtype).itemsize, dtype)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    seconds = best({"product": lambda: product(a), "sum": lambda: total(big)}, 10)
    return 2 * n**3 / seconds["product"], big.nbytes / seconds["sum"]


def compile_seconds(lm: TransformerLM, particles: int, count: int) -> float:
    """Seconds of the first run of a program, less those of the second."""
    taken = []
    for seed in range(2):
        start = time.perf_counter()
        ids = np.arange(64) * 37 % 50000
        inference.SMC(particles).run(jax.random.key(seed), plain, lm, ids.tolist(), count, progress=False)
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]


def reference(args: argparse.Namespace) -> dict[str, float]:
    """Seconds that transformers takes, from reference.py in its own environment."""
    script = Path(__file__).with_name("reference.py")
    command = [
        args.reference_python,
        script,
        args.checkpoint,
        args.particles[0],
        args.prompt,
        args.tokens,
        PREFILL,
        args.repeats,
    ]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--particles", type=int, nargs="+", default=[32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference-python")
    args = parser.parse_args()
    make = lambda dtype: models.load(args.checkpoint, dtype=dtype) if args.checkpoint else random_model(args.shape, dtype)
    lms = {dtype: make(dtype) for dtype in args.dtypes}
    first = next(iter(lms.values()))
    print(
        f"compilation of {first.config.num_layers} layers: {compile_seconds(first, args.particles[0], args.tokens + 1):.1f} s"
    )
    prompt = (np.arange(args.prompt) * 37 % 50000).tolist()
    long = jnp.arange(PREFILL) * 37 % 50000
    prefill = jax.jit(lambda lm, tokens: lm.unembed(lm.forward(tokens, empty_memory())[0][-1:]))
    runs: dict[str, Callable[[], Any]] = {}
    for dtype, lm in lms.items():
        for n in args.particles:
            decode = lambda lm=lm, n=n: inference.ImportanceSampling(n).run(
                jax.random.key(0), plain, lm, prompt, args.tokens, progress=False
            )
            runs[f"{dtype}, {n} particles"] = decode
        runs[f"{dtype}, prefill"] = lambda lm=lm: prefill(lm, long)
    seconds = best(runs, args.repeats)
    for dtype, lm in lms.items():
        operations, bandwidth = limits(dtype)
        parameters, size = (sum(f(x) for x in jax.tree.leaves(lm)) for f in (lambda x: x.size, lambda x: x.nbytes))
        print(f"{dtype}: {parameters / 1e6:.0f}M parameters, {operations / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
        for n in args.particles:
            s = seconds[f"{dtype}, {n} particles"]
            fastest = args.tokens * max(2 * parameters * n / operations, size / bandwidth)
            print(f"  {n:4} particles: {n * args.tokens / s:9.0f} tokens/s, {fastest / s:5.0%} of the limit")
        print(f"  prefill of {PREFILL}: {PREFILL / seconds[f'{dtype}, prefill']:.0f} tokens/s")
    if len(lms) == 2:
        for kind in [f"{n} particles" for n in args.particles] + ["prefill"]:
            print(
                f"bfloat16 over float32, {kind}: {seconds[f'float32, {kind}'] / seconds[f'bfloat16, {kind}']:.2f} times as fast"
            )
    if args.reference_python:
        theirs = reference(args)
        for kind, name in [(f"{args.particles[0]} particles", "generate"), ("prefill", "prefill")]:
            print(f"transformers, {kind}: {theirs[name] / seconds[f'float32, {kind}']:.2f} times our seconds (float32)")


if __name__ == "__main__":
    main()
