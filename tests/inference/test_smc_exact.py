"""SMC is exactly unbiased: its own random choices are enumerated, so nothing here has a Monte Carlo error.

All randomness passes through `Choices`. Here a token is a digit of the number of a world, and a resampling's uniform
number is one of the finitely many that lead to different ancestors, so that the sum over worlds of
P(world) * Z_hat * (posterior average of f) can be compared with Z * E[f].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference.smc.smc import ResampleBelow
from latentrace.ppl.program import as_program, stage
from latentrace.ppl.run import Settings, execute

N, T, V, EOS = 2, 2, 3, 2
LM = programs.markov(V, eos_id=EOS, seed=3)
REWARD = jnp.array([0.9, -1.3, 0.4])
WEIGHTS = jnp.array([[0.2, -0.7, 1.1], [-0.4, 0.8, 0.1]])


class World(NamedTuple):
    """The choices of one particle in one world. A token is a digit of its own, a resampling one that all share."""

    own: Any
    """int32[]: tokens to come, as a number in base V"""
    shared: Any
    """int32[]: resamplings to come, as a number in base N"""
    log_p_own: Any
    log_p_shared: Any

    def supply(self, spec, active):
        return None

    def token(self, site, step, logits):
        token = self.own % V
        paid = jax.nn.log_softmax(logits)[token]
        return token, self._replace(own=self.own // V, log_p_own=self.log_p_own + paid)

    def offset(self, clock, weights):
        """One of the N stretches of [0, 1) on which systematic resampling has the same outcome."""
        cuts = jnp.sort(jnp.concatenate([jnp.zeros(1), (N * jnp.cumsum(weights)[:-1] / weights.sum()) % 1.0, jnp.ones(1)]))
        k = self.shared % N
        paid = jnp.log(cuts[k + 1] - cuts[k])
        return (cuts[k] + cuts[k + 1]) / 2, self._replace(shared=self.shared // N, log_p_shared=self.log_p_shared + paid)


class Worlds(NamedTuple):
    """A source whose "key" is the number of the world."""

    tokens: int
    """tokens drawn by each particle at most"""

    def choices(self, world, particle):
        own = world // V ** (self.tokens * particle) % V**self.tokens
        zero = jnp.float32(0)
        return World(own.astype(jnp.int32), (world // V ** (self.tokens * N)).astype(jnp.int32), zero, zero)


class Watched(NamedTuple):
    """A policy that counts its choices: hands the choices back through the log-weights of the last rebalance."""

    policy: ResampleBelow

    @property
    def inside_texts(self):
        return self.policy.inside_texts

    def __call__(self, choices, clock, log_weight):
        return self.policy(choices, clock, log_weight)
