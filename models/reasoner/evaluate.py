"""How often the reasoner solves a puzzle by plain sampling: `python -m latentrace.models.reasoner.evaluate`.

Numbers are given in ascending order. A sample succeeds if its three lines are exactly right and the end token follows.
"""

import argparse
import json
import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace import models
from latentrace.models.reasoner import data
from latentrace.models.reasoner.splits import FRESH, HARD, training_puzzles
from latentrace.models.reasoner.verifier import trace_is_valid
from latentrace.ppl.language_model import Array, Block, LanguageModel, Memory, empty_memory


class Report(NamedTuple):
    """Success on one set of puzzles; intervals hold 95 %."""

    puzzles: int
    samples: int
    """Samples per puzzle."""
    success: float
    """Share of samples that succeed."""
    success_interval: tuple[float, float]
    """By bootstrap over puzzles, whose difficulty varies more than chance within one does."""
    solved: float
    """Share of puzzles with at least one success."""
    solved_interval: tuple[float, float]
    """Wilson's interval."""


@partial(jax.jit, static_argnames="length")
def sample(
    lm: LanguageModel, rng_key: Array, prompts: Array, length: int = data.TRACE_LENGTH, temperature: Array | float = 1.0
) -> Array:
    """int32[B, length]: one continuation of each prompt, int32[B, P]; temperature 0 takes the likeliest tokens."""

    def draw(logits, key):
        divisor = jnp.where(temperature == 0, 1.0, temperature)
        drawn = jax.random.categorical(key, logits / divisor)
        return jnp.where(temperature == 0, jnp.argmax(logits), drawn)

    def continuation(prompt, key):
        features, entries = lm.forward(prompt, empty_memory())
        cache = jax.tree.map(lambda leaf: _with_slots(leaf, length), entries)
        slots = jnp.arange(prompt.size + length)

        def step(carry, key):
            cache, logits, position = carry
            token = draw(logits, key)
            last = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, position - 1, 1, axis=-2), cache)
            memory = Memory((Block(cache, slots < position),), position, last)
            features, entries = lm.forward(token[None], memory)
            cache = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=-2), cache, entries
            )
            return (cache, lm.unembed(features)[-1], position + 1), token

        first = (cache, lm.unembed(features[-1:])[-1], jnp.int32(prompt.size))
        return jax.lax.scan(step, first, jax.random.split(key, length))[1]

    return jax.vmap(continuation)(prompts, jax.random.split(rng_key, len(prompts)))


def _with_slots(leaf: Array, count: int) -> Array:
    """A cache entry with `count` more empty slots on axis -2."""
    return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, count), (0, 0)])


def successes(
    lm: LanguageModel,
    puzzles: Sequence[Sequence[int]],
    samples: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 500,
) -> np.ndarray:
    """bool[puzzles, samples]: which plain samples solve their puzzle; `batch_size` of them are drawn at once."""
    numbers = np.repeat(np.asarray(puzzles, np.int32), samples, axis=0)
    batch_size = min(batch_size, len(numbers))
    padding = -len(numbers) % batch_size
    padded = np.concatenate([numbers, np.repeat(numbers[-1:], padding, axis=0)])
    check = jax.jit(jax.vmap(partial(trace_is_valid, length=data.TRACE_LENGTH)))
    results = []
    for index, chunk in enumerate(padded.reshape(-1, batch_size, 4)):
        key = jax.random.fold_in(jax.random.key(seed), index)
        traces = sample(lm, key, jnp.asarray(data.prompt_tokens(chunk)), temperature=temperature)
        results.append(np.asarray(check(jnp.asarray(chunk), traces)))
    return np.concatenate(results)[: len(numbers)].reshape(len(puzzles), samples)


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    share, shrink = hits / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return centre - half, centre + half


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The central 95 % of the means of resampled values float[N]."""
    rows = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def report(solved: np.ndarray) -> Report:
    """The figures of bool[puzzles, samples]."""
    puzzles, samples = solved.shape
    per_puzzle, hits = solved.mean(axis=1), int(solved.any(axis=1).sum())
    return Report(
        puzzles,
        samples,
        float(per_puzzle.mean()),
        bootstrap_interval(per_puzzle),
        hits / puzzles,
        wilson_interval(hits, puzzles),
    )


def main(argv: list[str] | None = None) -> None:
    """The command line: one JSON line per set of puzzles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reasoner", help="a shipped model or a directory in Hugging Face layout")
    parser.add_argument("--samples", type=int, default=100, help="samples per puzzle")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    lm = models.load(arguments.model)
    trained = random.Random(0).sample(training_puzzles(), 100)
    for name, puzzles in {"hard": HARD, "fresh": FRESH, "trained": trained}.items():
        solved = successes(lm, puzzles, arguments.samples, arguments.seed, arguments.temperature)
        print(json.dumps({"split": name, **report(solved)._asdict()}), flush=True)


if __name__ == "__main__":
    main()
