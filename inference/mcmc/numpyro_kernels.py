"""NumPyro's own kernels on the continuous sites of a program: NUTS, HMC, and any other that takes a potential function."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.infer
from numpyro.infer.mcmc import MCMCKernel

from latentrace.ppl.errors import SiteError, near_misses
from latentrace.ppl.partial import specialised
from latentrace.ppl.run import Settings
from latentrace.ppl.sites import sample_p
from latentrace.ppl.staging import optional_sites, trace_eqns
from latentrace.ppl.state import spread_over
from latentrace.ppl.unconstrained import Point, PointOf, point_shape

from ..chains import Draw, Info, Kernel, Target, draw_of, info_of

Array = jax.Array
Potential = Callable[[Any], Array]
"""of points by site, nats"""

RADIUS = 2.0
"""first points are uniform within it, as Stan's and NumPyro's are"""
STATS = ("accept_prob", "diverging", "num_steps", "energy", "potential_energy")


class NumPyroState(NamedTuple):
    draw: Draw
    inner: Any
    """NumPyro's state; its position is the point of each site, float32[*loops and plates, *shape of a point]"""


@dataclass(frozen=True, init=False)
class NumPyro(Kernel):
    """A kernel of NumPyro, as it is, that moves continuous sites given the rest of the trace.

    Its potential energy is minus the log density of the trace, in nats, at points of R^n that NumPyro's bijections
    (`numpyro.distributions.biject_to`) take to the values, log Jacobians included: `numpyro.infer.util.potential_energy` for a
    NumPyro model (where a plate or handler scales a site, the Jacobian is not scaled: it belongs to the measure). A support
    that depends on other values is that at the current ones. Texts
    that do not depend on these sites are scored once in a step, unless they stand in a branch or in a loop within a loop.

    A site in a loop, plate or branch is moved in all its active elements. An inactive one has no density of its own: its point
    is drawn from a standard normal at each step, and moves under it (a pseudo-prior: Carlin and Chib 1995), so that a
    trajectory may cross into another branch. Where it would make other random choices appear or vanish, the density is 0.

    What a kernel adapts, it adapts in the first `num_warmup` steps. Chains start from points uniform within 2 of the origin,
    other sites from a forward run given these.

    Args:
        make: from a potential function to a kernel. It is compiled in: hand over the same function each time.
        sites: names of continuous `sample` sites; all of them where none is named.

    `Info.accepted` is the acceptance probability. `stats` holds what the kernel's state has of `accept_prob`, `diverging`,
    `num_steps`, `energy` and `potential_energy` (nats), and `step_size`.

    Raises `SiteError` for texts, discrete sites, supports that NumPyro has no bijection onto, and programs without a
    continuous site.

    >>> import jax, numpyro.infer, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> barker = mcmc.NumPyro(lambda potential_fn: numpyro.infer.BarkerMH(potential_fn=potential_fn))
    >>> rate = ppl.program(lambda: ppl.sample("rate", dist.Gamma(3.0, 2.0)))
    >>> posterior = inference.MCMC(barker, num_samples=500, num_warmup=200, num_chains=4).run(jax.random.key(0), rate)
    >>> abs(posterior.expectation("rate") - 1.5) < 0.2
    np.True_
    """

    make: Callable[[Potential], MCMCKernel]
    names: tuple[str, ...]

    def __init__(self, make: Callable[[Potential], MCMCKernel], *sites: str):
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "names", sites)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.names

    def check(self, target: Target) -> None:
        shapes(target, self.names, type(self).__name__)
        if not isinstance(kernel := self.make(lambda points: jnp.float32(0)), MCMCKernel):
            raise SiteError(f"NumPyro: `make` returned {type(kernel).__name__}, expected one of NumPyro's kernels")

    def start(self, target: Target, rng_key: Array, values: Mapping[str, Array]) -> tuple[Draw, Info]:
        """A trace with points near the origin; `Info.accepted` is 0 where it has density 0."""
        point_key, run_key = jax.random.split(rng_key)
        wanted = {name: shape for name, shape in self._shapes(target).items() if name not in values}
        keys = jax.random.split(point_key, max(len(wanted), 1))
        points = {
            name: Point(jax.random.uniform(key, shape, minval=-RADIUS, maxval=RADIUS))
            for key, (name, shape) in zip(keys, wanted.items())
        }
        output = target.population(run_key, Settings(1), {**values, **points})  # type: ignore[dict-item]
        found = output.log_weight[0] > -jnp.inf
        return draw_of(output, jnp.int32(0)), info_of(output, found.astype(jnp.float32))

    def init(self, target: Target, rng_key: Array, draw: Draw) -> NumPyroState:
        kernel = self.make(self.potential(target, draw))
        return NumPyroState(draw, kernel.init(rng_key, target.num_warmup, self.points(target, draw), (), {}))

    def at(self, target: Target, state: NumPyroState, draw: Draw) -> NumPyroState:
        return NumPyroState(draw, renewed(self.make, self.potential(target, draw), state.inner, self.points(target, draw)))

    def step(self, target: Target, rng_key: Array, state: NumPyroState) -> tuple[NumPyroState, Info]:
        point_key, sample_key = jax.random.split(rng_key)
        traces, inner = self._traces(target, state.draw), state.inner
        potential = self._potential(traces)
        kernel = self.make(potential)
        points, optional = dict(getattr(inner, kernel.sample_field)), self._optional(target)
        # NumPyro's kernels learn what to call from `init`
        jax.eval_shape(lambda: kernel.init(rng_key, target.num_warmup, points, (), {}))
        if optional or target.changing:
            for key, name in zip(jax.random.split(point_key, max(len(optional), 1)), optional):
                active, point = state.draw.active[name], points[name]
                points[name] = jnp.where(spread_over(active, point), point, jax.random.normal(key, point.shape, point.dtype))
            inner = renewed(self.make, potential, inner, points)
        inner = kernel.sample(settled(inner, target)._replace(rng_key=sample_key), (), {})
        _, draw, info = traces(getattr(inner, kernel.sample_field))
        # where it stands the density is known to be finite: the compiler leaves out to compute it again
        none = jnp.int32(-1)
        info = info._replace(faults=info.faults._replace(died=none, died_at=none, non_finite=none))
        stats = {name: getattr(inner, name) for name in STATS if hasattr(inner, name)}
        if hasattr(inner, "adapt_state"):
            stats["step_size"] = inner.adapt_state.step_size
        return NumPyroState(draw, inner), info._replace(accepted=jnp.float32(stats["accept_prob"]), stats=stats)

    def points(self, target: Target, draw: Draw) -> dict[str, Array]:
        """The point of each site; 0 where it is inactive."""
        values, names = target.choices(draw), list(self._shapes(target))
        located, _, _ = target.evaluate({**values, **{name: PointOf(values[name]) for name in names}})  # type: ignore[dict-item]
        return {name: located.values[name] for name in names}

    def potential(self, target: Target, draw: Draw) -> Potential:
        """Of points, with the rest of the trace as it is in `draw`: float32[], nats."""
        return self._potential(self._traces(target, draw))

    def _potential(self, traces: Callable[[Any], Any]) -> Potential:
        energy = lambda points: traces(points)[0]
        forward = getattr(self.make(energy), "_forward_mode_differentiation", False)
        return energy if forward else with_finite_gradient(energy)

    def _traces(self, target: Target, draw: Draw) -> Callable[[Any], tuple[Array, Draw, Info]]:
        """From points to their potential and the trace there. What does not depend on them is computed here, such as texts."""
        values, optional, mine = target.choices(draw), self._optional(target), self._shapes(target)

        def there(points: dict[str, Array]) -> tuple[Array, Draw, Info]:
            trace, log_density, info = target.evaluate({**values, **as_points(points)})
            energy = jnp.where(target.same_choices(draw, trace, but=mine), -log_density, jnp.inf)
            idle = [jnp.where(spread_over(trace.active[name], points[name]), 0.0, points[name] ** 2).sum() for name in optional]
            return energy + 0.5 * sum(idle), trace, info

        return specialised(there, {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in mine.items()})

    def _shapes(self, target: Target) -> dict[str, tuple[int, ...]]:
        return shapes(target, self.names, type(self).__name__)

    def _optional(self, target: Target) -> list[str]:
        """Its sites that may have inactive elements."""
        optional = optional_sites(target.staged.jaxpr)
        return [name for name in self._shapes(target) if name in optional]


class WithOptions(NamedTuple):
    """A `make` that is equal for equal options."""

    kernel: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, potential_fn: Potential) -> MCMCKernel:
        options = dict(self.options)
        if isinstance(options.get("dense_mass"), tuple):
            options["dense_mass"] = list(options["dense_mass"])
        return self.kernel(potential_fn=potential_fn, **options)


class HMC(NumPyro):
    """NumPyro's Hamiltonian Monte Carlo with trajectories of one length; see `mcmc.NumPyro`.

    Args:
        sites: names of continuous `sample` sites; all of them where none is named.
        options: those of `numpyro.infer.HMC`, such as `step_size`, `trajectory_length`, `num_steps`, `target_accept_prob`,
            `dense_mass`.

    >>> HMC("theta", step_size=0.1, trajectory_length=1.0)
    HMC('theta', step_size=0.1, trajectory_length=1.0)
    """

    kernel = numpyro.infer.HMC

    def __init__(self, *sites: str, **options: Any):
        make: Any = WithOptions(self.kernel, checked(type(self).__name__, self.kernel, options))
        super().__init__(make, *sites)

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.make.options]  # type: ignore[attr-defined]
        return f"{type(self).__name__}({', '.join([*map(repr, self.names), *options])})"


class NUTS(HMC):
    """NumPyro's No-U-Turn sampler (Hoffman and Gelman 2014; Betancourt 2017); see `mcmc.NumPyro`.

    Args:
        sites: names of continuous `sample` sites; all of them where none is named.
        options: those of `numpyro.infer.NUTS`, such as `target_accept_prob`, `dense_mass`, `max_tree_depth`, `step_size`.

    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> @ppl.program
    ... def noisy(ys):
    ...     scale = ppl.sample("scale", dist.HalfNormal(2.0))
    ...     ppl.observe("y", dist.Normal(0.0, scale), ys)
    >>> chains = inference.MCMC(mcmc.NUTS(), num_samples=300, num_warmup=200, num_chains=4)
    >>> posterior = chains.run(jax.random.key(0), noisy, jnp.array([0.3, -1.2, 0.8, 2.0]))
    >>> abs(posterior.expectation("scale") - 1.49) < 0.2, bool(posterior.moves.stats["diverging"].any())
    (np.True_, False)
    """

    kernel = numpyro.infer.NUTS


def checked(name: str, kernel: Any, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options of one of NumPyro's kernels, hashable; `SiteError` for others."""
    known = set(inspect.signature(kernel.__init__).parameters) - {"self", "model", "potential_fn", "init_strategy"}
    for option in options:
        if option not in known:
            raise SiteError(f"{name}: no option {option!r}; {near_misses(option, known)}")
    found = tuple((option, tuple(x) if isinstance(x, list) else x) for option, x in sorted(options.items()))
    for option, value in found:
        try:
            hash(value)
        except TypeError as error:
            raise SiteError(
                f"{name}: option {option!r} must be a number, or something else that can be hashed, not "
                f"{type(value).__name__}; make the kernel in a function, for `mcmc.NumPyro`"
            ) from error
    return found


def shapes(target: Target, names: tuple[str, ...], algorithm: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the points of these sites, loops and plates included; of all continuous ones where none is named."""
    found: dict[str, tuple[int, ...]] = {}
    for eqn in trace_eqns(target.staged.jaxpr):
        name, p = eqn.params.get("name"), eqn.params
        if eqn.primitive is not sample_p or name not in target.random or name not in (names or (name,)):
            continue
        leaves = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        try:
            shape = point_shape(p["tree"], leaves[:-1] if p["scaled"] else leaves, *p["out"])
        except (NotImplementedError, AttributeError) as error:
            raise SiteError(
                f"{algorithm}: site {name!r} has a support that NumPyro knows no bijection onto ({error}); move it by "
                "mcmc.Regenerate in a cycle, or name the sites to move"
            ) from error
        if shape is None:
            if names:
                raise SiteError(f"{algorithm}: site {name!r} is discrete and has no gradient; take mcmc.Gibbs({name!r})")
            continue
        whole = (*target.staged.sites[name].dims, *shape)
        if found.setdefault(name, whole) != whole:
            raise SiteError(
                f"{algorithm}: site {name!r} stands in exclusive branches with points of shapes {found[name]} and {whole}; "
                "give it different names there"
            )
    if texts := [name for name in names if name not in found]:
        raise SiteError(f"{algorithm}: site {texts[0]!r} is a text and has no gradient; move it by mcmc.Regenerate in a cycle")
    if not found:
        raise SiteError(f"{algorithm}: the program has no continuous random site; take mcmc.Gibbs or mcmc.Regenerate")
    return found


def as_points(points: Mapping[str, Array]) -> dict[str, Any]:
    return {name: Point(point) for name, point in points.items()}


def with_finite_gradient(energy: Potential) -> Potential:
    """The same function, with gradient 0 where that is infinite or NaN, which might get into what a kernel adapts. Moves by
    gradients stay valid with any function of the position in their place."""

    @jax.custom_vjp
    def guarded(points: Any) -> Array:
        return energy(points)

    def there(points: Any) -> tuple[Array, Any]:
        value, gradient = jax.value_and_grad(energy)(points)
        return value, jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), gradient)

    guarded.defvjp(there, lambda gradient, scale: (jax.tree.map(lambda x: scale * x, gradient),))
    return guarded


def renewed(make: Callable[[Potential], MCMCKernel], potential: Potential, inner: Any, points: dict[str, Array]) -> Any:
    """NumPyro's state at other points, or for another potential: what has been adapted stays."""
    kernel = make(potential)
    if not {kernel.sample_field, "potential_energy", "z_grad"} <= set(inner._fields):
        raise SiteError(
            f"{type(kernel).__name__} keeps more than the potential and gradient of where it stands, which other kernels "
            "cannot move, nor a target that changes: run it alone, on sites that are always active, or take NUTS"
        )
    inner = inner._replace(**{kernel.sample_field: points})
    if isinstance(kernel, numpyro.infer.HMC):  # which knows whether to differentiate forward
        return kernel.refresh(inner, (), {})
    energy, gradient = jax.value_and_grad(potential)(points)
    return inner._replace(potential_energy=energy, z_grad=gradient)


def settled(inner: Any, target: Target) -> Any:
    """NumPyro's state, with nothing more to adapt when warm-up is over, be it that not every step of it was this kernel's.

    NumPyro counts its own steps, and at the last one of warm-up takes the step size that dual averaging has found.
    """
    if not hasattr(inner, "adapt_state"):
        return inner
    unfinished = (target.iteration >= target.num_warmup) & (inner.i < target.num_warmup)
    _, log_step_size, _, updates, _ = inner.adapt_state.ss_state
    found = jnp.where(unfinished & (updates > 0), jnp.exp(log_step_size), inner.adapt_state.step_size)
    return inner._replace(
        i=jnp.where(unfinished, target.num_warmup, inner.i), adapt_state=inner.adapt_state._replace(step_size=found)
    )
