"""Constraints on a real vocabulary: what their tables cost, that every sample matches, and what a masked step costs.

    python tests/benchmarks/constraints.py --data ../shared/data
    python tests/benchmarks/constraints.py --skip-patterns --shapes small    # the data may be absent

The data are published regular expressions and a tokenizer of 50,000 tokens. All patterns share one compiled program.
"""

import argparse
import csv
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latentrace import inference, models, ppl
from latentrace.models import Transformer, TransformerConfig, TransformerLM
from latentrace.models.tokenizer import Tokenizer
from latentrace.ppl.constraints import (
    ByteAutomaton,
    HostConstraint,
    RegexError,
    TokenAutomaton,
    automaton,
    compile_regex,
    grammar,
    lookahead,
)
from latentrace.ppl.constraints.tokens import NEVER, TOO_MANY, About

SHARED = Path(__file__).parents[3] / "shared" / "data"
EOS = 50256
STATES, CLASSES = 2048, 192
"""The size to which the tables of all patterns are padded, so that one compiled program serves them."""
MAX_TOKENS = 24
"""More than twice what the shortest text of any of the patterns takes."""


# --- published patterns on a real vocabulary ----------------------------------------------------------------------------


def regular_patterns(data: Path) -> Iterator[tuple[str, ByteAutomaton, float]]:
    """The published patterns that are regular languages, their automata and the seconds that these took."""
    with (data / "grammars" / "patterns.csv").open() as file:
        patterns = [row["regex"] for row in csv.DictReader(file)]
    for pattern in patterns:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's parser, about what will change
            try:
                re.compile(pattern)
                start = time.perf_counter()
                machine = compile_regex(pattern)
            except (re.error, RegexError):
                continue
        yield pattern, machine, time.perf_counter() - start


def random_writer(data: Path) -> TransformerLM:
    """A small transformer with the real tokenizer and random weights, large enough that its probabilities are uneven."""
    definition = (data / "tokenizers" / "gpt2_style_50k_tokenizer.json").read_text()
    tokenizer = Tokenizer(definition, EOS, EOS)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, max_length=128, eos_id=EOS, bos_id=EOS, tied=False,
    )  # fmt: skip
    lm = TransformerLM.from_module(Transformer(config, rngs=nnx.Rngs(0)), tokenizer)
    return jax.tree.map(lambda x: 30 * x if x.shape == (tokenizer.vocab_size, 16) else x, lm)


def padded(constraint: TokenAutomaton, states: int, classes: int) -> TokenAutomaton:
    """The same constraint with larger tables."""
    more = states - constraint.after.shape[0], classes - constraint.after.shape[1]
    pad = lambda table, value: jnp.pad(table, [(0, n) for n in more[: table.ndim]], constant_values=value)
    fields = pad(constraint.after, -1), pad(constraint.need, TOO_MANY), pad(constraint.distance, NEVER)
    return replace(constraint, after=fields[0], need=fields[1], distance=fields[2])


@ppl.program
def write(lm: Any, constraint: Any) -> Any:
    return ppl.generate("text", ppl.prompt(lm), max_tokens=MAX_TOKENS, constraint=constraint)[0].length


def samples(lm: TransformerLM, spellings: list[bytes], constraint: TokenAutomaton, count: int) -> list[str]:
    """Texts that the model writes under a constraint; bytes that are no text raise UnicodeDecodeError."""
    run = inference.ImportanceSampling(count).run(jax.random.key(1), write, lm, padded(constraint, STATES, CLASSES))
    return [b"".join(spellings[i] for i in ids if i != lm.eos_id).decode() for ids in run.values["text"].ids()]


def measure_patterns(data: Path, count: int) -> None:
    """A line for each pattern, and their totals."""
    lm = random_writer(data)
    spellings = lm.token_bytes()
    totals, wrong, number = np.zeros(4), 0, 0
    print("states  token states x classes  shortest  automaton s  table s  table MB  sampling s  matching  pattern")
    for pattern, machine, compile_seconds in regular_patterns(data):
        start = time.perf_counter()
        constraint = automaton(lm, machine, f"pattern {pattern!r}")
        built = time.perf_counter()
        texts = samples(lm, spellings, constraint, count)
        seconds = time.perf_counter() - built
        matching = sum(bool(re.fullmatch(pattern, text)) for text in texts)
        megabytes = sum(x.nbytes for x in (constraint.after, constraint.need, constraint.class_of, constraint.distance)) / 1e6
        costs = np.array([compile_seconds, built - start, megabytes, seconds])
        totals, wrong, number = totals + costs, wrong + count - matching, number + 1
        shape = "{} x {}".format(*constraint.after.shape)
        print(f"{len(machine.next):6}  {shape:>22}  {constraint.about.shortest:8}  {costs[0]:11.2f}  {costs[1]:7.2f}  "
              f"{costs[2]:8.2f}  {costs[3]:10.2f}  {matching:4}/{count}  {pattern[:60]}", flush=True)  # fmt: skip
    print(f"{number} patterns: {totals[0]:.0f} s for automata, {totals[1]:.0f} s for tables, {totals[3]:.0f} s of sampling; "
          f"{number * count - wrong} of {number * count} samples match")  # fmt: skip


# --- the cost of a step -------------------------------------------------------------------------------------------------

PROMPT_TOKENS, PARTICLES, NEW_TOKENS, VOCABULARY = 64, 32, 32, 50257
SHAPES = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64),
    "small": dict(hidden_size=192, intermediate_size=512, num_layers=6, num_heads=6, num_kv_heads=2, head_dim=32),
}


def random_model(shape: str) -> TransformerLM:
    """A model of a shape with random weights: speed does not depend on them."""
    config = TransformerConfig(vocab_size=VOCABULARY, max_length=2048, eos_id=EOS, bos_id=EOS, tied=True, **SHAPES[shape])
    return TransformerLM.from_module(Transformer(config, rngs=nnx.Rngs(0)))


def random_automaton(forbidden: float, states: int = 512, classes: int = 160) -> TokenAutomaton:
    """Tables of the size of a large pattern's that forbid a part of the classes and allow EOS: texts hardly ever end."""
    rng = np.random.default_rng(0)
    after = rng.integers(0, states, (states, classes)).astype(np.int16)
    after[rng.random(after.shape) < forbidden] = -1
    class_of = rng.integers(0, classes - 1, VOCABULARY).astype(np.uint8)
    class_of[EOS] = classes - 1
    after[:, classes - 1] = -1
    need = np.where(after >= 0, 1, TOO_MANY).astype(np.int16)
    need[:, classes - 1] = 0
    return TokenAutomaton(*map(jnp.asarray, (after, class_of, need, np.zeros(states, np.int32))), EOS, About("random", 0))


def random_guide(states: int = 64) -> models.HMMLM:
    """A hidden Markov model that knows nothing: its cost does not depend on what it knows."""
    rng = np.random.default_rng(1)
    return models.HMMLM(*(rng.normal(size=n) for n in (states, (states, states), (states, VOCABULARY))), EOS)


class Spelled(NamedTuple):
    """What a grammar needs of a model."""

    spellings: tuple[bytes, ...]
    vocab_size: int = VOCABULARY
    eos_id: int = EOS

    def token_bytes(self) -> list[bytes]:
        return list(self.spellings)


def nested(data: Path) -> HostConstraint:
    """A grammar of nested brackets, with anything between them."""
    spellings = Spelled(tuple(random_writer(data).token_bytes()[:VOCABULARY]))
    return grammar(cast(Any, spellings), 'start: (/[^()]+/ | "(" start ")")*')


@ppl.program
def decode(lm: Any, ids: Any, constraint: Any) -> Any:
    return ppl.generate("text", ppl.prompt(lm, ids), max_tokens=NEW_TOKENS, constraint=constraint)[0].length


class Cost(NamedTuple):
    """Of one run; ratios are to the first run of the same round."""

    seconds: float
    """median"""
    ratio: float
    """median"""
    processor_ratio: float
    """median, of processor seconds: a busy machine disturbs them less"""


def costs(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, Cost]:
    """What each run costs, taken in turn after one round that compiles."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for seed in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run(seed)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    rounds = {name: np.array(taken[1:]) for name, taken in times.items()}
    first = rounds[next(iter(rounds))]
    return {name: Cost(np.median(taken[:, 0]), *np.median(taken / first, axis=0)) for name, taken in rounds.items()}


def measure_steps(shape: str, repeats: int, data: Path) -> None:
    """Seconds of a run with each constraint, and its ratio to that without."""
    lm, ids, masked = random_model(shape), (np.arange(PROMPT_TOKENS) * 37 % 50000).tolist(), random_automaton(2 / 3)
    start = time.perf_counter()
    guided = lookahead(random_automaton(0.0), random_guide(), max_tokens=NEW_TOKENS)
    print(f"{shape}: tables of a lookahead with 64 hidden states took {time.perf_counter() - start:.1f} s")
    sampling, smc = inference.ImportanceSampling(PARTICLES), inference.SMC(PARTICLES)

    def timed(algorithm: Any, constraint: Any) -> Callable[[int], Any]:
        def run(seed: int) -> None:
            posterior = algorithm.run(jax.random.key(seed), decode, lm, ids, constraint, progress=False)
            assert posterior.returned.max() == NEW_TOKENS, "all runs take as many steps"

        return run

    runs = {
        "no constraint": timed(sampling, None),
        "a fixed mask": timed(sampling, jnp.arange(VOCABULARY) % 7 != 0),
        "an automaton": timed(sampling, masked),
        "an automaton, SMC": timed(smc, masked),
        "a lookahead": timed(sampling, guided),
    }
    parsed = nested(data) if data.exists() else None
    if parsed is not None:
        runs["a grammar, on the host"] = timed(sampling, parsed)
    print("  ms a step, and how many times that without a constraint: by the clock, by processor time")
    for name, cost in costs(runs, repeats).items():
        print(f"  {name:22} {1e3 * cost.seconds / NEW_TOKENS:8.2f} {cost.ratio:8.3f} {cost.processor_ratio:8.3f}", flush=True)
    if parsed is not None:
        calls, seconds, masks = parsed.cost
        print(f"  of a grammar's step, {1e3 * seconds / calls:.2f} ms are the callback's, for {masks / calls:.0f} new masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--skip-patterns", action="store_true")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if not args.skip_patterns:
        measure_patterns(args.data, args.samples)
    for shape in args.shapes:
        measure_steps(shape, args.repeats, args.data)


if __name__ == "__main__":
    main()
