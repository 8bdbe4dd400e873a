"""What may happen to a run in segments while it stands at a cut: it resamples, and particles are replaced by others."""

from typing import Any

import jax
import jax.numpy as jnp

from . import staging
from .collectives import differs, index, reindex
from .lineage import follow_back, resample
from .loops import Collected
from .run import Prefixes, RegeneratingSource, Settings
from .segments import Boundary, Carried, SegmentedRun, Setting
from .sites import generate_p
from .staging import Site
from .state import Faults, State, total_twist

Array = jax.Array


def renew(run: SegmentedRun) -> None:
    """Let the population resample, if weights have moved since it last could, and bring each particle's past to its place."""
    at = run.segments[run.segment].start
    if not run.collected:
        run.boundary = run.call(_renewed, run.boundary, at=at)
    else:
        run.boundary, collected = run.call(_renewed_in_loop, run.boundary, run.padded())
        run.collected = _steps(collected, len(run.collected))


def _renewed(setting: Setting, boundary: Boundary, at: int) -> Boundary:
    def one_particle(carried: Carried) -> Carried:
        run, env = setting.interpreter(carried, at)
        run.before_draw()
        return setting.pause(run, env, at)

    return setting.over(boundary, one_particle)


def _renewed_in_loop(setting: Setting, boundary: Boundary, collected: Collected) -> tuple[Boundary, Collected]:
    policy = setting.settings.policy
    assert policy is not None

    def one_particle(carried: Carried, collected: Collected) -> tuple[Carried, Collected]:
        carry, since = carried.loop
        state, carry, ancestor = resample(policy, carried.state, carry)
        env, records, prompts = reindex((carried.env, carried.records, carried.prompts), reindex(since, ancestor))
        outputs, steps = follow_back((collected.outputs, collected.records), collected.moved, ancestor)
        here = jnp.full_like(collected.moved, index())
        return Carried(env, records, prompts, state, (carry, index())), Collected(outputs, steps, here)

    return setting.parted(setting.over(boundary, one_particle, collected))


def _steps(collected: Collected, count: int) -> list[Collected]:
    """The first `count` of the steps [N, length, ...]."""
    return [jax.tree.map(lambda x, i=i: x[:, i], collected) for i in range(count)]  # type: ignore[misc]


# --- another run to the same cut --------------------------------------------------------------------------------------


def repeated(run: SegmentedRun, values: dict[str, Any], cuts: Array, rng_key: Array) -> SegmentedRun:
    """A run of independent particles up to the cut at which `run` stands, which repeat its traces up to choice number `cuts`
    (int32[N]) and then draw. `values` are those of its sites so far."""
    settings = Settings(run.settings.num_particles, RegeneratingSource(), steered=True)
    trace = Prefixes(choices_of(run, values), cuts)
    return to_the_same_cut(run, SegmentedRun(run.staged, rng_key, run.given, settings, trace=trace))


def choices_of(run: SegmentedRun, values: dict[str, Any]) -> dict[str, Array]:
    """Values of all random sites, with a leading axis of particles; zeros for those that the run has not met."""
    found = {}
    for site in random_sites(run):
        shape, dtype = site.out or ((site.max_tokens,), "int32")
        if site.name not in values:
            found[site.name] = jnp.zeros((run.settings.num_particles, *site.dims, *shape), dtype)
        else:
            found[site.name] = values[site.name][0] if site.kind == generate_p.name else values[site.name]
    return found


def random_sites(run: SegmentedRun) -> list[Site]:
    """The sites whose values are drawn."""
    return [run.staged.sites[name] for name in staging.random_sites(run.staged) if name not in run.given]


def to_the_same_cut(run: SegmentedRun, other: SegmentedRun) -> SegmentedRun:
    """The other run, when it stands where `run` does."""
    while (other.segment, len(other.collected)) != (run.segment, len(run.collected)):
        other.advance()
    return other


def log_rise(run: SegmentedRun, other: SegmentedRun) -> Array:
    """By how much the log of target over proposal, twists included while the run goes on, is higher in another run that
    stands at the same cut and has never resampled: float32[N], nats; -inf where this run's particle has weight 0."""
    return run.call(_log_rise, run.boundary, other.boundary, steered=not run.done)  # type: ignore[no-any-return]


def _log_rise(setting: Setting, ours: Boundary, theirs: Boundary, steered: bool) -> Array:
    def one_particle(carried: Carried, other: Carried) -> Array:
        now, then = carried.state, other.state
        before, after = now.log_weight - now.offset, then.log_weight
        if steered:
            before, after = before + total_twist(now), after + total_twist(then)
        return jnp.where(before == -jnp.inf, -jnp.inf, after - before)

    return setting.over(ours, one_particle, theirs).whole(setting.settings.num_particles)  # type: ignore[no-any-return]


def replace(run: SegmentedRun, other: SegmentedRun, accept: Array) -> None:
    """Where `accept` (bool[N]), put in a particle's place that of another run at the same cut, after `renew`. Weights of the
    population, with twists while the run goes on, stay; what the other run cost, and what went wrong in it, is added."""
    if not run.collected:
        run.boundary = run.call(_replaced, run.boundary, other.boundary, accept, steered=not run.done)
    else:
        run.boundary, collected = run.call(
            _replaced_in_loop, run.boundary, other.boundary, accept, run.padded(), other.padded(), steered=True
        )
        run.collected = _steps(collected, len(run.collected))


def _replaced(setting: Setting, ours: Boundary, theirs: Boundary, accept: Array, steered: bool) -> Boundary:
    def one_particle(carried: Carried, other: Carried, accept: Array) -> Carried:
        return _carried(carried, other, accept, steered)

    return setting.over(ours, one_particle, theirs, accept)


def _replaced_in_loop(
    setting: Setting,
    ours: Boundary,
    theirs: Boundary,
    accept: Array,
    collected: Collected,
    other_collected: Collected,
    steered: bool,
) -> tuple[Boundary, Collected]:
    def one_particle(
        carried: Carried, other: Carried, accept: Array, past: Collected, other_past: Collected
    ) -> tuple[Carried, Collected]:
        chosen = pick(accept, other_past, past)
        return _carried(carried, other, accept, steered), chosen._replace(moved=past.moved)

    return setting.parted(setting.over(ours, one_particle, theirs, accept, collected, other_collected))


def _carried(carried: Carried, other: Carried, accept: Array, steered: bool) -> Carried:
    """What a particle carries on: the other's values; its own place in the population."""
    values = lambda c: (c.env, c.records, c.prompts, c.loop and c.loop[0])
    env, records, prompts, carry = pick(accept, values(other), values(carried))
    now, then = carried.state, other.state
    log_weight = now.log_weight
    if steered:
        log_weight = jnp.where(accept, log_weight + total_twist(now) - total_twist(then), log_weight)
    arenas, log_twists, made = pick(accept, (then.arenas, then.log_twists, then.made), (now.arenas, now.log_twists, now.made))
    state: State = now._replace(
        log_weight=log_weight,
        offset=jnp.where(accept, log_weight - then.log_weight, now.offset),
        arenas=arenas,
        log_twists=log_twists,
        made=made,
        faults=_faults(now.faults, then.faults),
        counts=jax.tree.map(jnp.add, now.counts, then.counts),
    )
    return Carried(env, records, prompts, state, carried.loop and (carry, carried.loop[1]))


def _faults(now: Faults, then: Faults) -> Faults:
    """A death in the other run is none of ours; everything else is."""
    return jax.tree.map(jnp.maximum, now, then)._replace(died=now.died, died_at=now.died_at)  # type: ignore[no-any-return]


def pick(accept: Array, then: Any, now: Any) -> Any:
    """`then` where accepted, else `now`; what all particles share, such as a prompt's cache, is the same in both."""
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b) if differs(a) or differs(b) else b, then, now)
