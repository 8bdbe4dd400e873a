"""Ways to spend tokens on a problem, side by side: accuracy against tokens, with intervals.

Every method sees the same problems. Countdown comes with an exact verifier of whole traces; word problems come with
nothing but the process reward.
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

PLAIN, BEST, MAJORITY, IMPORTANCE, SMC = "plain sampling", "best of N", "majority vote", "importance sampling", "SMC"
METHODS = (PLAIN, BEST, MAJORITY, IMPORTANCE, SMC)
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
    """All methods with each number of samples; independent samples are drawn once and shared by the first four methods."""
    solved: dict[Any, list[float]] = {(m, n): [] for m in METHODS for n in sizes}
    tokens: dict[Any, list[float]] = {(m, n): [] for m in METHODS for n in sizes}
    keys = jax.random.split(jax.random.key(seed), len(problems))
    for problem, key in tqdm(list(zip(problems, keys)), unit=" problems", leave=False, delay=3):
        pool = rollouts(lm, problem, max(sizes) * REPEATS, key)
        scores = np.asarray(reward.log_prob(jnp.asarray(pool.last)))
        for n in sizes:
            groups = np.arange(len(pool.right) // n * n).reshape(-1, n)[:REPEATS]
            verdicts = [_from_samples(problem, pool, scores, group) for group in groups]
            for method in verdicts[0]:
                solved[method, n].append(float(np.mean([v[method] for v in verdicts])))
                tokens[method, n].append(pool.tokens * n / len(pool.right))
            runs = [_smc(lm, reward, problem, n, jax.random.fold_in(key, repeat)) for repeat in range(len(groups))]
            solved[SMC, n].append(float(np.mean([right for right, _ in runs])))
            tokens[SMC, n].append(float(np.mean([spent for _, spent in runs])))
    return [Result(m, n, float(np.mean(tokens[m, n])), np.array(solved[m, n])) for m in METHODS for n in sizes]


def _from_samples(problem: Problem, pool: Rollouts, scores: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """What independent samples come to: chosen by chance, by score, by vote and by weighted vote."""
    right = pool.right[group]
    answers = [problem.answer(pool.texts[i]) for i in group]
    if isinstance(problem, CountdownProblem):  # the verifier picks, and weighs with 0 or 1
        best = weighted = bool(right.any())
    else:
        best = bool(right[np.argmax(scores[group])])
        weighted = _vote(answers, np.exp(scores[group]), right)
    return {PLAIN: float(right.mean()), BEST: best, MAJORITY: _vote(answers, np.ones(len(group)), right), IMPORTANCE: weighted}


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
) -> tuple[bool, int]:
    """Whether SMC with the process reward solves a problem, and the tokens that it generated."""
    algorithm = inference.SMC(particles)
    if isinstance(problem, CountdownProblem):
        posterior = algorithm.run(rng_key, countdown, lm, problem.puzzle, reward, "none", progress=False)
        solved = jax.vmap(verifier.is_solved, (0, None))(posterior.returned[1], problem.puzzle.target)  # the verifier picks
        return bool(solved.any()), posterior.ledger.tokens_generated
    posterior = algorithm.run(rng_key, step_by_step, lm, problem.question, reward, progress=False)
    answer = posterior.marginal("answer")[0].value
    return answer == word_problems.solve(problem.question).answer, posterior.ledger.tokens_generated


def difference(one: Result, other: Result) -> tuple[float, tuple[float, float]]:
    """How much more accurate `one` is on the same problems, and the 95 % interval by bootstrap over them."""
    gains = one.solved - other.solved
    return float(gains.mean()), bootstrap_interval(gains)


def table(results: Sequence[Result]) -> str:
    """The results as text, with the advantage of SMC over each other method at the same number of samples."""
    smc = {r.samples: r for r in results if r.method == SMC}
    lines = [f"{'method':20} {'N':>4} {'tokens':>7} {'accuracy':>9}  {'95 % interval':15}  SMC's advantage"]
    for r in results:
        low, high = r.interval
        text = f"{r.method:20} {r.samples:4d} {r.tokens:7.0f} {r.accuracy:9.1%}  {f'{low:.1%} to {high:.1%}':15}"
        if r.method != SMC:
            gain, (low, high) = difference(smc[r.samples], r)
            text += f"  {gain:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(text)
    return "\n".join(lines)


def figure(results: dict[str, Sequence[Result]], path: str | Path | None = None) -> Any:
    """Accuracy against tokens, one panel for each task; written to `path` if there is one. Needs matplotlib."""
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results), 3.8), squeeze=False, layout="constrained")
    for panel, (task, rows) in zip(panels[0], results.items()):
        for number, method in enumerate(METHODS):
            line = sorted((r for r in rows if r.method == method), key=lambda r: r.samples)
            tokens, accuracy = [r.tokens for r in line], [r.accuracy for r in line]
            low, high = zip(*(r.interval for r in line))
            style = {"color": f"C{number}", "linewidth": 2.2 if method == SMC else 1.3}
            panel.plot(tokens, accuracy, marker="o", markersize=4, label=method, **style)
            panel.fill_between(tokens, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        panel.set(xscale="log", xlabel="tokens per problem", ylabel="problems solved", title=task)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8, frameon=False)
    if path is not None:
        drawing.savefig(path, dpi=150)
    return drawing
