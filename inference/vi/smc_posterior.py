"""The posterior of a program as sequential Monte Carlo yields it, as a distribution with an estimated density."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from latentrace.ppl.choices import Keyed, SiteRef
from latentrace.ppl.errors import SiteError
from latentrace.ppl.program import as_program
from latentrace.ppl.run import RetainingSource, Settings, arrays_of, given_arrays, label_values
from latentrace.ppl.staging import Staged, check_given, check_repeatable, stage

from ..chains import Target
from ..smc.conditional import CONDITIONAL_SCHEMES
from ..smc.smc import SMC
from .density import log_density
from .expectations import Controlled
from .objectives import log_mean_exp
from .randomness import current, inner_randomness
from .terms import LogDensity
from .traces import Plan, Trace, over_leading, side_by_side

Array = jax.Array


@dataclass(frozen=True)
class SMCPosterior:
    """One trace of a population that SMC leaves, drawn by its weight; see `smc_posterior`."""

    program: Any
    smc: SMC

    def expect(
        self, fn: Callable[..., Any], num_traces: int | None, num_samples: int, rng_key: Array, args: Any, has_aux: bool
    ) -> tuple[Array, Any]:
        """The mean of a function of such traces, which are constants to differentiation, and of what else it returns."""
        staged, target = self._target(args)
        plan = Plan(staged, {}, as_program(self.program).given)
        settings = Settings(self.smc.num_particles, policy=self.smc.policy())

        def one_trace(key: Array) -> Trace:
            output = target.population(key, settings)
            law = dist.Categorical(logits=output.log_weight)
            which, _ = Keyed(key, jnp.int32(-2)).value(SiteRef("which"), law, jnp.int32(0))
            chosen = jax.tree.map(lambda x: x[which], output)
            values = label_values(staged, chosen.values)
            choices = target.choices(chosen)  # type: ignore[arg-type]
            log_gamma = log_density(self.program, choices, *args).nats
            nothing = {name: jnp.zeros(jnp.shape(chosen.active[name]), jnp.int32) for name in plan.random}
            active = {name: chosen.active[name] for name in plan.random}
            density = LogDensity(log_gamma - log_mean_exp(output.log_weight))
            trace = Trace(values, staged.out_tree.unflatten(chosen.returned), density, {}, nothing, active, plan)
            return jax.lax.stop_gradient(trace)  # type: ignore[no-any-return]

        def one_sample(keys: Array, sample: Array) -> tuple[Array, Any]:
            with inner_randomness(rng_key, sample):
                if num_traces is None:
                    found = fn(one_trace(keys[0]))
                else:
                    traces = over_leading(one_trace, keys)
                    found = fn(replace(traces, many=True))
            found, aux = found if has_aux else (found, ())
            found = found.value if isinstance(found, Controlled) else found
            return jnp.asarray(found.nats if isinstance(found, LogDensity) else found, jnp.float32), aux

        keys = jax.random.split(rng_key, (num_samples, num_traces or 1))
        return jax.tree.map(lambda x: x.mean(axis=0), over_leading(one_sample, keys, jnp.arange(num_samples)))  # type: ignore[no-any-return]

    def estimate_at(self, trace: Trace | Mapping[str, Any], args: tuple[Any, ...]) -> LogDensity:
        """The log of an unbiased estimate of the density of what SMC yields, by SMC in which one particle repeats the trace."""
        staged, target = self._target(args)
        scheme = self.smc.resample
        policy = self.smc.policy()._replace(resampler=CONDITIONAL_SCHEMES[scheme])  # type: ignore[index]
        settings = Settings(self.smc.num_particles, RetainingSource(), policy)
        values, many = (trace.values, trace.many) if isinstance(trace, Trace) else (trace, False)
        values = {name: values[name] for name in target.random}
        key = current("the density of a vi.smc_posterior").next_key()

        def one(values: dict[str, Any], i: Array) -> Array:
            arrays = given_arrays(staged, values)
            output = target.population(jax.random.fold_in(key, i), settings, trace=arrays)
            return jax.lax.stop_gradient(log_mean_exp(output.log_weight))  # type: ignore[no-any-return]

        rows = values if many else jax.tree.map(lambda x: jnp.asarray(x)[None], values)
        log_evidence = over_leading(one, rows, jnp.arange(jax.tree.leaves(rows)[0].shape[0]))
        log_gamma = log_density(self.program, trace, *args).nats
        return LogDensity(log_gamma - (log_evidence if many else log_evidence[0]))

    def _target(self, args: tuple[Any, ...]) -> tuple[Staged, Target]:
        program = as_program(self.program)
        staged = stage(program.fn, args)
        check_given(staged, program.given)
        check_repeatable(staged, program.given)
        arrays = jax.lax.stop_gradient(arrays_of(staged))
        given = given_arrays(staged, program.given)
        return staged, Target(staged.skeleton(), arrays, given, side_by_side=side_by_side.get())


def smc_posterior(program: Any, smc: SMC) -> SMCPosterior:
    """The posterior of a program as SMC yields it: one of its particles at the end, drawn by weight.

    Its density at a trace is estimated by the trace's joint density over SMC's estimate of the evidence (Cusumano-Towner and
    Mansinghka 2017): as a guide so that the reciprocal is unbiased, as a model, by conditional SMC around the trace, so that
    the density is. Thus `vi.elbo` of it, or with it as the model, measures how far SMC is from a posterior or another guide.
    Neither the traces nor the estimate have a gradient in what SMC reads: to learn that, learn twists or a proposal.

    Args:
        program: a program with observations.
        smc: with resampling of which there is a conditional form, "multinomial" or "systematic".

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import vi
    >>> @ppl.program
    ... def model():
    ...     ppl.observe("x", dist.Normal(ppl.sample("z", dist.Normal(0.0, 1.0)), 1.0), 1.0)
    >>> bound = vi.elbo(model, vi.smc_posterior(model, inference.SMC(32)), num_samples=50)(jax.random.key(0))
    >>> -1.6 < bound < -1.45  # log evidence is -1.515
    Array(True, dtype=bool)

    Raises `SiteError` for other resampling, and for programs that conditional SMC cannot repeat.
    """
    if smc.resample not in CONDITIONAL_SCHEMES:
        raise SiteError(
            f"smc_posterior: no conditional form of resampling {smc.resample!r}; take 'multinomial' or 'systematic'"
        )
    return SMCPosterior(program, smc)
