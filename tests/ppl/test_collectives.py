"""Moving what particles carry, for one population and for many side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace.ppl import collectives
from latentrace.ppl.collectives import PARTICLES, move, over_problems, reindex

RNG = np.random.default_rng(0)
OWN, ANCESTORS = RNG.normal(size=(3, 4, 5)), np.array([[1, 1, 3, 3], [0, 0, 0, 2], [2, 3, 1, 0]])
SHARED = RNG.normal(size=(3, 2))


@pytest.mark.parametrize("small", [0, 2**18])
@pytest.mark.parametrize("due", [(True, False, True), (False, False, False), (True, True, True)])
def test_populations_that_are_due_are_moved(monkeypatch, small, due):
    """Large ones one after the other, small ones at once; what a population shares stays shared."""
    monkeypatch.setattr(collectives, "SMALL", small)

    def one_population(due, own, shared, ancestors):
        def one_particle(own, ancestor):
            return move(due, {"own": own, "shared": shared}, ancestor)

        axes = {"own": 0, "shared": None}
        return jax.vmap(one_particle, axis_name=PARTICLES, out_axes=axes)(own, ancestors)

    found = over_problems(one_population, 0)(jnp.asarray(due), OWN, SHARED, ANCESTORS)
    expected = [own[a] if d else own for d, own, a in zip(due, OWN, ANCESTORS)]
    np.testing.assert_allclose(found["own"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["shared"], SHARED, rtol=1e-6)
    alone = one_population(jnp.asarray(due[0]), OWN[0], SHARED[0], ANCESTORS[0])
    np.testing.assert_allclose(alone["own"], expected[0], rtol=1e-6)


def test_a_plate_inside_a_population_moves_with_it():
    def one_particle(own, ancestor):
        return jax.vmap(lambda x: (move(jnp.asarray(True), x, ancestor), reindex(x, ancestor)), axis_name="plate")(own)

    moved, reindexed = jax.vmap(one_particle, axis_name=PARTICLES)(OWN[0], ANCESTORS[0])
    np.testing.assert_allclose(moved, OWN[0][ANCESTORS[0]], rtol=1e-6)
    np.testing.assert_allclose(reindexed, OWN[0][ANCESTORS[0]], rtol=1e-6)
