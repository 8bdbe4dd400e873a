"""Metropolis-Hastings moves that redraw some choices of a trace and repeat the others."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.boundary import Boundary, over
from latentrace.ppl.choices import inverse_cdf
from latentrace.ppl.notes import Notes
from latentrace.ppl.staging import check_repeatable
from latentrace.ppl.state import Counts, Faults, together
from latentrace.ppl.walk import Walk

from ..chains import Draw, Info, Kernel, Target
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
        return self._along(target, rng_key, draw, None)

    def at(self, target: Target, state: WalkState, draw: Draw) -> WalkState:
        """A walk along another trace: what the chain's contexts have read already is not read again."""
        return self._along(target, jax.random.key(0), draw, state.walk)

    def _along(self, target: Target, rng_key: Array, draw: Draw, before: Walk | None) -> WalkState:
        sites = target.staged.sites
        shape = lambda s: (*s.dims, s.max_tokens) if s.max_tokens else s.dims
        kept = {name: jnp.ones(shape(sites[name]), bool) for name in target.random}
        return WalkState(target.walk(rng_key, target.choices(draw), kept, before=before, notes=self.notes)[0])

    def step(self, target: Target, rng_key: Array, state: WalkState) -> tuple[WalkState, Info]:
        """The trace after one move."""
        if target.changing:
            state = self.at(target, state, state.draw)
        cut_key, run_key, pick_key, accept_key = jax.random.split(rng_key, 4)
        cut_key = jax.random.fold_in(target.shared(cut_key), 0)
        x, places = state.walk, self.places(target, state.walk)
        at = inverse_cdf(places.weights, jax.random.uniform(cut_key))
        place = Place(at, places.numbers[at])
        kept = self.kept(target, x, place)
        options: dict[str, Any] = {"before": x, "notes": self.notes}
        walks, faults, counts = target.walks(self.tries, run_key, choices_of(target, x), kept, **options)
        tried = over(walks, lambda y: self.log_w(target, y, x, kept, place), size=self.tries).whole(self.tries)
        which = jax.random.categorical(pick_key, tried)
        one = nth(walks, which)
        now = self.log_w(target, x, one, kept, place)
        accept = accepts(accept_key, log_multiple_try(tried, now, which))
        stats = {"cut": place.number, "length": x.made, "new_tokens": counts.generated.sum()}
        return WalkState(choose(accept, one, x)), info_of_walks(faults, counts, accept, stats)

    def places(self, target: Target, walk: Walk) -> Places:
        """What the rule says of a trace's choices."""
        names, inside = self.movable(target), walk.inside(target.random)
        weights = [jnp.where(inside[n], self.rule.weights(walk, n), 0.0).ravel().astype(jnp.float32) for n in names]
        return Places(jnp.concatenate(weights), jnp.concatenate([walk.notes[n].number.ravel() for n in names]))

    def log_w(self, target: Target, walk: Walk, other: Walk, kept: dict[str, Array], place: Place) -> Array:
        """log w, float32[], of one trace when `other` is the one before or after it; -inf where it is impossible."""
        places, inside, there = self.places(target, walk), walk.inside(target.random), other.inside(target.random)
        part = jnp.where(self.alike(places, place), places.weights, 0.0).sum()
        chance = jnp.where(part > 0, jnp.log(part) - jnp.log(places.weights.sum()), -jnp.inf)
        repeated = [jnp.where(kept[n] & inside[n] & there[n], walk.notes[n].log_q, 0.0).sum() for n in target.random]
        return jnp.where(walk.log_weight == -jnp.inf, -jnp.inf, self.power * walk.log_weight) + chance + sum(repeated)


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
    work = jax.tree.map(lambda x: x.sum(axis=0), counts)._replace(model_calls=counts.model_calls.max())
    return Info(accept.astype(jnp.float32), together(faults), work, stats)
