"""Moves that redraw a part of a trace satisfy detailed balance: places and redraws are enumerated, without sampling error."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from latentrace.inference import mcmc
from latentrace.inference.mcmc.redraw import Place, choices_of, log_multiple_try
from latentrace.ppl.state import Tempering
from latentrace.ppl.walk import walk

from .moves import PROGRAMS, World, enumerated


@cache
def states(name, notes, tempering):
    """The walks along all traces of a program, side by side."""
    found = enumerated(name)
    target = found.target._replace(tempering=tempering and Tempering(*map(jnp.float32, tempering)))
    target = target._replace(arrays=jax.tree.map(jnp.asarray, target.arrays))
    sites = target.staged.sites
    kept = {n: jnp.ones((*sites[n].dims, *([sites[n].max_tokens] if sites[n].max_tokens else [])), bool) for n in target.random}
    along = lambda values: target.walk(jax.random.key(0), values, kept, notes=notes)[0]
    return target, jax.jit(jax.vmap(along))(found.values)


def proposals(kernel, name, tempering=None):
    """For every trace, place and world: the chance of place and world, the trace found, and log w of both traces."""
    found = enumerated(name)
    target, walks = states(name, kernel.notes, tempering)
    count = kernel.places(target, jax.tree.map(lambda x: x[0], walks)).weights.shape[0]

    def propose(x, at, world):
        places = kernel.places(target, x)
        place = Place(at, places.numbers[at])
        kept, zero = kernel.kept(target, x, place), jnp.float32(0)
        drawn = World(world, jnp.int32(0), zero, zero, None)
        y, state = walk(target.staged, target.arrays, target.given, drawn, choices_of(target, x), kept, before=x,
                        notes=kernel.notes, tempering=target.tempering)  # fmt: skip
        drawn = state.choices.drawn
        alone = jnp.arange(places.weights.shape[0]) == at
        chance = jnp.exp(kernel.log_chance(places, alone, place) + drawn.log_p_own)
        chance = jnp.where(drawn.own == 0, chance, 0.0)  # else this world repeats one with fewer digits
        log_w = partial(kernel.log_w, target, kept=kept, place=place)
        return chance, choices_of(target, y), log_w(x, y), log_w(y, x)

    over_worlds = jax.vmap(propose, (None, None, 0))
    all_of_them = jax.vmap(jax.vmap(over_worlds, (None, 0, None)), (0, None, None))
    chance, values, now, then = jax.jit(all_of_them)(walks, jnp.arange(count), jnp.arange(found.num_worlds))
    chance, now, then = (np.asarray(x, np.float64) for x in (chance, now, then))
    number = {key: i for i, key in enumerate(found.key)}
    flat = {k: np.asarray(v).reshape(chance.size, *v.shape[3:]) for k, v in values.items()}
    # a trace of density 0 has no number, and is never accepted
    numbers = np.array([number.get(key, 0) for key in found.keys(flat)]).reshape(chance.shape)
    return chance, numbers, now, then


def groups(kernel, name, chance):
    """The places that are taken by one law: all of them, or for a rule that takes ranks those of each rank, bool[X, M]."""
    target, walks = states(name, kernel.notes, None)
    places = jax.vmap(lambda x: kernel.places(target, x))(walks)
    there = np.asarray(places.weights) > 0
    if not kernel.rule.equal:
        np.testing.assert_allclose(chance.sum((1, 2)), 1.0, atol=1e-5)
        return [there]
    numbers = np.where(there, np.asarray(places.numbers), -1)
    distinct = [sorted({*row} - {-1}) for row in numbers.tolist()]
    found = []
    for rank in range(max(map(len, distinct))):
        number = np.array([row[rank] if rank < len(row) else -2 for row in distinct])
        found.append(numbers == number[:, None])
        total = np.where(found[-1][:, :, None], chance, 0.0).sum((1, 2))
        np.testing.assert_allclose(total[number >= 0], 1.0, atol=1e-5)
    return found


def density_of(kernel, name, tempering=None):
    """q W^power, normalised."""
    _, walks = states(name, kernel.notes, tempering)
    inside = walks.inside(enumerated(name).target.random)
    log_q = sum(np.where(inside[n], walks.notes[n].log_q, 0.0).reshape(len(walks.log_weight), -1).sum(1) for n in inside)
    density = np.exp(log_q + kernel.power * np.asarray(walks.log_weight, np.float64))
    return density / density.sum()


def single(chance, numbers, now, then):
    """The transition matrix with one try."""
    count = len(chance)
    possible = (chance > 0) & (then > -np.inf)
    rise = np.where(possible, then, 0.0) - np.where(possible, now, 0.0)
    accepted = np.where(possible, chance * np.exp(np.minimum(0.0, rise)), 0.0)
    matrix = np.zeros((count, count))
    for x in range(count):
        np.add.at(matrix[x], numbers[x].ravel(), accepted[x].ravel())
    return matrix + np.diag(1 - matrix.sum(1))


def check(target, matrix):
    """Detailed balance; how many moves there are."""
    assert (matrix > -1e-6).all()
    flow = target[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-6)
    np.testing.assert_allclose(target @ matrix, target, atol=1e-5)
    return (matrix - np.diag(np.diag(matrix)) > 1e-6).sum()


KERNELS = {
    "suffix": mcmc.Regenerate(),
    "suffix, power": mcmc.Regenerate(power=0.3),
    "suffix by entropy": mcmc.Regenerate(mcmc.EntropyCuts(0.2)),
    "suffix by site": mcmc.Regenerate("sites"),
    "suffix by step": mcmc.Regenerate(mcmc.StepCuts((1,))),
    "token": mcmc.Infill(),
    "token, power": mcmc.Infill(power=0.3),
    "span by entropy": mcmc.Infill(span=2, cuts="entropy"),
    "single site": mcmc.SingleSite(),
}
QUICK = [
    ("suffix", "steered text"),
    ("suffix by entropy", "exclusive branches"),
    ("token", "exclusive branches"),
    ("token, power", "steered text"),
    ("single site", "plate"),
]
SLOW = [
    pytest.param(kernel, name, marks=pytest.mark.slow) for kernel in KERNELS for name in PROGRAMS if (kernel, name) not in QUICK
]


@pytest.mark.parametrize(("kernel", "name"), [*QUICK, *SLOW])
def test_detailed_balance(kernel, name):
    kernel = KERNELS[kernel]
    target = density_of(kernel, name)
    if kernel.power == 1:
        exact = enumerated(name).density
        np.testing.assert_allclose(target, exact / exact.sum(), atol=1e-6)
    chance, *found = proposals(kernel, name)
    moved = [check(target, single(np.where(group[:, :, None], chance, 0.0), *found)) for group in groups(kernel, name, chance)]
    assert sum(moved) > len(target), "the chain moves"


@pytest.mark.parametrize("kernel", ["suffix", pytest.param("token", marks=pytest.mark.slow)])
def test_detailed_balance_of_tempered_targets(kernel):
    """Of p(texts)^sharpness times (all else)^power, computed from densities."""
    name, (sharpness, power) = "steered text", (1.7, 0.4)
    found, (target, walks) = enumerated(name), states(name, KERNELS[kernel].notes, (sharpness, power))
    log_p = np.asarray(sum(walks.values[n][3].sum(-1) for n in target.random), np.float64)
    exact = np.exp(sharpness * log_p + power * (np.log(found.density) - log_p))
    density = density_of(KERNELS[kernel], name, (sharpness, power))
    np.testing.assert_allclose(density, exact / exact.sum(), atol=1e-6)
    chance, *found = proposals(KERNELS[kernel], name, (sharpness, power))
    for group in groups(KERNELS[kernel], name, chance):
        check(density, single(np.where(group[:, :, None], chance, 0.0), *found))


@pytest.mark.parametrize("name", ["exclusive branches", pytest.param("steered text", marks=pytest.mark.slow)])
def test_detailed_balance_with_several_tries(name):
    """Two tries of each place: all pairs of worlds."""
    kernel = mcmc.Regenerate("entropy", tries=2)
    found, (target, walks) = enumerated(name), states(name, kernel.notes, None)
    weights = np.asarray(jax.vmap(lambda x: kernel.places(target, x).weights)(walks), np.float64)
    chance, numbers, now, then = proposals(kernel, name)
    matrix = np.zeros((len(chance), len(chance)))
    ratio = jax.jit(jax.vmap(log_multiple_try, (0, 0, None)), static_argnums=())
    for x, (p_places, now_x) in enumerate(zip(weights / weights.sum(1, keepdims=True), now)):
        for at in np.flatnonzero(p_places):
            worlds = np.flatnonzero(chance[x, at])
            p = chance[x, at, worlds] / p_places[at]
            i, j = (g.ravel() for g in np.meshgrid(np.arange(len(worlds)), np.arange(len(worlds))))
            tried = then[x, at, worlds][np.stack([i, j], axis=1)]
            log_ratio = np.asarray(ratio(jnp.asarray(tried), jnp.full(len(i), now_x[at, worlds[0]]), 0), np.float64)
            total = logsumexp(tried, axis=1)
            picked = np.where(total > -np.inf, np.exp(tried[:, 0] - np.where(total > -np.inf, total, 0.0)), 0.0)
            # the pair is symmetric: the first of it is picked, twice
            mass = 2 * p_places[at] * p[i] * p[j] * picked * np.exp(np.minimum(0.0, log_ratio))
            np.add.at(matrix[x], numbers[x, at, worlds[i]], mass)
    matrix += np.diag(1 - matrix.sum(1))
    density = found.density / found.density.sum()
    check(density, matrix)
    one_try = single(chance, numbers, now, then)
    assert np.trace(matrix) < np.trace(one_try), "two tries are accepted more often than one"
