"""Every way to resample and every trigger is exactly unbiased: the algorithms' own choices are enumerated."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import ppl
from latentrace.inference.smc.resampling import SCHEMES, Tempered, largest_power, powered
from latentrace.inference.smc.smc import Resample
from latentrace.inference.smc.steering import Branching
from latentrace.inference.smc.triggers import ESSBelow, EveryK

from .worlds import check_measure, systematic_cuts

V, EOS = 3, 2
LM = programs.markov(V, eos_id=EOS, seed=3)
REWARD = np.array([[0.9, -1.3], [-0.6, 1.7], [1.1, -0.2]])
PROMISE = np.array([[0.8, -1.2], [-1.5, 0.6]])


def draws():
    """Three draws, each rewarded; the first two are twisted, and the second may be fatal."""
    x = ppl.sample("x", dist.Bernoulli(0.4))
    ppl.factor("reward of x", jnp.asarray(REWARD)[0, x])
    ppl.twist("promise", jnp.asarray(PROMISE)[0, x])
    y = ppl.sample("y", dist.Bernoulli(0.3 + 0.4 * x))
    ppl.condition("x or y", (x == 1) | (y == 1))
    ppl.factor("reward of y", jnp.asarray(REWARD)[1, y])
    ppl.twist("promise again", jnp.asarray(PROMISE)[1, y])
    z = ppl.sample("z", dist.Bernoulli(0.7 - 0.5 * y))
    ppl.factor("reward of z", jnp.asarray(REWARD)[2, z])
    return jnp.stack([x, y, z])


def draws_density(path):
    x = path.flip(0.4)
    y = path.flip(0.3 + 0.4 * x)
    path.weigh(x == 1 or y == 1)
    z = path.flip(0.7 - 0.5 * y)
    path.weigh(np.exp(REWARD[0, x] + REWARD[1, y] + REWARD[2, z]))
    return x, y, z


def text():
    """One text with a proposal and a twist, which move weights inside it."""
    promise = jnp.array([[1.6, -1.1, 0.3], [-0.6, 0.8, 2.1]])
    x, _ = ppl.generate(
        "x",
        ppl.prompt(LM),
        max_tokens=2,
        proposal=ppl.proposals.temperature(1.7),
        twist=lambda t: promise[t.length - 1, t.tokens[t.length - 1]],
    )
    ppl.factor("reward", 0.5 * x.tokens[0] - 0.8 * x.tokens[1])
    return x.tokens


def text_density(path):
    x = programs.padded(path.text(LM, (), 2), 2, EOS)
    path.weigh(np.exp(0.5 * x[0] - 0.8 * x[1]))
    return x


PROGRAMS = {"draws": (draws, draws_density, 2**3, 2), "text": (text, text_density, V**2, 2)}


def branching_cuts(weights):
    """Where a choice of two out of four changes: two are drawn, or one beside one that has more than half of the weight."""
    keeps = weights.max() > 0.5
    drawn = jnp.where(keeps & (weights == weights.max()), 0.0, weights)
    nobody = drawn.sum() == 0
    return jnp.where(nobody, 0.5, systematic_cuts(jnp.where(nobody, 1.0, drawn), jnp.where(keeps, 1, 2)))


@pytest.mark.parametrize("case", PROGRAMS)
def test_steering_is_properly_weighted(case):
    """Two survivors of four candidates."""
    program, density, own, asked = PROGRAMS[case]
    policy = Resample(EveryK(1), Branching(2), True)
    check_measure(program, density, policy, branching_cuts, particles=4, own=own, asked=asked)


@pytest.mark.parametrize("ess", [0.5, 0.8])
def test_tempered_resampling_is_properly_weighted(ess):
    program, density, own, asked = PROGRAMS["draws"]
    cuts = lambda weights: systematic_cuts(powered(weights, largest_power(weights, ess)), 3)
    policy = Resample(ESSBelow(0.9), Tempered(ess), True)
    check_measure(program, density, policy, cuts, particles=3, own=own, asked=asked)


@pytest.mark.parametrize("case", PROGRAMS)
@pytest.mark.parametrize("when", [EveryK(1), EveryK(2), ESSBelow(0.7)])
def test_every_trigger_keeps_the_expected_measure(when, case):
    program, density, own, asked = PROGRAMS[case]
    policy = Resample(when, SCHEMES["systematic"], True)
    check_measure(program, density, policy, lambda w: systematic_cuts(w, 2), particles=2, own=own, asked=asked)
