"""SMC whose twist looks ahead is the auxiliary particle filter, and with the log predictive the fully adapted one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import inference, ppl

STATES, STEPS, START = 4, 5, 4
rng = np.random.default_rng(0)
NEXT = np.log(rng.dirichlet(np.full(STATES, 0.7), STATES + 1))  # [START or the state before, state], nats
SEEN = np.log(rng.dirichlet(np.full(3, 0.5), STATES))[:, rng.integers(0, 3, STEPS)].T  # log p(y_t | x_t): [step, state], nats
logsumexp = np.logaddexp.reduce


def looking_ahead(steps: int) -> np.ndarray:
    """log p(y_t, ..., y_{t + steps - 1} given the state before t), float64[STEPS + 1, STATES + 1], nats; 0 after the last."""
    ahead = np.zeros((STEPS + 1, STATES + 1))
    for _ in range(steps):
        ahead[:-1] = logsumexp(NEXT + (SEEN + ahead[1:, :STATES])[:, None], axis=2)
    return ahead


NOTHING, PREDICTIVE, EVERYTHING = looking_ahead(0), looking_ahead(1), looking_ahead(STEPS)
EVIDENCE = EVERYTHING[0, START]
ROUNDING = 8 * STEPS * np.finfo(np.float32).eps * np.abs(EVERYTHING).max()  # of eight operations a step


def draw(guide, x, t):
    """A state drawn in proportion to p(x_t | x_{t-1}) p(y_t | x_t) exp(guide), and log of target over proposal, nats."""
    logits = jnp.asarray(NEXT)[x] + jnp.asarray(SEEN)[t] + jnp.asarray(guide)[t + 1, :STATES]
    new = ppl.sample("x", dist.Categorical(logits=logits))
    return new, jax.nn.logsumexp(logits) - jnp.asarray(guide)[t + 1, new]


def twisted(guide, ahead):
    """Each state is drawn, then weighed, and promises what `ahead` expects after it."""

    def step(x, t):
        x, owed = draw(guide, x, t)
        ppl.factor("weight", owed)
        ppl.twist("promise", jnp.asarray(ahead)[t + 1, x])
        return x, x

    def program():
        ppl.twist("start", float(ahead[0, START]))
        return jax.lax.scan(step, START, jnp.arange(STEPS))[1]

    return ppl.program(program)


@ppl.program
def fully_adapted():
    """The filter as it is published: weigh by p(y_t | x_{t-1}), resample, draw from p(x_t | x_{t-1}, y_t)."""

    def step(x, t):
        ppl.factor("weight", jnp.asarray(PREDICTIVE)[t, x])
        x, _ = draw(NOTHING, x, t)
        ppl.twist("none", 0.0)  # moves weights as often as in the twisted program: the same random numbers are used
        return x, x

    return jax.lax.scan(step, START, jnp.arange(STEPS))[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_log_predictive_as_a_twist_is_the_fully_adapted_filter(seed):
    smc, key = inference.SMC(50, ess_threshold=1.1), jax.random.key(seed)
    published, ours = smc.run(key, fully_adapted), smc.run(key, twisted(NOTHING, PREDICTIVE))
    np.testing.assert_array_equal(ours.values["x"], published.values["x"])
    np.testing.assert_allclose(ours.log_weights, published.log_weights, atol=ROUNDING, rtol=0)
    assert np.ptp(ours.log_weights) <= ROUNDING
    assert abs(ours.log_evidence - EVIDENCE) > ROUNDING  # an estimate: the next observation is not all that follows
    unannounced = smc.run(key, twisted(NOTHING, NOTHING))
    assert np.ptp(unannounced.log_weights) > ROUNDING


@pytest.mark.parametrize("threshold", [0.5, 1.1])
def test_evidence_has_no_variance_where_a_twist_knows_all_that_follows(threshold):
    for seed in range(3):
        posterior = inference.SMC(5, threshold).run(jax.random.key(seed), twisted(EVERYTHING, EVERYTHING))
        np.testing.assert_allclose(posterior.log_weights, EVIDENCE, atol=ROUNDING, rtol=0)


def test_the_filter_finds_the_evidence():
    runs = [inference.SMC(50, 1.1).run(jax.random.key(i), twisted(NOTHING, PREDICTIVE)).log_evidence for i in range(12)]
    ratio = np.exp(np.array(runs) - EVIDENCE)
    assert abs(ratio.mean() - 1) < 6 * ratio.std(ddof=1) / np.sqrt(len(ratio))
