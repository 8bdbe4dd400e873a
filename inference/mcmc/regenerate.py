"""Regeneration: a Metropolis-Hastings move over whole traces, which redraws a trace from one of its choices on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from latentrace.ppl.choices import WHOLE
from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Prefixes, RegeneratingSource, Settings
from latentrace.ppl.staging import check_repeatable

from ..chains import Draw, Info, Kernel, Target, Traces, info_of, traces_of
from .metropolis import accepts, choose

Array = jax.Array


@dataclass(frozen=True)
class Regenerate(Kernel):
    """A kernel that keeps a trace up to one of its random choices, and redraws that choice and all that follow.

    One of the n(x) choices of trace x is taken uniformly: a `sample` site, a token of a text, or a whole plate counts as one,
    and what stands in an untaken branch or past the end of a loop or text does not count. From it on the program draws from
    its own proposals (masks, constraints and `proposal=` included). With q the density of such a forward run and W the
    target over q, the result x' is accepted with probability

        min(1, (W(x') / W(x))^power * n(x) / n(x')),

    by which q W^power is invariant: the densities of both redrawn parts cancel against q (single-site Metropolis-Hastings of
    Wingate, Stuhlmueller and Goodman 2011, with everything after the site redrawn; for language models, Karan and Du 2025).
    Power 1 is the posterior. A program whose only weight is `ppl.factor("power", (alpha - 1) * text.log_probs.sum())` has the
    targets p^(1 + power (alpha - 1)).

    A move costs one forward run of the program, wherever the cut: repeated texts are decoded again token by token, and count
    as generated. It draws nothing but what the program draws, so it serves every program; where a trace is long and its end
    rewarded sharply, most moves are refused.

    Args:
        power: of the invariant distribution of a chain; populations such as that of `inference.TemperedSMC` set their own.

    Raises `SiteError` for a program without a random choice.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def two_coins():
    ...     a, b = ppl.sample("a", dist.Bernoulli(0.5)), ppl.sample("b", dist.Bernoulli(0.2))
    ...     ppl.condition("one at least", a + b >= 1)
    >>> posterior = inference.MCMC(inference.mcmc.Regenerate(), num_samples=400).run(jax.random.key(0), two_coins)
    >>> abs(posterior.expectation("a") - 5 / 6) < 0.1
    np.True_
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise SiteError(f"Regenerate: power must be positive, not {self.power}; power 0 is a plain forward run")

    def check(self, target: Target) -> None:
        target.require_choices("Regenerate")
        check_repeatable(target.staged, target.given)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Traces:
        """The trace again, for its weight."""
        prefixes = Prefixes(jax.tree.map(lambda x: x[None], target.choices(draw)), jnp.full(1, WHOLE))
        output = target.population(rng_key, Settings(1, RegeneratingSource()), trace=prefixes)
        return jax.tree.map(lambda x: x[0], traces_of(output))

    def at(self, target: Target, state: Traces, draw: Draw) -> Traces:
        return self.init(target, jax.random.key(0), draw)

    def step(self, target: Target, rng_key: Array, state: Traces) -> tuple[Traces, Info]:
        """The trace after one move."""
        population = jax.tree.map(lambda x: x[None], state)
        moved, info = self.move(target, rng_key, population, jnp.float32(self.power))
        return jax.tree.map(lambda x: x[0], moved), info

    def move(self, target: Target, rng_key: Array, traces: Traces, power: Array) -> tuple[Traces, Info]:
        """The traces after one move of each; of what was proposed, `Info.accepted` is the part that was accepted."""
        target.require_choices("Regenerate")
        cut_key, run_key, accept_key = jax.random.split(rng_key, 3)
        cuts = random_cuts(cut_key, traces.made)
        prefixes = Prefixes(target.choices(traces.draw), cuts)
        output = target.population(run_key, Settings(cuts.shape[0], RegeneratingSource()), trace=prefixes)
        proposed = traces_of(output)
        rise = power * (proposed.log_weight - traces.log_weight)
        accept = accepts(accept_key, log_ratio(rise, traces.made, proposed.made))
        return jax.vmap(choose)(accept, proposed, traces), info_of(output, accept.mean())


def random_cuts(rng_key: Array, made: Array) -> Array:
    """Of how many choices to keep, int32[N]: from 0 to one less than there are, uniformly."""
    return jax.random.randint(rng_key, made.shape, 0, jnp.maximum(made, 1))


def log_ratio(rise: Array, made: Array, made_then: Array) -> Array:
    """Log of the ratio by which regenerated traces are accepted, float32, nats: `rise` is that of the target over the
    proposal, `made` are the numbers of choices before and after."""
    choices = lambda made: jnp.log(jnp.maximum(made, 1).astype(jnp.float32))
    return rise + choices(made) - choices(made_then)
