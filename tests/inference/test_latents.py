"""A cycle of NUTS, Gibbs sampling and regeneration on continuous, discrete and text latents at once, against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.calibration import coverage_test, rank_test, replicate

from .cases import M3, R

KEY = jax.random.key(2)
CYCLE = mcmc.Cycle(mcmc.NUTS("scale"), mcmc.Gibbs("k"), mcmc.Regenerate())


@ppl.program
def noisy():
    """Measurements of a text of one of three strategies, with noise of unknown scale."""
    scale = ppl.sample("scale", dist.HalfNormal(1.5))
    k = ppl.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
    context = ppl.extend(ppl.prompt(M3), jnp.array([0, 1, 2])[k][None])
    text, _ = ppl.generate("text", context, max_tokens=2)
    ppl.sample("y", dist.Normal(jnp.asarray(R)[text.tokens].sum() + 0.6 * k, scale).expand([3]))


Y = np.array([0.9, 1.4, 2.1], np.float32)
EXPECTATIONS = {
    "scale": lambda v: v["scale"],
    "scale of the last strategy": lambda v: v["scale"] * (v["k"] == 2),
    "strategy": lambda v: v["k"] == 2,
    "other strategy": lambda v: v["k"] == 0,
    "first token": lambda v: v["text"].tokens[..., 0] == 2,
    "first token of a strategy": lambda v: (v["text"].tokens[..., 0] == 2) & (v["k"] == 1),
    "length": lambda v: v["text"].length,
}


def quadrature(program, points=60):
    """The expectations, by enumeration given each of many scales."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    scales, weights = (nodes + 1) / 2 * 9 + 1e-6, weights * 4.5
    mass, sums = 0.0, dict.fromkeys(EXPECTATIONS, 0.0)
    for scale, weight in zip(scales, weights):
        exact = inference.Exact().run(KEY, program.condition({"scale": np.float32(scale)}))
        p = weight * np.exp(exact.log_weights.astype(np.float64))
        mass += p.sum()
        for name, fn in EXPECTATIONS.items():
            sums[name] += float(p @ np.asarray(fn(exact.values), np.float64))
    return {name: value / mass for name, value in sums.items()}


@pytest.mark.slow
def test_the_cycle_recovers_the_posterior():
    program = noisy.condition({"y": Y})
    found = inference.MCMC(CYCLE, num_samples=1500, num_warmup=300, num_chains=4).run(KEY, program)
    for name, expected in quadrature(program).items():
        values = np.asarray(EXPECTATIONS[name](found.values), np.float64)
        error = found.error(values)
        assert abs(values.mean() - expected) < 4.5 * error, name
        assert error < 0.03
    steps = next(stats for name, stats in found.moves.stats.items() if name.startswith("NUTS"))["step_size"]
    assert (steps == steps[:, :1]).all()


@pytest.mark.slow
def test_the_cycle_is_calibrated():
    draws, thinning = 19, 10
    algorithm = inference.MCMC(CYCLE, num_samples=draws, num_warmup=200, thinning=thinning)
    length = lambda v: v["text"].length
    fit = lambda v: -((v["y"] - R[v["text"].tokens].sum() - 0.6 * v["k"]) ** 2).sum()
    found = replicate(KEY, noisy, (), ["y"], ["scale", "k", length, fit], algorithm, 300, draws)
    p_values = [*rank_test(KEY, found).p_values, coverage_test(KEY, found).p_value]
    assert min(p_values) > 1e-3, p_values
