"""Small models and oracles for the tests of the language and of inference."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from latentrace import models, ppl

LETTERS = "abcdefgh"


def markov(vocab_size: int, *, eos_id: int = 0, seed: int = 0) -> models.MarkovLM:
    """A Markov chain with uneven random logits, whose tokens spell a, b, c, ..."""
    rng = np.random.default_rng(seed)
    initial, transition = rng.normal(size=vocab_size), rng.normal(size=(vocab_size, vocab_size))
    return models.MarkovLM(initial, transition, eos_id, vocabulary=tuple(LETTERS[:vocab_size]))


def hmm(states: int, vocab_size: int, *, eos_id: int = 0, seed: int = 0) -> models.HMMLM:
    """A hidden Markov model with uneven random logits: its next token depends on the whole context."""
    rng = np.random.default_rng(seed)
    shapes = (states,), (states, states), (states, vocab_size)
    return models.HMMLM(*(1.5 * rng.normal(size=s) for s in shapes), eos_id, vocabulary=tuple(LETTERS[:vocab_size]))


def next_probs(lm: Any, tokens: tuple[int, ...] = ()) -> np.ndarray:
    """float64[V]: the model's next-token probabilities after `tokens`, by one pass over the whole sequence."""
    ids = np.asarray([lm.start_id, *tokens] if not tokens or isinstance(lm, models.HMMLM) else tokens, np.int32)
    logits = np.asarray(lm.logits(ids), np.float64)[-1]
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def texts(lm: Any, context: tuple[int, ...], max_tokens: int, stop: Callable[[tuple[int, ...]], bool] = lambda text: False):
    """Every text that can follow a context: (tokens, probability, whether it ended). `stop` says that `until` is met."""

    def grow(text: tuple[int, ...], p: float):
        ended = bool(text) and (text[-1] == lm.eos_id or stop(text))
        if ended or len(text) == max_tokens:
            yield text, p, ended
            return
        for token, q in enumerate(next_probs(lm, context + text)):
            if q > 0:
                yield from grow((*text, token), p * float(q))

    yield from grow((), 1.0)


def sum_of_densities(program: Any, args: tuple[Any, ...], values: dict[str, Any]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """exp(log density) of every assignment of `values[name]`, a list of candidates for each site."""
    names = list(values)
    assignments = [dict(zip(names, choice)) for choice in itertools.product(*values.values())]
    density = jax.jit(jax.vmap(lambda given: program.log_density(given, *args)))
    stacked = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *assignments)
    return np.exp(np.asarray(density(stacked), np.float64)), assignments


__all__ = ["hmm", "markov", "next_probs", "ppl", "sum_of_densities", "texts"]
