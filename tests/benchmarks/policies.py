"""Policy learning on the shipped reasoner at equal tokens: RLOO, GRPO, DAPO and rejection-sampling fine-tuning.

Each method trains all weights on word problems of the kind that trained the reasoner, new ones at every step, with the
verifier's 1 or 0 as reward, until it has generated its tokens; dynamic sampling pays for the groups that it drops. The
learning rate is the best one of `--rates` on validation problems; accuracy, per sample at temperature 1, is that on held-out
problems. Intervals hold 95 % over problems (bootstrap); those of gains are paired, problem by problem.

python tests/benchmarks/policies.py                                   # the table, about 20 minutes on two cores
python tests/benchmarks/policies.py --tokens 50000 --only rloo --log  # a try
"""

import argparse
import random
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from latentrace import models
from latentrace.inference import learning
from latentrace.inference.learning import policies
from latentrace.models.reasoner import word_problems
from latentrace.models.reasoner.evaluate import bootstrap_interval

PROMPTS, GROUP, PARTS = 32, 8, 2
"""Problems of a step, texts of each, and updates of a step, each on its part of the problems."""
MAX_TOKENS, BUFFER = 54, 6
"""Of a text: six steps of 8, an answer of 4, the end token, and one to spare; the last six are discouraged by DAPO."""
VALIDATION = 96
TRAINING_SEED, VALIDATION_SEED = 2_000_003, 1_000_003


class Method(NamedTuple):
    """A loss of log-probabilities and rollouts, and whether groups without advantages are dropped and drawn anew."""

    loss: Callable[[Any, learning.Rollouts], Any]
    dynamic: bool = False


def dapo(log_probs: Any, batch: learning.Rollouts) -> Any:
    rewards = batch.rewards + policies.overlong_penalty(batch.lengths, MAX_TOKENS, BUFFER)
    return policies.dapo(log_probs, batch.log_probs, rewards, batch.mask)


METHODS = {
    "rloo": Method(lambda x, batch: policies.rloo(x, batch.rewards, batch.mask, old_log_probs=batch.log_probs)),
    "grpo": Method(lambda x, batch: policies.grpo(x, batch.log_probs, batch.rewards, batch.mask)),
    "dapo": Method(dapo, dynamic=True),
    "rejection": Method(lambda x, batch: policies.rejection_sampling(x, batch.rewards, batch.mask)),
}


def training_prompts(rng: random.Random, count: int) -> list[str]:
    """Problems that are in no test split."""
    return [word_problems.format_prompt(word_problems.generate(rng)[0]) for _ in range(count)]


def draw(rng_key: Any, lm: Any, prompts: list[str]) -> learning.Rollouts:
    reward = lambda prompt, text: float(word_problems.verify(prompt, text))
    sizes = {"group_size": GROUP, "max_tokens": MAX_TOKENS, "pad_to": word_problems.PROMPT_TOKENS, "at_once": PROMPTS}
    return learning.rollouts(rng_key, lm, prompts, reward, **sizes)


def accuracy(lm: Any, prompts: list[str]) -> np.ndarray:
    """float64[problems]: the share of right texts."""
    return np.asarray(draw(jax.random.key(7), lm, prompts).rewards, np.float64).mean(axis=1)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0, b2=0.98))


@cache
def compiled_update(name: str) -> Callable[..., Any]:
    def loss(lm: Any, batch: learning.Rollouts) -> Any:
        return METHODS[name].loss(learning.log_probs(lm, batch), batch)

    def update(lm: Any, state: Any, rate: Any, batch: learning.Rollouts) -> Any:
        updates, state = OPTIMIZER.update(jax.grad(loss)(lm, batch), state)
        return optax.apply_updates(lm, jax.tree.map(lambda x: rate * x, updates)), state

    return jax.jit(update)


def train(name: str, lm: Any, rate: float, tokens: int, seed: int, log: bool) -> tuple[Any, int]:
    """The model after `tokens` generated tokens, and how many they were. The rate rises for a tenth of them, and falls to 0."""
    state, spent, step, rng = OPTIMIZER.init(lm), 0, 0, random.Random(TRAINING_SEED + seed)
    while spent < tokens:
        new = lambda rng_key, _: draw(rng_key, lm, training_prompts(rng, PROMPTS))
        key = jax.random.fold_in(jax.random.key(seed), step)
        if METHODS[name].dynamic:
            batch, _, generated = learning.mixed_rollouts(key, new, PROMPTS)
        else:
            batch = new(key, 0)
            generated = int(batch.mask.sum())
        spent, step = spent + generated, step + 1
        for part in range(PARTS):
            now = rate * min(1.0, 10 * spent / tokens, max(0.0, 1 - (spent - generated) / tokens))
            lm, state = compiled_update(name)(lm, state, now, jax.tree.map(lambda x: x[part::PARTS], batch))
        if log:
            print(f"  {name} {rate:g}: step {step}, {spent} tokens, reward {float(batch.rewards.mean()):.3f}", flush=True)
    return lm, spent


def line(name: str, tokens: int, found: np.ndarray, base: np.ndarray) -> str:
    percent = lambda x: (
        f"{100 * x.mean():5.1f} ({100 * bootstrap_interval(x)[0]:5.1f} to {100 * bootstrap_interval(x)[1]:5.1f})"
    )
    return f"{name:20} {tokens:9}  {percent(found)}  {percent(found - base)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=250_000, help="generated by each run")
    parser.add_argument("--problems", type=int, default=384, help="held-out problems")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4], help="learning rates to choose from")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", action="store_true", help="print every step")
    arguments = parser.parse_args()
    lm = models.load("reasoner")
    validation = training_prompts(random.Random(VALIDATION_SEED), VALIDATION)
    held_out = [word_problems.format_prompt(question) for question in word_problems.problems(0, arguments.problems)]
    base = accuracy(lm, held_out)
    print(f"base on validation problems: {100 * accuracy(lm, validation).mean():.1f} %", flush=True)
    table = [line("base", 0, base, base)]
    for name in arguments.only:
        best = (-1.0, 0.0, lm, 0)
        for rate in arguments.rates:
            start = time.perf_counter()
            trained, spent = train(name, lm, rate, arguments.tokens, arguments.seed, arguments.log)
            found = float(accuracy(trained, validation).mean())
            best = max(best, (found, rate, trained, spent), key=lambda run: run[0])
            seconds = time.perf_counter() - start
            print(f"{name}, rate {rate:g}: {100 * found:.1f} % on validation problems, {seconds:.0f} s", flush=True)
        table.append(line(f"{name}, rate {best[1]:g}", best[3], accuracy(best[2], held_out), base))
        print(table[-1], flush=True)
    print(f"\n{'method':20} {'tokens':>9}  {'held-out accuracy, %':22}  gain over base, %")
    print("\n".join(table))


if __name__ == "__main__":
    main()
