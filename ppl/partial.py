"""Partial evaluation: what of a function does not depend on its arguments is computed once, before it is called many times.

So a text is scored once for a trajectory of many leapfrog steps that it does not depend on. Scans are split in two: one of what
is known, whose values at each step the other one reads. A scan within a scan, a branch and a `while` are taken as wholes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from .jaxpr import Literal, bind, body_of, consts_of, scan_of


class Parts(NamedTuple):
    """The equations of a jaxpr by whether they depend on what is unknown."""

    known: list[Any]
    later: list[Any]
    variables: set[Any]
    """those that are known"""


def specialised(fn: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """`fn` of arguments like `example`, with all that does not depend on them computed here."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(example)  # type: ignore[call-overload]
    jaxpr, known = body_of(closed), dict(zip(body_of(closed).constvars, consts_of(closed)))
    later: list[Callable[..., None]] = []
    for eqn in jaxpr.eqns:
        if all(_is_in(known, a) for a in eqn.invars):
            _run(eqn, known)
        elif eqn.primitive.name == "scan":
            later.append(_split_scan(known, eqn))
        else:
            later.append(partial(_run, eqn))

    def rest(arguments: Any) -> Any:
        env = {**known, **dict(zip(jaxpr.invars, jax.tree.leaves(arguments)))}
        for run in later:
            run(env)
        return jax.tree.unflatten(jax.tree.structure(shape), [_read(env, a) for a in jaxpr.outvars])

    return rest


def _is_in(known: Any, atom: Any) -> bool:
    return isinstance(atom, Literal) or atom in known


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def _run(eqn: Any, env: dict[Any, Any]) -> None:
    env.update(zip(eqn.outvars, bind(eqn, [_read(env, a) for a in eqn.invars])))


def _parts(jaxpr: Any, known: Sequence[bool]) -> Parts:
    """The equations of a body whose inputs are known where `known` says so."""
    parts = Parts([], [], {v for v, k in zip(jaxpr.invars, known) if k} | set(jaxpr.constvars))
    for eqn in jaxpr.eqns:
        if all(_is_in(parts.variables, a) for a in eqn.invars):
            parts.known.append(eqn)
            parts.variables.update(eqn.outvars)
        else:
            parts.later.append(eqn)
    return parts


def _split_scan(known: dict[Any, Any], eqn: Any) -> Callable[[dict[Any, Any]], None]:
    """Run the known part of a scan and add what it gives to `known`; the other part, a function of the values then."""
    s, flags = scan_of(eqn), [_is_in(known, a) for a in eqn.invars]
    body, carries = body_of(s.body), range(s.num_consts, s.num_consts + s.num_carry)
    while True:  # a carry is known if it stays so
        parts = _parts(body, flags)
        lost = [i for i in carries if flags[i] and not _is_in(parts.variables, body.outvars[i - s.num_consts])]
        if not lost:
            break
        flags = [k and i not in lost for i, k in enumerate(flags)]
    constants, outs = dict(zip(body.constvars, consts_of(s.body))), [_is_in(parts.variables, v) for v in body.outvars]
    shared = {v: a for v, a, k in zip(body.invars[: s.num_consts], eqn.invars, flags) if k}
    reads = [a for e in parts.later for a in e.invars] + [body.outvars[i - s.num_consts] for i in carries if not flags[i]]
    there = {*shared, *constants}
    between = list(dict.fromkeys(v for v in reads if not isinstance(v, Literal) and v in parts.variables and v not in there))

    def loop(env: dict[Any, Any], eqns: list[Any], want: bool, reads: list[Any], read: Any, gives: list[Any]) -> Any:
        """The scan of those equations that are known, or are not: last carry, outputs, and what it gives at each step."""
        chosen = [i for i, k in enumerate(flags) if k == want]
        mine = [i for i in chosen if i in carries]
        xs = [i for i in chosen if i >= carries.stop]
        fixed = {v: _read(env, a) for v, a in shared.items()} | {
            body.invars[i]: _read(env, eqn.invars[i]) for i in chosen if i < s.num_consts
        }
        ys = [i for i in range(s.num_carry, len(body.outvars)) if outs[i] == want]

        def step(carry: list[Any], slices: Any) -> Any:
            here = {**constants, **fixed, **dict(zip([body.invars[i] for i in mine], carry))}
            here |= dict(zip([body.invars[i] for i in xs], slices[0])) | dict(zip(reads, slices[1]))
            for e in eqns:
                _run(e, here)
            after = [_read(here, body.outvars[i - s.num_consts]) for i in mine]
            return after, ([_read(here, body.outvars[i]) for i in ys], [here[v] for v in gives])

        inputs = [_read(env, eqn.invars[i]) for i in xs], read
        carry = [_read(env, eqn.invars[i]) for i in mine]
        carry, (outputs, given) = jax.lax.scan(step, carry, inputs, length=s.length, reverse=s.reverse)
        env.update(zip([eqn.outvars[i - s.num_consts] for i in mine], carry))
        env.update(zip([eqn.outvars[i] for i in ys], outputs))
        return given

    given = loop(known, parts.known, True, [], [], between)
    return lambda env: loop(env, parts.later, False, between, given, [])
