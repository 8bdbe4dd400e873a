"""What the reasoner writes for a problem when nothing steers it, and how it ends: for evaluation and for training rewards."""

from typing import Any, NamedTuple

import jax
import numpy as np

from latentrace import inference, ppl
from latentrace.models.reasoner.tasks import Problem


class Rollouts(NamedTuple):
    """N plain samples for one problem."""

    texts: list[str]
    right: np.ndarray
    """bool[N]: whether the verifier accepts the text, with nothing after its last line"""
    features: np.ndarray
    """float32[N, L, D]: features at the end of each line"""
    is_line: np.ndarray
    """bool[N, L]: which of them are at the end of a whole line"""
    tokens: int
    """generated in all"""

    @property
    def last(self) -> np.ndarray:
        """float32[N, D]: features at the end of the last whole line."""
        rows = np.maximum(self.is_line.sum(axis=1) - 1, 0)
        return self.features[np.arange(len(rows)), rows]


@ppl.program
def lines(lm: ppl.LanguageModel, prompt: str, prompt_tokens: int, count: int, line_length: int) -> Any:
    """`count` lines after a prompt, and the features at the end of each."""

    def line(context: ppl.Context, _: None) -> Any:
        text, context = ppl.generate("line", context, until="\n", max_tokens=line_length)
        return context, (text, ppl.features(context))

    return jax.lax.scan(line, ppl.prompt(lm, prompt, pad_to=prompt_tokens), length=count)[1]


def rollouts(lm: ppl.LanguageModel, problem: Problem, samples: int, rng_key: jax.Array) -> Rollouts:
    """`samples` plain samples at temperature 1."""
    algorithm = inference.ImportanceSampling(samples)
    sizes = problem.prompt_tokens, problem.lines, problem.line_length
    posterior = algorithm.run(rng_key, lines, lm, problem.prompt, *sizes, progress=False)
    texts, features = posterior.returned
    written = texts.decode()
    is_line = np.array([[line.endswith("\n") for line in trace] for trace in written])
    joined = ["".join(trace) for trace in written]
    right = np.array([problem.is_right(text) for text in joined])
    return Rollouts(joined, right, np.asarray(features), is_line, posterior.ledger.tokens_generated)
