"""The command line: `latentrace solve`, `latentrace compare` and `latentrace sample`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from latentrace import inference, models, ppl
from latentrace.models.reasoner import countdown as puzzles
from latentrace.models.reasoner import word_problems
from latentrace.models.reasoner.process_reward import load_process_reward

from .countdown import countdown, expression_of
from .step_by_step import step_by_step

MAX_SHOWN = 10
TASKS = {"countdown": "countdown4", "game24": "hard", "words": "words"}
"""Tasks of `compare` and the held-out split of each."""


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

    text = "The posterior over solutions of a Countdown puzzle, or over answers of a word problem, from the shipped model."
    sub = add("solve", solve, text, 256)
    sub.add_argument("problem", help='"4 6 8 10" (make 24), "4 6 8 10=32", or "Ann has 12 pens. ... does Ann have?"')
    sub.add_argument("--algorithm", choices=["smc", "importance"], default="smc", help="inference (default %(default)s)")
    text = "Sampling, best of N, majority vote, importance sampling and SMC at equal tokens, on held-out problems."
    sub = commands.add_parser("compare", help=text, description=text)
    sub.set_defaults(command=compare)
    sub.add_argument("--tasks", nargs="+", choices=TASKS, default=["game24", "words"], help="(default %(default)s)")
    sub.add_argument("--problems", type=positive, default=100, help="problems of each task (default %(default)s)")
    sub.add_argument("--samples", type=positive, nargs="+", default=[4, 8, 16, 32], metavar="N", help="samples or particles")
    sub.add_argument("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
    sub.add_argument("--figure", metavar="FILE", help="draw accuracy against tokens, as PNG, PDF or SVG")
    sub.add_argument("--json", action="store_true", help="print JSON")
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


def check_puzzle(text: str) -> puzzles.Puzzle:
    """A Countdown puzzle; a `UsageError` where the model can write no solution."""
    try:
        puzzle = puzzles.check_puzzle(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not puzzles.solve(*puzzle):
        raise UsageError(f"{text}: no way to make {puzzle.target} exists")
    if puzzles.needs_fractions(*puzzle):
        raise UsageError(f"{text}: every solution passes through fractions or numbers that the shipped model cannot write")
    return puzzle


def solve(args: argparse.Namespace) -> None:
    make = {"smc": inference.SMC, "importance": inference.ImportanceSampling}[args.algorithm]
    algorithm, key = make(args.particles), jax.random.key(args.seed)
    if any(letter.isalpha() for letter in args.problem):
        try:
            word_problems.solve(args.problem)
        except ValueError as error:
            raise UsageError(str(error)) from None
        posterior = algorithm.run(key, step_by_step, models.load("reasoner"), args.problem, load_process_reward())
        kind, rows = "answer", posterior.marginal("answer")
    else:
        puzzle = check_puzzle(args.problem)
        try:
            posterior = algorithm.run(key, countdown, models.load("reasoner"), puzzle, load_process_reward())
        except ppl.errors.AllParticlesDeadError:
            raise UsageError(
                f"{args.problem}: none of {args.particles} particles reached a solution; try more --particles or another --seed"
            ) from None
        kind, rows = "solution", posterior.marginal(expression_of)
    name = "expression" if kind == "solution" else "answer"
    if args.json:
        found = [{name: r.value, "probability": r.probability, "error": r.error} for r in rows]
        print(json.dumps({"problem": args.problem, f"{kind}s": found, **summary(posterior)}))
        return
    print(f"{args.problem}: {len(rows)} {kind}{'s' if len(rows) > 1 else ''}")
    print(rows.top(MAX_SHOWN))
    if len(rows) > MAX_SHOWN:
        print(f"... and {len(rows) - MAX_SHOWN} more (--json shows all)")
    ledger = posterior.ledger
    print(
        f"log evidence {posterior.log_evidence:.3f}   ESS {posterior.ess:.1f} of {args.particles}   "
        f"tokens {ledger.tokens_generated}   seconds {ledger.seconds:.2f}"
    )


def compare(args: argparse.Namespace) -> None:
    from latentrace.models.reasoner.tasks import SPLITS

    from . import compare as comparison

    if args.figure:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError("--figure needs matplotlib: pip install 'latentrace[plots]'") from None
    lm, reward = models.load("reasoner"), load_process_reward()
    results: dict[str, Sequence[comparison.Result]] = {}
    for task in args.tasks:
        problems = SPLITS[TASKS[task]](args.problems)
        results[task] = comparison.compare(lm, reward, problems, sorted(set(args.samples)), args.seed)
        if not args.json:
            print(f"{task}: {len(problems)} held-out problems\n{comparison.table(results[task])}\n", flush=True)
    if args.json:
        rows = [
            {"task": task, "method": r.method, "samples": r.samples, "tokens": r.tokens, "accuracy": r.accuracy,
             "interval": r.interval}
            for task, found in results.items() for r in found
        ]  # fmt: skip
        print(json.dumps(rows))
    if args.figure:
        comparison.figure(results, args.figure)


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
