"""Draws of NUTS under the driver against posteriordb's reference draws."""

import jax
import numpy as np
import posteriors
import pytest
from numpyro.diagnostics import effective_sample_size

from latentrace import inference
from latentrace.inference import mcmc

CHAINS, DRAWS = 4, 2000


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", posteriors.NAMES)
def test_means_and_deviations(name):
    if not posteriors.SHARED.exists():
        pytest.skip("reference data ../shared/data/posteriordb is not beside this checkout")
    model, data, reference = posteriors.reference(name)
    # eight schools has a funnel, whose neck takes small steps
    kernel = mcmc.NUTS(target_accept_prob=0.95 if name == "eight_schools" else 0.8)
    found = inference.MCMC(kernel, DRAWS, num_warmup=1000, num_chains=CHAINS).run(jax.random.key(1), model, *data)
    values = {k: v.reshape(CHAINS, DRAWS, *v.shape[1:]) for k, v in found.values.items()}
    ours = posteriors.columns(values, reference)
    assert found.moves.stats["diverging"].mean() < 1e-3
    assert 0.7 < found.moves.accepted.mean() < 0.99
    for parameter, draws in reference.items():
        # the second moment about the reference's mean: its root is the deviation, and its error is that of a mean
        center = draws.mean()
        for statistic in (lambda x: x, lambda x: (x - center) ** 2):
            a, b = statistic(ours[parameter].astype(np.float64)), statistic(draws)
            errors = [x.std() / np.sqrt(effective_sample_size(x)) for x in (a, b)]
            assert abs(a.mean() - b.mean()) < 4.5 * np.hypot(*errors), parameter
            assert errors[0] < 0.1 * max(b.std(), abs(b.mean())), "the chains are long enough to tell"
