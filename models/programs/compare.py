"""Ways to spend tokens on a problem, side by side: accuracy against tokens, with intervals.

Every method sees the same problems and commits itself to one answer of each, with nothing but the process reward to judge by.
For Countdown there are two rows more, for who has the exact verifier and needs one right trace only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from latentrace import inference, ppl
from latentrace.models.reasoner import verifier, word_problems
from latentrace.models.reasoner.evaluate import bootstrap_interval
from latentrace.models.reasoner.process_reward import ProcessReward
from latentrace.models.reasoner.rollouts import Rollouts, rollouts
from latentrace.models.reasoner.tasks import CountdownProblem, Problem

from .countdown import countdown
from .step_by_step import step_by_step

PLAIN, MAJORITY = "plain sampling", "majority vote"
BEST, BEST_LINES = "best of N", "best of N, all lines"
IMPORTANCE, SMC = "importance sampling", "SMC"
ANY, ANY_SMC = "any of N", "any of SMC"
METHODS = (PLAIN, MAJORITY, BEST, BEST_LINES, IMPORTANCE, SMC)
"""What they answer: one sample, by chance; what most say; that whose end, or all of whose lines, the reward likes best; and the
most probable answer of the posterior, by independent samples or by SMC."""
VERIFIED = (ANY, ANY_SMC)
"""Whether one of the samples, or of SMC's particles, is right."""
REPEATS = 2
"""At most so many runs of one method with the same number of samples on one problem."""


class Result(NamedTuple):
    """One method with one number of samples, on all problems."""

    method: str
    samples: int
    """particles, or samples"""
    tokens: float
    """generated per problem, mean"""
    solved: np.ndarray
    """float64[problems]: share of repeats in which each problem was solved"""

    @property
    def accuracy(self) -> float:
        return float(self.solved.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by bootstrap over problems."""
        return bootstrap_interval(self.solved)


def compare(
    lm: ppl.LanguageModel, reward: ProcessReward, problems: Sequence[Problem], sizes: Sequence[int], seed: int = 0
) -> list[Result]:
    """All methods with each number of samples; independent samples are drawn once and shared by all but SMC."""
    methods = METHODS + VERIFIED if isinstance(problems[0], CountdownProblem) else METHODS
    solved: dict[Any, list[float]] = {(m, n): [] for m in methods for n in sizes}
    tokens: dict[Any, list[float]] = {(m, n): [] for m in methods for n in sizes}
    keys = jax.random.split(jax.random.key(seed), len(problems))
    for problem, key in tqdm(list(zip(problems, keys)), unit=" problems", leave=False, delay=3):
        pool = rollouts(lm, problem, max(sizes) * REPEATS, key)
        log_rewards = np.where(pool.is_line, np.asarray(reward.log_prob(jnp.asarray(pool.features))), 0.0)
        for n in sizes:
            groups = np.arange(len(pool.right) // n * n).reshape(-1, n)[:REPEATS]
            runs = [_smc(lm, reward, problem, n, jax.random.fold_in(key, repeat)) for repeat in range(len(groups))]
            found = [{**_from_samples(problem, pool, log_rewards, group), **run[0]} for group, run in zip(groups, runs)]
            for method in methods:
                solved[method, n].append(float(np.mean([verdict[method] for verdict in found])))
                spent = [run[1] for run in runs] if method in (SMC, ANY_SMC) else [pool.tokens * n / len(pool.right)]
                tokens[method, n].append(float(np.mean(spent)))
    return [Result(m, n, float(np.mean(tokens[m, n])), np.array(solved[m, n])) for m in methods for n in sizes]


def _from_samples(problem: Problem, pool: Rollouts, log_rewards: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """What independent samples come to, each with its log reward after every line, float[N, L]."""
    right, answers = pool.right[group], [problem.answer(pool.texts[i]) for i in group]
    lines = pool.is_line[group].sum(1)
    at_end = np.where(lines > 0, log_rewards[group, np.maximum(lines - 1, 0)], -np.inf)
    all_lines = np.where(lines > 0, log_rewards[group].sum(1), -np.inf)
    log_weights = all_lines if isinstance(problem, CountdownProblem) else at_end  # as in the two programs
    return {
        PLAIN: float(right.mean()),
        MAJORITY: _vote(answers, np.ones(len(group)), right),
        BEST: bool(right[np.argmax(at_end)]),
        BEST_LINES: bool(right[np.argmax(all_lines)]),
        IMPORTANCE: _vote(answers, np.exp(log_weights), right),
        ANY: bool(right.any()),
    }


def _vote(answers: Sequence[Any], weights: np.ndarray, right: np.ndarray) -> bool:
    """Whether the answer of largest weight is right; the first one said wins a tie."""
    total: dict[Any, float] = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            total[answer] = total.get(answer, 0.0) + float(weight)
    if not total:
        return False
    return bool(right[answers.index(max(total, key=total.__getitem__))])


def _smc(
    lm: ppl.LanguageModel, reward: ProcessReward, problem: Problem, particles: int, rng_key: jax.Array
) -> tuple[dict[str, float], int]:
    """Whether SMC with the process reward solves a problem, and the tokens that it generated."""
    algorithm = inference.SMC(particles)
    if isinstance(problem, CountdownProblem):
        posterior = algorithm.run(rng_key, countdown, lm, problem.puzzle, reward, "none", progress=False)
        is_solved = jax.vmap(verifier.is_solved, (0, None))
        right = np.asarray(is_solved(posterior.returned[1], problem.puzzle.target))
        answers = [problem.answer("".join(lines)) for lines in posterior.values["step"].decode()]
        found: dict[str, float] = {SMC: _vote(answers, posterior.weights, right), ANY_SMC: bool(right.any())}
    else:
        posterior = algorithm.run(rng_key, step_by_step, lm, problem.question, reward, progress=False)
        answer = posterior.marginal("answer")[0].value
        found = {SMC: answer == word_problems.solve(problem.question).answer}
    return found, posterior.ledger.tokens_generated


def difference(one: Result, other: Result) -> tuple[float, tuple[float, float]]:
    """How much more accurate `one` is on the same problems, and the 95 % interval by bootstrap over them."""
    gains = one.solved - other.solved
    return float(gains.mean()), bootstrap_interval(gains)


def table(results: Sequence[Result]) -> str:
    """The results as text, with the advantage of SMC over each other method at the same number of samples."""
    smc = {(r.method, r.samples): r for r in results if r.method in (SMC, ANY_SMC)}
    lines = [f"{'method':20} {'N':>4} {'tokens':>7} {'accuracy':>9}  {'95 % interval':15}  SMC's advantage"]
    for r in results:
        low, high = r.interval
        text = f"{r.method:20} {r.samples:4d} {r.tokens:7.0f} {r.accuracy:9.1%}  {f'{low:.1%} to {high:.1%}':15}"
        if r.method not in (SMC, ANY_SMC):
            gain, (low, high) = difference(smc[ANY_SMC if r.method == ANY else SMC, r.samples], r)
            text += f"  {gain:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(text)
    return "\n".join(lines)


def figure(results: dict[str, Sequence[Result]], path: str | Path | None = None) -> Any:
    """Accuracy against tokens, one panel for each task; written to `path` if there is one. Needs matplotlib."""
    import matplotlib.pyplot as plt

    size = 4.6 * len(results) + 1.6, 3.8
    drawing, panels = plt.subplots(1, len(results), figsize=size, squeeze=False, layout="constrained")
    for panel, (task, rows) in zip(panels[0], results.items()):
        for number, method in enumerate(METHODS + VERIFIED):
            line = sorted((r for r in rows if r.method == method), key=lambda r: r.samples)
            if not line:
                continue
            tokens, accuracy = [r.tokens for r in line], [r.accuracy for r in line]
            low, high = zip(*(r.interval for r in line))
            style = {
                "color": f"C{number}",
                "linewidth": 2.2 if method == SMC else 1.3,
                "linestyle": ":" if method in VERIFIED else "-",
            }
            panel.plot(tokens, accuracy, marker="o", markersize=4, label=method, **style)
            panel.fill_between(tokens, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        panel.set(xscale="log", xlabel="tokens per problem", ylabel="problems solved", title=task)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ticks = sorted({round(r.tokens) for r in rows if r.method == PLAIN})
        panel.set_xticks(ticks, map(str, ticks))
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    drawing.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    if path is not None:
        drawing.savefig(path, dpi=150)
    return drawing
