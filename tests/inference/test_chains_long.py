"""Long runs of moves over traces, against enumeration: programs over random Markov and hidden Markov models."""

import jax
import numpy as np
import programs
import pytest

from latentrace import inference
from latentrace.inference import mcmc

from . import control_flow_cases, language_cases  # noqa: F401  (they fill the table)
from .cases import CASES
from .test_against_enumeration import results

CHAINS, DRAWS, WARMUP = 48, 150, 60
KERNELS = {
    "suffix": mcmc.Regenerate(),
    "suffix by entropy, three tries": mcmc.Regenerate("entropy", tries=3),
    "span": mcmc.Infill(span=2),
    "suffix and site": mcmc.Cycle(mcmc.Regenerate("sites"), mcmc.SingleSite()),
}
PROGRAMS = [
    "reverse scan over data",
    "jit in scan in cond in while",
    "while loop stops by data",
    "plate of texts from one context",
    "plate in scan with scan inside",
]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_long_runs(name, kernel):
    """Of each likely result, the chains' frequencies by a t statistic; of all, the total variation beside its expectation."""
    target = programs.measure(programs.paths(CASES[name].oracle))
    total = sum(target.values())
    probability = {result: p / total for result, p in target.items() if p > 0}
    chains = inference.MCMC(KERNELS[kernel], DRAWS, WARMUP, CHAINS)
    posterior = chains.run(jax.random.key(1), CASES[name].program)
    rows = results(posterior).reshape(CHAINS, DRAWS, -1)
    frequencies = [programs.measure((row, 1 / DRAWS) for row in chain) for chain in rows]
    assert {result for found in frequencies for result in found} <= set(probability), "nothing impossible"
    matrix = np.array([[found.get(result, 0.0) for result in probability] for found in frequencies])
    p = np.array(list(probability.values()))
    error = matrix.std(0, ddof=1) / np.sqrt(CHAINS)
    likely = p > 0.02
    t = (matrix.mean(0) - p)[likely] / np.maximum(error[likely], 1e-4)
    assert (np.abs(t) < 5).all(), (t, matrix.mean(0)[likely], p[likely])
    # each frequency is about normal: what is expected of total variation, by the errors that the chains show
    expected = 0.5 * np.sqrt(2 / np.pi) * error.sum()
    found = 0.5 * np.abs(matrix.mean(0) - p).sum()
    assert found < 2 * expected + 0.01, (found, expected)
