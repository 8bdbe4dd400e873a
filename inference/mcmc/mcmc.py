"""The driver of Markov chains: warm-up, draws, and what is kept of them."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from latentrace.ppl.boundary import Boundary, advance, over, settled
from latentrace.ppl.collectives import PROBLEMS, index
from latentrace.ppl.errors import AllParticlesDeadError, SiteError, SiteNameError, near_misses
from latentrace.ppl.run import arrays_of, check_faults, compiled, given_arrays, label_values
from latentrace.ppl.staging import check_given
from latentrace.ppl.state import Counts, spread_over

from ..anytime import Checkpoint, fingerprint
from ..chains import Draw, Info, Kernel, Target, check, kernels_in
from ..driver import ledger_of, prepare, wants_progress
from ..posterior import Posterior
from .moves import Moves
from .saved import Kept, Saved, check_mark, load, save
from .tempered import Tempered

Array = jax.Array

SHARED = 0xFFFFFFFF
"""number of the key that all chains share, in place of a chain's"""
MOST_STARTS = 100
"""forward runs that each chain may take to find a first trace of positive density"""
MOST_BYTES = 2**26
"""of draws on the device before the host takes them"""
SECONDS = 0.5
"""between two looks of the host at the chains: Ctrl-C waits no longer"""


@dataclass(frozen=True)
class MCMC:
    """Markov chains side by side, moved by one kernel, compiled.

    Args:
        kernel: how to move: one of `latentrace.inference.mcmc`, a composition of them, or your own
            (`latentrace.inference.chains.Kernel`).
        num_samples: draws of each chain.
        num_warmup: steps before the first draw, in which kernels may adapt; not kept.
        num_chains: chains, which run side by side: one pass through a language model serves all of them.
        thinning: steps from draw to draw.
        target: another target than the program's posterior, such as `mcmc.Tempered(sharpness=4.0)`.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> @ppl.program
    ... def two_coins():
    ...     a, b = ppl.sample("a", dist.Bernoulli(0.5)), ppl.sample("b", dist.Bernoulli(0.2))
    ...     ppl.condition("one at least", a + b >= 1)
    >>> posterior = inference.MCMC(mcmc.Regenerate(), num_samples=300, num_chains=4).run(jax.random.key(0), two_coins)
    >>> posterior.chains, abs(posterior.expectation("a") - 5 / 6) < 0.1
    (4, np.True_)
    """

    kernel: Kernel
    num_samples: int
    num_warmup: int = 0
    num_chains: int = 1
    thinning: int = 1
    target: Tempered | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("num_warmup", 0), ("num_chains", 1), ("thinning", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise SiteError(f"MCMC: {name} must be a whole number of at least {least}, not {value!r}")
        if not isinstance(self.kernel, Kernel):
            raise SiteError(
                f"MCMC: expected a kernel, found {type(self.kernel).__name__}; derive it from `inference.chains.Kernel`, or "
                "wrap NumPyro's in `mcmc.NumPyro`"
            )

    def run(
        self,
        rng_key: Array,
        program: Any,
        *args: Any,
        start: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
        resume: Posterior | None = None,
        progress: bool | None = None,
    ) -> Posterior:
        """Run on a program; draws of the same chain follow each other.

        Args:
            start: values of random sites to start from, the same for all chains; other sites are drawn. By default each chain
                starts from a forward run of positive density.
            checkpoint: where to save the chains and their draws, and to resume from if the file is there: the draws are
                bit-identical to those of a run that was not interrupted.
            resume: a posterior of the same chains (same key, program and algorithm, but for `num_samples`): they go on where
                they stood, without warm-up, and only the draws that follow are returned.
            progress: whether to show a bar (by default on a terminal or in a notebook, after a few seconds).

        An interrupt (Ctrl-C) ends the run early: the posterior then holds the draws so far. In warm-up it is raised.

        Raises `AllParticlesDeadError` where no first trace has positive density, naming the site; `SiteNameError` for unknown
        sites; `RunCheckpointError` for a file of another run. Warns of chains that never moved.
        """
        began = time.perf_counter()
        chains = Chains(self, rng_key, program, args)
        saved = chains.first(start, checkpoint, resume)
        end = self.num_warmup * (resume is None) + self.num_samples * self.thinning + (resume is not None) * saved.done
        bar = tqdm(total=end, initial=saved.done, unit=" steps", leave=False, delay=3, disable=not wants_progress(progress))
        try:
            chains.go_on(saved, end, checkpoint, bar)
        except KeyboardInterrupt:
            if not saved.kept:
                raise
        finally:
            bar.close()
            if checkpoint:
                save(saved, checkpoint.path)
        return chains.posterior(saved, time.perf_counter() - began)


class Chains:
    """Chains on a program, compiled: one call finds first traces, one runs any number of steps."""

    def __init__(self, how: MCMC, rng_key: Array, program: Any, args: tuple[Any, ...]):
        self.how, self.rng_key = how, rng_key
        self.staged, given = prepare(program, args)
        self.given, arrays, skeleton = given_arrays(self.staged, given), arrays_of(self.staged), self.staged.skeleton()
        target = Target(skeleton, arrays, self.given, how.num_warmup)
        self.random = target.random
        for name in how.kernel.sites:
            if name not in self.random:
                raise SiteNameError(f"no random site {name!r} to move: {near_misses(name, self.random)}")
        if how.target is not None:
            how.target.check(self.staged, how.num_warmup)
        how.kernel.check(target)

        lent = {kernel: kernel.arrays(target) for kernel in kernels_in(how.kernel)}
        inputs = arrays, self.given, list(lent.values())

        def at(inputs: Any) -> Target:
            arrays, given, read = inputs
            return Target(skeleton, arrays, given, how.num_warmup, side_by_side=True, lent=dict(zip(lent, read)))

        program_key, alike = self.staged.key(), replace(how, num_samples=1, thinning=1)

        def part(fn: Callable[..., Any], **static: Any) -> Any:
            key = (program_key, alike, tuple(sorted(self.given)), fn, *static.items())
            return partial(compiled(key, lambda: lambda inputs, *rest: fn(how, at(inputs), *rest, **static)), inputs)

        self.part = part
        read = {**self.given, "lent": list(lent.values())}
        # reads all weights, and is asked for only by those who save or go on
        self.mark = cache(lambda: fingerprint(self.staged, replace(how, num_samples=1), read, rng_key))

    def first(self, start: Mapping[str, Any] | None, checkpoint: Checkpoint | None, resume: Posterior | None) -> Saved:
        """Chains that stand before their first step, or where they were left."""
        if resume is not None:
            if checkpoint is not None:
                raise SiteError("MCMC: `resume` and `checkpoint` both say where to go on from; give one of them")
            if resume.chain_state is None:
                raise SiteError("MCMC: `resume` takes a posterior that `inference.MCMC` has returned")
            check_mark(self.mark(), resume.chain_state.mark())
            return replace(resume.chain_state, kept=[], spent=dict(resume.chain_state.spent))
        if checkpoint and Path(checkpoint.path).exists():
            return load(checkpoint.path, self.mark, self._shapes(), self.rng_key)
        draws, infos = self._first_traces(start or {})
        saved = Saved(self.mark, *self.part(first_states)(self.rng_key, draws))
        for info in infos:
            saved.pay(info)
        return saved

    def _first_traces(self, start: Mapping[str, Any]) -> tuple[Draw, list[Info]]:
        """A trace of positive density for each chain, from as many forward runs as that takes."""
        check_given(self.staged, start)
        if fixed := [name for name in start if name in self.given]:
            raise SiteError(f"MCMC: site {fixed[0]!r} is given, and cannot start from another value")
        values, find = given_arrays(self.staged, start), self.part(first_draws)
        found, draws, infos = np.zeros(self.how.num_chains, bool), None, []
        attempts = 1 if set(self.random) <= set(start) else MOST_STARTS
        for attempt in range(attempts):
            more, info = find(jax.random.fold_in(self.rng_key, attempt), values)
            infos.append(jax.device_get(info))
            good = np.asarray(info.accepted) > 0
            draws = more if draws is None else jax.tree.map(partial(_where, good & ~found), more, draws)
            found |= good
            if found.all():
                return draws, infos
        dead = jax.tree.map(lambda x: np.asarray(x)[~found], infos[-1].faults)
        try:
            check_faults(self.staged, dead, np.full((~found).sum(), -np.inf))
        except AllParticlesDeadError as error:
            site = str(error).partition("at site ")[2].partition(". Use")[0]
            raise AllParticlesDeadError(
                f"no first trace of positive density for {len(dead.bound)} of {len(found)} chains, in {attempts} forward runs "
                f"of each: the last one has weight 0 at site {site}. Give `start` values with which it is positive, or check "
                "that it can be"
            ) from None
        raise AssertionError("a trace of weight 0 has died at some site")

    def _shapes(self) -> tuple[Any, Any, Any]:
        """The states, what a step says, and one draw of all chains, without their numbers."""
        draws, _ = jax.eval_shape(self.part(first_draws), self.rng_key, {})
        boundary, blank = jax.eval_shape(self.part(first_states), self.rng_key, draws)
        return boundary, blank, jax.eval_shape(partial(draws_of, self.how), boundary)

    def go_on(self, saved: Saved, end: int, checkpoint: Checkpoint | None, bar: Any) -> None:
        """Run up to step `end`, and keep in `saved` what has been done; the host looks at the chains now and then."""
        one = jax.eval_shape(partial(draws_of, self.how), saved.boundary)
        bytes_of_draw = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((one, saved.blank)))
        long = max(self.how.num_samples, self.how.num_warmup, 32)
        # a power of two, so that runs of other lengths share what is compiled
        most = max(1, min(MOST_BYTES // bytes_of_draw, 1 << (long - 1).bit_length(), 1024))
        stretch, count, saved_at = self.part(many_draws, most=most), 1, time.monotonic()
        while saved.done < end:
            before, to_warm = time.monotonic(), self.how.num_warmup - saved.done
            thinning = 1 if to_warm > 0 else self.how.thinning
            count = min(count, most, to_warm if to_warm > 0 else -(-(end - saved.done) // thinning))
            numbers = map(jnp.int32, (saved.done, count, thinning))
            boundary, kept = stretch(saved.boundary, saved.blank, self.rng_key, *numbers)
            kept = jax.tree.map(lambda x, count=count: np.array(x[:count]), jax.device_get(kept))
            check(self.staged, kept.info)
            saved.boundary, saved.done = boundary, saved.done + count * thinning
            saved.pay(kept.info)
            if to_warm <= 0:
                saved.kept.append(kept)
            bar.update(count * thinning)
            each = (time.monotonic() - before) / count
            count = int(np.clip(SECONDS / each, 1, 8 * count))
            if checkpoint and time.monotonic() - saved_at >= checkpoint.every:
                save(saved, checkpoint.path)
                saved_at = time.monotonic()

    def posterior(self, saved: Saved, seconds: float) -> Posterior:
        """The draws, chain after chain, with equal weights."""
        kept = saved.draws()
        rows = jax.tree.map(_chain_after_chain, kept.draw)
        moves = Moves.of(kept.info, self.how.thinning)
        for message in moves.stuck():
            warnings.warn(message, stacklevel=3)
        counts, how = Counts(*(saved.spent[name] for name in Counts._fields)), self.how  # type: ignore[arg-type]
        return Posterior(
            values=label_values(self.staged, rows.values),
            returned=self.staged.out_tree.unflatten(rows.returned),
            log_weights=np.zeros(moves.accepted.size, np.float32),
            ledger=ledger_of(counts, how.num_chains * how.kernel.num_particles, saved.spent["model_calls"], seconds),
            active=rows.active,
            restricted=bool(saved.spent["restricted"]),
            chains=how.num_chains,
            moves=moves,
            chain_state=saved.without_draws(),
        )


def _where(good: np.ndarray, then: Array, now: Array) -> Array:
    return jnp.where(spread_over(jnp.asarray(good), then), then, now)


def _chain_after_chain(x: np.ndarray) -> np.ndarray:
    """[draws, chains, ...] as [chains * draws, ...]."""
    return np.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


# --- for all chains, compiled -----------------------------------------------------------------------------------------


def _own(rng_key: Array, iteration: Array) -> Array:
    """This chain's key of a step."""
    return jax.random.fold_in(jax.random.fold_in(rng_key, index(PROBLEMS)), iteration)


def at_step(how: MCMC, target: Target, rng_key: Array, iteration: Array) -> Target:
    """The target of a step."""
    shared = jax.random.fold_in(jax.random.fold_in(rng_key, SHARED), iteration)
    if how.target is not None:
        target = target._replace(tempering=how.target.at(iteration), changing=how.target.end > 0)
    return target._replace(iteration=iteration, shared_key=shared)


def first_draws(how: MCMC, target: Target, rng_key: Array, values: dict[str, Array]) -> tuple[Draw, Info]:
    """A forward run of each chain."""
    now = at_step(how, target, rng_key, jnp.int32(0))
    run = lambda: how.kernel.start(now, _own(rng_key, jnp.int32(-1)), values)
    return over(Boundary.nothing(), lambda _: run(), size=how.num_chains, axis=PROBLEMS).whole(how.num_chains)  # type: ignore[no-any-return]


def first_states(how: MCMC, target: Target, rng_key: Array, draws: Draw) -> tuple[Boundary, Info]:
    """The chains at these traces, and zeros like what a step says."""
    now = at_step(how, target, rng_key, jnp.int32(0))
    init = lambda draw: how.kernel.init(now, _own(rng_key, jnp.int32(-2)), draw)
    boundary = over(Boundary.of(draws), init, size=how.num_chains, axis=PROBLEMS)
    step = lambda state: how.kernel.step(now, _own(rng_key, jnp.int32(0)), state)
    return settled(boundary, step, size=how.num_chains, axis=PROBLEMS)


def draws_of(how: MCMC, boundary: Boundary) -> Draw:
    """The traces at which chains are."""
    return over(boundary, lambda state: state.draw, size=how.num_chains, axis=PROBLEMS).whole(how.num_chains)  # type: ignore[no-any-return]


def one_draw(
    how: MCMC, target: Target, boundary: Boundary, blank: Info, rng_key: Array, first: Array, thinning: Array
) -> tuple[Boundary, Kept]:
    """So many steps, and the draw after them."""

    def step(i: Array, loop: tuple[Boundary, Info]) -> tuple[Boundary, Info]:
        boundary, so_far = loop
        now = at_step(how, target, rng_key, first + i)
        one_step = lambda state: how.kernel.step(now, _own(rng_key, first + i), state)
        boundary, info = advance(boundary, one_step, size=how.num_chains, axis=PROBLEMS)
        return boundary, Info(
            so_far.accepted + info.accepted / thinning,
            jax.tree.map(jnp.maximum, so_far.faults, info.faults),
            jax.tree.map(jnp.add, so_far.counts, info.counts),
            info.stats,
        )

    nothing = blank._replace(faults=jax.tree.map(lambda x: x if x.dtype == bool else x - 1, blank.faults))
    boundary, info = jax.lax.fori_loop(0, thinning, step, (boundary, nothing))
    return boundary, Kept(draws_of(how, boundary), info)


def many_draws(
    how: MCMC,
    target: Target,
    boundary: Boundary,
    blank: Info,
    rng_key: Array,
    first: Array,
    count: Array,
    thinning: Array,
    *,
    most: int,
) -> tuple[Boundary, Kept]:
    """`count` draws, the first ones of `most` places, which follow each other by `thinning` steps."""

    def draw(k: Array, loop: tuple[Boundary, Kept]) -> tuple[Boundary, Kept]:
        boundary, kept = one_draw(how, target, loop[0], blank, rng_key, first + k * thinning, thinning)
        put = lambda place, x: jax.lax.dynamic_update_index_in_dim(place, x, k, 0)
        return boundary, jax.tree.map(put, loop[1], kept)

    one = Kept(draws_of(how, boundary), blank)
    places = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), one)
    return jax.lax.fori_loop(0, count, draw, (boundary, places))  # type: ignore[no-any-return]
