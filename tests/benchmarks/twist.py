"""How much a twist saves: a keyword within a sentence of limited length, on a character-level model of stories.

    python tests/benchmarks/twist.py ../shared/data/models/babyllama105

A hidden Markov model is fitted to texts that the model writes; what it foresees of the constraint, exactly, steers SMC on the
model itself. Rejection sampling, SMC whose proposal only masks, and SMC with the twist are compared by tokens at equal error,
the total variation between the distribution of where the keyword stands and that of a long run.
"""

import argparse
import re
from typing import Any

import jax
import numpy as np

from latentrace import inference, models, ppl
from latentrace.ppl.constraints import lookahead, regex

PROMPT, KEYWORD, LENGTH = "Once upon a time, there was a ", "frog", 24
PATTERN = rf"(?s)[^.!?\n]*\b{KEYWORD}\b[^.!?\n]*\..*"
"""The keyword, and then the end of its sentence."""


@ppl.program
def write(lm: Any, prompt: Any, constraint: Any = None) -> Any:
    return ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=LENGTH, constraint=constraint)[0]


def places(texts: list[str], weights: np.ndarray) -> np.ndarray:
    """The distribution of where the keyword stands, float64[LENGTH]; texts without it are left out."""
    at = np.array([text.find(KEYWORD) for text in texts])
    found = np.bincount(at[at >= 0], weights[at >= 0], LENGTH)
    return found / max(found.sum(), 1e-300)


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(p - q).sum() / 2)


def rejection(lm: Any, total: int) -> tuple[np.ndarray, int]:
    """Where the keyword stands in each accepted one of `total` plain texts, and tokens in all."""
    accepted, tokens = [], 0
    for seed in range(total // 4096):
        posterior = inference.ImportanceSampling(4096).run(jax.random.key(1000 + seed), write, lm, PROMPT, progress=False)
        tokens += posterior.ledger.tokens_generated
        accepted += [t.find(KEYWORD) for t in posterior.values["text"].decode() if re.fullmatch(PATTERN, t)]
    return np.array(accepted), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--states", type=int, default=128)
    parser.add_argument("--texts", type=int, default=16384)
    parser.add_argument("--plain", type=int, default=2**17)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--runs", type=int, default=32)
    args = parser.parse_args()
    lm = models.load(args.model)
    drawn = inference.ImportanceSampling(args.texts).run(jax.random.key(0), write, lm, PROMPT).values["text"]
    hmm = models.fit_hmm(
        jax.random.key(1), drawn.tokens, drawn.length, args.states, vocab_size=lm.vocab_size, eos_id=lm.eos_id, num_steps=80
    )
    mask = regex(lm, PATTERN)
    twist = lookahead(mask, hmm, max_tokens=LENGTH)

    # the twist is exact where the hidden Markov model is the model
    exact = inference.SMC(1).run(jax.random.key(0), write, hmm, "", twist)
    estimates = [
        inference.SMC(args.particles).run(jax.random.key(s), write, hmm, "", mask, progress=False).log_evidence
        for s in range(args.runs)
    ]
    ratio = np.exp(np.array(estimates) - exact.log_evidence)
    print(f"under the hidden Markov model: log p(constraint) = {exact.log_evidence:.3f}, exact; of that probability SMC "
          f"without the twist estimates {ratio.mean():.3f} +- {ratio.std(ddof=1) / np.sqrt(len(ratio)):.3f}")  # fmt: skip

    # a long run on the model itself
    long = [inference.SMC(4096).run(jax.random.key(s), write, lm, PROMPT, twist) for s in range(8)]
    reference = np.mean([places(p.values["text"].decode(), p.weights) for p in long], axis=0)
    evidence = np.exp([p.log_evidence for p in long])
    error = evidence.std(ddof=1) / np.sqrt(len(evidence))
    between = [distance(places(p.values["text"].decode(), p.weights), reference) for p in long]
    print(f"under the model: p(constraint) = {evidence.mean():.3e} +- {error:.1e} by SMC with 8 x 4096 particles, "
          f"each {np.mean(between):.4f} from their mean in total variation")  # fmt: skip

    accepted, spent = rejection(lm, args.plain)
    rate = len(accepted) / (args.plain // 4096 * 4096)
    plain_error = np.sqrt(rate * (1 - rate) / args.plain)
    print(f"{len(accepted)} of {args.plain} plain texts are accepted: {rate:.3e} +- {plain_error:.1e}; "
          f"{distance(np.bincount(accepted, minlength=LENGTH) / len(accepted), reference):.4f} from the long run")  # fmt: skip

    def report(name: str, constraint: Any) -> tuple[float, float]:
        runs = [
            inference.SMC(args.particles).run(jax.random.key(s), write, lm, PROMPT, constraint, progress=False)
            for s in range(args.runs)
        ]
        tokens = np.mean([p.ledger.tokens_generated for p in runs])
        errors = [distance(places(p.values["text"].decode(), p.weights), reference) for p in runs]
        found = np.exp(np.array([p.log_evidence for p in runs])) / evidence.mean()
        print(f"{name}: {tokens:.0f} tokens, total variation {np.mean(errors):.3f} +- "
              f"{np.std(errors) / len(errors) ** 0.5:.3f}, evidence {found.mean():.3f} of the long run's, standard deviation "
              f"{found.std():.2f}")  # fmt: skip
        return float(tokens), float(np.mean(errors))

    report("SMC with a mask", mask)
    tokens, goal = report("SMC with the twist", twist)
    # how many accepted texts give the same error: by drawing subsets of those that there are
    rng, per_accepted = np.random.default_rng(0), spent / max(len(accepted), 1)
    needed = 1
    while needed < len(accepted) / 2:
        draws = [np.bincount(rng.choice(accepted, needed, replace=False), minlength=LENGTH) / needed for _ in range(200)]
        if np.mean([distance(d, reference) for d in draws]) <= goal:
            break
        needed += max(1, needed // 20)
    print(f"rejection sampling needs {needed} accepted texts, {needed * per_accepted:.0f} tokens, for the same error: "
          f"{needed * per_accepted / tokens:.1f} times the tokens")  # fmt: skip


if __name__ == "__main__":
    main()
