"""How many particles a learned twist saves: Games of 24 on the shipped reasoner, of which only the end is checked.

    python tests/benchmarks/learned_twist.py

A text is the whole solution, and the exact verifier says at its end whether it is right: without a twist, SMC is best of N. The
twist (FUDGE: `learning.acceptance_loss`) is learnt from what the model writes for games that it was never trained on and that are
in no test split (one of their numbers is 21 to 24), at its best on others of them. It reads the features that the model has at
each token anyway: a particle costs the same with it. Evaluated on the 200 held-out games, in one run:

- solved: how often SMC with N particles has a solution, where the model has one;
- spread: the mean over games of the variance of the evidence estimate, an unbiased estimate of p(right) with and without a
  twist. Best of N has p (1 - p) / N, so the ratio at equal N is how many times the particles it would need for equal error.

Intervals are 95 %, bootstrap over games.
"""

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from latentrace import inference, models, ppl
from latentrace.inference import learning
from latentrace.models.reasoner import countdown, splits, verifier
from latentrace.ppl.errors import AllParticlesDeadError

Game = tuple[int, ...]
LENGTH = verifier.trace_length(4) + 1
"""Tokens of a solution, the end token included."""
COUNTS = (4, 8, 16, 32, 64)


@ppl.program
def play(lm: Any, numbers: Any, prompt: str, twist: Any) -> ppl.Text:
    text, _ = ppl.generate("solution", ppl.prompt(lm, prompt), max_tokens=LENGTH, twist=twist)
    ppl.condition("right", verifier.trace_is_valid(numbers, text.tokens, text.length))
    return text


def prompt_of(game: Game) -> str:
    return countdown.format_prompt(game, countdown.TARGET)


def new_games(count: int, seed: int) -> list[Game]:
    """Solvable games that neither trained the model nor test it."""
    pool = [game for game in itertools.combinations_with_replacement(range(1, 25), 4) if game[-1] > 20]
    pool = [game for game in pool if splits.may_train(game, countdown.TARGET)]
    random.Random(seed).shuffle(pool)
    return list(itertools.islice((game for game in pool if countdown.solve(game, whole=True)), count))


@jax.jit
def right(numbers: Any, texts: ppl.Text) -> Any:
    return jax.vmap(lambda text: verifier.trace_is_valid(numbers, text.tokens, text.length))(texts)


def examples(lm: Any, games: Sequence[Game], texts: int, seed: int) -> learning.TwistExamples:
    """What the model writes for some games."""

    def log_phi(b: int, written: ppl.Text) -> np.ndarray:
        return np.where(right(np.array(games[b]), written), 0.0, -np.inf)

    prompts = [prompt_of(game) for game in games]
    return learning.draw_examples(jax.random.key(seed), lm, prompts, log_phi, num_texts=texts, max_tokens=LENGTH)


def learn(lm: Any, args: argparse.Namespace) -> learning.AcceptanceTwist:
    """The twist that is best on games kept out of training."""
    games, began = new_games(args.games + args.kept_out, seed=0), time.perf_counter()
    check = examples(lm, games[: args.kept_out], 16, seed=1)
    data = examples(lm, games[args.kept_out :], args.texts, seed=2)
    print(f"{data.log_phi.size} texts of {args.games} games in {time.perf_counter() - began:.0f} s, "
          f"{np.isfinite(data.log_phi).mean():.3f} of them right")  # fmt: skip
    start = learning.AcceptanceTwist(ppl.proposals.twist_head(jax.random.key(3), lm, (args.hidden,)))
    rate = optax.cosine_decay_schedule(1e-3, args.steps)
    loss_of_check = jax.jit(lambda twist: learning.acceptance_loss(jax.random.key(0), twist, check))
    found = learning.fit(learning.acceptance_loss, start, optax.adamw(rate, weight_decay=args.weight_decay),
                         num_steps=args.steps, rng_key=jax.random.key(4), data=data, batch_size=16, segment=250,
                         validate=lambda twist: float(loss_of_check(twist)) / LENGTH, patience=4)  # fmt: skip
    constant = float(loss_of_check(start)) / LENGTH
    print(f"{found.steps} steps in {found.seconds:.0f} s: {found.validations.min():.4f} nats per token on games kept out, "
          f"{constant:.4f} at first")  # fmt: skip
    return found.params


def evidence(lm: Any, games: Sequence[Game], twist: Any, particles: int, seed: int) -> np.ndarray:
    """Estimates of p(right), float64[games]; 0 where no particle is right."""
    problems = [(lm, np.array(game), prompt_of(game), twist) for game in games]
    smc = inference.SMC(particles)
    found = smc.run_many(jax.random.key(seed), play, problems, return_errors=True, progress=False)
    unexpected = [x for x in found if not isinstance(x, (inference.Posterior, AllParticlesDeadError))]
    if unexpected:
        raise unexpected[0]
    return np.array([np.exp(x.log_evidence) if isinstance(x, inference.Posterior) else 0.0 for x in found])


def interval(rows: np.ndarray, of: Any) -> tuple[float, float]:
    """95 %, bootstrap over the first axis."""
    rng = np.random.default_rng(0)
    found = [of(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(2000)]
    return tuple(np.quantile(found, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=3000, help="to learn from")
    parser.add_argument("--kept-out", type=int, default=200, help="more of them, to choose the best twist on")
    parser.add_argument("--texts", type=int, default=8, help="for each game")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--validation", action="store_true", help="evaluate on the games kept out, to choose among settings")
    args = parser.parse_args()
    lm = models.load("reasoner")
    twist = learn(lm, args)
    games = new_games(args.kept_out, seed=0) if args.validation else [*splits.HARD, *splits.FRESH]
    report(lm, games, twist, args.seeds)


def report(lm: Any, games: Sequence[Game], twist: Any, seeds: int) -> None:
    """The table."""
    began = time.perf_counter()
    estimates = {
        (name, n): np.stack([evidence(lm, games, head, n, seed) for seed in range(seeds)], 1)
        for name, head in (("no twist", None), ("twist", twist))
        for n in COUNTS
    }
    print(f"{len(games)} games, {seeds} runs of each, {time.perf_counter() - began:.0f} s")
    print("particles   solved, no twist          solved, twist             spread, no twist / twist")
    for n in COUNTS:
        pair = [estimates[name, n] for name in ("no twist", "twist")]
        share = lambda rows: (rows > 0).mean()
        cells = [f"{share(x):.3f} ({interval(x, share)[0]:.3f} to {interval(x, share)[1]:.3f})" for x in pair]
        ratio = lambda rows: rows[:, 0].mean() / rows[:, 1].mean()
        spreads = np.stack([x.var(axis=1, ddof=1) for x in pair], 1)
        low, high = interval(spreads, ratio)
        print(f"{n:9d}   {cells[0]:24s}  {cells[1]:24s}  {ratio(spreads):.2f} ({low:.2f} to {high:.2f})")
    for n in COUNTS[:-1]:
        ahead = (estimates["twist", n] > 0).mean(1) - (estimates["no twist", 2 * n] > 0).mean(1)
        low, high = interval(ahead, np.mean)
        print(f"solved with {n} particles and the twist, less {2 * n} without: {ahead.mean():+.3f} ({low:+.3f} to {high:+.3f})")
    low, high = interval(
        difference := estimates["twist", COUNTS[-1]].mean(1) - estimates["no twist", COUNTS[-1]].mean(1), np.mean
    )
    print(f"mean evidence with the twist, less that without: {difference.mean():+.4f} ({low:+.4f} to {high:+.4f})")


if __name__ == "__main__":
    main()
