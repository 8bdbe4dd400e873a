"""Kernels made of kernels: one after the other, one of several at random, one several times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError

from ..chains import Draw, Info, Kernel, Target, added

Array = jax.Array


class Parts(NamedTuple):
    """The state of a kernel made of kernels."""

    draw: Draw
    states: tuple[Any, ...]
    """of each part, at the trace that it left"""


class Composition(Kernel):
    """What kernels made of `parts` have in common."""

    @property
    def num_particles(self) -> int:
        return max(part.num_particles for part in self.parts)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.sites))

    def check(self, target: Target) -> None:
        for part in self.parts:
            part.check(target)

    def start(self, target: Target, rng_key: Array, values: Mapping[str, Array]) -> tuple[Draw, Info]:
        """As the part with the largest population does."""
        return max(self.parts, key=lambda part: part.num_particles).start(target, rng_key, values)


@dataclass(frozen=True, init=False)
class Cycle(Composition):
    """Kernels one after the other, all of them in each step.

    Before each one its state is put at the trace that the one before has left, which for kernels that keep densities costs an
    evaluation. A step leaves the target invariant since every part does; it is not reversible.

    `Info.accepted` is the mean over the parts. `Info.stats` has for each part, by its class and sites (and a number where they
    repeat), what it says of its own step: `accepted` and its own `stats`.

    Raises `SiteError` without kernels, and for what is no `Kernel`.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> mixed = ppl.program(lambda: (ppl.sample("k", dist.Bernoulli(0.3)), ppl.sample("x", dist.Normal(0.0, 1.0))))
    >>> kernel = mcmc.Cycle(mcmc.Metropolis(mcmc.RandomWalk(x=1.0)), mcmc.Regenerate())
    >>> sorted(inference.MCMC(kernel, num_samples=10).run(jax.random.key(0), mixed).moves.stats)
    ['Metropolis(x)', 'Regenerate']
    """

    kernels: tuple[Kernel, ...]

    def __init__(self, *kernels: Kernel):
        object.__setattr__(self, "kernels", checked("Cycle", kernels))

    @property
    def parts(self) -> tuple[Kernel, ...]:
        return self.kernels

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Parts:
        return Parts(draw, first_states(self.kernels, target, rng_key, draw))

    def step(self, target: Target, rng_key: Array, state: Parts) -> tuple[Parts, Info]:
        draw, states, infos = state.draw, [], []
        for number, (kernel, before) in enumerate(zip(self.kernels, state.states)):
            here, key = part(target, rng_key, number)
            before = before if len(self.kernels) == 1 else kernel.at(here, before, draw)
            after, info = kernel.step(here, key, before)
            draw = after.draw
            states.append(after)
            infos.append(info)
        stats = dict(zip(labels(self.kernels), map(own_stats, infos)))
        accepted = jnp.stack([info.accepted for info in infos]).mean()
        return Parts(draw, tuple(states)), reduce(added, infos)._replace(accepted=accepted, stats=stats)

    def at(self, target: Target, state: Parts, draw: Draw) -> Parts:
        if len(self.kernels) == 1:
            return Parts(draw, (self.kernels[0].at(target, state.states[0], draw),))
        return state._replace(draw=draw)  # each part is put there before it moves


class Mixed(NamedTuple):
    """The state of a mixture."""

    draw: Draw
    states: tuple[Any, ...]
    latest: Array
    """int32[]: the part whose state stands at `draw`; -1 where none does"""


@dataclass(frozen=True, init=False)
class Mixture(Composition):
    """One of several kernels in each step, drawn anew whatever the trace: all chains run the same one.

    If every part is reversible, so is the mixture. Only the drawn part is run, at the cost of its own step, and of putting its
    state at the trace where another one ran before it. Replicas of one chain draw each their own (`mcmc.ReplicaExchange`), for
    which all parts are run.

    `Info.accepted` is that of the part that ran. `Info.stats` has `which`, int32[], its number, and for each part what it says
    of its own step, as `Cycle` has it; where a part did not run its `accepted` is NaN and the rest is 0.

    Args:
        weights: probabilities of the parts, up to a factor; equal ones by default.

    Raises `SiteError` without kernels, for what is no `Kernel`, and for weights that are no probabilities.

    >>> from latentrace.inference.mcmc import Metropolis, Mixture, RandomWalk, Regenerate
    >>> Mixture(Metropolis(RandomWalk(x=0.1)), Regenerate(), weights=(3, 1)).weights
    (0.75, 0.25)
    """

    kernels: tuple[Kernel, ...]
    weights: tuple[float, ...]

    def __init__(self, *kernels: Kernel, weights: Sequence[float] | None = None):
        object.__setattr__(self, "kernels", checked("Mixture", kernels))
        weights = [1.0] * len(kernels) if weights is None else [float(w) for w in weights]
        if len(weights) != len(kernels):
            raise SiteError(f"Mixture: {len(weights)} weights for {len(kernels)} kernels; give one for each")
        if not (all(0 <= w < float("inf") for w in weights) and sum(weights) > 0):
            raise SiteError(f"Mixture: weights must be finite, 0 or more, and not all 0; found {tuple(weights)}")
        object.__setattr__(self, "weights", tuple(w / sum(weights) for w in weights))

    @property
    def parts(self) -> tuple[Kernel, ...]:
        return self.kernels

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Mixed:
        return Mixed(draw, first_states(self.kernels, target, rng_key, draw), jnp.int32(-1))

    def step(self, target: Target, rng_key: Array, state: Mixed) -> tuple[Mixed, Info]:
        here, key = part(target, rng_key, len(self.kernels))
        which = pick(here.shared(key), self.weights)

        def one(number: int, state: Mixed) -> tuple[Mixed, Info]:
            kernel, (here, key) = self.kernels[number], part(target, rng_key, number)
            before, put = state.states[number], lambda before: kernel.at(here, before, state.draw)
            if len(self.kernels) > 1:
                before = jax.lax.cond(state.latest == number, lambda before: before, put, before)
            after, info = kernel.step(here, key, before)
            states = (*state.states[:number], after, *state.states[number + 1 :])
            return Mixed(after.draw, states, jnp.int32(number)), info._replace(stats=own_stats(info))

        ones = [jax.jit(partial(one, number)) for number in range(len(self.kernels))]  # traced once
        silent = [jax.tree_util.tree_map_with_path(_silent, jax.eval_shape(one, state)[1].stats) for one in ones]

        def among(number: int, state: Mixed) -> tuple[Mixed, Info]:
            state, info = ones[number](state)
            stats = [*silent[:number], info.stats, *silent[number + 1 :]]
            return state, info._replace(stats=dict(zip(labels(self.kernels), stats)))

        after, info = jax.lax.switch(which, [partial(among, number) for number in range(len(ones))], state)
        return after, info._replace(stats={"which": which, **info.stats})

    def at(self, target: Target, state: Mixed, draw: Draw) -> Mixed:
        if len(self.kernels) == 1:
            return state._replace(draw=draw, states=(self.kernels[0].at(target, state.states[0], draw),))
        return state._replace(draw=draw, latest=jnp.int32(-1))


@dataclass(frozen=True)
class Repeat(Composition):
    """A kernel so many times in each step.

    `Info.accepted` is the mean over the times; `Info.stats` has what the kernel says of each of them, and `accepted`, on a
    leading axis.

    Raises `SiteError` for what is no `Kernel`, and for no times.

    >>> from latentrace.inference.mcmc import Metropolis, RandomWalk, Repeat
    >>> Repeat(Metropolis(RandomWalk(x=0.5)), 5)
    Repeat(kernel=Metropolis(proposal=RandomWalk(x=0.5)), times=5)
    """

    kernel: Kernel
    times: int

    def __post_init__(self) -> None:
        checked("Repeat", (self.kernel,))
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 1:
            raise SiteError(f"Repeat: times must be a whole number of at least 1, not {self.times!r}")

    @property
    def parts(self) -> tuple[Kernel, ...]:
        return (self.kernel,)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Any:
        return self.kernel.init(target, rng_key, draw)

    def step(self, target: Target, rng_key: Array, state: Any) -> tuple[Any, Info]:
        def once(state: Any, number: Array) -> tuple[Any, Info]:
            return self.kernel.step(*part(target, rng_key, number), state)

        state, infos = jax.lax.scan(once, state, jnp.arange(self.times))
        faults = jax.tree.map(lambda x: x.max(axis=0), infos.faults)
        counts = jax.tree.map(lambda x: x.sum(axis=0), infos.counts)
        return state, Info(infos.accepted.mean(), faults, counts, own_stats(infos))

    def at(self, target: Target, state: Any, draw: Draw) -> Any:
        return self.kernel.at(target, state, draw)


def checked(name: str, kernels: tuple[Any, ...]) -> tuple[Kernel, ...]:
    """The kernels, if they are some."""
    if not kernels:
        raise SiteError(f"{name}: give at least one kernel")
    for kernel in kernels:
        if not isinstance(kernel, Kernel):
            mend = "derive it from `inference.chains.Kernel`"
            if isinstance(kernel, type):
                mend = f"call it, as in {kernel.__name__}()"
            raise SiteError(f"{name}: expected a kernel, found {kernel!r}; {mend}")
    return kernels


def first_states(kernels: tuple[Kernel, ...], target: Target, rng_key: Array, draw: Draw) -> tuple[Any, ...]:
    """The state of each at a trace."""
    return tuple(kernel.init(*part(target, rng_key, number), draw) for number, kernel in enumerate(kernels))


def part(target: Target, rng_key: Array, number: Array | int) -> tuple[Target, Array]:
    """Target and key for a part of a step. What chains share differs from part to part: a kernel that is chosen by a shared
    key must not take its cut by the same one."""
    shared = target.shared_key
    shared = None if shared is None else jax.random.fold_in(shared, number)
    return target._replace(shared_key=shared), jax.random.fold_in(rng_key, number)


def pick(rng_key: Array, weights: tuple[float, ...]) -> Array:
    """The number of a part, int32[]."""
    return jax.random.categorical(rng_key, jnp.log(jnp.asarray(weights))).astype(jnp.int32)


def own_stats(info: Info) -> dict[str, Any]:
    """What a part says of its step."""
    return {"accepted": info.accepted, **info.stats}


def _silent(path: tuple[Any, ...], x: Any) -> Array:
    """What stands in place of a number of a part that did not run."""
    return jnp.full(x.shape, jnp.nan if path == (jax.tree_util.DictKey("accepted"),) else 0, x.dtype)


def labels(kernels: tuple[Kernel, ...]) -> list[str]:
    """A name for each kernel: its class and sites, and a number from the second of that name on."""
    found: list[str] = []
    for kernel in kernels:
        name = type(kernel).__name__ + (f"({', '.join(kernel.sites)})" if kernel.sites else "")
        found.append(name)
    return [name if found.index(name) == i else f"{name} {found[: i + 1].count(name)}" for i, name in enumerate(found)]
