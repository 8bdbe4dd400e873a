"""Speed of many problems in one batch, as ratios taken in one run: 64 problems of 8 particles beside 512 plain samples.

python tests/benchmarks/problems.py            # random weights of the small shape of `workload.py`
python tests/benchmarks/problems.py --large    # the 135M shape
python tests/benchmarks/problems.py --large --only "plain, one prompt" "plain, 64 problems"    # some runs
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from workload import NEW_TOKENS, forbid, plain, random_model, seconds, twisted

from latentrace import inference, ppl

PROBLEMS, PARTICLES = 64, 8


@ppl.program
def uneven(lm: Any, ids: Any, lines: Any) -> Any:
    """As many short texts as a problem needs."""

    def step(carry: Any) -> Any:
        i, context = carry
        ppl.bound(16)
        text, context = ppl.generate("line", context, max_tokens=4)
        ppl.factor("reward", 0.1 * (text.tokens % 7).sum())
        return i + 1, context

    return jax.lax.while_loop(lambda carry: carry[0] < lines, step, (0, ppl.prompt(lm, ids)))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of runs; the first one is always needed")
    args = parser.parse_args()
    lm = random_model("135m" if args.large else "small")
    prompts = [((np.arange(41 + p % 24) * 37 + p) % 50000).tolist() for p in range(PROBLEMS)]
    allowed = jnp.arange(lm.vocab_size) % 7 != 0
    smc, total = inference.SMC(PARTICLES), PROBLEMS * PARTICLES

    def many(program: Any, *more: Any, algorithm: Any = smc) -> Any:
        problems = [(lm, prompt, *more) for prompt in prompts]
        return lambda seed: algorithm.run_many(jax.random.key(seed), program, problems, progress=False)

    def one(program: Any, *more: Any, algorithm: Any) -> Any:
        return lambda seed: algorithm.run(jax.random.key(seed), program, lm, prompts[23], *more, progress=False)

    sampling = inference.ImportanceSampling
    runs = {
        "plain, one prompt": one(plain, algorithm=sampling(total)),
        "plain, 64 problems": many(plain, algorithm=sampling(PARTICLES)),
        "forbid, 64 problems": many(forbid, allowed),
        "twisted, 64 problems, resampled": many(twisted),
    }
    if not args.large:
        runs["forbid, one prompt"] = one(forbid, allowed, algorithm=inference.SMC(total))
        runs["twisted, 64 problems, at each token"] = many(twisted, algorithm=inference.SMC(PARTICLES, 1.1))
    times = seconds({name: run for name, run in runs.items() if name in (args.only or runs)}, args.repeats)
    for name, s in times.items():
        rate, of_plain = total * NEW_TOKENS / s, times["plain, one prompt"] / s
        print(f"{name:36} {s:7.3f} s {rate:8.0f} tokens/s {of_plain:5.2f} of the throughput of 512 plain samples")
    if args.large or args.only:
        return
    lines = np.random.default_rng(0).geometric(0.2, PROBLEMS).clip(1, 16)
    problems = [(lm, prompt, jnp.int32(n)) for prompt, n in zip(prompts, lines)]
    refilled = lambda seed: smc.run_many(jax.random.key(seed), uneven, problems, at_once=16, progress=False)
    in_turn = lambda seed: [
        smc.run_many(jax.random.key(seed), uneven, problems[i : i + 16], progress=False) for i in range(0, PROBLEMS, 16)
    ]
    times = seconds({"refilled": refilled, "in turn": in_turn}, args.repeats)
    ratio = times["refilled"] / times["in turn"]
    print(f"1 to 16 lines, 16 problems at once: with refilled places {ratio:.2f} of the time of one batch after the other")


if __name__ == "__main__":
    main()
