"""Moves that redraw a part of a trace satisfy detailed balance: places and redraws are enumerated, without Monte Carlo error."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from latentrace.inference import mcmc
from latentrace.inference.mcmc.redraw import Place, choices_of, log_multiple_try
from latentrace.ppl.collectives import over_particles
from latentrace.ppl.state import Tempering
from latentrace.ppl.walk import walk

from .moves import PROGRAMS, World, enumerated


def one(fn):
    """`fn()` for a particle that is alone."""
    return jax.tree.map(lambda x: x[0], over_particles(fn, 1))


@cache
def states(name, notes, tempering):
    """The walks along all traces of a program, side by side."""
    found = enumerated(name)
    target = found.target._replace(tempering=tempering and Tempering(*map(jnp.float32, tempering)))
    sites = target.staged.sites
    kept = {n: jnp.ones((*sites[n].dims, *([sites[n].max_tokens] if sites[n].max_tokens else [])), bool) for n in target.random}
    along = lambda values: target.walk(jax.random.key(0), values, kept, notes=notes)[0]
    return target, jax.jit(jax.vmap(along))(found.values)


def proposals(kernel, name, tempering=None):
    """For every trace, place and world: the chance of the place, that of the world, the trace found, and both log w."""
    found = enumerated(name)
    target, walks = states(name, kernel.notes, tempering)

    def propose(x, at, world):
        places = kernel.places(target, x)
        place = Place(at, places.numbers[at])
        kept, zero = kernel.kept(target, x, place), jnp.float32(0)

        def particle():
            drawn = World(world, jnp.int32(0), zero, zero, None)
            y, *_ = walk(target.staged, target.arrays, target.given, drawn, choices_of(target, x), kept, before=x,
                         notes=kernel.notes, tempering=target.tempering)  # fmt: skip
            return y, y.arenas[0].used, jnp.float32(0)

        y = one(particle)[0]
        chance = places.weights[at] / places.weights.sum()
        log_w = partial(kernel.log_w, target, kept=kept, place=place)
        return chance, choices_of(target, y), log_w(x, y), log_w(y, x)

    raise NotImplementedError
