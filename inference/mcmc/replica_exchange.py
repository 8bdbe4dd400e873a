"""Replica exchange: a chain of the target beside chains of flatter ones, which hand their traces on to it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.boundary import Boundary, advance, over, settled
from latentrace.ppl.collectives import index
from latentrace.ppl.errors import SiteError
from latentrace.ppl.state import Tempering

from ..chains import Draw, Info, Kernel, Target, added, at_once
from .composition import Composition, checked, own_stats, part
from .metropolis import accepts
from .tempered import check_powers

Array = jax.Array

FEWEST = 4
"""times that every pair of neighbours must have been tried before the ladder adapts to it"""
LEAST = 1e-3
"""rejection rate at which two targets count as different"""


class Replicas(NamedTuple):
    """K replicas of a chain, from the flattest target to the chain's own."""

    draws: Draw
    """the traces of all replicas, after the last swap; leading axes [K]"""
    states: Boundary
    """of the inner kernel, at the traces before the last swap"""
    places: Array
    """float32[K]: where on the ladder that was given each target stands, from 0 to K - 1"""
    refused: Array
    """float32[K - 1]: rejection probabilities of the swaps of neighbours, summed since the ladder last adapted"""
    tried: Array
    """float32[K - 1]: swaps of neighbours tried since then"""
    steps: Array
    """int32[]"""
    replica: Array
    """int32[K]: at each target, where its trace was at first"""
    fresh: Array
    """bool[K]: whether the trace has been at the first target since it was last at the chain's own"""
    round_trips: Array
    """int32[]: how often a fresh one has come to the chain's own target"""

    @property
    def draw(self) -> Draw:
        """Of the chain's own target."""
        return jax.tree.map(lambda x: x[-1], self.draws)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ReplicaExchange(Composition):
    """A kernel at K targets side by side, whose traces are swapped between neighbours: parallel tempering.

    Target k is the chain's own with its exponents multiplied: `powers[k]` for what `observe`, `factor`, `condition` and `score`
    pay, `sharpness[k]` for the probability of generated texts (see `mcmc.Tempered`). The last one is the chain's own target,
    and its traces are the draws; what is impossible is so for all. Each step moves every replica by the kernel, and then swaps
    traces x and y of neighbouring targets i and j with probability min(1, pi_i(y) pi_j(x) / (pi_i(x) pi_j(y))), of even pairs
    and odd pairs in turn. That order is not reversible, and its round trips do not slow down as replicas are added, as they do
    where the pairs are drawn at random (Syed, Bouchard-Cote, Deligiannidis and Doucet 2022).

    With `adapt`, targets between the first and the last move along the ladder in warm-up, by linear interpolation of the
    rejection rates summed along it, until neighbours reject alike (the same paper); then they stay. They adapt after 1/2^n of
    the warm-up for every n, once each pair has been tried four times.

    A step costs a step of the kernel for every replica, and what it takes to put it at another trace, side by side in one
    batch; then one pass through the language model for each text of every replica. That pass gives the density of a trace at
    all K targets: the exponents come after it.

    `Info.accepted` is the mean of the kernel's at the chain's own target and of the swap there, if it was tried. `Info.stats`:
    `powers`, `sharpness` float32[K], multiples as they are now; `tried`, `swapped` bool[K - 1], the pairs of neighbours;
    `replica` int32[K], at each target the number of its trace, which goes with it; `round_trips` int32[], how many traces have
    come to the chain's own target from the first one so far; `kernel`, what the kernel says, with a leading axis [K].

    Args:
        kernel: how to move; any that can be put at another trace.
        powers: K multiples, each at least 0; the last one 1. 1 for all by default.
        num_replicas: K powers spaced evenly from 0 to 1, in place of `powers`.
        sharpness: K positive multiples; the last one 1. 1 for all by default.
        adapt: whether targets between the first and the last move in warm-up.

    Raises `SiteError` for ladders that do not fit, and for programs with `ppl.nested`, whose density has no powers.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> @ppl.program
    ... def two_modes():
    ...     x = ppl.sample("x", dist.Normal(0.0, 3.0))
    ...     ppl.factor("modes", -20.0 * (abs(x) - 2.0) ** 2)
    >>> kernel = mcmc.ReplicaExchange(mcmc.Metropolis(mcmc.RandomWalk(x=0.5)), num_replicas=4)
    >>> posterior = inference.MCMC(kernel, num_samples=500, num_warmup=100).run(jax.random.key(0), two_modes)
    >>> 0.2 < posterior.probability(lambda values: values["x"] > 0) < 0.8
    True
    """

    kernel: Kernel
    powers: tuple[float, ...] | None = None
    num_replicas: int | None = None
    sharpness: tuple[float, ...] | None = None
    adapt: bool = True

    def __post_init__(self) -> None:
        checked("ReplicaExchange", (self.kernel,))
        if self.powers is not None and self.num_replicas is not None:
            raise SiteError("ReplicaExchange: give powers, or num_replicas to space them evenly, not both")
        for name in ("powers", "sharpness"):
            if (ladder := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(x) for x in ladder))
        self._check_ladder()

    def _check_ladder(self) -> None:
        ladders = {name: x for name in ("powers", "sharpness") if (x := getattr(self, name)) is not None}
        sizes = {name: len(x) for name, x in ladders.items()}
        if self.num_replicas is not None:
            sizes["num_replicas"] = self.num_replicas
        if len(set(sizes.values())) != 1 or min(sizes.values()) < 2:
            found = ", ".join(f"{size} by {name}" for name, size in sizes.items()) or "none"
            raise SiteError(f"ReplicaExchange: expected as many replicas by each ladder, at least 2; found {found}")
        for name, x in ladders.items():
            if x[-1] != 1:
                raise SiteError(f"ReplicaExchange: the last of {name} is the chain's own target and must be 1, not {x[-1]}")
            if not all(0 <= y < float("inf") and (y > 0 or name == "powers") for y in x):
                raise SiteError(f"ReplicaExchange: {name} must be {'0 or more' if name == 'powers' else 'positive'}, not {x}")

    @property
    def parts(self) -> tuple[Kernel, ...]:
        return (self.kernel,)

    @property
    def size(self) -> int:
        """K."""
        return self.num_replicas or len(self.powers or self.sharpness or ())

    @property
    def num_particles(self) -> int:
        return self.size * self.kernel.num_particles

    def check(self, target: Target) -> None:
        check_powers(target.staged, "take another kernel than ReplicaExchange")
        super().check(target)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Replicas:
        here, axis = self._beside(target)
        count = self.size
        places = jnp.arange(count, dtype=jnp.float32)

        def init(tempering: Tempering) -> Any:
            return self.kernel.init(*part(here._replace(tempering=tempering), rng_key, index(axis)), draw)

        states = over(Boundary.of(self.targets(target, places)), init, size=count, axis=axis)
        draws = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), draw)
        move = self._mover(target, rng_key, draws, places)
        return Replicas(
            draws=draws,
            states=settled(states, move, size=count, axis=axis)[0],
            places=places,
            refused=jnp.zeros(count - 1),
            tried=jnp.zeros(count - 1),
            steps=jnp.int32(0),
            replica=jnp.arange(count, dtype=jnp.int32),
            fresh=jnp.zeros(count, bool),
            round_trips=jnp.int32(0),
        )

    def at(self, target: Target, state: Replicas, draw: Draw) -> Replicas:
        """The chain's own target at another trace; the others stay where they are."""
        return state._replace(draws=jax.tree.map(lambda all_, one: all_.at[-1].set(one), state.draws, draw))

    def step(self, target: Target, rng_key: Array, state: Replicas) -> tuple[Replicas, Info]:
        here, axis = self._beside(target)
        move, temperings = self._mover(target, rng_key, state.draws, state.places), self.targets(target, state.places)
        states, infos = advance(state.states, move, size=self.size, axis=axis)
        draws = over(states, lambda state: state.draw, size=self.size, axis=axis).whole(self.size)
        densities = jax.vmap(lambda draw: log_densities(here, draw, temperings), axis_name=axis)
        log_density, scored = densities(draws)
        _, swap_key = part(target, rng_key, self.size)
        source, tried, swapped, chance = exchange(swap_key, log_density, state.steps % 2)
        fresh = state.fresh[source].at[0].set(True)
        after = Replicas(
            draws=jax.tree.map(lambda x: x[source], draws),
            states=states,
            places=state.places,
            refused=state.refused + jnp.where(tried, 1 - chance, 0.0),
            tried=state.tried + tried,
            steps=state.steps + 1,
            replica=state.replica[source],
            fresh=fresh.at[-1].set(False),
            round_trips=state.round_trips + fresh[-1],
        )
        own = infos.accepted[-1]
        stats = {
            "powers": self._multiples(state.places).power,
            "sharpness": self._multiples(state.places).sharpness,
            "tried": tried,
            "swapped": swapped,
            "replica": after.replica,
            "round_trips": after.round_trips,
            "kernel": own_stats(infos),
        }
        info = added(side_by_side(scored), side_by_side(infos))
        info = info._replace(accepted=jnp.where(tried[-1], (own + swapped[-1]) / 2, own), stats=stats)
        return self._adapted(target, after), info

    def _mover(self, target: Target, rng_key: Array, draws: Draw, places: Array) -> Callable[[Any], tuple[Any, Info]]:
        """From the state of a replica to that after a step of the kernel from its trace, at its own target."""
        here, axis = self._beside(target)
        temperings = self.targets(target, places)

        def move(state: Any) -> tuple[Any, Info]:
            draw, tempering = jax.tree.map(lambda x: x[index(axis)], (draws, temperings))
            mine, key = part(here._replace(tempering=tempering), rng_key, index(axis))
            return self.kernel.step(mine, key, self.kernel.at(mine, state, draw))

        return move

    def _beside(self, target: Target) -> tuple[Target, str]:
        """The target with an axis more for the replicas, and its name."""
        axis = f"replicas{len(target.beside)}"
        return target._replace(beside=(*target.beside, axis)), axis

    def _multiples(self, places: Array) -> Tempering:
        """The exponents, as multiples of the chain's own, at places on the ladder that was given."""
        even = [k / (self.size - 1) for k in range(self.size)]
        powers = self.powers or (even if self.num_replicas else [1.0] * self.size)
        ladder = lambda x: jnp.interp(places, jnp.arange(self.size, dtype=jnp.float32), jnp.asarray(x, jnp.float32))
        return Tempering(ladder(self.sharpness or [1.0] * self.size), ladder(powers))

    def targets(self, target: Target, places: Array) -> Tempering:
        """The targets at these places; leading axes [K]."""
        own = target.tempering or Tempering(jnp.float32(1), jnp.float32(1))
        return jax.tree.map(jnp.multiply, self._multiples(places), own)

    def _adapted(self, target: Target, state: Replicas) -> Replicas:
        """With its targets moved, at the end of a round of the warm-up."""
        ends = list(itertools.takewhile(bool, (target.num_warmup >> n for n in range(32))))
        if not self.adapt or not ends or self.size < 3:
            return state
        due = (jnp.asarray(ends) == target.iteration + 1).any() & (state.tried >= FEWEST).all()
        places = evened(state.places, state.refused / jnp.maximum(state.tried, 1))
        return state._replace(
            places=jnp.where(due, places, state.places),
            refused=jnp.where(due, 0.0, state.refused),
            tried=jnp.where(due, 0.0, state.tried),
        )


def log_densities(target: Target, draw: Draw, temperings: Tempering) -> tuple[Array, Info]:
    """The log density of a trace at each of K targets, float32[K], nats, by one pass: it does not depend on the exponents,
    which come after it, so that `vmap` over them repeats nothing but sums."""

    def one(tempering: Tempering) -> tuple[Array, Info]:
        _, log_density, info = target._replace(tempering=tempering).evaluate(target.choices(draw))
        return log_density, info

    log_density, infos = jax.vmap(one)(temperings)
    return log_density, jax.tree.map(lambda x: x[0], infos)


def exchange(rng_key: Array, log_density: Array, odd: Array) -> tuple[Array, Array, Array, Array]:
    """Swaps of the traces of neighbours, of even pairs or of odd ones, by log densities [K, K] of each trace at each target.

    Returns at each target whose trace comes there, int32[K]; which pairs were tried and which swapped, bool[K - 1]; and the
    probability of each swap, float32[K - 1].
    """
    count = log_density.shape[0]
    own, lower, upper = jnp.diagonal(log_density), jnp.diagonal(log_density, -1), jnp.diagonal(log_density, 1)
    log_ratio = upper + lower - own[:-1] - own[1:]
    tried = jnp.arange(count - 1) % 2 == odd
    swapped = tried & accepts(rng_key, log_ratio)
    none = jnp.zeros(1, bool)
    up, down = jnp.concatenate([swapped, none]), jnp.concatenate([none, swapped])
    source = jnp.arange(count, dtype=jnp.int32) + up - down
    return source, tried, swapped, jnp.nan_to_num(jnp.exp(jnp.minimum(log_ratio, 0.0)))


def evened(places: Array, rejection: Array) -> Array:
    """Places float32[K] between which neighbours would reject alike, from rejection rates float32[K - 1] at those that are:
    their sum along the ladder, interpolated, is cut into equal parts (Syed et al. 2022)."""
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.maximum(rejection, LEAST))])
    moved = jnp.interp(jnp.linspace(0.0, 1.0, len(places)) * barrier[-1], barrier, places)
    return moved.at[0].set(places[0]).at[-1].set(places[-1])


def side_by_side(infos: Info) -> Info:
    """What replicas cost together; leading axes [K]. One pass through a model serves them all."""
    return Info(infos.accepted.mean(), jax.tree.map(lambda x: x.max(axis=0), infos.faults), at_once(infos.counts))
