"""Populations of whole traces that climb a ladder of targets, from the program's proposal to its posterior.

With q the density of a forward run and W the target over q, the targets are q W^power, for powers that rise from 0 to 1.
`TemperedSMC` and `WasteFreeSMC` differ in how they renew a population that has been weighted for its next target.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from latentrace.ppl.choices import Choices
from latentrace.ppl.collectives import index, over_particles
from latentrace.ppl.errors import RunError, SiteError
from latentrace.ppl.lineage import Policy
from latentrace.ppl.run import Settings, arrays_of, check_faults, compiled, given_arrays, label_values
from latentrace.ppl.staging import check_repeatable
from latentrace.ppl.state import Faults

from ..chains import Info, Target, Traces, check, info_of, traces_of
from ..driver import ledger_of, prepare, wants_progress
from ..posterior import Posterior
from .resampling import largest

Array = jax.Array

MOST = 1000
"""temperatures of a ladder that is found in a pilot run"""


class Population(NamedTuple):
    """Weighted traces; leading axes of particles."""

    traces: Traces
    log_weights: Array
    """float32[N], nats: the mean of exp(log_weights) estimates the evidence of the target it is weighted for"""
    roots: Array
    """int32[N]: each particle's ancestor among the first ones"""


class Renewal(Protocol):
    """How a weighted population is renewed. Hashable: it is compiled in."""

    @property
    def num_particles(self) -> int: ...

    @property
    def num_moving(self) -> int:
        """How many particles are moved at a time."""
        ...

    @property
    def at_the_end(self) -> bool:
        """Whether to renew once more at power 1."""
        ...

    def renew(self, target: Target, rng_key: Array, population: Population, power: Array) -> tuple[Population, Array, Info]:
        """Resample and move, all for q W^power; whether it was resampled, bool[]; `Info.accepted` is the mean over moves."""
        ...


class Rung(NamedTuple):
    """One temperature of a run."""

    power: float
    """of W"""
    ess: float
    """effective sample size when weighted for this temperature"""
    resampled: bool
    accepted: float
    """part of the proposed moves that was accepted; NaN where nothing was moved"""
    log_evidence: float
    """of this temperature's target, nats"""


class Ladder(tuple[Rung, ...]):
    """The temperatures of a run, in order. Prints as a table.

    >>> Ladder([Rung(0.25, 61.3, False, 0.42, -1.25), Rung(1.0, 40.9, True, 0.31, -2.5)])
     power      ESS  resampled  accepted  log evidence
    0.2500     61.3         no      0.42        -1.250
    1.0000     40.9        yes      0.31        -2.500
    """

    __slots__ = ()

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The powers, for `temperatures=` of another run."""
        return tuple(rung.power for rung in self)

    def __repr__(self) -> str:
        lines = [" power      ESS  resampled  accepted  log evidence"]
        for r in self:
            yes = "yes" if r.resampled else "no"
            lines.append(f"{r.power:6.4f} {r.ess:8.1f} {yes:>10} {r.accepted:9.2f} {r.log_evidence:13.3f}")
        return "\n".join(lines)


# --- one temperature --------------------------------------------------------------------------------------------------


def first_population(target: Target, rng_key: Array, num_particles: int) -> tuple[Population, Faults, Info]:
    """Independent forward runs, what went wrong in each of them, and what they cost."""
    output = target.population(rng_key, Settings(num_particles))
    population = Population(traces_of(output), jnp.zeros(num_particles), jnp.arange(num_particles, dtype=jnp.int32))
    return population, output.faults, info_of(output, jnp.float32(1))


def risen(log_weights: Array, log_w: Array, rise: Array) -> Array:
    """Log-weights float32[N] for a power higher by `rise`; a trace of weight 0 has weight 0 at every power but 0."""
    return jnp.where(log_w == -jnp.inf, -jnp.inf, log_weights + rise * log_w)


@jax.jit
def weighted(log_weights: Array, log_w: Array, power: Array, following: Array) -> tuple[Array, Array, Array]:
    """Log-weights float32[N] for the following power, their effective sample size, and the log of their mean."""
    after = risen(log_weights, log_w, following - power)
    total = jax.nn.logsumexp(after)
    return after, 1 / (jnp.exp(after - total) ** 2).sum(), total - jnp.log(log_w.shape[0])


@jax.jit
def following_power(log_weights: Array, log_w: Array, power: Array, part: Array) -> Array:
    """The highest next power, up to 1, whose conditional effective sample size is at least `part` of the population.

    That size is (sum_i w_i u_i)^2 / sum_i w_i u_i^2 for normalised weights w before and increments u, as a part between 0
    and 1 (Zhou, Johansen and Aston 2016). Traces of weight 0 do not count: no power but 0 has room for them.
    """
    alive = (log_w > -jnp.inf) & (log_weights > -jnp.inf)
    before = jax.nn.log_softmax(jnp.where(alive, log_weights, -jnp.inf))
    log_w = jnp.where(alive, log_w - jnp.where(alive, log_w, -jnp.inf).max(), 0.0)  # large ones would be rounded

    def fits(following: Array) -> Array:
        increments = (following - power) * log_w
        mean, square = (jax.nn.logsumexp(before + k * increments) for k in (1, 2))
        return 2 * mean - square >= jnp.log(part)

    return largest(fits, power)


def resampled(population: Population, policy: Policy, choices: Choices) -> tuple[Population, Array]:
    """The population after it could resample, and whether it did, bool[]."""
    zero = jnp.int32(0)
    log_weights = population.log_weights

    def one_particle() -> tuple[Array, Array, Array]:
        due, ancestor, log_weight, _ = policy(choices, zero, zero, log_weights[index()])
        return due, ancestor, log_weight

    due, ancestors, after = over_particles(one_particle, log_weights.shape[0])
    traces, roots = jax.tree.map(lambda x: x[ancestors], (population.traces, population.roots))
    return Population(traces, after, roots), due[0]


# --- the ladder -------------------------------------------------------------------------------------------------------


def check_temperatures(algorithm: str, temperatures: Sequence[float] | None, ess_threshold: float) -> None:
    """`SiteError` for what is no ladder."""
    if temperatures is None:
        if not 0 < ess_threshold < 1:
            raise SiteError(
                f"{algorithm}: to choose temperatures, ess_threshold must be between 0 and 1, a part of the population, not "
                f"{ess_threshold}"
            )
        return
    powers = [0.0, *rungs_of(temperatures)]
    if len(powers) < 2 or powers[-1] != 1 or any(not a < b for a, b in itertools.pairwise(powers)):
        raise SiteError(
            f"{algorithm}: temperatures are powers of the weight that increase from above 0 to 1, as in (0.2, 0.5, 1.0); "
            f"found {tuple(temperatures)}"
        )


def rungs_of(temperatures: Sequence[float]) -> list[float]:
    """The powers after 0, which may stand first."""
    powers = [float(t) for t in temperatures]
    return powers[1:] if powers[:1] == [0.0] else powers


class Climb:
    """A program and a renewal, compiled: one call each for the first population and for each temperature."""

    def __init__(self, algorithm: str, program: Any, args: tuple[Any, ...], renewal: Renewal):
        self.renewal = renewal
        self.staged, given = prepare(program, args)
        values, arrays, skeleton = given_arrays(self.staged, given), arrays_of(self.staged), self.staged.skeleton()
        Target(skeleton, arrays, values).require_choices(algorithm)
        check_repeatable(self.staged, values)

        def part(how: Any, fn: Callable[..., Any]) -> Any:
            run = lambda arrays, values, *rest: fn(Target(skeleton, arrays, values), *rest)
            return partial(compiled((self.staged.key(), how, tuple(sorted(values))), lambda: run), arrays, values)

        size = renewal.num_particles
        self.begin = part(("forward", size), lambda target, key: first_population(target, key, size))
        self.renew = part(renewal, renewal.renew)
        self.infos: list[Info] = []
        self.sizes: list[int] = []

    def _note(self, info: Info, size: int) -> None:
        """Keep what a run of `size` particles says."""
        self.infos.append(jax.device_get(info))
        self.sizes.append(size)

    def run(self, rng_key: Array, following: Callable[[Population, float], float], bar: Any) -> tuple[Population, Ladder]:
        """Climb from power 0 to 1: `following` gives the next power."""
        population, faults, info = self.begin(jax.random.fold_in(rng_key, 0))
        check_faults(self.staged, jax.device_get(faults), np.asarray(population.traces.log_weight))
        self._note(info, self.renewal.num_particles)
        bar.update()
        power, rungs = 0.0, list[Rung]()
        while power < 1:
            before, power = power, following(population, power)
            log_w = population.traces.log_weight
            after, ess, log_evidence = weighted(population.log_weights, log_w, jnp.float32(before), jnp.float32(power))
            population = population._replace(log_weights=after)
            due, accepted = False, np.nan
            if power < 1 or self.renewal.at_the_end:
                key = jax.random.fold_in(rng_key, len(rungs) + 1)
                population, due, info = self.renew(key, population, jnp.float32(power))
                check(self.staged, info)
                self._note(info, self.renewal.num_moving)
                accepted = float(info.accepted)
            rungs.append(Rung(power, float(ess), bool(due), accepted, float(log_evidence)))
            bar.update()
        return population, Ladder(rungs)


def climb(
    algorithm: str,
    rng_key: Array,
    program: Any,
    args: tuple[Any, ...],
    renewal: Renewal,
    *,
    temperatures: Sequence[float] | None,
    ess_threshold: float,
    progress: bool | None,
) -> Posterior:
    """Run along given temperatures; without them, along those that a pilot run of the same size finds."""
    start = time.perf_counter()
    run = Climb(algorithm, program, args, renewal)
    pilot_key, run_key = jax.random.split(rng_key)
    with tqdm(unit=" temperatures", leave=False, delay=3, disable=not wants_progress(progress)) as bar:
        if temperatures is None:
            temperatures = run.run(pilot_key, _finder(algorithm, ess_threshold), bar)[1].temperatures
        rungs = iter(rungs_of(temperatures))
        population, ladder = run.run(run_key, lambda population, power: next(rungs), bar)
    population = jax.device_get(population)
    counts = jax.tree.map(lambda *xs: int(np.sum(xs)), *[info.counts for info in run.infos])
    calls = counts.model_calls
    places = sum(int(info.counts.model_calls) * size for info, size in zip(run.infos, run.sizes))
    draw = population.traces.draw
    return Posterior(
        values=label_values(run.staged, draw.values),
        returned=run.staged.out_tree.unflatten(draw.returned),
        log_weights=population.log_weights,
        ledger=ledger_of(counts, places / max(calls, 1), calls, time.perf_counter() - start),
        active=draw.active,
        roots=population.roots,
        restricted=any(bool(info.faults.restricted) for info in run.infos),
        ladder=ladder,
    )


def _finder(algorithm: str, part: float) -> Callable[[Population, float], float]:
    """What chooses the next power in a pilot run."""
    count = 0

    def following(population: Population, power: float) -> float:
        nonlocal count
        count += 1
        log_w = population.traces.log_weight
        found = float(following_power(population.log_weights, log_w, jnp.float32(power), jnp.float32(part)))
        if count > MOST or not found > power:
            spread = float(np.ptp(log_w[np.isfinite(log_w)]))
            raise RunError(
                f"{algorithm}: after {count - 1} temperatures the power is {power:.3g} and hardly rises, as log-weights "
                f"differ by {spread:.3g} nats; lower ess_threshold, or hand over temperatures"
            )
        return found

    return following
