"""Effective samples per second of NUTS on four posteriors of posteriordb: our driver beside NumPyro's own, in one run.

    python tests/benchmarks/posteriordb.py --data ../shared/data/posteriordb

Both run the same NumPyro model with the same numbers of chains, warm-up steps and draws, in turn. NumPyro's `MCMC.run` compiles
anew each time, so it runs whole under one `jax.jit`, and like ours is timed from its second run on. Effective samples are those
of the parameter that has the fewest, averaged over the repeats; seconds
are those of the fastest, since some runs of the same compiled program take twice as long as others.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro.infer
from numpyro.diagnostics import effective_sample_size
from scipy import stats

from latentrace import inference
from latentrace.inference import mcmc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import posteriors


def bulk(draws: np.ndarray) -> float:
    """Bulk effective sample size (Vehtari et al. 2021) of float[chains, draws]: that of the normal scores of split chains."""
    half = draws.shape[1] // 2
    split = draws[:, : 2 * half].reshape(-1, half)
    ranks = stats.rankdata(split).reshape(split.shape)
    return float(effective_sample_size(stats.norm.ppf((ranks - 0.375) / (split.size + 0.25))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=posteriors.SHARED)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("names", nargs="*", default=posteriors.NAMES)
    args = parser.parse_args()
    shape = args.draws, args.warmup, args.chains
    ratios = []
    for name in args.names:
        model, data, draws = posteriors.reference(name, args.data)

        def ours(seed: int) -> Any:
            posterior = inference.MCMC(mcmc.NUTS(), *shape).run(jax.random.key(seed), model, *data, progress=False)
            values = {k: v.reshape(args.chains, args.draws, *v.shape[1:]) for k, v in posterior.values.items()}
            return values, posterior.moves.stats["num_steps"]

        @jax.jit
        def numpyros(rng_key: Any, data: Any) -> Any:
            options = dict(num_chains=args.chains, chain_method="vectorized", progress_bar=False)
            chains = numpyro.infer.MCMC(
                numpyro.infer.NUTS(model),
                num_warmup=args.warmup,
                num_samples=args.draws,
                **options,
            )
            chains.run(rng_key, *data, extra_fields=("num_steps",))
            return chains.get_samples(group_by_chain=True), chains.get_extra_fields(group_by_chain=True)["num_steps"]

        def theirs(seed: int) -> Any:
            return jax.device_get(numpyros(jax.random.key(seed), data))

        runs = {"ours": ours, "numpyro": theirs}
        rates, seconds, steps = ({who: [] for who in runs} for _ in range(3))
        for seed in range(args.repeats + 1):
            for who, run in list(runs.items())[:: 1 if seed % 2 else -1]:
                start = time.perf_counter()
                values, num_steps = run(seed)
                took = time.perf_counter() - start
                if seed:
                    fewest = min(bulk(column) for column in posteriors.columns(values, draws).values())
                    rates[who].append(fewest)
                    seconds[who].append(took)
                    # chains side by side take as many leapfrog steps as the one that takes most
                    steps[who].append(num_steps.max(axis=0).sum())
        per_second = {who: np.mean(rates[who]) / np.min(seconds[who]) for who in runs}
        ratios.append(per_second["ours"] / per_second["numpyro"])
        for who in runs:
            fewest, leaps, took = np.mean(rates[who]), np.mean(steps[who]), seconds[who]
            print(f"{name:18} {who:8} {per_second[who]:8.0f} effective samples/s: {fewest:6.0f} in {np.min(took):.3f} s "
                  f"(median {np.median(took):.3f}), {leaps:.0f} leapfrog steps")  # fmt: skip
        print(f"{name:18} ratio    {ratios[-1]:.2f}\n")
    print(f"least ratio: {min(ratios):.2f}")


if __name__ == "__main__":
    main()
