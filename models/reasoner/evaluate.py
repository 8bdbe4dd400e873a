"""How often the reasoner solves a problem by plain sampling: `python -m latentrace.models.reasoner.evaluate`.

A sample succeeds if the verifier accepts it and the end token follows. The numbers of a Game of 24 are given in ascending
order.
"""

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from latentrace import inference, models
from latentrace.models.programs.countdown import countdown
from latentrace.models.reasoner.countdown import Puzzle
from latentrace.models.reasoner.rollouts import rollouts
from latentrace.models.reasoner.splits import training_puzzles
from latentrace.models.reasoner.tasks import SPLITS, CountdownProblem, Problem
from latentrace.ppl.errors import AllParticlesDeadError
from latentrace.ppl.language_model import LanguageModel


class Report(NamedTuple):
    """Success on one set of problems; intervals hold 95 %."""

    problems: int
    samples: int
    """Samples per problem."""
    success: float
    """Share of samples that succeed."""
    success_interval: tuple[float, float]
    """By bootstrap over problems, whose difficulty varies more than chance within one does."""
    solved: float
    """Share of problems with at least one success."""
    solved_interval: tuple[float, float]
    """Wilson's interval."""


def successes(lm: LanguageModel, problems: Sequence[Problem], samples: int, seed: int = 0) -> np.ndarray:
    """bool[problems, samples]: which plain samples solve their problem."""
    keys = jax.random.split(jax.random.key(seed), len(problems))
    each = tqdm(list(zip(problems, keys)), unit=" problems", leave=False, delay=3)
    return np.stack([rollouts(lm, problem, samples, key).right for problem, key in each])


def solved_by_smc(lm: LanguageModel, problems: Sequence[Any], particles: int, seed: int = 0) -> np.ndarray:
    """bool[problems, 1]: which puzzles SMC solves when the exact verifier looks at every step."""
    algorithm, found = inference.SMC(particles), []
    for problem in tqdm(problems, unit=" problems", leave=False, delay=3):
        try:
            algorithm.run(jax.random.key(seed), countdown, lm, problem.puzzle, progress=False)
            found.append([True])
        except AllParticlesDeadError:
            found.append([False])
    return np.array(found)


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
    """The figures of bool[problems, samples]."""
    problems, samples = solved.shape
    per_problem, hits = solved.mean(axis=1), int(solved.any(axis=1).sum())
    return Report(
        problems,
        samples,
        float(per_problem.mean()),
        bootstrap_interval(per_problem),
        hits / problems,
        wilson_interval(hits, problems),
    )


def main(argv: list[str] | None = None) -> None:
    """The command line: one JSON line per set of problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reasoner", help="a shipped model or a directory in Hugging Face layout")
    parser.add_argument("--splits", nargs="+", choices=[*SPLITS, "trained"], default=[*SPLITS, "trained"])
    parser.add_argument("--problems", type=int, default=100, help="problems per split, 100 at most of Games of 24")
    parser.add_argument("--samples", type=int, default=100, help="samples per problem")
    parser.add_argument("--smc", type=int, metavar="N", help="SMC with N particles and the verifier, in place of samples")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.smc and "words" in arguments.splits:
        parser.error("--smc needs puzzles: name them with --splits, for example --splits hard")
    lm = models.load(arguments.model)
    for split in arguments.splits:
        if split == "trained":
            known = random.Random(0).sample(training_puzzles(), arguments.problems)
            problems: list[Problem] = [CountdownProblem(Puzzle(numbers)) for numbers in known]
        else:
            problems = SPLITS[split](arguments.problems)
        if arguments.smc:
            solved = solved_by_smc(lm, problems, arguments.smc, arguments.seed)
        else:
            solved = successes(lm, problems, arguments.samples, arguments.seed)
        print(json.dumps({"split": split, **report(solved)._asdict()}), flush=True)


if __name__ == "__main__":
    main()
