"""Markov chains over traces: what a kernel is, what it may ask of a program, and the loop that drives it.

A kernel is a pair of pure functions. `init(target, rng_key)` gives a first state and `step(target, rng_key, state)` the next
one; a state holds a `Draw` in its field `draw`. A kernel is hashable: its fields are compiled in.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from latentrace.ppl.errors import SiteError, SiteNameError, near_misses
from latentrace.ppl.run import (
    Arrays,
    Output,
    Settings,
    arrays_of,
    check_faults,
    compiled,
    given_arrays,
    label_values,
    runner,
)
from latentrace.ppl.sites import generate_p
from latentrace.ppl.staging import Staged, check_repeatable, random_sites
from latentrace.ppl.state import Counts, Faults, together

from .driver import ledger_of, prepare, wants_progress
from .posterior import Posterior

Array = jax.Array


class Draw(NamedTuple):
    """One trace of a chain."""

    values: dict[str, Any]
    """of every site, as the interpreter records them"""
    active: dict[str, Array]
    returned: list[Array]


class Traces(NamedTuple):
    """Traces of a population; leading axes of particles."""

    draw: Draw
    log_weight: Array
    """float32[N], nats: log W, the target over the program's proposal"""
    made: Array
    """int32[N]: how many random choices each has"""


class Info(NamedTuple):
    """What one step of a kernel reports."""

    accepted: Array
    """float32[]: how much of what was proposed was accepted, between 0 and 1"""
    faults: Faults
    counts: Counts


class Target(NamedTuple):
    """A program inside a traced function: what kernels run."""

    staged: Staged
    arrays: Arrays
    given: dict[str, Array]

    @property
    def random(self) -> list[str]:
        """The random sites whose values are not given."""
        return [name for name in random_sites(self.staged) if name not in self.given]

    def population(self, rng_key: Array, settings: Settings, given: Mapping[str, Array] = {}, trace: Any = None) -> Output:
        """Run a population with more values given; `trace` is what its choices repeat."""
        return runner(self.staged, settings)(rng_key, jnp.int32(0), self.arrays, {**self.given, **given}, trace or {})  # type: ignore[no-any-return]

    def require_choices(self, algorithm: str) -> None:
        """`SiteError` where nothing is random."""
        if not self.random:
            raise SiteError(
                f"{algorithm}: the program has no random choice to move; every `sample` and `generate` site is given, or there "
                "is none"
            )

    def choices(self, draw: Draw) -> dict[str, Array]:
        """A draw's values of the random sites: token ids for texts."""
        texts = {s.name for s in self.staged.sites.values() if s.kind == generate_p.name}
        return {name: draw.values[name][0] if name in texts else draw.values[name] for name in self.random}

    def evaluate(self, values: Mapping[str, Array]) -> tuple[Draw, Array, Info]:
        """The trace in which every random site has its value in `values`, and its log density float32[], nats."""
        output = self.population(jax.random.key(0), Settings(1), values)
        return draw_of(output, jnp.int32(0)), output.log_weight[0], info_of(output, jnp.float32(1))


def draw_of(output: Output, which: Array) -> Draw:
    """Particle number `which` of a population."""
    return Draw(*jax.tree.map(lambda x: x[which], (output.values, output.active, output.returned)))


def traces_of(output: Output) -> Traces:
    """All particles of a population, which drew from the program's proposal or repeat what could have been drawn."""
    return Traces(Draw(output.values, output.active, output.returned), output.log_weight, output.made)


def info_of(output: Output, accepted: Array) -> Info:
    """What a population's run says of a step that ran it."""
    counts = jax.tree.map(lambda x: x.sum(axis=0), output.counts)._replace(model_calls=output.counts.model_calls.max())
    return Info(accepted, together(output.faults), counts)


def added(one: Info, other: Info) -> Info:
    """Two parts of one step; of both acceptances the second is kept."""
    faults = jax.tree.map(jnp.maximum, one.faults, other.faults)
    return Info(other.accepted, faults, jax.tree.map(jnp.add, one.counts, other.counts))


class Kernel(Protocol):
    """One way to move from trace to trace that leaves a program's posterior invariant."""

    @property
    def num_particles(self) -> int:
        """Size of the population that it runs; 1 for none."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """The random sites that it names."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether it runs a population in which one particle repeats the chain's trace."""
        ...

    def init(self, target: Target, rng_key: Array) -> tuple[Any, Info]:
        """A first state; `Info.accepted` is 0 where none of positive density was found."""
        ...

    def step(self, target: Target, rng_key: Array, state: Any) -> tuple[Any, Info]:
        """The state after one step."""
        ...


class PopulationKernel(Protocol):
    """A way to move each trace of a population by itself. Hashable: it is compiled in."""

    def move(self, target: Target, rng_key: Array, traces: Traces, power: Array) -> tuple[Traces, Info]:
        """The traces after one move of each, which leaves q W^power invariant: q is the program's proposal, W the target over
        q, `power` a positive float32[]. The proposal's own distribution is that of power 0, the posterior that of power 1."""
        ...


def run_chains(
    rng_key: Array,
    program: Any,
    args: tuple[Any, ...],
    kernel: Kernel,
    *,
    num_samples: int,
    num_warmup: int,
    num_chains: int,
    progress: bool | None,
) -> Posterior:
    """Draws of `num_chains` chains, one after the other, as a posterior of equal weights.

    An interrupt (Ctrl-C) ends the run early: the posterior then holds the draws so far of the chains that have as many.
    """
    start = time.perf_counter()
    staged, given = prepare(program, args)
    values, arrays, skeleton = given_arrays(staged, given), arrays_of(staged), staged.skeleton()
    random = Target(skeleton, arrays, values).random
    if kernel.repeats:
        check_repeatable(staged, values)
    for name in kernel.sites:
        if name not in random:
            raise SiteNameError(f"no random site {name!r} to move: {near_misses(name, random)}")

    def part(name: str) -> Any:
        run = lambda arrays, values, *state: getattr(kernel, name)(Target(skeleton, arrays, values), *state)
        return partial(compiled((staged.key(), kernel, name, tuple(sorted(values))), lambda: run), arrays, values)

    init, step = part("init"), part("step")
    draws: list[list[Draw]] = []
    infos: list[Info] = []
    steps = num_warmup + num_samples
    bar = tqdm(total=num_chains * steps, unit=" steps", leave=False, delay=3, disable=not wants_progress(progress))
    try:
        for chain in range(num_chains):
            chain_key = jax.random.fold_in(rng_key, chain)
            state, info = init(jax.random.fold_in(chain_key, 0))
            check(staged, info, start=True)
            draws.append([])
            infos.append(jax.device_get(info))
            for number in range(1, steps + 1):
                state, info = step(jax.random.fold_in(chain_key, number), state)
                infos.append(jax.device_get(info))
                check(staged, infos[-1])
                if number > num_warmup:
                    draws[-1].append(jax.device_get(state.draw))
                bar.update()
    except KeyboardInterrupt:
        if not draws or not draws[0]:
            raise
    finally:
        bar.close()
    return _posterior(staged, draws, infos, kernel.num_particles, time.perf_counter() - start)


def check(staged: Staged, info: Info, start: bool = False) -> None:
    """Raise what went wrong in a step, or at the start if no trace of positive density was found."""
    log_weight = np.array([-np.inf if start and not float(info.accepted) else 0.0])
    check_faults(staged, jax.tree.map(lambda x: np.asarray(x)[None], info.faults), log_weight)


def _posterior(staged: Staged, draws: list[list[Draw]], infos: list[Info], num_particles: int, seconds: float) -> Posterior:
    """Draws of the chains that have as many as the first, with equal weights."""
    complete = [chain for chain in draws if len(chain) == len(draws[0])]
    rows = [draw for chain in complete for draw in chain]
    values, active, returned = jax.tree.map(lambda *xs: np.stack(xs), *rows)
    counts = jax.tree.map(lambda *xs: int(np.sum(xs)), *[info.counts for info in infos])
    return Posterior(
        values=label_values(staged, values),
        returned=staged.out_tree.unflatten(returned),
        log_weights=np.zeros(len(rows), np.float32),
        ledger=ledger_of(counts, num_particles, counts.model_calls, seconds),
        active=active,
        restricted=any(bool(info.faults.restricted) for info in infos),
        chains=len(complete),
    )
