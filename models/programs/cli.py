"""The command line: `latentrace solve` and `latentrace sample`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from latentrace import inference, models, ppl
from latentrace.models.reasoner import game24

from .game24 import expression_of, game_of_24

MAX_SHOWN = 10


class UsageError(Exception):
    """Input that cannot be served; its message is the one line that the user sees."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after one line on standard error."""
    args = build_parser().parse_args(argv)
    try:
        args.command(args)
    except (UsageError, ppl.errors.LatentraceError, models.CheckpointError) as error:
        print(f"latentrace: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("latentrace: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="latentrace", description="Inference over reasoning traces of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str, particles: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--particles", type=positive, default=particles, help="number of particles (default %(default)s)")
        sub.add_argument("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    sub = add("solve", solve, "The posterior over solutions of a Game of 24, from the shipped model.", 256)
    sub.add_argument("puzzle", help='four whole numbers, such as "4 6 8 10"')
    sub.add_argument("--algorithm", choices=["smc", "importance"], default="smc", help="inference (default %(default)s)")
    sub = add("sample", sample, "Texts sampled from a checkpoint.", 4)
    sub.add_argument("--model", required=True, metavar="DIR", help='a directory in Hugging Face layout, or "reasoner"')
    sub.add_argument("--prompt", default="", help="text to continue (default: empty)")
    sub.add_argument("--chat", action="store_true", help="give the prompt as a user's message, in the model's chat template")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrices (default %(default)s)")
    sub.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to add to the weights")
    sub.add_argument("--max-tokens", type=positive, default=64, help="most tokens of a text (default %(default)s)")
    sub.add_argument("--until", action="append", metavar="TEXT", help="stop after this text (may be repeated)")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def check_solvable(puzzle: str) -> tuple[int, ...]:
    """The puzzle's numbers; a `UsageError` where the model can write no solution."""
    try:
        numbers = game24.check_puzzle(puzzle)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not game24.solve(numbers):
        raise UsageError(f"{puzzle}: no way to make 24 exists")
    if game24.needs_fractions(numbers):
        raise UsageError(f"{puzzle}: every solution passes through fractions or numbers that the shipped model cannot write")
    return numbers


def solve(args: argparse.Namespace) -> None:
    check_solvable(args.puzzle)
    lm = models.load("reasoner")
    make = {"smc": inference.SMC, "importance": inference.ImportanceSampling}[args.algorithm]
    try:
        posterior = make(args.particles).run(jax.random.key(args.seed), game_of_24, lm, args.puzzle)
    except ppl.errors.AllParticlesDeadError:
        raise UsageError(
            f"{args.puzzle}: none of {args.particles} particles reached a solution; try more --particles or another --seed"
        ) from None
    solutions = posterior.marginal(expression_of)
    ledger = posterior.ledger
    if args.json:
        print(json.dumps({
            "puzzle": args.puzzle,
            "solutions": [{"expression": r.value, "probability": r.probability, "error": r.error} for r in solutions],
            **summary(posterior),
        }))  # fmt: skip
        return
    print(f"{args.puzzle}: {len(solutions)} solution{'s' if len(solutions) > 1 else ''}")
    print(solutions.top(MAX_SHOWN))
    if len(solutions) > MAX_SHOWN:
        print(f"... and {len(solutions) - MAX_SHOWN} more (--json shows all)")
    print(
        f"log evidence {posterior.log_evidence:.3f}   ESS {posterior.ess:.1f} of {args.particles}   "
        f"tokens {ledger.tokens_generated}   seconds {ledger.seconds:.2f}"
    )


def summary(posterior: inference.Posterior) -> dict[str, Any]:
    return {
        "log_evidence": posterior.log_evidence,
        "ess": posterior.ess,
        "tokens": posterior.ledger.tokens_generated,
        "seconds": posterior.ledger.seconds,
    }


@ppl.program
def continuation(lm: ppl.LanguageModel, prompt: Any, max_tokens: int, until: tuple[str, ...] | None) -> ppl.Text:
    """A text that continues a prompt."""
    return ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=max_tokens, until=until)[0]


def sample(args: argparse.Namespace) -> None:
    lm = models.load(args.model, dtype=args.dtype, adapter=args.adapter)
    start = time.perf_counter()
    prompt = args.prompt
    if args.chat:
        if lm.tokenizer is None:
            raise models.CheckpointError(f"{args.model} has no tokenizer.json, which --chat needs")
        prompt = lm.tokenizer.chat([{"role": "user", "content": args.prompt}])
    until = tuple(args.until) if args.until else None
    algorithm = inference.ImportanceSampling(args.particles)
    posterior = algorithm.run(jax.random.key(args.seed), continuation, lm, prompt, args.max_tokens, until)
    texts = posterior.values["text"]
    log_probs = texts.log_probs.sum(-1)
    rows = [{"text": text, "log_prob": float(lp)} for text, lp in zip(texts.decode(), log_probs)]
    if args.json:
        print(json.dumps({"prompt": args.prompt, "samples": rows, **summary(posterior)}))
        return
    for row in rows:
        print(f"[log p {row['log_prob']:9.2f}] {args.prompt}{row['text']}")
    tokens, seconds = posterior.ledger.tokens_generated, time.perf_counter() - start
    print(f"tokens {tokens}   seconds {seconds:.2f}")


if __name__ == "__main__":
    sys.exit(main())
