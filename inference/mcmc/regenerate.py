"""Regeneration: a Metropolis-Hastings move over whole traces, which redraws a trace from one of its choices on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Prefixes, RegeneratingSource, Settings
from latentrace.ppl.walk import Walk

from ..chains import Info, Target, Traces, info_of, traces_of
from .cuts import Cuts, rule
from .metropolis import accepts, choose
from .redraw import Place, Places, Redraw

Array = jax.Array


@dataclass(frozen=True)
class Regenerate(Redraw):
    """A kernel that keeps a trace up to one of its random choices, and redraws that choice and all that follow.

    With q the program's proposals (masks, constraints and `proposal=` included) and W the target over q, the result x' of a cut
    at choice number c is accepted with probability

        min(1, (W(x') / W(x))^power),

    by which q W^power is invariant: the densities of both redrawn parts cancel against q (single-site Metropolis-Hastings of
    Wingate, Stuhlmueller and Goodman 2011, with everything after the site redrawn; for language models, Karan and Du 2025).
    The number c is drawn whatever the trace; where it has fewer choices the chain stays. So texts may become longer and shorter
    on the program's fixed horizon, and no ratio of lengths is needed. A rule of cuts that weighs choices is chosen by the
    trace: then the ratio has h(c | x') / h(c | x) besides, h being the chance of the cut. For p^alpha draw with
    `proposal=ppl.proposals.temperature(1 / alpha)` and take `target=mcmc.Tempered(sharpness=alpha)`.

    A move costs the tokens that it draws: the cache of what is kept serves again. Chains that run side by side share the
    number, so that they stay in step; with "entropy" each has its own cut, and all wait for the longest suffix.

    Args:
        cuts: "uniform" over all choices; "sites", the first choice of each site; "entropy", in proportion to the jumps of the
            model's entropy (`EntropyCuts`; Entropy-Cut Metropolis-Hastings); `StepCuts((newline,))`; or your own `Cuts`.
        tries: suffixes drawn from each cut, side by side, of which one is proposed (see `Redraw`). With cuts="entropy" these
            are tries where the text was decided, as in entropy-guided power sampling (EGPS).
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

    cuts: str | Cuts = "uniform"
    tries: int = 1
    power: float = 1.0

    def __post_init__(self) -> None:
        rule(self.cuts, "Regenerate")
        if self.tries < 1:
            raise SiteError(f"Regenerate: tries must be at least 1, not {self.tries}")
        if not self.power > 0:
            raise SiteError(f"Regenerate: power must be positive, not {self.power}; power 0 is a plain forward run")

    @property
    def rule(self) -> Cuts:
        return rule(self.cuts, "Regenerate")

    def kept(self, target: Target, walk: Walk, place: Place) -> dict[str, Array]:
        inside = walk.inside(target.random)
        return {name: inside[name] & (walk.notes[name].number < place.number) for name in target.random}

    def alike(self, places: Places, place: Place) -> Array:
        return places.numbers == place.number

    def move(self, target: Target, rng_key: Array, traces: Traces, power: Array) -> tuple[Traces, Info]:
        """The traces after one move of each; of what was proposed, `Info.accepted` is the part that was accepted."""
        target.require_choices("Regenerate")
        if self.cuts != "uniform" or self.tries != 1:
            raise SiteError(f"a population moves by uniform cuts and one try, not by {self!r}")
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
