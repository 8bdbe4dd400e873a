"""SMC^2: particles of parameters, each with a particle filter of its own."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from latentrace.ppl.errors import SiteError, SiteNameError, near_misses
from latentrace.ppl.jaxpr import body_of
from latentrace.ppl.problems import Lanes, Problems, inputs_with
from latentrace.ppl.run import Output, Settings, check_faults, given_arrays
from latentrace.ppl.segments import names_in
from latentrace.ppl.staging import Staged
from latentrace.ppl.state import Counts

from ..chains import Target
from ..driver import finish, ledger_of, prepare, wants_progress
from ..mcmc.metropolis import accepts
from ..mcmc.proposals import ValueProposal
from ..posterior import Posterior
from .resampling import at_points
from .smc import SMC
from .triggers import effective_size

Array = jax.Array


class Filters(NamedTuple):
    """The population of parameters; every field has a leading axis of M."""

    parameters: dict[str, Array]
    lanes: Lanes
    """the particle filter of each"""
    log_base: Array
    """float32[M], nats: what the filter's evidence counted when the parameters last had equal weights"""
    root: Array
    """int32[M]: equal for copies of one another that have not moved since"""


class Cut(NamedTuple):
    """A place where the filters may stop: before a step of a loop if `step` is a number, else after a segment."""

    segment: int
    step: int | None = None


@dataclass(frozen=True)
class SMC2:
    """SMC^2 (Chopin, Jacob and Papaspiliopoulos 2013): sequential inference of parameters and of traces together.

    Each of `num_particles` parameters has a particle filter over the rest of the program. All filters advance side by side,
    and parameters are weighted by the evidence that their filters estimate. Where weights degenerate, parameters are resampled
    and each is moved by particle marginal Metropolis-Hastings (`PMMH`), for which a filter runs again from the start. The
    posterior of parameters and trace is exact for any size of the filters in the limit of many parameters.

    The program is cut after each text at its top level and each step of its top-level loops. Moves at cuts that depend on the
    weights would make the evidence biased. So a pilot run with a key of its own chooses the cuts, and the run itself resamples
    and moves there whatever its weights are: its estimate of the evidence is unbiased. That doubles the cost; with `moves_at`
    the cuts are yours, such as those of `schedule`, and there is no pilot.

    Parameters are `sample` sites that stand before every other random site.

    Args:
        num_particles: how many parameters, M; the run holds M times `smc.num_particles` traces.
        parameters: the proposal of moves, such as `inference.mcmc.RandomWalk(theta=0.3)`; it names the parameters.
        smc: the filter of each.
        num_moves: moves after each resampling.
        ess_threshold: the pilot resamples when the effective number of parameters is below this share of them.
        moves_at: numbers of cuts, counted from 1, after which parameters are resampled and moved.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def walk(ys):
    ...     drift = ppl.sample("drift", dist.Normal(0.0, 1.0))
    ...     def step(x, y):
    ...         x = ppl.sample("x", dist.Normal(x + drift, 1.0))
    ...         ppl.observe("y", dist.Normal(x, 0.5), y)
    ...         return x, x
    ...     return jax.lax.scan(step, 0.0, ys)[1]
    >>> algorithm = inference.SMC2(50, inference.mcmc.RandomWalk(drift=0.5), inference.SMC(20))
    >>> algorithm.run(jax.random.key(0), walk, jax.numpy.array([0.1, 0.5, 1.2])).values["drift"].shape
    (1000,)
    """

    num_particles: int
    parameters: ValueProposal
    smc: SMC
    num_moves: int = 1
    ess_threshold: float = 0.5
    moves_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_moves"):
            if getattr(self, name) < 1:
                raise SiteError(f"SMC2: {name} must be at least 1, not {getattr(self, name)}")
        if self.moves_at is not None and any(number < 1 for number in self.moves_at):
            raise SiteError(f"SMC2: moves_at are numbers of cuts, counted from 1, not {self.moves_at}")
        if self.smc.policy().resampler.biased:
            raise SiteError(f"SMC2: resampling by {self.smc.resample!r} is biased; take 'systematic'")

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds).

        The posterior has the traces of all filters, with weights. Raises `SiteError` where a parameter does not come first.
        """
        start = time.perf_counter()
        staged, given = prepare(program, args)
        sampler = Sampler(self, staged, given_arrays(staged, given), wants_progress(progress))
        pilot_key, run_key = jax.random.split(rng_key)
        moves_at = self.moves_at if self.moves_at is not None else sampler.run(pilot_key, None).moved_at
        return sampler.posterior(sampler.run(run_key, moves_at), time.perf_counter() - start)

    def schedule(self, rng_key: jax.Array, program: Any, *args: Any) -> tuple[int, ...]:
        """The cuts at which a run whose resampling depends on its weights has moved its parameters."""
        staged, given = prepare(program, args)
        return Sampler(self, staged, given_arrays(staged, given), progress=False).run(rng_key, None).moved_at


class Finished(NamedTuple):
    """The end of a run."""

    parts: Problems
    filters: Filters
    log_total: float
    """nats: of the evidence, what is no more in the weights of `filters`"""
    moved_at: tuple[int, ...]


class Sampler:
    """Runs of one program."""

    def __init__(self, algorithm: SMC2, staged: Staged, given: dict[str, Array], progress: bool):
        self.algorithm, self.staged, self.given, self.progress = algorithm, staged, given, progress
        self.size = algorithm.num_particles
        self.everyone = jnp.arange(self.size)
        self.settings = Settings(algorithm.smc.num_particles, policy=algorithm.smc.policy(), many=True)
        self.first = self._parameters_end()
        self.spent = Counts(*[np.int64(0)] * len(Counts._fields))
        """work of filters that are gone"""

    def _parameters_end(self) -> int:
        """The number of equations at top level up to the last parameter, in which nothing else is drawn."""
        target = Target(self.staged, None, self.given)  # type: ignore[arg-type]
        names, random = self.algorithm.parameters.sites, target.random
        for name in names:
            if name not in random:
                raise SiteNameError(f"no random site {name!r} to move: {near_misses(name, random)}")
        eqns = body_of(self.staged.jaxpr).eqns
        end = max(i for i, eqn in enumerate(eqns) if set(names_in(eqn)) & set(names)) + 1
        early = [name for eqn in eqns[:end] for name in names_in(eqn) if name in random and name not in names]
        if early:
            raise SiteError(
                f"SMC2: site {early[0]!r} is drawn before or together with a parameter; parameters come first: declare it "
                f"after {', '.join(map(repr, names))}, or make it a parameter too"
            )
        return end

    # --- filters ------------------------------------------------------------------------------------------------------

    def filters(self, parameters: dict[str, Array], rng_key: Array) -> Problems:
        """The parts of the filters of these parameters, with keys of their own."""
        keys = jax.random.split(rng_key, self.size)
        return Problems(self.staged, inputs_with(self.staged, self.given, parameters), keys, self.settings)

    def cuts(self, parts: Problems) -> Iterator[Cut]:
        """The places where weights are looked at, in order."""
        for segment in range(len(parts.segments)):
            length = parts.length(segment)
            yield from (Cut(segment, step) for step in range(1, length))
            yield Cut(segment)

    def advance(self, parts: Problems, lanes: Lanes, since: Cut | None, to: Cut) -> Lanes:
        """From one cut to a later one in the same segment, or to one in the next."""
        everyone, segment = self.everyone, to.segment
        if not parts.length(segment):
            return parts.straight(everyone, lanes, segment)
        done = 0 if since is None or since.segment < segment else since.step or 0
        if not done:
            lanes = parts.enter(everyone, lanes, segment)
        for step in range(done, parts.length(segment) if to.step is None else to.step):
            lanes, _ = parts.step(everyone, lanes, jnp.full(self.size, step), segment)
        return parts.leave(everyone, lanes, segment) if to.step is None else lanes

    def restart(self, parameters: dict[str, Array], rng_key: Array, to: Cut) -> tuple[Problems, Lanes]:
        """Filters of other parameters, run from the start to a cut."""
        parts = self.filters(parameters, rng_key)
        lanes, since = parts.begin(self.everyone), None
        for segment in range(to.segment):
            lanes, since = self.advance(parts, lanes, since, Cut(segment)), Cut(segment)
        return parts, self.advance(parts, lanes, since, to)

    def prior(self, rng_key: Array) -> tuple[dict[str, Array], Array]:
        """Parameters from their prior, and its log density float32[M]: what they pay when they are given, beyond what is paid
        up to there anyway."""
        one = self.settings._replace(num_particles=1, policy=None)
        keys = jax.random.split(rng_key, self.size)

        def walk(given: dict[str, Array]) -> Output:
            parts = Problems(self.staged, inputs_with(self.staged, self.given, given), keys, one)
            lanes = parts.stretch(self.everyone, parts.begin(self.everyone), 0, self.first)
            return parts.output(self.everyone, lanes, complete=False)

        drawn = walk({})
        parameters = {name: drawn.values[name][:, 0] for name in self.algorithm.parameters.sites}
        return parameters, walk(parameters).log_weight[:, 0] - drawn.log_weight[:, 0]

    def look(self, parts: Problems, lanes: Lanes) -> tuple[Array, Counts]:
        """The evidence float32[M] that each filter estimates, nats, and their work in all."""
        log_weights, faults, counts = parts.standing(self.everyone, lanes)
        flat = jax.tree.map(lambda x: np.asarray(x).ravel(), faults)
        check_faults(self.staged, flat, np.zeros(1))  # a filter all of whose particles are dead has evidence 0
        work = jax.tree.map(lambda x: np.int64(x.sum()), counts)._replace(model_calls=np.int64(counts.model_calls.max()))
        return jax.nn.logsumexp(log_weights, axis=1) - jnp.log(log_weights.shape[1]), work

    # --- the algorithm ------------------------------------------------------------------------------------------------

    def run(self, rng_key: Array, moves_at: tuple[int, ...] | None) -> Finished:
        """From the start to the end; where it may choose, it moves parameters when their weights degenerate."""
        prior_key, filter_key = jax.random.split(jax.random.fold_in(rng_key, 0))
        parameters, log_prior = self.prior(prior_key)
        parts = self.filters(parameters, filter_key)
        now, since, log_total = Filters(parameters, parts.begin(self.everyone), log_prior, self.everyone), None, 0.0
        cuts, moved_at = list(self.cuts(parts)), []
        for number, cut in enumerate(tqdm(cuts, unit=" cuts", leave=False, delay=3, disable=not self.progress), 1):
            now, since = now._replace(lanes=self.advance(parts, now.lanes, since, cut)), cut
            log_evidence, work = self.look(parts, now.lanes)
            log_weights = log_evidence - now.log_base
            if number == len(cuts) or (log_weights == -jnp.inf).all():
                break
            weights = jax.nn.softmax(log_weights)
            low = effective_size(weights) < self.algorithm.ess_threshold * self.size
            if low if moves_at is None else number in moves_at:
                log_total += float(jax.nn.logsumexp(log_weights) - np.log(self.size))
                parts, now = self.renew(jax.random.fold_in(rng_key, number), parts, now, weights, cut)
                self.spend(work)
                moved_at.append(number)
        self.spend(work)
        return Finished(parts, now, log_total, tuple(moved_at))

    def renew(self, rng_key: Array, parts: Problems, now: Filters, weights: Array, cut: Cut) -> tuple[Problems, Filters]:
        """Resample parameters with their filters, and move them; the weights are equal after."""
        pick_key, filter_key, move_key = jax.random.split(rng_key, 3)
        ancestors = at_points(weights, (self.everyone + jax.random.uniform(pick_key)) / self.size)
        kept = _taken(now, ancestors)
        kept = kept._replace(log_base=self.look(parts, kept.lanes)[0])
        for key in jax.random.split(move_key, self.algorithm.num_moves):
            kept, work = self.move(key, kept, cut)
            self.spend(work)
        parts = self.filters(kept.parameters, filter_key)
        return parts, kept._replace(lanes=parts.renewed(self.everyone, kept.lanes))  # copies of one filter part ways

    def move(self, rng_key: Array, now: Filters, cut: Cut) -> tuple[Filters, Counts]:
        """One step of particle marginal Metropolis-Hastings for each of the parameters; the weights of `now` are equal."""
        propose_key, run_key, accept_key = jax.random.split(rng_key, 3)
        propose = jax.vmap(self.algorithm.parameters.propose)
        parameters, log_ratio = propose(jax.random.split(propose_key, self.size), now.parameters)
        parts, lanes = self.restart(parameters, run_key, cut)
        log_evidence, work = self.look(parts, lanes)
        ratio = log_evidence - now.log_base + log_ratio
        accept = jax.vmap(accepts)(jax.random.split(accept_key, self.size), ratio)
        moved = Filters(parameters, lanes, log_evidence, now.root.max() + 1 + self.everyone)
        return _chosen(accept, moved, now), work

    def spend(self, work: Counts) -> None:
        self.spent = jax.tree.map(lambda a, b: a + b, self.spent, work)

    def posterior(self, finished: Finished, seconds: float) -> Posterior:
        """The traces of all filters: their weights' mean is the evidence."""
        parts, now, log_total, _ = finished
        output = jax.device_get(parts.output(self.everyone, now.lanes))
        root = np.repeat(np.asarray(now.root), self.settings.num_particles)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
        log_weight = output.log_weight - np.asarray(now.log_base)[:, None] + log_total
        flat = flat._replace(log_weight=log_weight.ravel(), root=root)
        calls = int(self.spent.model_calls)
        posterior = finish(self.staged, flat, calls=calls, seconds=seconds)
        ledger = ledger_of(self.spent, self.size * self.settings.num_particles, calls, seconds)
        return replace(posterior, ledger=ledger)


@jax.jit
def _taken(now: Filters, ancestors: Array) -> Filters:
    return jax.tree.map(lambda x: x[ancestors], now)  # type: ignore[no-any-return]


@jax.jit
def _chosen(accept: Array, then: Filters, before: Filters) -> Filters:
    """`then` of the parameters that accept, else `before`."""
    choose = lambda a, b: jnp.where(accept.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(choose, then, before)  # type: ignore[no-any-return]
