"""Train the process reward: `python -m latentrace.models.reasoner.train_reward --out FILE`.

The model's own samples for problems that it never saw are judged by the exact verifier; the reward learns, from the features at
the end of each line, whether the text will end right. The 100 fresh Games of 24 are among them, the 100 hard ones are not. How
well calibrated it is on held-out problems is printed as JSON.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from latentrace import models
from latentrace.models.reasoner.process_reward import FILE, ProcessReward, initial_reward
from latentrace.models.reasoner.rollouts import rollouts
from latentrace.models.reasoner.tasks import SPLITS, Problem, new_problem
from latentrace.ppl.language_model import LanguageModel

Array = jax.Array
HELD_OUT_PROBLEMS = 400
"""Most problems of a split that the reward is judged on."""


class Examples(NamedTuple):
    """Ends of lines, of all samples of all problems."""

    features: np.ndarray
    """float32[M, D]"""
    right: np.ndarray
    """bool[M]: whether the text that the line belongs to ended right"""
    line: np.ndarray
    """int[M]: number of the line in its text, from 0"""
    problem: np.ndarray
    """int[M]: number of the problem"""


def collect(lm: LanguageModel, problems: Sequence[Problem], samples: int, seed: int) -> Examples:
    """Lines of `samples` plain samples for each problem."""
    keys = jax.random.split(jax.random.key(seed), len(problems))
    parts = []
    for number, key in enumerate(tqdm(keys, unit=" problems", desc="sampling", delay=3)):
        found = rollouts(lm, problems[number], samples, key)
        sample, line = np.nonzero(found.is_line)
        parts.append(Examples(found.features[sample, line], found.right[sample], line, np.full(len(line), number)))
    return Examples(*(np.concatenate(columns) for columns in zip(*parts)))


def joined(one: Examples, other: Examples) -> Examples:
    """Both, with problems numbered on."""
    other = other._replace(problem=other.problem + one.problem.max() + 1)
    return Examples(*(np.concatenate(columns) for columns in zip(one, other)))


def fit(examples: Examples, steps: int, seed: int, members: int = 3) -> ProcessReward:
    """The mean, in log odds, of `members` perceptrons that differ in their seed and in the problems kept out of training.

    Each alone is too sure of itself on new problems. Their mean is one perceptron, as wide as all of them.
    """
    fitted = [fit_member(examples, steps, seed + k, kept_out=k) for k in range(members)]
    joined = lambda name: jnp.concatenate([jnp.atleast_1d(getattr(reward, name)) for reward in fitted])
    outer, offset = joined("outer") / members, joined("offset").mean()
    return replace(fitted[0], inner=joined("inner"), bias=joined("bias"), outer=outer, offset=offset)


def fit_member(
    examples: Examples, steps: int, seed: int, kept_out: int, batch_size: int = 1024, learning_rate: float = 1e-3
) -> ProcessReward:
    """Minimise the cross entropy of right and wrong with AdamW; of what comes by, keep the best on a sixth of the problems.

    Those take no part in training: a reward that knew its problems by heart would be too sure of itself on others.
    """
    is_check = examples.problem % 6 == kept_out % 6
    train, check = (Examples(*(column[rows] for column in examples)) for rows in (~is_check, is_check))
    reward = initial_reward(examples.features, jax.random.key(seed))
    transform = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=0.02)

    def loss_of(reward: ProcessReward, features: Array, right: Array) -> Array:
        return optax.sigmoid_binary_cross_entropy(reward.logit(features), right).mean()

    @jax.jit
    def update(reward: ProcessReward, state: optax.OptState, features: Array, right: Array) -> tuple:
        gradients = jax.grad(loss_of)(reward, features, right)
        updates, state = transform.update(gradients, state, reward)
        # the normalisation stays as it is
        return replace(optax.apply_updates(reward, updates), mean=reward.mean, scale=reward.scale), state

    state, rng, assess = transform.init(reward), np.random.default_rng(seed), jax.jit(loss_of)
    best, lowest = reward, float("inf")
    for step in tqdm(range(1, steps + 1), unit=" steps", desc=f"fitting {kept_out}", delay=3):
        rows = rng.integers(len(train.right), size=batch_size)
        reward, state = update(reward, state, train.features[rows], train.right[rows].astype(np.float32))
        if step % 100 == 0 or step == steps:
            loss = float(assess(reward, check.features, check.right.astype(np.float32)))
            best, lowest = (reward, loss) if loss < lowest else (best, lowest)
    return best


class Calibration(NamedTuple):
    """How stated probabilities compare with outcomes, in ten bins of equal width."""

    error: float
    """expected calibration error: mean distance of stated and found frequency, weighted by bin size (Guo et al. 2017)"""
    stated: list[float]
    found: list[float]
    counts: list[int]


def calibration(probability: np.ndarray, holds: np.ndarray, bins: int = 10) -> Calibration:
    """Bin float[M] probabilities of events bool[M]; empty bins are left out."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    used = [b for b in range(bins) if (index == b).any()]
    stated = [float(probability[index == b].mean()) for b in used]
    found = [float(holds[index == b].mean()) for b in used]
    counts = [int((index == b).sum()) for b in used]
    error = float(np.average(np.abs(np.subtract(stated, found)), weights=counts))
    return Calibration(error, stated, found, counts)


def area_under_curve(score: np.ndarray, holds: np.ndarray) -> float:
    """Probability that a right text scores higher than a wrong one (ties count half)."""
    _, rank, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    positive, negative = holds.sum(), (~holds).sum()
    if not positive or not negative:
        return float("nan")
    return float((middle[rank][holds].sum() - positive * (positive + 1) / 2) / (positive * negative))


def assess(lm: LanguageModel, reward: ProcessReward, split: str, problems: int, samples: int, seed: int) -> dict:
    """Calibration and discrimination on held-out problems, of all lines and of first lines alone."""
    examples = collect(lm, SPLITS[split](problems), samples, seed)
    probability = np.asarray(reward.probability(jnp.asarray(examples.features)))
    first = examples.line == 0
    return {
        "split": split,
        "lines": len(first),
        "share_right": float(examples.right.mean()),
        "calibration_error": calibration(probability, examples.right).error,
        "area_under_curve": area_under_curve(probability, examples.right),
        "area_under_curve_first_line": area_under_curve(probability[first], examples.right[first]),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reasoner", help="a shipped model or a directory in Hugging Face layout")
    parser.add_argument("--out", default=FILE, help="file to write (default %(default)s)")
    parser.add_argument("--problems", type=int, default=20000, help="new problems to sample for")
    parser.add_argument("--samples", type=int, default=8, help="samples per problem, eight times as many for the fresh games")
    parser.add_argument("--steps", type=int, default=15000, help="of fitting each of its three parts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    lm = models.load(arguments.model)
    rng = random.Random(arguments.seed)
    problems = [new_problem(rng) for _ in range(arguments.problems)]
    fresh = collect(lm, SPLITS["fresh"](100), 8 * arguments.samples, arguments.seed)
    examples = joined(fresh, collect(lm, problems, arguments.samples, arguments.seed))
    reward = fit(examples, arguments.steps, arguments.seed)
    reward.save(arguments.out)
    for split in [name for name in SPLITS if name != "fresh"]:
        print(json.dumps(assess(lm, reward, split, HELD_OUT_PROBLEMS, 20, arguments.seed + 1)), flush=True)


if __name__ == "__main__":
    main()
