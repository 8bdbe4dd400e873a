"""How many particles a learned twist saves: Countdown of three numbers on the shipped reasoner, where only the end is checked.

    python tests/benchmarks/learned_twist.py
    python tests/benchmarks/learned_twist.py --condition right

A text is the whole solution. What is asked of it is seen at its end: that its last operation be a subtraction or a division,
for which the first one has to be chosen well; or, with `--condition right`, that the exact verifier accepts it, of which the
model's features say little. Without a twist, SMC is best of N: a pool of plain texts tells how it does for every N. The twist
(FUDGE: `learning.acceptance_loss`) is learnt from what the model writes for puzzles that may train it, at its best on others of
them, and reads the features that the model has at each token anyway: a particle costs as many passes with it. Evaluated on
held-out puzzles, in one run:

- met: how often one of N particles meets the condition;
- spread: the mean over puzzles of the variance of the evidence estimate, which is an unbiased estimate of p(condition) either
  way. Best of N has p (1 - p) / N, so the ratio at equal N says how many times the particles it needs for equal error.

Intervals are 95 %, bootstrap over puzzles. The two need not agree: a twist that is wrong in places makes particles meet the
condition and their weights uneven.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latentrace import inference, models, ppl
from latentrace.inference import learning
from latentrace.models.reasoner import countdown, splits, tokenizer, verifier
from latentrace.models.reasoner.countdown import Puzzle
from latentrace.ppl.errors import AllParticlesDeadError

NUMBERS = 3
LENGTH = verifier.trace_length(NUMBERS) + 1
"""Tokens of a solution, the end token included."""
COUNTS = (2, 4, 8, 16)
POOL = 64
"""plain texts for each puzzle"""


SOUGHT = np.array([tokenizer.TOKEN_ID[operator] for operator in "-/"])


def is_right(numbers: Any, target: Any, text: ppl.Text) -> Any:
    return verifier.trace_is_valid(numbers, text.tokens, text.length, target)


def ends_as_sought(numbers: Any, target: Any, text: ppl.Text) -> Any:
    is_operator = jnp.asarray(tokenizer.OPERATOR_OF_TOKEN)[text.tokens] >= 0
    last = jnp.max(jnp.where(is_operator & (jnp.arange(LENGTH) < text.length), jnp.arange(LENGTH), 0))
    return jnp.isin(text.tokens[last], SOUGHT)


CONDITIONS = {"ending": ends_as_sought, "right": is_right}


@ppl.program
def play(lm: Any, numbers: Any, target: Any, prompt: str, twist: Any, holds: Any) -> ppl.Text:
    context = ppl.prompt(lm, prompt, pad_to=16)
    text, _ = ppl.generate("solution", context, max_tokens=LENGTH, twist=twist)
    ppl.condition("condition", holds(numbers, target[0], text))
    return text


def new_puzzles(count: int, seed: int) -> list[Puzzle]:
    """Different puzzles that are in no test split."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        puzzle, _ = countdown.random_trace(rng, NUMBERS)
        if splits.may_train(*puzzle):
            found.setdefault((tuple(sorted(puzzle.numbers)), puzzle.target), puzzle)
    return list(found.values())


@partial(jax.jit, static_argnums=0)
def judged(holds: Any, numbers: Any, target: Any, texts: ppl.Text) -> Any:
    return jax.vmap(lambda text: holds(numbers, target, text))(texts)


def examples(lm: Any, puzzles: Sequence[Puzzle], holds: Any, texts: int, seed: int) -> learning.TwistExamples:
    """What the model writes for some puzzles."""

    def log_phi(b: int, written: ppl.Text) -> np.ndarray:
        return np.where(judged(holds, np.array(puzzles[b].numbers), puzzles[b].target, written), 0.0, -np.inf)

    prompts = [countdown.format_prompt(*puzzle) for puzzle in puzzles]
    return learning.draw_examples(jax.random.key(seed), lm, prompts, log_phi, num_texts=texts, max_tokens=LENGTH)


def learn(lm: Any, holds: Any, args: argparse.Namespace) -> learning.AcceptanceTwist:
    """The twist that is best on puzzles kept out of training."""
    puzzles, began = new_puzzles(args.puzzles + args.kept_out, seed=0), time.perf_counter()
    check = examples(lm, puzzles[: args.kept_out], holds, 16, seed=1)
    data = examples(lm, puzzles[args.kept_out :], holds, args.texts, seed=2)
    print(f"{data.log_phi.size} texts of {args.puzzles} puzzles in {time.perf_counter() - began:.0f} s, "
          f"{np.isfinite(data.log_phi).mean():.3f} of them meet the condition", flush=True)  # fmt: skip
    head = ppl.proposals.twist_head(jax.random.key(3), lm, (args.hidden,))
    # tokens that the model hardly ever writes are hardly ever learnt from: they begin as those of a text that fails
    head = replace(head, biases=(*head.biases[:-1], head.biases[-1] - 4.0))
    loss_of = jax.jit(learning.acceptance_loss)
    found = learning.fit(
        learning.acceptance_loss,
        learning.AcceptanceTwist(head),
        optax.adam(optax.cosine_decay_schedule(args.learning_rate, args.steps)),
        num_steps=args.steps,
        rng_key=jax.random.key(4),
        data=data,
        batch_size=args.batch,
        segment=args.steps // 10,
        validate=lambda twist: loss_of(jax.random.key(0), twist, check) / LENGTH,
    )
    share = np.isfinite(check.log_phi).mean()
    constant = -share * np.log(share) - (1 - share) * np.log(1 - share)
    print(f"{found.steps} steps in {found.seconds:.0f} s: {found.validations.min():.4f} nats per token on puzzles kept out; "
          f"{constant:.4f} for their share alone", flush=True)  # fmt: skip
    return found.params


def evidence(lm: Any, puzzles: Sequence[Puzzle], holds: Any, twist: Any, particles: int, seed: int) -> np.ndarray:
    """Estimates of p(condition), float64[puzzles]; 0 where no particle meets it."""
    inputs = lambda p: (lm, np.array(p.numbers), np.array([p.target]), countdown.format_prompt(*p), twist, holds)
    found = inference.SMC(particles).run_many(
        jax.random.key(seed), play, [inputs(puzzle) for puzzle in puzzles], return_errors=True, progress=False
    )
    for x in found:
        if not isinstance(x, (inference.Posterior, AllParticlesDeadError)):
            raise x
    return np.array([np.exp(x.log_evidence) if isinstance(x, inference.Posterior) else 0.0 for x in found])


def interval(rows: np.ndarray, of: Any) -> str:
    """A number of rows, and its 95 % interval by bootstrap."""
    rng = np.random.default_rng(0)
    found = [of(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(2000)]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{of(rows):.3f} ({low:.3f} to {high:.3f})"


def report(lm: Any, puzzles: Sequence[Puzzle], holds: Any, twist: Any, seeds: int) -> None:
    """The table."""
    began = time.perf_counter()
    hits = np.isfinite(examples(lm, puzzles, holds, POOL, seed=100).log_phi).sum(1)
    plain = {n: np.array([1 - comb(POOL - k, n) / comb(POOL, n) for k in hits]) for n in (*COUNTS, 2 * COUNTS[-1])}
    plain_spread = hits * (POOL - hits) / (POOL * (POOL - 1))  # of one text
    steered = {n: np.stack([evidence(lm, puzzles, holds, twist, n, seed) for seed in range(seeds)], 1) for n in COUNTS}
    print(f"{len(puzzles)} puzzles, {seeds} runs of each with the twist, {time.perf_counter() - began:.0f} s")
    titles = ("met, no twist", "met, twist", "twist less 2 N without", "spread, ratio", "mean evidence")
    print("particles  " + "".join(f"{title:27s}" for title in titles))
    for n, estimates in steered.items():
        met = (estimates > 0).mean(1)
        spreads = np.stack([plain_spread / n, estimates.var(axis=1, ddof=1)], 1)
        cells = [
            interval(plain[n], np.mean),
            interval(met, np.mean),
            interval(met - plain[2 * n], np.mean),
            interval(spreads, lambda rows: rows[:, 0].mean() / rows[:, 1].mean()),
            interval(estimates.mean(1), np.mean),
        ]
        print(f"{n:9d}  " + "".join(f"{cell:27s}" for cell in cells))
    print(f"share of plain texts that meet it: {interval(hits / POOL, np.mean)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--condition", choices=CONDITIONS, default="ending")
    parser.add_argument("--puzzles", type=int, default=2400, help="to learn from")
    parser.add_argument("--kept-out", type=int, default=200, help="more of them, to choose the best twist on")
    parser.add_argument("--texts", type=int, default=8, help="for each puzzle")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="puzzles in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", action="store_true", help="evaluate on the puzzles kept out, to choose settings")
    args = parser.parse_args()
    lm = models.load("reasoner")
    holds = CONDITIONS[args.condition]
    twist = learn(lm, holds, args)
    held_out = countdown.puzzles(NUMBERS, args.kept_out, NUMBERS)
    report(lm, new_puzzles(args.kept_out, seed=0) if args.validation else held_out, holds, twist, args.seeds)


if __name__ == "__main__":
    main()
