"""The sites of a program: each call binds one equation of a primitive that inference interprets.

A site has no meaning of its own to JAX. It may stand anywhere that a program's trace reaches: in the body of `scan`,
`while_loop`, `cond`, `switch` or `jit`, and under `vmap` of this module. Batching or differentiating one is an error.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching
from numpyro.distributions import Categorical

from .errors import SiteError, TransformationError
from .jaxpr import SitePrimitive, all_eqns, is_site
from .language_model import LanguageModel

Array = jax.Array

# --- staging: where sites may be bound --------------------------------------------------------------------------------


class Staging(threading.local):
    """What is being staged in this thread: the models met so far, and the prefix of site names."""

    models: list[LanguageModel] | None = None
    scope: tuple[str, ...] = ()
    number: int = 0
    pad_to: int = 0
    """given texts are padded to at least so many tokens"""

    def model_number(self, lm: LanguageModel) -> int:
        assert self.models is not None
        for i, known in enumerate(self.models):
            if known is lm:
                return i
        self.models.append(lm)
        return len(self.models) - 1


_staging = Staging()
_numbers = itertools.count(1)
_jax_context = jax.make_user_context(None)  # part of JAX's trace caches: a jitted helper is traced anew per scope


@contextlib.contextmanager
def staging(pad_to: int = 0) -> Iterator[Staging]:
    """Collect sites of the functions traced inside."""
    saved = _staging.models, _staging.scope, _staging.number, _staging.pad_to
    _staging.models, _staging.scope, _staging.number, _staging.pad_to = [], (), next(_numbers), pad_to
    try:
        with _jax_context((_staging.number, ())):
            yield _staging
    finally:
        _staging.models, _staging.scope, _staging.number, _staging.pad_to = saved


@contextlib.contextmanager
def scope(prefix: str) -> Iterator[None]:
    """Prefix the names of the sites inside with `prefix/`.

    >>> with scope("first"):
    ...     pass
    """
    saved = _staging.scope
    _staging.scope = (*saved, prefix)
    try:
        with _jax_context((_staging.number, _staging.scope)):
            yield
    finally:
        _staging.scope = saved


def site_name(name: str) -> str:
    """The full name of a site declared here; an error outside a program."""
    if not isinstance(name, str) or not name:
        raise SiteError(f"a site's name must be a non-empty string, not {name!r}")
    if _staging.models is None:
        raise SiteError(
            f"site {name!r} was reached outside of inference: decorate the function with `ppl.program` and hand it to an "
            "algorithm, such as `inference.SMC(num_particles=64).run(jax.random.key(0), program, *args)`"
        )
    return "/".join((*_staging.scope, name))


def least_padding() -> int:
    """To how many tokens given texts are padded at least."""
    return _staging.pad_to


def model_number(lm: LanguageModel) -> int:
    """The number by which sites of this program refer to `lm`."""
    return _staging.model_number(lm)


# --- primitives -------------------------------------------------------------------------------------------------------


def _primitive(name: str, abstract: Callable[..., list[jax.core.ShapedArray]]) -> SitePrimitive:
    primitive = SitePrimitive(name)
    primitive.def_abstract_eval(abstract)

    def refuse(transformation: str, mend: str) -> Callable[..., Any]:
        def rule(*_: Any, **params: Any) -> Any:
            raise TransformationError(f"site {params.get('name', name)!r} stands under {transformation}: {mend}")

        return rule

    batching.fancy_primitive_batchers[primitive] = refuse("jax.vmap", "use `ppl.vmap`, the plate, in its place")
    ad.primitive_jvps[primitive] = refuse(
        "differentiation (jax.grad, jvp or linearize)",
        "a program may differentiate functions of its values, not functions that hold sites",
    )
    return primitive


def _aval(shape: tuple[int, ...], dtype: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(shape, jnp.dtype(dtype))


def _text_avals(max_tokens: int) -> list[jax.core.ShapedArray]:
    """tokens, length, ended, log_probs."""
    return [_aval((max_tokens,), "int32"), _aval((), "int32"), _aval((), "bool"), _aval((max_tokens,), "float32")]


HANDLE = _aval((), "int32")

sample_p = _primitive("sample", lambda *leaves, out, **_: [_aval(*out)])
observe_p = _primitive("observe", lambda *operands, **_: [])
factor_p = _primitive("factor", lambda log_weight, **_: [])
twist_p = _primitive("twist", lambda log_psi, **_: [])
deterministic_p = _primitive("deterministic", lambda *leaves, **_: [])
bound_p = _primitive("bound", lambda **_: [])
prompt_p = _primitive("prompt", lambda tokens, **_: [HANDLE])
extend_p = _primitive("extend", lambda handle, tokens, **_: [HANDLE])
score_p = _primitive("score", lambda handle, tokens, **_: [HANDLE])
tokens_p = _primitive("tokens", lambda handle, last, **_: [_aval((last,), "int32"), _aval((), "int32")])
features_p = _primitive("features", lambda handle, size, **_: [_aval((size,), "float32")])
generate_p = _primitive("generate", lambda *operands, max_tokens, **_: [*_text_avals(max_tokens), HANDLE])


def _plate_avals(*operands: Any, size: int, jaxpr: Any, role: str, **_: Any) -> list[Any]:
    weights = [] if role == PLATE else [_aval((size,), jnp.float32)]
    return [_aval((size, *a.shape), a.dtype) for a in jaxpr.out_avals] + weights


PLATE, NESTED, LOOKAHEAD = "plate", "nested", "lookahead"
"""What a plate's elements are to the particle: parts of its trace, samples of an estimate of its weight, or of its twist."""

plate_p = _primitive("plate", _plate_avals)

CONTEXT_SITES = (prompt_p, extend_p, score_p, generate_p)
"""Sites that make a new context."""
NAMED_SITES = (sample_p, observe_p, factor_p, twist_p, deterministic_p, score_p, generate_p)
VALUE_SITES = (sample_p, generate_p, deterministic_p)
"""Sites whose values a trace records."""


def flatten(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Leaves and tree of a pytree."""
    return jax.tree.flatten(value, is_leaf=is_leaf)


def hoist(fn: Callable[..., Any], *args: Any, what: str | None = None) -> tuple[Any, list[Any], Any]:
    """Stage `fn` for arguments like `args`; what it closes over, traced values included, becomes leading operands.

    Returns the jaxpr (constants first among its inputs), the operands, and the tree of its result. `what` names a
    function that must not hold sites.
    """
    flat, tree = flatten(args)
    first, shape = jax.make_jaxpr(lambda *leaves: fn(*tree.unflatten(leaves)), return_shape=True)(*flat)  # type: ignore[call-overload]
    consts = list(first.consts)
    # a second trace turns the captured values into arguments, whatever this JAX version calls them
    open_jaxpr: Any = getattr(first, "jaxpr", first)
    closed = jax.make_jaxpr(lambda captured, leaves: jax.core.eval_jaxpr(open_jaxpr, captured, *leaves))(consts, flat)
    if what is not None and any(is_site(e) for e in all_eqns(closed)):
        raise SiteError(f"{what} holds a site: it must be a function of its arguments and of earlier values alone")
    return closed, consts, jax.tree.structure(shape)


# --- the language -----------------------------------------------------------------------------------------------------


def sample(name: str, dist: Any, *, auxiliary: bool = False) -> Array:
    """A random value from a NumPyro distribution.

    Returns an array of shape `dist.batch_shape + dist.event_shape`. An `auxiliary` value of a guide is noise that other sites
    are made of, whose densities account for it: the model has no such site.

    >>> import numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> @ppl.program
    ... def coin():
    ...     return ppl.sample("heads", dist.Bernoulli(0.3))
    """
    return bind_sample(name, dist, None, auxiliary)


def bind_sample(name: str, dist: Any, scale: Any, auxiliary: bool = False) -> Array:
    full = site_name(name)
    _check_distribution(full, dist)
    leaves, tree = flatten(dist)
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    try:
        out = _draw_shape(tree, shapes)
    except TypeError:  # something in the structure cannot be hashed
        out = _draw_shape.__wrapped__(tree, shapes)
    operands = leaves if scale is None else [*leaves, jnp.asarray(scale, jnp.float32)]
    about = dict(scaled=scale is not None, out=(out.shape, str(out.dtype)), support=_support(dist), auxiliary=auxiliary)
    return sample_p.bind(*operands, name=full, tree=tree, **about)[0]


@lru_cache(maxsize=1024)
def _draw_shape(tree: Any, shapes: tuple[Any, ...]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a draw from the distribution of this structure, with leaves of these shapes and dtypes."""
    leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    draw = lambda leaves, key: tree.unflatten(leaves).sample(key)
    try:
        return jax.eval_shape(draw, leaves, jax.eval_shape(lambda: jax.random.key(0)))  # type: ignore[no-any-return]
    except NotImplementedError:  # no proper distribution: an error only where it has to be drawn
        shape = jax.eval_shape(lambda leaves: jnp.zeros(tree.unflatten(leaves).shape()), leaves).shape
        return jax.ShapeDtypeStruct(shape, jnp.result_type(float))


def _check_distribution(name: str, dist: Any) -> None:
    if not (hasattr(dist, "log_prob") and hasattr(dist, "sample")):
        raise SiteError(f"site {name!r}: expected a NumPyro distribution, found {type(dist).__name__}")


def _support(dist: Any) -> tuple[float, ...] | None:
    """The values of one element of a finite distribution, where they do not depend on traced parameters."""
    if not getattr(dist, "has_enumerate_support", False) or dist.event_shape:
        return None
    try:
        with jax.ensure_compile_time_eval():
            return tuple(np.asarray(dist.enumerate_support(expand=False)).reshape(-1).tolist())
    except (jax.errors.JAXTypeError, TypeError, ValueError, NotImplementedError):
        return None


def observe(name: str, dist: Any, value: Any) -> None:
    """Condition on `value` being drawn from `dist`: the log-weight grows by its log density, in nats."""
    bind_observe(name, dist, value, None)


def bind_observe(name: str, dist: Any, value: Any, scale: Any) -> None:
    full = site_name(name)
    _check_distribution(full, dist)
    leaves, tree = flatten(dist)
    operands = [*leaves, jnp.asarray(value)]
    if scale is not None:
        operands.append(jnp.asarray(scale, jnp.float32))
    observe_p.bind(*operands, name=full, tree=tree, scaled=scale is not None)


def factor(name: str, log_weight: Any) -> None:
    """Add `log_weight` (float[], nats) to the log density. -inf kills the particle; NaN and +inf are errors."""
    factor_p.bind(_scalar(name, log_weight, jnp.float32), name=site_name(name))


def condition(name: str, holds: Any) -> None:
    """Keep only traces in which `holds` (bool[]) is true."""
    holds = _scalar(name, holds, jnp.bool_)
    factor_p.bind(jnp.where(holds, jnp.float32(0), -jnp.inf), name=site_name(name))


def twist(name: str, log_psi: Any) -> None:
    """Set the intermediate target: p times exp(`log_psi`), float[], nats.

    A twist replaces the earlier one of the same name and is taken back at the end of the program, so it steers SMC and
    leaves the posterior as it is.
    """
    twist_p.bind(_scalar(name, log_psi, jnp.float32), name=site_name(name))


def deterministic(name: str, value: Any) -> Any:
    """Record a computed value (a pytree of arrays) under a name; returns it."""
    leaves, tree = jax.tree.flatten(value)
    deterministic_p.bind(*map(jnp.asarray, leaves), name=site_name(name), tree=tree)
    return value


def _scalar(name: str, value: Any, dtype: Any) -> Array:
    if jnp.shape(value) != ():
        raise SiteError(
            f"site {name!r}: expected a scalar, found shape {jnp.shape(value)}; reduce it, with `.sum()` or `.all()`"
        )
    try:
        found = jnp.result_type(value)
    except TypeError as error:
        raise SiteError(f"site {name!r}: expected a number, found {type(value).__name__}") from error
    if dtype == jnp.bool_ and found != jnp.bool_:
        raise SiteError(f"site {name!r}: expected a bool, found {found}; compare it with something, such as `x == 24`")
    if dtype == jnp.float32 and not jnp.issubdtype(found, jnp.number) and found != jnp.bool_:
        raise SiteError(f"site {name!r}: expected a number of nats, found {found}")
    if dtype == jnp.float32 and found == jnp.bool_:
        raise SiteError(f"site {name!r}: a bool is not a log-weight; use `ppl.condition` to require it")
    return jnp.asarray(value, dtype)


def bound(max_steps: int, *, truncate: bool = False) -> None:
    """Declare, in the body of a `while_loop` that holds sites, how many steps it may take.

    A particle that is still going after `max_steps` raises `BoundReachedError`; with `truncate=True` the loop ends there
    and the program's target is the truncated one.
    """
    site_name("bound")
    if max_steps < 1:
        raise SiteError(f"a loop's bound must be at least 1, not {max_steps}")
    bound_p.bind(max_steps=int(max_steps), truncate=bool(truncate), name="bound()")


def vmap(fn: Callable[..., Any], in_axes: Any = 0, *, axis_size: int | None = None) -> Callable[..., Any]:
    """The plate: `fn` for each element of its arguments' axes, independently; sites inside may hold any value but contexts
    that leave it.

    `in_axes` is 0 or None for each argument; with no mapped argument, `axis_size` says how many elements there are.
    Values of sites inside have the plate as leading axis.
    """

    def mapped(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, (tuple, list)) else [in_axes] * len(args)
        if len(axes) != len(args) or any(a not in (0, None) for a in axes):
            raise SiteError(f"ppl.vmap: in_axes must be 0 or None for each of {len(args)} arguments, found {in_axes!r}")
        sizes = {jnp.shape(x)[0] for a, arg in zip(axes, args) if a == 0 for x in jax.tree.leaves(arg)}
        sizes |= set() if axis_size is None else {axis_size}
        if len(sizes) != 1:
            raise SiteError(f"ppl.vmap: the mapped axes must have one size, found {sorted(sizes) or 'none; give axis_size'}")
        (n,) = sizes
        if n == 0:
            raise SiteError("ppl.vmap: the mapped axes are empty; a plate has at least one element")
        return _plate(fn, args, axes, n, "ppl.vmap", PLATE)[0]

    return mapped


def nested(name: str, fn: Callable[..., Any], *, num_samples: int, ess_threshold: float = 0.0) -> Callable[..., Any]:
    """`fn` with its own sampler: one draw of what it returns, from its posterior, and its evidence as a weight.

    For each particle the sites of `fn` run `num_samples` times. The log-weight grows by the log of the mean of their weights,
    an unbiased estimate of the evidence of `fn`, and the result of one, drawn by weight, is returned. So the program means the
    same as with `fn` called in its place, for any number of samples (random-weight and nested sequential Monte Carlo:
    Fearnhead, Papaspiliopoulos, Roberts and Stuart 2010; Naesseth, Lindsten and Schon 2015): use it to average over what a
    reward depends on, such as ways to finish a text.

    With an `ess_threshold` the sampler is SMC: a particle's samples resample among themselves (systematically, at sites and
    inside texts) when their effective sample size falls below `ess_threshold * num_samples`, and twists in `fn` steer them.
    That pays where `fn` weighs its samples on the way. At 0, the default, it is importance sampling, and twists in `fn` do
    nothing: a function that weighs once, at its end, has nothing to resample, and only such samples can be repeated by
    `ParticleGibbs`, as values alone do not tell who was whose ancestor.

    Site `name` is the number of the sample that was drawn; values of the sites in `fn` have the samples as leading axis. They
    cannot be given or enumerated: an estimate has no density. Contexts do not leave `fn`. Where every sample has weight 0,
    so has the particle.

        reward = ppl.nested("rollouts", lambda: finish(context), num_samples=8)()
    """
    if num_samples < 1:
        raise SiteError(f"nested {name!r}: num_samples must be at least 1, not {num_samples}")
    if not ess_threshold >= 0:
        raise SiteError(f"nested {name!r}: ess_threshold must be at least 0, a part of num_samples, not {ess_threshold}")

    def estimated(*args: Any) -> Any:
        alone = [None] * len(args)
        out, (log_weights,) = _plate(fn, args, alone, num_samples, f"nested {name!r}", NESTED, name, float(ess_threshold))
        log_mean = jax.nn.logsumexp(log_weights) - np.log(num_samples)
        alive = log_mean > -jnp.inf
        which = sample(name, Categorical(logits=jnp.where(alive, log_weights, 0.0)))
        factor(f"{name} evidence", log_mean)
        return jax.tree.map(lambda x: x[which], out)

    return estimated


def lookahead(name: str, fn: Callable[..., Any], *, num_samples: int, floor: float = -float("inf")) -> Callable[..., None]:
    """A twist by short rollouts: log psi is the log of the mean weight of `num_samples` runs of `fn` from where a particle is.

    `fn` holds sites, such as a few tokens from a context and a factor for what they look like; its result is not used. Its
    sites are no part of the trace: their values are not recorded, given, enumerated or repeated, and their weights go to the
    twist `name` alone, which is set as by `ppl.twist` and taken back at the end. So whatever the rollouts draw, the posterior
    and the unbiased evidence stay those of the program without them (pilot lookahead: Lin, Chen and Liu 2013). Their tokens
    and passes count in the ledger. Where nothing resamples (enumeration, importance sampling, densities) a twist has no
    effect, and they are not run.

    Where every rollout has weight 0, psi is 0, and the particle is dropped when the population resamples next: right if it
    cannot go on, but if other rollouts might have, the posterior and the evidence lose what it would have led to. A `floor`
    for log psi, in nats, keeps them exact there.

        ppl.lookahead("promise", lambda: finish(context), num_samples=4, floor=-10.0)()

    Raises `SiteError` for fewer than 1 sample, and for a floor that is NaN or +inf.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        raise SiteError(f"lookahead {name!r}: num_samples must be a whole number of at least 1, not {num_samples!r}")
    if not floor < float("inf"):
        raise SiteError(f"lookahead {name!r}: the floor must be a number of nats below infinity, not {floor}")

    def estimated(*args: Any) -> None:
        silent = lambda *args: (fn(*args), ())[1]
        _, (log_weights,) = _plate(silent, args, [None] * len(args), int(num_samples), f"lookahead {name!r}", LOOKAHEAD)
        twist(name, jnp.maximum(jax.nn.logsumexp(log_weights) - np.log(num_samples), floor))

    return estimated


def _plate(
    fn: Callable[..., Any], args: Any, axes: Any, n: int, what: str, role: str, name: str = "vmap", ess_threshold: float = 0.0
) -> tuple[Any, list[Array]]:
    """`fn` for each of `n` elements, and their log-weights float32[n] where these are for the caller; elements of a nested
    site resample by a threshold."""
    element = [jax.tree.map(lambda x: jnp.asarray(x)[0], arg) if a == 0 else arg for a, arg in zip(axes, args)]
    closed, consts, tree = hoist(fn, *element)
    if "Context" in str(tree):
        raise SiteError(f"{what}: a context cannot leave the plate that it was made in; return its text instead")
    flat = [(jnp.asarray(x), a) for arg, a in zip(args, axes) for x in jax.tree.leaves(arg)]
    flags = tuple([False] * len(consts) + [a == 0 for _, a in flat])
    operands = (*consts, *[x for x, _ in flat])
    options = dict(name=f"{site_name(name)}()", role=role, ess_threshold=ess_threshold)
    out = plate_p.bind(*operands, jaxpr=closed, size=n, mapped=flags, **options)
    count = len(closed.out_avals)
    return tree.unflatten(out[:count]), out[count:]
