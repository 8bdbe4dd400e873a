"""What the enumerable programs share: models, constants, and the table of programs with their twins in plain Python."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import programs

from latentrace import ppl

M3 = programs.markov(3, seed=1)
M2 = programs.markov(2, seed=2)
H3 = programs.hmm(2, 3, seed=4)
H2 = programs.hmm(3, 2, eos_id=1, seed=5)
R = np.array([0.7, -1.1, 0.4])
J = jnp.asarray(R)
EOS = 0


class Case(NamedTuple):
    program: Any
    oracle: Any = None
    """the same program in plain Python; None: `Exact` alone is the reference"""
    restricted: bool = False


CASES: dict[str, Case] = {}


def case(program, oracle=None, **more):
    CASES[program.__name__.replace("_", " ")] = Case(ppl.program(program), oracle, **more)
