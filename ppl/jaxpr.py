"""Reading jaxprs: the one module that knows how JAX 0.10 and 0.11 lay them out.

JAX 0.11 made `ClosedJaxpr` the same class as `Jaxpr` and renamed parameters of `scan`; everything here works on both.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

Jaxpr = core.Jaxpr
Literal = core.Literal
DropVar = core.DropVar
JAXPRS = (core.ClosedJaxpr, core.Jaxpr)

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""Primitives that call one inner jaxpr with the equation's own inputs."""


def body_of(closed: Any) -> Any:
    """The open jaxpr of a closed or open one."""
    return getattr(closed, "jaxpr", closed)


def consts_of(closed: Any) -> list[Any]:
    return list(getattr(closed, "consts", ()))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters, closed ones as they are."""
    found = []
    for value in eqn.params.values():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, JAXPRS):
                found.append(v)
    return found


def called_jaxpr(eqn: Any) -> Any:
    """The jaxpr that a call equation (`CALLS`) runs."""
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr")))


def all_eqns(closed: Any) -> Iterator[Any]:
    """Every equation, those of inner jaxprs included, in order."""
    for eqn in body_of(closed).eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from all_eqns(inner)


class Scan(NamedTuple):
    """What a scan equation says, the same on every JAX version."""

    body: Any
    length: int
    reverse: bool
    num_consts: int
    num_carry: int


def scan_of(eqn: Any) -> Scan:
    """Split a scan's inputs into consts, carry and xs: an input is an x, an output a y, iff its rank changes."""
    body = body_of(eqn.params["jaxpr"])
    ndim = lambda v: len(v.aval.shape)
    num_xs = sum(ndim(a) != ndim(v) for a, v in zip(eqn.invars, body.invars))
    num_ys = sum(ndim(a) != ndim(v) for a, v in zip(eqn.outvars, body.outvars))
    num_carry = len(body.outvars) - num_ys
    return Scan(eqn.params["jaxpr"], eqn.params["length"], eqn.params["reverse"],
                len(body.invars) - num_xs - num_carry, num_carry)  # fmt: skip


def bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    """Apply an equation's primitive to values."""
    params = eqn.primitive.get_bind_params(eqn.params) if hasattr(eqn.primitive, "get_bind_params") else eqn.params
    out = eqn.primitive.bind(*inputs, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


SKIPPED_PARAMS = ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "bwd_callable", "out_trees", "name")
"""Thunks of custom derivatives are new objects at each staging; names of functions mean nothing."""


def structural_key(closed: Any, hoisted: Mapping[int, int] | None = None) -> tuple:
    """A hashable value equal for jaxprs that compute the same function of their inputs and hoisted constants.

    Constants whose identity is in `hoisted` enter by their number there, since they are inputs of the compiled program; any
    other is compiled in and enters by its content.
    """
    hoisted = hoisted or {}
    numbers: dict[Any, int] = {}

    def number(v: Any) -> Any:
        if isinstance(v, Literal):
            return ("literal", *aval_key(v.aval), np.asarray(v.val).tobytes())
        return numbers.setdefault(v, len(numbers))

    jaxpr = body_of(closed)
    inputs = tuple((number(v), *aval_key(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars))
    baked = tuple(hoisted[id(c)] if id(c) in hoisted else param_key(c, hoisted) for c in consts_of(closed))
    eqns = tuple(
        (
            eqn.primitive.name,
            tuple(number(v) for v in eqn.invars),
            tuple((number(v), *aval_key(v.aval)) for v in eqn.outvars),
            tuple((k, param_key(v, hoisted)) for k, v in sorted(eqn.params.items()) if k not in SKIPPED_PARAMS or is_site(eqn)),
        )
        for eqn in jaxpr.eqns
    )
    return inputs, baked, eqns, tuple(number(v) for v in jaxpr.outvars)


def is_site(eqn: Any) -> bool:
    """Whether an equation is one of this library's own."""
    return isinstance(eqn.primitive, SitePrimitive)


def sites_inside(closed: Any) -> list[str]:
    """Names of the sites of a jaxpr, those of nested ones included."""
    return [e.params["name"] for e in all_eqns(closed) if is_site(e) and "name" in e.params]


class SitePrimitive(core.Primitive):
    """A primitive that inference interprets; it has no meaning of its own to JAX."""

    multiple_results = True


def aval_key(aval: Any) -> tuple:
    return aval.shape, str(aval.dtype), getattr(aval, "weak_type", False)


def param_key(value: Any, hoisted: Mapping[int, int]) -> Any:
    if isinstance(value, JAXPRS):
        return structural_key(value, hoisted)
    if isinstance(value, (tuple, list)):
        return tuple(param_key(v, hoisted) for v in value)
    if isinstance(value, dict):
        return tuple((k, param_key(v, hoisted)) for k, v in sorted(value.items()))
    if isinstance(value, (np.ndarray, jax.Array)):
        array = np.asarray(value)
        return array.shape, str(array.dtype), array.tobytes()
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
