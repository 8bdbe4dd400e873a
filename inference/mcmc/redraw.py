"""Metropolis-Hastings moves that redraw some choices of a trace and repeat the others."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.arena import Prompt
from latentrace.ppl.boundary import Boundary, over
from latentrace.ppl.choices import inverse_cdf
from latentrace.ppl.notes import Notes
from latentrace.ppl.staging import check_repeatable, steady_prompts
from latentrace.ppl.state import Counts, Faults, together
from latentrace.ppl.walk import Walk

from ..chains import Draw, Info, Kernel, Target, at_once
from .cuts import Cuts
from .metropolis import accepts, choose

Array = jax.Array


class Places(NamedTuple):
    """The choices of a trace that may be taken, in one row [M]: site after site, as `notes` has them."""

    weights: Array
    """float32: 0 where inactive"""
    numbers: Array
    """int32: which of the trace's choices each is"""


class Place(NamedTuple):
    """One of them, taken."""

    at: Array
    """int32[]: in the row"""
    number: Array


class WalkState(NamedTuple):
    """The state of a kernel that walks."""

    walk: Walk
    most: Array
    """int32[]: the most ranks of places that any chain has had, up to the end of warm-up"""

    @property
    def draw(self) -> Draw:
        return Draw(self.walk.values, self.walk.active, self.walk.returned)


class Redraw(Kernel):
    """What kernels that walk have in common: they take a place in a trace, redraw some choices and repeat the others.

    Let x be the trace, x' the new one, q the program's proposals, W the target over q, h(place | x) the chance of taking the
    place, and K the choices that are active in both and not to be redrawn there. The way there draws all choices of x' but K,
    the way back all of x but K. So Hastings' ratio is w(x') / w(x), with

        w(x) = W(x) h(place | x) prod_K q(x_i | what is before it in x).

    Where only a suffix is redrawn the product is the same in both. `power` stands over W, and over the product where W counts
    it: the invariant distribution is q W^power.

    Several `tries` of one place are drawn side by side. One of them is picked in proportion to its w, and accepted with
    probability min(1, sum w / (sum w - w of the pick + w(x))): multiple-try Metropolis with independent tries (Liu, Liang and
    Wong 2000; Martino 2018, equation 24). That takes a K which is the same for all tries: a suffix.
    """

    tries: int
    power: float

    @property
    def num_particles(self) -> int:
        return self.tries

    @property
    def rule(self) -> Cuts:
        """How a place is taken: a choice of the trace."""
        raise NotImplementedError

    def movable(self, target: Target) -> list[str]:
        """The sites of which choices may be taken."""
        return target.random

    def kept(self, target: Target, walk: Walk, place: Place) -> dict[str, Array]:
        """The choices that are repeated: bool for each, as `Walk.inside`."""
        raise NotImplementedError

    def alike(self, places: Places, place: Place) -> Array:
        """bool[M]: which places of another trace are the same as this one."""
        raise NotImplementedError

    @property
    def notes(self) -> Notes:
        return Notes(self.rule.entropies)

    def check(self, target: Target) -> None:
        target.require_choices(type(self).__name__)
        check_repeatable(target.staged, target.given)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> WalkState:
        """A walk along the trace, which reads it token by token."""
        walk = self._along(target, rng_key, draw, None)
        return WalkState(walk, target.largest(self._ranks(target, walk)))

    def at(self, target: Target, state: WalkState, draw: Draw) -> WalkState:
        """A walk along another trace: what the chain's contexts have read already is not read again."""
        return state._replace(walk=self._along(target, jax.random.key(0), draw, state.walk))

    def _along(self, target: Target, rng_key: Array, draw: Draw, before: Walk | None) -> Walk:
        sites = target.staged.sites
        shape = lambda s: (*s.dims, s.max_tokens) if s.max_tokens else s.dims
        kept = {name: jnp.ones(shape(sites[name]), bool) for name in target.random}
        return target.walk(rng_key, target.choices(draw), kept, before=before, notes=self.notes)[0]

    def step(self, target: Target, rng_key: Array, state: WalkState) -> tuple[WalkState, Info]:
        """The trace after one move."""
        if target.changing:
            state = self.at(target, state, state.draw)
        cut_key, run_key, pick_key, accept_key = jax.random.split(rng_key, 4)
        x, places = state.walk, self.places(target, state.walk)
        place, moves = self.take(target, cut_key, places, state.most)
        kept = {name: mask | ~moves for name, mask in self.kept(target, x, place).items()}
        options: dict[str, Any] = {"before": x, "notes": self.notes}
        walks, faults, counts = target.walks(self.tries, run_key, choices_of(target, x), kept, **options)
        tried = over(walks, lambda y: self.log_w(target, y, x, kept, place), size=self.tries).whole(self.tries)
        which = jax.random.categorical(pick_key, tried)
        one = nth(walks, which)
        now = self.log_w(target, x, one, kept, place)
        accept = moves & accepts(accept_key, self.log_ratio(x, one, log_multiple_try(tried, now, which)))
        after = choose(accept, one, x)._replace(prompts=self._prompts(target, accept, one, x))
        warming, most = target.iteration < target.num_warmup, target.largest(self._ranks(target, after))
        most = jnp.where(warming, jnp.maximum(state.most, most), state.most)
        stats = {"cut": jnp.where(moves, place.number, -1), "length": x.made, "new_tokens": counts.generated.sum()}
        return WalkState(after, most), info_of_walks(faults, counts, accept, stats)

    def take(self, target: Target, rng_key: Array, places: Places, most: Array) -> tuple[Place, Array]:
        """A place, and whether there is one.

        Where the rule only says which places there are, chains take the one of the same rank: then they stay in step. A rank
        is drawn whatever the trace, and the trace stays as it is if it has fewer: so the target is invariant for each rank by
        itself, and what chains have in common does not make their traces depend on each other. Other rules take a place in
        proportion to its weight, each chain its own.
        """
        if not self.rule.equal:
            at = inverse_cdf(places.weights, jax.random.uniform(rng_key))
            return Place(at, places.numbers[at]), places.weights.sum() > 0
        rank_key = jax.random.fold_in(target.shared(rng_key), 0)
        numbers, distinct = ranked(places)
        rank = jnp.minimum((jax.random.uniform(rank_key) * most).astype(jnp.int32), most - 1)
        number = jnp.where(distinct & (jnp.cumsum(distinct) - 1 == rank), numbers, -1).max()
        at = inverse_cdf(jnp.where(places.numbers == number, places.weights, 0.0), jax.random.uniform(rng_key))
        return Place(at, number), number >= 0

    def _prompts(self, target: Target, accept: Array, one: Walk, x: Walk) -> dict[int, list[Prompt]]:
        """The prompts of the chosen walk; chains go on sharing those that are the same in every walk."""
        steady = steady_prompts(target.staged.jaxpr)
        pick = lambda same, then, now: now if same else choose(accept, then, now)
        return {m: list(map(pick, steady.get(m, []), one.prompts[m], x.prompts[m])) for m in x.prompts}

    def _ranks(self, target: Target, walk: Walk) -> Array:
        return ranked(self.places(target, walk))[1].sum().astype(jnp.int32)

    def log_ratio(self, walk: Walk, other: Walk, exact: Array) -> Array:
        """Log of the ratio, float32[], by which another walk is accepted."""
        return exact

    def places(self, target: Target, walk: Walk) -> Places:
        """What the rule says of a trace's choices."""
        names, inside = self.movable(target), walk.inside(target.random)
        weights = [jnp.where(inside[n], self.rule.weights(walk, n), 0.0).ravel().astype(jnp.float32) for n in names]
        return Places(jnp.concatenate(weights), jnp.concatenate([walk.notes[n].number.ravel() for n in names]))

    def log_chance(self, places: Places, alike: Array, place: Place) -> Array:
        """Log probability, float32[], with which one of the places `alike` (bool[M]) is taken; given its rank where that is
        drawn whatever the trace."""
        among = jnp.where(places.numbers == place.number, places.weights, 0.0) if self.rule.equal else places.weights
        part = jnp.where(alike, places.weights, 0.0).sum()
        return jnp.where(part > 0, jnp.log(part) - jnp.log(among.sum()), -jnp.inf)

    def log_w(self, target: Target, walk: Walk, other: Walk, kept: dict[str, Array], place: Place) -> Array:
        """log w, float32[], of one trace when `other` is the one before or after it; -inf where it is impossible."""
        places, inside, there = self.places(target, walk), walk.inside(target.random), other.inside(target.random)
        chance = self.log_chance(places, self.alike(places, place), place)
        repeated = [jnp.where(kept[n] & inside[n] & there[n], walk.notes[n].log_q, 0.0).sum() for n in target.random]
        return jnp.where(walk.log_weight == -jnp.inf, -jnp.inf, self.power * walk.log_weight) + chance + sum(repeated)


def ranked(places: Places) -> tuple[Array, Array]:
    """The numbers of places of positive weight, ascending, int32[M], and which of them are the first of their kind."""
    none = jnp.iinfo(jnp.int32).max
    numbers = jnp.sort(jnp.where(places.weights > 0, places.numbers, none))
    return numbers, (numbers < none) & jnp.concatenate([jnp.ones(1, bool), numbers[1:] != numbers[:-1]])


def log_multiple_try(tried: Array, now: Array, which: Array) -> Array:
    """Log of the ratio, float32[], by which try number `which` of log w float32[K] replaces a trace of log w `now`."""
    others = jnp.where(jnp.arange(tried.shape[0]) == which, now, tried)
    ratio = jax.nn.logsumexp(tried) - jax.nn.logsumexp(others)
    return jnp.where(tried[which] == -jnp.inf, -jnp.inf, ratio)


def nth(walks: Boundary, which: Array) -> Walk:
    """One of several walks."""
    taken = [x if axis is None else x[which] for x, axis in zip(walks.leaves, walks.axes)]
    return jax.tree.unflatten(walks.tree, taken)  # type: ignore[no-any-return]


def choices_of(target: Target, walk: Walk) -> dict[str, Array]:
    """The values of a trace's random sites."""
    return target.choices(Draw(walk.values, walk.active, walk.returned))


def info_of_walks(faults: Faults, counts: Counts, accept: Array, stats: dict[str, Any]) -> Info:
    """What a step says of the walks that it took (leading axis)."""
    return Info(accept.astype(jnp.float32), together(faults), at_once(counts), stats)
