"""Regeneration: a Metropolis-Hastings move over whole traces, which redraws a trace from one of its choices on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Prefixes, RegeneratingSource, Settings

from ..chains import Info, Target, Traces, info_of, traces_of
from .metropolis import accepts, choose

Array = jax.Array


@dataclass(frozen=True)
class Regenerate:
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
        num_starts: forward runs from which a chain's first trace is chosen by weight.

    Raises `SiteError` for a program without a random choice.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference.chains import run_chains
    >>> @ppl.program
    ... def two_coins():
    ...     a, b = ppl.sample("a", dist.Bernoulli(0.5)), ppl.sample("b", dist.Bernoulli(0.2))
    ...     ppl.condition("one at least", a + b >= 1)
    >>> how = dict(num_samples=400, num_warmup=20, num_chains=1, progress=False)
    >>> posterior = run_chains(jax.random.key(0), two_coins, (), Regenerate(), **how)
    >>> abs(posterior.expectation("a") - 5 / 6) < 0.1
    np.True_
    """

    power: float = 1.0
    num_starts: int = 16

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise SiteError(f"Regenerate: power must be positive, not {self.power}; power 0 is a plain forward run")
        if self.num_starts < 1:
            raise SiteError(f"Regenerate: num_starts must be at least 1, not {self.num_starts}")

    @property
    def num_particles(self) -> int:
        return 1

    @property
    def sites(self) -> tuple[str, ...]:
        return ()

    @property
    def repeats(self) -> bool:
        return True

    def init(self, target: Target, rng_key: Array) -> tuple[Traces, Info]:
        """One of `num_starts` forward runs, chosen by weight."""
        target.require_choices("Regenerate")
        run_key, pick_key = jax.random.split(rng_key)
        output = target.population(run_key, Settings(self.num_starts))
        which = jax.random.categorical(pick_key, self.power * output.log_weight)
        found = (output.log_weight > -jnp.inf).any().astype(jnp.float32)
        return jax.tree.map(lambda x: x[which], traces_of(output)), info_of(output, found)

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
