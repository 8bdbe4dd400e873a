"""Enumerating an algorithm's own random choices: draws of every particle, and the one uniform number of each resampling."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs

from latentrace import ppl
from latentrace.ppl.collectives import PARTICLES, index
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.staging import stage


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("own", "shared", "log_p_own", "log_p_shared"),
    meta_fields=("cuts",),
)
@dataclass(frozen=True)
class World:
    """The choices of one particle in one world: digits of its own, and of resamplings, which all particles share."""

    own: Any
    shared: Any
    log_p_own: Any
    log_p_shared: Any
    cuts: Callable[[Any], Any]
    """from weights float32[N] to the numbers float32[C] in [0, 1) at which resampling starts to have another outcome"""

    def supply(self, spec, active):
        return None

    def _choose(self, logits):
        digit = self.own % len(logits)
        possible = logits.max() > -jnp.inf  # where no token is, the particle is dead and any token will do
        paid = jax.nn.log_softmax(jnp.where(possible, logits, 0.0))[digit]
        return digit, replace(self, own=self.own // len(logits), log_p_own=self.log_p_own + paid)

    def value(self, site, distribution, number):
        support = distribution.enumerate_support()
        digit, choices = self._choose(jax.vmap(distribution.log_prob)(support))
        return support[digit], choices

    def token(self, site, step, logits, number):
        return self._choose(logits)

    def uniforms(self, clock, weights, count):
        """The middle of one of the stretches of [0, 1) on which resampling has the same outcome."""
        assert count == 1
        edges = jnp.concatenate([jnp.zeros(1), jnp.sort(self.cuts(weights)), jnp.ones(1)])
        stretch = self.shared % (len(edges) - 1)
        low, high = edges[stretch], edges[stretch + 1]
        spent = replace(self, shared=self.shared // (len(edges) - 1), log_p_shared=self.log_p_shared + jnp.log(high - low))
        return (low + high)[None] / 2, spent


def systematic_cuts(weights: Any, places: Any) -> Any:
    """Where the points (i + u) / places of the cumulative weights pass from one particle to the next."""
    cumulative = jnp.cumsum(weights)
    return places * cumulative / cumulative[-1] % 1.0


def estimated_measure(program, policy, cuts, *, particles: int, own: int, asked: int) -> tuple[float, dict]:
    """The sum over all worlds of P(world), and of P(world) * Z_hat * weight over each trace.

    `own` is how many outcomes a particle's draws have, `asked` how often the policy is called.
    """
    staged = stage(ppl.program(program), ())
    consts = {name: jnp.asarray(array) for name, array in staged.consts.items()}
    stretches = len(cuts(jnp.full(particles, 1 / particles))) + 1

    def one_world(world):
        def one_particle(_):
            zero = jnp.float32(0)
            choices = World(world // own ** index() % own, world // own**particles, zero, zero, cuts)
            run = Interpreter(staged, consts, staged.models, first_state(staged, staged.models, choices), policy=policy)
            cells = run.walk(staged.jaxpr, [])
            return jnp.asarray(run.frame.get(cells[0])), run.state.log_weight, run.state.choices

        trace, log_weight, choices = jax.vmap(one_particle, axis_name=PARTICLES)(jnp.zeros(particles))
        spent = (choices.own == 0).all() & (choices.shared == 0).all()  # else this world repeats one with fewer digits
        log_p = jnp.where(spent, choices.log_p_own.sum() + choices.log_p_shared[0], -jnp.inf)
        return log_p, log_weight, trace

    worlds = jnp.arange(own**particles * stretches**asked)
    log_p, log_weight, traces = (np.asarray(r) for r in jax.jit(jax.vmap(one_world))(worlds))
    p, weight = np.exp(log_p.astype(np.float64)), np.exp(log_weight.astype(np.float64))
    mass = p[:, None] * weight / particles  # Z_hat times the self-normalised average of f is the mean of weight times f
    rows, where = np.unique(traces.reshape(-1, traces.shape[-1]), axis=0, return_inverse=True)
    return float(p.sum()), programs.measure(zip(rows, np.bincount(where.ravel(), mass.ravel())))


def check_measure(program, density, policy, cuts, *, particles: int, own: int, asked: int) -> None:
    """The expected weighted measure is the target: E[Z_hat f] = Z E[f] for every f."""
    target = programs.measure(programs.paths(density))
    total, found = estimated_measure(program, policy, cuts, particles=particles, own=own, asked=asked)
    assert abs(total - 1) < 1e-5
    for trace in {*target, *found}:
        error = found.get(trace, 0.0) - target.get(trace, 0.0)
        assert abs(error) < 1e-5 * sum(target.values()), (trace, error)
