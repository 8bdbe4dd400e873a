"""What moves of Markov chains cost beside decoding as many tokens, as ratios taken in one run: 32 chains, 64-token prompt.

python tests/benchmarks/moves.py            # random weights of the small shape of `workload.py`
python tests/benchmarks/moves.py --large    # the 135M shape
python tests/benchmarks/moves.py --large --only "suffix of 8 tokens" --moves 12    # some kernels
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from workload import PARTICLES, PROMPT_TOKENS, random_model, seconds

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.ppl import run

TOKENS = 64


@dataclasses.dataclass(frozen=True)
class LastTokens:
    """Cuts that leave the last `count` tokens to be redrawn."""

    count: int
    entropies = False
    equal = True

    def weights(self, walk: Any, name: str) -> Any:
        return jnp.zeros_like(walk.notes[name].log_q).at[..., -self.count].set(1.0)


@ppl.program
def text(lm: Any, ids: Any, tokens: int) -> Any:
    text, _ = ppl.generate("text", ppl.prompt(lm, ids), max_tokens=tokens)
    ppl.factor("reward", 0.05 * (text.tokens % 3).sum())
    return text.length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--only", nargs="*", help="names of kernels")
    args = parser.parse_args()
    lm = random_model("135m" if args.large else "small")
    ids = (np.arange(PROMPT_TOKENS) * 37 % 50000).tolist()

    def decode(tokens: int) -> Any:
        sampling = inference.ImportanceSampling(PARTICLES)
        return lambda seed: sampling.run(jax.random.key(seed), text, lm, ids, tokens, progress=False)

    counted: dict[str, list[int]] = {}

    def moves(name: str, kernel: Any) -> Any:
        """The chains stand where the run before left them, compiled: what is timed is moves alone."""
        chains = inference.MCMC(kernel, num_samples=args.moves, num_chains=PARTICLES)
        state = chains.run(jax.random.key(0), text, lm, ids, TOKENS, progress=False)

        def go_on(_: int) -> Any:
            nonlocal state
            state = chains.run(jax.random.key(0), text, lm, ids, TOKENS, resume=state, progress=False)
            counted.setdefault(name, []).append(int(state.moves.stats["new_tokens"].max(axis=0).sum()))

        return go_on

    kernels = {
        **{f"suffix of {k} tokens": mcmc.Regenerate(LastTokens(k)) for k in (4, 8, 16, 32)},
        "suffix, uniform cuts": mcmc.Regenerate(),
        "suffix, entropy cuts": mcmc.Regenerate("entropy"),
    }
    kernels = {name: kernel for name, kernel in kernels.items() if name in (args.only or kernels)}
    runs = {"decode 32": decode(32), "decode 64": decode(64)} | {name: moves(name, kernel) for name, kernel in kernels.items()}
    times = seconds(runs, args.repeats)
    traced = run.traced
    token = (times["decode 64"] - times["decode 32"]) / 32
    print(f"decoding: {1e3 * token:.2f} ms per token of {PARTICLES} texts, from token 33 to 64")
    for name in kernels:
        steps = np.mean(counted[name][1:])
        each = times[name] / steps
        print(
            f"{name:24} {steps / args.moves:5.1f} tokens a move, {1e3 * each:7.2f} ms each: {each / token:5.2f} times decoding"
        )
    for go_on in runs.values():
        go_on(99)
    print(f"programs traced by another round, with other cuts: {run.traced - traced}")


if __name__ == "__main__":
    main()
