"""Markov chains over traces: what a kernel is, and what it may ask of a program. `inference.MCMC` drives one."""

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.boundary import Boundary, over, parted
from latentrace.ppl.choices import Keyed
from latentrace.ppl.collectives import PARTICLES, PROBLEMS, index
from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Arrays, Output, Settings, check_faults, runner
from latentrace.ppl.sites import generate_p
from latentrace.ppl.staging import Staged, optional_sites, random_sites
from latentrace.ppl.state import Counts, Faults, Tempering, together
from latentrace.ppl.walk import Walk, walk

Array = jax.Array
Walked = tuple[Walk, Faults, Counts]


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
    stats: dict[str, Any] = {}
    """what a kernel says of its steps besides: arrays by name, and a dictionary of them for each kernel that it is made of"""


class Target(NamedTuple):
    """A program inside a traced function: what kernels run."""

    staged: Staged
    arrays: Arrays
    given: dict[str, Array]
    num_warmup: int = 0
    """the first steps, in which kernels may adapt; their draws are not kept"""
    iteration: Array | int = 0
    """int32[]: number of this step, from 0 on"""
    shared_key: Array | None = None
    """a key of this step that all chains have in common"""
    tempering: Tempering | None = None
    """of the target; None where it is the program's posterior"""
    changing: bool = False
    """whether `tempering` is another one at each step, so that densities of the step before are of no use"""
    side_by_side: bool = False
    """whether chains run side by side, on an axis of their own"""
    beside: tuple[str, ...] = ()
    """axes of what runs side by side in one chain, such as replicas"""
    lent: "Mapping[Kernel, Any]" = {}
    """what kernels read besides the program's arrays (`Kernel.arrays`)"""

    def shared(self, rng_key: Array) -> Array:
        """A key for what chains had better choose alike, such as where to cut, so that they stay in step; `rng_key`, a chain's
        own, where there is but one."""
        return rng_key if self.shared_key is None else self.shared_key

    @property
    def random(self) -> list[str]:
        """The random sites whose values are not given."""
        return [name for name in random_sites(self.staged) if name not in self.given]

    def population(self, rng_key: Array, settings: Settings, given: Mapping[str, Array] = {}, trace: Any = None) -> Output:
        """Run a population with more values given; `trace` is what its choices repeat."""
        settings = settings._replace(many=self.side_by_side, beside=self.beside)
        run = runner(self.staged, settings, self.tempering)
        return run(rng_key, jnp.int32(0), self.arrays, {**self.given, **given}, trace or {})  # type: ignore[no-any-return]

    def walk(self, rng_key: Array, values: Mapping[str, Array], kept: Mapping[str, Array], **options: Any) -> Walked:
        """One walk that repeats those of `values` that are `kept` and draws the others; for `options` see `ppl.walk.walk`."""
        return self._walk(rng_key, values, kept, options, jnp.int32(0), self._axes)

    def walks(
        self, size: int, rng_key: Array, values: Mapping[str, Array], kept: Mapping[str, Array], **options: Any
    ) -> tuple[Boundary, Faults, Counts]:
        """`size` of them, of which what they have in common is kept once; faults and counts have a leading axis."""
        if size == 1:
            found, faults, counts = self.walk(rng_key, values, kept, **options)
            alone = Boundary(*jax.tree.flatten(found), axes=(None,) * len(jax.tree.leaves(found)))
            return alone, *jax.tree.map(lambda x: x[None], (faults, counts))

        def one(_: Any) -> tuple[Walk, tuple[Faults, Counts]]:
            found, faults, counts = self._walk(rng_key, values, kept, options, index(), (*self._axes, PARTICLES))
            return found, (faults, counts)

        walks, (faults, counts) = parted(over(Boundary.nothing(), one, size=size), size)
        return walks, faults, counts

    @property
    def _axes(self) -> tuple[str, ...]:
        return (*([PROBLEMS] if self.side_by_side else []), *self.beside)

    def _walk(self, rng_key: Array, values: Any, kept: Any, options: Any, number: Array, axes: tuple[str, ...]) -> Walked:
        how = {"tempering": self.tempering, "axes": axes, **options}
        drawn = Keyed(rng_key, number)
        found, state = walk(self.staged, self.arrays, self.given, drawn, dict(values), dict(kept), **how)
        return found, state.faults, state.counts

    def largest(self, x: Array) -> Array:
        """The largest of a number of each chain."""
        return jax.lax.pmax(x, self._axes) if self._axes else x

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

    def same_choices(self, one: Draw, other: Draw, but: Container[str] = ()) -> Array:
        """bool[]: whether two traces have the same random choices, those of sites in `but` left out: the same elements are
        active. Between traces that have not, there is no density ratio: values of one are missing in the other."""
        optional = [name for name in optional_sites(self.staged.jaxpr) if name in self.random and name not in but]
        return jnp.asarray([jnp.array_equal(one.active[name], other.active[name]) for name in optional] or True).all()

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


def at_once(counts: Counts) -> Counts:
    """The work of what ran side by side (leading axis), of which one pass through a model serves all."""
    total: Counts = jax.tree.map(lambda x: x.sum(axis=0), counts)
    return total._replace(model_calls=counts.model_calls.max(axis=0))


def info_of(output: Output, accepted: Array) -> Info:
    """What a population's run says of a step that ran it."""
    return Info(accepted, together(output.faults), at_once(output.counts))


def added(one: Info, other: Info) -> Info:
    """Two parts of one step; of both acceptances the second is kept."""
    faults = jax.tree.map(jnp.maximum, one.faults, other.faults)
    return other._replace(faults=faults, counts=jax.tree.map(jnp.add, one.counts, other.counts))


def check(staged: Staged, info: Info) -> None:
    """Raise what went wrong in steps, of any leading axes."""
    faults = jax.tree.map(lambda x: np.asarray(x).reshape(-1), info.faults)
    check_faults(staged, faults, np.zeros(len(faults.bound)))


class Kernel:
    """One way to move from trace to trace that leaves a program's posterior invariant.

    A kernel is a pair of pure functions of one chain: `init` gives a state at a trace, `step` the next state. `inference.MCMC`
    runs many chains side by side under `vmap`, compiled, so a kernel has to be hashable: a frozen dataclass whose fields are
    numbers, strings and other kernels. A state is a pytree with the chain's trace in its field `draw`; `at` puts the chain at
    another one, which other kernels of a cycle have found.

    >>> import dataclasses, jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference.chains import Kernel, State
    >>> @dataclasses.dataclass(frozen=True)
    ... class Flip(Kernel):
    ...     "Metropolis' move of one coin."
    ...     site: str
    ...     def init(self, target, rng_key, draw):
    ...         return State(draw)
    ...     def step(self, target, rng_key, state):
    ...         values = target.choices(state.draw)
    ...         now, log_now, _ = target.evaluate(values)
    ...         then, log_then, info = target.evaluate({**values, self.site: 1 - values[self.site]})
    ...         accept = jnp.log(jax.random.uniform(rng_key)) < log_then - log_now
    ...         draw = jax.tree.map(lambda a, b: jnp.where(accept, a, b), then, now)
    ...         return State(draw), info._replace(accepted=accept.astype(jnp.float32))
    >>> coin = ppl.program(lambda: ppl.sample("coin", dist.Bernoulli(0.3)))
    >>> posterior = inference.MCMC(Flip("coin"), num_samples=400, num_chains=2).run(jax.random.key(0), coin)
    >>> abs(posterior.expectation("coin") - 0.3) < 0.1
    np.True_
    """

    @property
    def parts(self) -> "tuple[Kernel, ...]":
        """The kernels that it is made of."""
        return ()

    @property
    def num_particles(self) -> int:
        """Size of the population that it runs for each chain; 1 for none."""
        return 1

    @property
    def sites(self) -> tuple[str, ...]:
        """The random sites that it names."""
        return ()

    def arrays(self, target: Target) -> Any:
        """A pytree of arrays that it reads besides the program's, such as weights of another model: inputs of what is compiled,
        which `step` finds in `target.lent[self]`."""
        return None

    def check(self, target: Target) -> None:
        """Raise what can be known to be wrong with a target before anything runs."""

    def start(self, target: Target, rng_key: Array, values: Mapping[str, Array]) -> tuple[Draw, Info]:
        """A trace to start from, with these values, by a forward run; `Info.accepted` is 0 where it has density 0."""
        output = target.population(rng_key, Settings(1), values)
        found = output.log_weight[0] > -jnp.inf
        return draw_of(output, jnp.int32(0)), info_of(output, found.astype(jnp.float32))

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Any:
        """The state of a chain at a trace."""
        raise NotImplementedError

    def step(self, target: Target, rng_key: Array, state: Any) -> tuple[Any, Info]:
        """The state after one step."""
        raise NotImplementedError

    def at(self, target: Target, state: Any, draw: Draw) -> Any:
        """The state of the same chain at another trace: what has been adapted stays."""
        return state._replace(draw=draw)


class State(NamedTuple):
    """The state of a kernel that remembers nothing but the trace."""

    draw: Draw


def kernels_in(kernel: Kernel) -> Iterator[Kernel]:
    """A kernel, and all that it is made of."""
    yield kernel
    for part in kernel.parts:
        yield from kernels_in(part)


class PopulationKernel(Protocol):
    """A way to move each trace of a population by itself. Hashable: it is compiled in."""

    def move(self, target: Target, rng_key: Array, traces: Traces, power: Array) -> tuple[Traces, Info]:
        """The traces after one move of each, which leaves q W^power invariant: q is the program's proposal, W the target over
        q, `power` a positive float32[]. The proposal's own distribution is that of power 0, the posterior that of power 1."""
        ...
