"""Metropolis-Hastings by a proposal that is itself a program: it draws new values, and its density is known both ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.choices import WHOLE
from latentrace.ppl.decode import weighted
from latentrace.ppl.errors import SiteError, near_misses
from latentrace.ppl.program import as_program
from latentrace.ppl.run import Arrays, Prefixes, RegeneratingSource, Settings, arrays_of
from latentrace.ppl.sites import NESTED, factor_p, generate_p, observe_p, plate_p, sample_p, score_p
from latentrace.ppl.staging import Site, Staged, check_repeatable, random_sites, stage, trace_eqns
from latentrace.ppl.state import spread_over

from ..chains import Draw, Info, Kernel, State, Target, added, info_of
from .metropolis import accepts, choose

Array = jax.Array


class Way(NamedTuple):
    """From one trace to another by the proposal program."""

    log_q: Array
    """float32[], nats: log density of what it draws on the way"""
    draws: dict[str, Array]
    """bool[*dims] for each of its sites: whether it draws it"""


@dataclass(frozen=True, eq=False)
class ProposalProgram(Kernel):
    """A kernel that proposes what a program draws, and accepts it by the ratio of Hastings (1970), exactly.

    The program's first argument is a dictionary of the current values of the target's random sites: arrays, token ids
    int32[..., max_tokens] for texts. Its own random sites are named like some of the target's, and what it draws are their new
    values; all other values stay. It may use whatever a program may, control flow, other language models, and `proposal=` and
    masks inside texts included, but may weigh nothing: no `factor`, `observe` or `score`.

    With q(x' | x) the density of what it draws at x, x' is accepted with probability
    min(1, pi(x') q(x | x') / (pi(x) q(x' | x))): the program is run forward at x, and its density evaluated at x' with the old
    values as draws. Supports may differ; what leads to a trace from which the program cannot return has q(x | x') = 0 and is
    refused. So is a value that it draws for a site which is not active in the new trace, and a newly active site for which it
    draws none. `Info.stats["returns"]`, bool[], says whether the way back had positive density: where it never has, the chain
    does not move.

    A step costs the forward run, a pass through the language model for each text at two traces of the target and for each text
    of the program there and back, and, where texts have a `proposal=` or the like, a run that repeats the way back.

    Kernels of one program are equal only if they are one object: make it once to compile once.

    Args:
        program: a `ppl.program`, or a function that could be one.
        args: what it takes after the dictionary. Arrays and models are inputs of the compiled chain.

    Raises `SiteError` for sites that the target does not have, or has of another kind or shape, and for programs that draw
    nothing, or weigh.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> @ppl.program
    ... def target():
    ...     count = ppl.sample("count", dist.Poisson(3.0))
    ...     ppl.factor("reward", 0.5 * count)
    >>> @ppl.program
    ... def one_more_or_less(values):
    ...     n = values["count"]
    ...     ppl.sample("count", dist.DiscreteUniform(jax.numpy.maximum(n - 1, 0), n + 1))
    >>> kernel = mcmc.ProposalProgram(one_more_or_less)
    >>> posterior = inference.MCMC(kernel, num_samples=500, num_warmup=50, num_chains=4).run(jax.random.key(0), target)
    >>> abs(posterior.expectation("count") - 3 * 2.71828 ** 0.5) < 0.5
    np.True_
    """

    program: Any
    args: tuple[Any, ...] = ()

    def check(self, target: Target) -> None:
        target.require_choices("ProposalProgram")
        staged = self._staged(target)
        names = random_sites(staged)
        if not names:
            raise SiteError(
                "ProposalProgram: the program draws nothing; give it a `sample` or `generate` site named as in the target"
            )
        for name in names:
            self._check_site(target, staged, name)
        for eqn in trace_eqns(staged.jaxpr):
            nested = eqn.primitive is plate_p and eqn.params["role"] == NESTED
            if nested or eqn.primitive in (factor_p, observe_p, score_p):
                name, kind = eqn.params["name"].removesuffix("()"), "nested" if nested else eqn.primitive.name
                raise SiteError(
                    f"ProposalProgram: site {name!r} is a {kind} site, but a proposal only draws, by `sample` and `generate`: "
                    "move it to the target"
                )
        check_repeatable(staged, ())

    def _check_site(self, target: Target, staged: Staged, name: str) -> None:
        """`SiteError` unless a site of the program can stand for that of the target."""
        if name not in target.random:
            why = "is given in" if name in target.given else "is no random site of"
            raise SiteError(
                f"ProposalProgram: site {name!r} {why} the target, so that there is no way back from what it draws; "
                f"{near_misses(name, target.random)}"
            )
        mine, its = staged.sites[name], target.staged.sites[name]
        if _kind(mine) != _kind(its):
            raise SiteError(f"ProposalProgram: site {name!r} is {_kind(mine)}, but {_kind(its)} in the target; make them alike")
        if mine.kind == generate_p.name:
            number = its.model or 0
            models = staged.models[mine.model or 0], target.staged.trees[number].unflatten(target.arrays.models[number])
            tokens = [f"{lm.vocab_size} tokens, EOS {lm.eos_id}" for lm in models]
            if tokens[0] != tokens[1]:
                raise SiteError(
                    f"ProposalProgram: site {name!r} is written by a model of {tokens[0]}, but by one of {tokens[1]} in the "
                    "target; take models with the same tokens"
                )

    def arrays(self, target: Target) -> Arrays:
        """What the program reads besides the values."""
        arrays: Arrays = jax.tree.map(jnp.asarray, arrays_of(self._staged(target)))
        return arrays._replace(inputs=arrays.inputs[len(target.random) :])

    def init(self, target: Target, rng_key: Array, draw: Draw) -> State:
        return State(draw)

    def step(self, target: Target, rng_key: Array, state: State) -> tuple[State, Info]:
        propose_key, accept_key = jax.random.split(rng_key)
        values = target.choices(state.draw)
        moved, log_w, run = self.propose(target, propose_key, values)
        now, log_now, info_now = target.evaluate(values)
        then, log_then, info_then = target.evaluate(moved)
        log_ratio, returns, ways = self.log_ratio(target, now, then, log_w)
        accept = accepts(accept_key, log_then - log_now + log_ratio)
        info = added(added(added(run, ways), info_now), info_then)
        stats = {"returns": returns}
        return State(choose(accept, then, now)), info._replace(accepted=accept.astype(jnp.float32), stats=stats)

    def propose(self, target: Target, rng_key: Array, values: Mapping[str, Array]) -> tuple[dict[str, Array], Array, Info]:
        """The values after a forward run; and log W float32[], nats: the density of its values over that of drawing them, by
        which proposals inside texts differ from their model; -inf where it could not go on."""
        program = self._at(target, values)
        output = program.population(rng_key, Settings(1))
        first = lambda x: x[0]
        draw = Draw(*jax.tree.map(first, (output.values, output.active, output.returned)))
        keep = lambda name, x: jnp.where(spread_over(draw.active[name], x), x, values[name])
        moved = {name: keep(name, x) for name, x in program.choices(draw).items()}
        return {**values, **moved}, output.log_weight[0], self._its(target, program, info_of(output, jnp.float32(1)))

    def log_ratio(self, target: Target, now: Draw, then: Draw, log_w: Array) -> tuple[Array, Array, Info]:
        """log q(now | then) - log q(then | now), float32[], nats, -inf where one of them is 0; and whether the way back is
        possible, bool[]. `log_w` is that of the way there."""
        there, info = self._way(target, now, then, log_w)
        back, more = self._way(target, then, now, None)
        returns = back.log_q > -jnp.inf
        possible = returns & (there.log_q > -jnp.inf)
        return jnp.where(possible, back.log_q - there.log_q, -jnp.inf), returns, added(info, more)

    def _way(self, target: Target, start: Draw, end: Draw, log_w: Array | None) -> tuple[Way, Info]:
        """How the program goes from one trace to another, with log W of the way if that is known."""
        before, after = target.choices(start), target.choices(end)
        program = self._at(target, before)
        values = {name: after[name] for name in program.random}
        draw, log_p, info = program.evaluate(values)
        if log_w is None:
            log_w = self._repeated(program, values)
        way = Way(jnp.where((log_p > -jnp.inf) & (log_w > -jnp.inf), log_p - log_w, -jnp.inf), draw.active)
        leads = jnp.asarray(True)
        for name in target.random:
            was, is_, drawn = start.active[name], end.active[name], way.draws.get(name, jnp.asarray(False))
            same = (before[name] == after[name]).reshape(*jnp.shape(is_), -1).all(axis=-1)
            leads &= jnp.where(drawn, is_, ~is_ | (was & same)).all()
        return way._replace(log_q=jnp.where(leads, way.log_q, -jnp.inf)), self._its(target, program, info)

    def _repeated(self, program: Target, values: dict[str, Array]) -> Array:
        """log W float32[], nats, of a run that draws these values; its faults are those of values that it cannot draw."""
        if not any(_pays(eqn) for eqn in trace_eqns(program.staged.jaxpr)):
            return jnp.float32(0)
        prefixes = Prefixes(jax.tree.map(lambda x: x[None], values), jnp.full(1, WHOLE))
        return program.population(jax.random.key(0), Settings(1, RegeneratingSource()), trace=prefixes).log_weight[0]

    def _staged(self, target: Target) -> Staged:
        """The program at some values."""
        program = as_program(self.program)
        if program.given:
            raise SiteError(
                f"ProposalProgram: the program has given values ({', '.join(program.given)}); a proposal draws them all"
            )
        staged = stage(program.fn, (_blank(target), *self.args))
        if len(staged.inputs) < len(target.random):
            raise SiteError(
                "ProposalProgram: the program asks for concrete numbers of its values, which differ from step to step"
            )
        return staged

    def _at(self, target: Target, values: Mapping[str, Array]) -> Target:
        """The program with these values as its argument, as a target of its own."""
        lent = target.lent[self] if self in target.lent else self.arrays(target)
        inputs = [*jax.tree.leaves({name: values[name] for name in target.random}), *lent.inputs]
        arrays = lent._replace(inputs=inputs)
        return Target(self._staged(target).skeleton(), arrays, {}, side_by_side=target.side_by_side, beside=target.beside)

    def _its(self, target: Target, program: Target, info: Info) -> Info:
        """What a run of the program says, with sites numbered as in the target; those that only the program has go by the first
        one of both. Tokens that a proposal leaves out are none that the target lacks."""
        sites, faults = program.staged.sites.values(), info.faults
        first = target.staged.sites[program.random[0]].number
        numbers = np.full(1 + max(site.number for site in sites), first, np.int32)
        for site in sites:
            if site.name in target.random:
                numbers[site.number] = target.staged.sites[site.name].number
        named = lambda x: x if x.dtype == bool else jnp.where(x < 0, x, jnp.asarray(numbers)[x])
        renamed = jax.tree.map(named, faults)._replace(died_at=faults.died_at, restricted=jnp.zeros_like(faults.restricted))
        return info._replace(faults=renamed)


def _kind(site: Site) -> str:
    """What a site of this name has to be in another program too."""
    shape, dtype = site.out or ((site.max_tokens,), "tokens")
    return f"{site.kind} {(*site.dims, *shape)} of {dtype}"


def _blank(target: Target) -> dict[str, np.ndarray]:
    """Zeros in place of the values of the random sites."""
    sites = {name: target.staged.sites[name] for name in target.random}
    of = lambda site: site.out or ((site.max_tokens,), "int32")
    return {name: np.zeros((*site.dims, *of(site)[0]), of(site)[1]) for name, site in sites.items()}


def _pays(eqn: Any) -> bool:
    """Whether an equation draws otherwise than its density says."""
    return (eqn.primitive is generate_p and weighted(eqn.params)) or (eqn.primitive is sample_p and eqn.params["scaled"])
