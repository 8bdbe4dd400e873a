"""Targets of chains other than the posterior: sharpened texts, tempered rewards, and ramps between them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError
from latentrace.ppl.sites import NESTED, plate_p
from latentrace.ppl.staging import Staged, trace_eqns
from latentrace.ppl.state import Tempering

Array = jax.Array


@dataclass(frozen=True)
class Ramp:
    """A number that goes from `start` to `end` in so many steps of a chain, evenly or by a constant factor, and stays there.

    >>> import jax
    >>> from latentrace.inference.mcmc import Ramp
    >>> Ramp(1.0, 4.0, 100, geometric=True).at(jax.numpy.int32(50))
    Array(2., dtype=float32)
    """

    start: float
    end: float
    steps: int
    geometric: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SiteError(f"Ramp: steps must be at least 1, not {self.steps}; for none, give the number itself")
        if self.geometric and not min(self.start, self.end) > 0:
            raise SiteError(f"Ramp: a geometric one goes between positive numbers, not from {self.start} to {self.end}")

    def at(self, iteration: Array) -> Array:
        part = jnp.clip(iteration / self.steps, 0.0, 1.0).astype(jnp.float32)
        if self.geometric:
            return self.start * jnp.exp(part * jnp.log(self.end / self.start))
        return self.start + part * (self.end - self.start)


@dataclass(frozen=True)
class Tempered:
    """A target for `inference.MCMC`: p(texts)^sharpness times the density of other choices times (all else)^power.

    "All else" is what `observe`, `factor`, `condition` and `score` pay; what is impossible stays so whatever the power. With
    `sharpness=4` and no rewards it is the power distribution p^4 (Karan and Du 2025); a reward r in nats with `power=1 / beta`
    is tilted by exp(r / beta) (Faria and Smith 2025). A `Ramp` in place of a number anneals over the steps: end it in warm-up,
    since draws are kept as of one target.

    >>> from latentrace.inference.mcmc import Ramp, Tempered
    >>> Tempered(sharpness=4.0, power=Ramp(0.1, 1.0, 200))
    Tempered(sharpness=4.0, power=Ramp(start=0.1, end=1.0, steps=200, geometric=False))
    """

    sharpness: float | Ramp = 1.0
    power: float | Ramp = 1.0

    def __post_init__(self) -> None:
        for name, fits, what in (
            ("sharpness", lambda x: x > 0, "positive"),
            ("power", lambda x: x >= 0, "0 or more"),
        ):
            value = getattr(self, name)
            for number in (value.start, value.end) if isinstance(value, Ramp) else (value,):
                if not fits(number):
                    raise SiteError(f"Tempered: {name} must be {what}, not {number}")

    def at(self, iteration: Array) -> Tempering:
        """The target of one step."""
        number = lambda x: x.at(iteration) if isinstance(x, Ramp) else jnp.float32(x)
        return Tempering(number(self.sharpness), number(self.power))

    @property
    def end(self) -> int:
        """The step from which on the target stays the same."""
        return max([0, *(x.steps for x in (self.sharpness, self.power) if isinstance(x, Ramp))])

    def check(self, staged: Staged, num_warmup: int) -> None:
        """Raise what is wrong with it for a program."""
        check_powers(staged, "leave out `target`")
        if self.end > num_warmup:
            raise SiteError(
                f"Tempered: the target changes up to step {self.end}, but draws are kept from step {num_warmup} on; raise "
                "num_warmup, or end the ramp sooner"
            )


def check_powers(staged: Staged, mend: str) -> None:
    """`SiteError` unless the density of every site has powers."""
    for eqn in trace_eqns(staged.jaxpr):
        if eqn.primitive is plate_p and eqn.params["role"] == NESTED:
            name: Any = eqn.params["name"].removesuffix("()")
            raise SiteError(f"nested {name!r} only estimates its density, of which no power is known; {mend}")
