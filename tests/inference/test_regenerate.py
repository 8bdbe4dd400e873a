"""The regeneration move satisfies detailed balance: its cuts and redraws are enumerated, without Monte Carlo error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.ppl import errors

from .cases import M2, M3
from .moves import PROGRAMS, enumerated, exclusive_branches

QUICK = ["steered text", "exclusive branches", "plate", "while"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS if name not in QUICK]


@pytest.mark.parametrize("power", [1.0, 0.3])
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_detailed_balance(name, power):
    found = enumerated(name)
    matrix = found.transition(power)
    # q W^power, where the density is q W
    target = found.density * np.exp((power - 1) * found.log_weight.astype(np.float64))
    target /= target.sum()
    assert (matrix > -1e-6).all()
    assert (matrix > 1e-6).sum() > 2 * len(target), "the chain moves"
    flow = target[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-6)
    np.testing.assert_allclose(target @ matrix, target, atol=1e-5)
    # the whole trace is redrawn where the cut is first: any trace may follow any other
    assert (matrix > 0).all()


def test_choices_are_counted_where_they_are_made():
    found = enumerated("exclusive branches")
    k, x = (np.asarray(found.values[name]) for name in ("k", "x"))
    length = np.where(x[:, 0] == M2.eos_id, 1, 2)
    np.testing.assert_array_equal(found.made, np.where(k == 1, 2 + length, 3))
    plate = enumerated("plate")
    text = np.asarray(plate.values["text"])
    np.testing.assert_array_equal(plate.made, 2 + np.where(text[:, 0] == M3.eos_id, 1, 2))


@pytest.mark.slow
def test_the_compiled_move_is_this_kernel():
    """Frequencies of one move from every trace, against the rows of the matrix."""
    found, n = enumerated("exclusive branches"), 4000
    matrix = found.transition(0.3)
    number = {key: i for i, key in enumerate(found.key)}
    move = jax.jit(lambda key, traces: mcmc.Regenerate().move(found.target, key, traces, jnp.float32(0.3))[0])
    for start in np.argsort(found.density)[[0, len(number) // 2, -1]]:
        moved = move(jax.random.key(start), found.population(start, n))
        counts = np.bincount([number[key] for key in found.keys(found.target.choices(moved.draw))], minlength=len(number))
        expected = np.maximum(matrix[start], 0)
        assert (counts[expected == 0] == 0).all()
        assert (np.abs(counts / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-6).all()


def test_errors():
    with pytest.raises(errors.SiteError, match="power must be positive"):
        mcmc.Regenerate(power=0.0)
    nothing = ppl.program(lambda: ppl.factor("f", 1.0))
    chain = inference.MCMC(mcmc.Regenerate(), num_samples=2)
    with pytest.raises(errors.SiteError, match="no random choice"):
        chain.run(jax.random.key(0), nothing)
    given = ppl.program(exclusive_branches).condition({"k": 1, "x": [1, 1], "b": 0, "last": 1})
    with pytest.raises(errors.SiteError, match="no random choice"):
        chain.run(jax.random.key(0), given)
