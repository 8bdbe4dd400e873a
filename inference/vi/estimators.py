"""Gradient estimators: how the gradient of an expectation finds its way through one random site."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from latentrace.ppl.errors import SiteError
from latentrace.ppl.rules import log_prob

Array = jax.Array
Draw = Callable[[Any], Array]
"""A draw from a distribution, by one site's randomness; of several the later ones are independent."""


class Estimator:
    """How a site's value is drawn, and what its gradient is. With cost f, the estimate is the gradient of

    f(value) + stop_gradient(f) * score
    """

    biased: ClassVar[bool] = False
    """whether the gradient is that of something else than the expectation"""

    def check(self, site: str, distribution: Any) -> None:
        """Raise `SiteError` where a site's distribution has no such estimator."""

    def draw(self, distribution: Any, draw: Draw) -> Array:
        """The site's value, through which a gradient may flow."""
        return jax.lax.stop_gradient(draw(distribution))

    def log_prob(self, distribution: Any, value: Array, draw: Draw) -> Array:
        """float32[], nats: the log density of the value that `draw` gives the draws of again."""
        return log_prob(distribution, value)

    def score(self, distribution: Any, value: Array, draw: Draw) -> Array | None:
        """float32[], nats: what the cost is multiplied by, as a function of the parameters; None for nothing. `draw` gives the
        draws of the value again."""
        return None


@dataclass(frozen=True)
class Reparameterised(Estimator):
    """The value as a smooth function of noise and parameters (Kingma and Welling 2014); implicitly differentiated for gamma,
    beta and Dirichlet (Figurnov et al. 2018). The default of continuous sites."""

    def check(self, site: str, distribution: Any) -> None:
        if not distribution.has_rsample:
            raise SiteError(
                f"site {site!r}: {_name(distribution)} cannot be reparameterised, as its values are no smooth function of its "
                "parameters; choose vi.ScoreFunction(), vi.Enumerate() or vi.MeasureValued()"
            )

    def draw(self, distribution: Any, draw: Draw) -> Array:
        return self._drawn(distribution, draw)[0]

    def log_prob(self, distribution: Any, value: Array, draw: Draw) -> Array:
        value, way = self._drawn(distribution, draw)
        if way is None:
            return log_prob(distribution, value)
        return distribution.log_prob(value, way).sum()  # type: ignore[no-any-return]

    def _drawn(self, distribution: Any, draw: Draw) -> tuple[Array, Any]:
        """The value, and what its transforms computed on the way: flows are costly to invert, or cannot be."""
        if isinstance(distribution, dist.TransformedDistribution):
            return draw(_Way(distribution))  # type: ignore[return-value]
        return draw(distribution), None


@dataclass(frozen=True)
class ScoreFunction(Estimator):
    """The cost times the gradient of the log density (REINFORCE, Williams 1992). The default of all other sites, texts
    included.

    The cost of a choice is that of what may depend on it: of a `vi.LogDensity`, what is paid from there on ("reward to go"),
    token by token in a text and step by step in a loop.

    Args:
        baseline: nats, float[] or of the shape of the site's choices: an axis for each loop, and of tokens last for a text. It
            is subtracted from the cost, and leaves the gradient unbiased as long as it does not depend on the choice: a moving
            average of earlier costs, or what a network predicts from what comes before. None for the mean over the other
            samples where an expectation has several ("leave one out"), and 0 where it has one.
    """

    baseline: Any = None

    def score(self, distribution: Any, value: Array, draw: Draw) -> Array | None:
        return log_prob(distribution, value)


@dataclass(frozen=True)
class Enumerate(Estimator):
    """The sum over all values of a finite site, weighted by their probabilities. Several enumerated sites, and the steps of a
    loop, multiply: the cost is computed for each combination."""

    def check(self, site: str, distribution: Any) -> None:
        if not getattr(distribution, "has_enumerate_support", False) or distribution.event_shape:
            raise SiteError(
                f"site {site!r}: {_name(distribution)} has no finite support to enumerate; choose vi.ScoreFunction()"
            )


@dataclass(frozen=True)
class GumbelSoftmax(Estimator):
    """A relaxed vector softmax((logits + Gumbel noise) / temperature) (Jang et al. 2017, Maddison et al. 2017) in place of the
    one-hot vector of a `vi.OneHot`. Biased: the gradient is that of the relaxed expectation."""

    temperature: float = 1.0
    hard: ClassVar[bool] = False
    biased: ClassVar[bool] = True

    def check(self, site: str, distribution: Any) -> None:
        if not isinstance(_within(distribution), OneHot):
            raise SiteError(
                f"site {site!r}: {_name(distribution)} has no relaxation; make it a one-hot vector, vi.OneHot(logits), or "
                "choose vi.ScoreFunction()"
            )

    def draw(self, distribution: Any, draw: Draw) -> Array:
        logits = jax.nn.log_softmax(_within(distribution).logits)
        perturbed = logits + draw(dist.Gumbel(jnp.zeros_like(logits), 1.0).to_event(logits.ndim))
        relaxed = jax.nn.softmax(perturbed / self.temperature)
        if not self.hard:
            return relaxed
        one_hot = jax.nn.one_hot(jnp.argmax(perturbed, axis=-1), logits.shape[-1])
        return jax.lax.stop_gradient(one_hot - relaxed) + relaxed


@dataclass(frozen=True)
class StraightThrough(GumbelSoftmax):
    """An exact one-hot draw, with the gradient of the relaxed one (Jang et al. 2017, section 2.2). Biased."""

    hard: ClassVar[bool] = True


@dataclass(frozen=True)
class AcceptReject(Estimator):
    """Gamma, beta and Dirichlet reparameterised through what a rejection sampler accepts (Naesseth et al. 2017).

    A gamma variable of shape a >= 1 is h(e, a) = (a - 1/3) (1 + e / sqrt(9 a - 3))^3, with e the normal variable that Marsaglia
    and Tsang's sampler accepts; one of a smaller shape is that of a + 1 times u^(1 / a). The density of e depends on a, which
    the score log q(h(e, a)) + log |dh/de| makes up for.
    """

    def check(self, site: str, distribution: Any) -> None:
        if not isinstance(_within(distribution), (dist.Gamma, dist.Beta, dist.Dirichlet)):
            raise SiteError(
                f"site {site!r}: {_name(distribution)} is not drawn by rejection; choose vi.Reparameterised() or "
                "vi.ScoreFunction()"
            )

    def draw(self, distribution: Any, draw: Draw) -> Array:
        of, (noise, shape) = _within(distribution), self._accepted(distribution, draw)
        small = _shapes(of) < 1
        uniform = draw(dist.Uniform(jnp.zeros_like(shape), 1.0).to_event(shape.ndim))
        gammas = _marsaglia_tsang(noise, shape) * jnp.where(small, uniform ** (1 / jnp.where(small, _shapes(of), 1.0)), 1.0)
        if isinstance(of, dist.Gamma):
            return gammas / of.rate
        parts = gammas / gammas.sum(-1, keepdims=True)
        return parts[..., 0] if isinstance(of, dist.Beta) else parts

    def score(self, distribution: Any, value: Array, draw: Draw) -> Array | None:
        noise, shape = self._accepted(distribution, draw)
        log_slope = jnp.log(3 * (shape - 1 / 3) / jnp.sqrt(9 * shape - 3)) + 2 * jnp.log1p(noise / jnp.sqrt(9 * shape - 3))
        return (dist.Gamma(shape).log_prob(_marsaglia_tsang(noise, shape)) + log_slope).sum()

    def _accepted(self, distribution: Any, draw: Draw) -> tuple[Array, Array]:
        """The accepted noise of each gamma variable, and its shape parameter, 1 at least."""
        shape = _shapes(_within(distribution))
        shape = shape + (shape < 1)
        accepted = draw(dist.Gamma(shape).to_event(shape.ndim))
        noise = (jnp.cbrt(accepted / (shape - 1 / 3)) - 1) * jnp.sqrt(9 * shape - 3)
        return jax.lax.stop_gradient(noise), shape


def _marsaglia_tsang(noise: Array, shape: Array) -> Array:
    return (shape - 1 / 3) * (1 + noise / jnp.sqrt(9 * shape - 3)) ** 3


def _shapes(distribution: Any) -> Array:
    """Shape parameters of the gamma variables that a variable is made of."""
    if isinstance(distribution, dist.Beta):
        a, b = distribution.concentration1, distribution.concentration0
        return jnp.stack(jnp.broadcast_arrays(a, b), axis=-1)
    return jnp.broadcast_to(distribution.concentration, distribution.batch_shape + distribution.event_shape)


BERNOULLI = (dist.BernoulliProbs, dist.BernoulliLogits)
CATEGORICAL = (dist.CategoricalProbs, dist.CategoricalLogits)


class Pairs(list[tuple[Array, Array, Array, Array]]):
    """For each parameter of a distribution: the parameter, a coefficient c, and values x+ and x-, each of the shape of the
    value. The gradient of E[f] for element i of the parameter is E[c (f(x+) - f(x-))], element i of the value being
    replaced."""


@dataclass(frozen=True)
class MeasureValued(Estimator):
    """The difference of the costs of two coupled values, for each element of the site at each visit (Mohamed et al. 2020,
    section 6): twice as many evaluations as there are elements and parameters. For Normal, Exponential, Poisson, Bernoulli and
    Categorical; for the latter all values of one visit are tried while those of other visits are drawn, so that in a loop the
    work grows with its length, where `Enumerate` tries all combinations."""

    def check(self, site: str, distribution: Any) -> None:
        if not isinstance(_within(distribution), (dist.Normal, dist.Exponential, dist.Poisson, *BERNOULLI, *CATEGORICAL)):
            raise SiteError(
                f"site {site!r}: no measure-valued derivative of {_name(distribution)} is known; choose vi.ScoreFunction()"
            )

    def pairs(self, distribution: Any, value: Any, draw: Any) -> Pairs:
        """What to compare at a visit where `value` was drawn; `draw` as in `score`, whose first draw is the value's."""
        of = _within(distribution)
        if isinstance(of, dist.Normal):
            return self._normal(of, value, draw)
        if isinstance(of, dist.Exponential):
            rate = jnp.broadcast_to(of.rate, value.shape)
            return Pairs([(rate, 1 / rate, value, draw(dist.Gamma(2.0, rate).to_event(rate.ndim)))])
        if isinstance(of, dist.Poisson):
            rate = jnp.broadcast_to(of.rate, value.shape)
            return Pairs([(rate, jnp.ones_like(rate), value + 1, value)])
        if isinstance(of, BERNOULLI):
            probs = jnp.broadcast_to(of.probs, value.shape)
            return Pairs([(probs, jnp.ones_like(probs), jnp.ones_like(value), jnp.zeros_like(value))])
        probs = jnp.broadcast_to(of.probs, (*value.shape, of.probs.shape[-1]))  # Categorical: `check` has refused all others
        one = jnp.ones_like(probs[..., 0])
        return Pairs([(probs[..., k], one, jnp.full_like(value, k), value) for k in range(probs.shape[-1])])

    def _normal(self, of: Any, value: Array, draw: Draw) -> Pairs:
        """Location: Rayleigh variables to both sides. Scale: a double-sided Maxwell variable against a normal one."""
        loc, scale = (jnp.broadcast_to(x, value.shape) for x in (of.loc, of.scale))
        normal = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(loc.ndim)
        standard = [draw(normal) for _ in range(5)][1:]  # the first is the value's
        rayleigh = scale * jnp.hypot(standard[0], standard[1])
        maxwell = scale * jnp.sqrt(sum(x**2 for x in standard[:3])) * jnp.sign(standard[3])
        by_loc = (loc, 1 / (scale * jnp.sqrt(2 * jnp.pi)), loc + rayleigh, loc - rayleigh)
        return Pairs([by_loc, (scale, 1 / scale, loc + maxwell, loc + scale * standard[0])])


class OneHot(dist.Distribution):
    """A category as a one-hot vector float32[..., V], for what relaxes it; logits float32[..., V].

    The log density of a relaxed vector is the linear extension, sum of value times log probability.

    >>> import jax, jax.numpy as jnp
    >>> from latentrace.inference import vi
    >>> vi.OneHot(jnp.array([0.0, 100.0])).sample(jax.random.key(0))
    Array([0., 1.], dtype=float32)
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.simplex

    def __init__(self, logits: Array, *, validate_args: bool | None = None):
        self.logits = jnp.asarray(logits)
        super().__init__(self.logits.shape[:-1], self.logits.shape[-1:], validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = sample_shape + self.batch_shape
        return jax.nn.one_hot(jax.random.categorical(key, self.logits, shape=shape), self.logits.shape[-1])

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        return (value * jax.nn.log_softmax(self.logits)).sum(-1)


class _Way(NamedTuple):
    """A transformed distribution whose draws tell how they came about."""

    distribution: Any

    def sample(self, key: Array) -> tuple[Array, Any]:
        return self.distribution.sample_with_intermediates(key)  # type: ignore[no-any-return]


def _within(distribution: Any) -> Any:
    """What a distribution's event dimensions were declared of."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


def _name(distribution: Any) -> str:
    return type(_within(distribution)).__name__


def default(distribution: Any) -> Estimator:
    """Reparameterisation where there is one."""
    return Reparameterised() if distribution.has_rsample else ScoreFunction()
