"""Staging: from a Python function to a jaxpr in which sites are equations, and what can be read off it before it runs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from . import numpyro_bridge
from .errors import SiteError, SiteNameError, near_misses
from .jaxpr import CALLS, Literal, all_eqns, body_of, called_jaxpr, inner_jaxprs, is_site, scan_of, sites_inside, structural_key
from .language_model import LanguageModel
from .proposals import checks_tokens, has_potentials
from .sites import (
    CONTEXT_SITES,
    LOOKAHEAD,
    NAMED_SITES,
    VALUE_SITES,
    bound_p,
    features_p,
    flatten,
    generate_p,
    plate_p,
    prompt_p,
    sample_p,
    staging,
    twist_p,
)


@dataclass(frozen=True)
class Need:
    """What one stretch of a program takes at most: rows and slots of each model's arena."""

    handles: dict[int, int] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)

    def __add__(self, other: "Need") -> "Need":
        join = lambda a, b: {k: a.get(k, 0) + b.get(k, 0) for k in {*a, *b}}
        return Need(join(self.handles, other.handles), join(self.slots, other.slots))

    def __mul__(self, times: int) -> "Need":
        scale = lambda d: {k: v * times for k, v in d.items()}
        return Need(scale(self.handles), scale(self.slots))


@dataclass(frozen=True)
class Site:
    """What is known of a named site before anything runs."""

    name: str
    kind: str
    number: int
    dims: tuple[int, ...] = ()
    """length of each enclosing loop and plate: leading axes of its value"""
    model: int | None = None
    max_tokens: int = 0
    draft: int | None = None
    """the model of a text's draft"""
    out: tuple[tuple[int, ...], str] | None = None
    """shape and dtype of a `sample` site's value"""
    in_rollout: bool = False
    """whether it is part of a `ppl.lookahead`, not of the trace"""


@dataclass(frozen=True)
class Staged:
    """A staged program: straight JAX code with site equations in it, and the arrays that feed it."""

    jaxpr: Any
    inputs: list[Any]
    """arrays of the arguments"""
    consts: dict[int, Any]
    """array constants that are inputs of the compiled program, by identity"""
    models: list[LanguageModel]
    out_tree: Any
    sites: dict[str, Site]
    twists: dict[str, tuple[int, ...]]
    """name and plate axes of every twist"""
    trees: tuple[Any, ...] = ()
    """structure of each model, in a skeleton"""

    def skeleton(self) -> "Staged":
        """The same without its input arrays and weights, for a compiled run to keep."""
        trees = self.trees or tuple(flatten(lm)[1] for lm in self.models)
        return replace(self, inputs=[], consts=dict.fromkeys(self.consts), models=[], trees=trees)

    def key(self) -> Any:
        """Equal for programs that one compiled run serves."""
        leaves = [jax.tree.flatten(lm) for lm in self.models]
        return structural_key(self.jaxpr, {c: i for i, c in enumerate(self.consts)}), tuple(tree for _, tree in leaves)


CONCRETIZATION = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
                  jax.errors.TracerBoolConversionError, jax.errors.TracerIntegerConversionError,
                  jax.errors.NonConcreteBooleanIndexError)  # fmt: skip


def _is_static(leaf: Any) -> bool:
    return not isinstance(leaf, (np.ndarray, jax.Array))


def stage(fn: Callable[..., Any], args: tuple[Any, ...], pad_to: int = 0) -> Staged:
    """Trace a function that holds sites.

    Arrays among `args` become inputs; everything else (strings, numbers, functions, models) is static.
    A function that needs concrete arrays (for shapes, say) is staged with them as constants, which are hoisted.
    Given texts are padded to at least `pad_to` tokens.
    """
    plain = (int, float, str)  # as in lists of token ids; asking whether they are models takes longer than the rest
    is_model = lambda x: not isinstance(x, plain) and (isinstance(x, LanguageModel) or callable(x))
    leaves, tree = flatten(args, is_model)
    arrays = [leaf for leaf in leaves if not _is_static(leaf)]

    def run(*traced: Any) -> Any:
        values = iter(traced)
        filled = [leaf if _is_static(leaf) else next(values) for leaf in leaves]
        with numpyro_bridge.intercept():
            return fn(*tree.unflatten(filled))

    with staging(pad_to) as context:
        try:
            closed, shape = jax.make_jaxpr(run, return_shape=True)(*arrays)
        except CONCRETIZATION:
            assert context.models is not None
            context.models.clear()
            whole = arrays
            closed, shape = jax.make_jaxpr(lambda: run(*whole), return_shape=True)()
            arrays = []
        models = list(context.models or [])
    _check_names(closed)
    sites = _sites(closed)
    return Staged(closed, arrays, _hoisted(closed), models, jax.tree.structure(shape), sites, _twists(closed, ()))


def walks_into(eqn: Any) -> bool:
    """Whether the interpreter goes through an equation's inner jaxprs itself, rather than binding it whole."""
    return (eqn.primitive.name in CALLS and called_jaxpr(eqn) is not None and (
        eqn.primitive.name in ("jit", "pjit") or holds_sites(eqn)
    )) or (not is_site(eqn) and holds_sites(eqn))  # fmt: skip


def holds_sites(eqn: Any) -> bool:
    return any(is_site(e) for inner in inner_jaxprs(eqn) for e in all_eqns(inner))


def is_rollout(eqn: Any) -> bool:
    """Whether an equation's sites are those of a `ppl.lookahead`."""
    return eqn.primitive is plate_p and eqn.params["role"] == LOOKAHEAD


def trace_eqns(closed: Any) -> Iterator[Any]:
    """Every equation, those of inner jaxprs included, but none of rollouts, whose sites are no part of the trace."""
    for eqn in body_of(closed).eqns:
        yield eqn
        for inner in [] if is_rollout(eqn) else inner_jaxprs(eqn):
            yield from trace_eqns(inner)


def steady_prompts(closed: Any) -> dict[int, list[bool]]:
    """Of each model, in the order in which a walk meets its prompts outside of loops, branches and plates: whether what the
    prompt holds depends on nothing random, so that it is the same in every walk."""
    found: dict[int, list[bool]] = {}

    def visit(closed: Any, random: list[bool]) -> list[bool]:
        jaxpr = body_of(closed)
        env = dict(zip(jaxpr.invars, random))
        for eqn in jaxpr.eqns:
            inputs = [not isinstance(a, Literal) and env.get(a, False) for a in eqn.invars]
            if eqn.primitive is prompt_p:
                found.setdefault(eqn.params["model"], []).append(not any(inputs))
                outputs = [False] * len(eqn.outvars)
            elif not is_site(eqn) and walks_into(eqn) and (called := called_jaxpr(eqn)) is not None:
                outputs = visit(called, inputs)
            else:
                outputs = [any(inputs) or is_site(eqn) or walks_into(eqn)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outputs))
        return [not isinstance(a, Literal) and env.get(a, False) for a in jaxpr.outvars]

    visit(closed, [False] * len(body_of(closed).invars))
    return found


def _hoisted(closed: Any) -> dict[int, Any]:
    """Constants along the way that the interpreter walks; it reads them from the inputs of the compiled program."""
    found = {id(c): c for c in getattr(closed, "consts", ())}
    for eqn in body_of(closed).eqns:
        if walks_into(eqn) or eqn.primitive is plate_p:
            for inner in inner_jaxprs(eqn):
                found.update(_hoisted(inner))
    return found


def _sites(closed: Any) -> dict[str, Site]:
    sites: dict[str, Site] = {}

    def visit(closed: Any, dims: tuple[int, ...], in_rollout: bool) -> None:
        for eqn in body_of(closed).eqns:
            p, inside = eqn.params, dims
            if is_site(eqn) and (name := p.get("name")):
                number = sites[name].number if name in sites else len(sites)
                about = p.get("model"), p.get("max_tokens", 0), p.get("draft"), p.get("out")
                site = Site(name, eqn.primitive.name, number, dims, *about, in_rollout)
                if sites.setdefault(name, site) != site and eqn.primitive in VALUE_SITES:
                    raise SiteError(
                        f"site {name!r} stands in exclusive branches with values of different kinds or shapes; give them "
                        "one shape, or different names"
                    )
            if eqn.primitive is plate_p:
                inside = (*dims, p["size"])
            elif holds_sites(eqn) and eqn.primitive.name == "scan":
                inside = (*dims, scan_of(eqn).length)
            elif holds_sites(eqn) and eqn.primitive.name == "while":
                inside = (*dims, loop_bound(eqn)[0])
            for inner in inner_jaxprs(eqn):
                visit(inner, inside, in_rollout or is_rollout(eqn))

    visit(closed, (), False)
    return sites


def _check_names(closed: Any) -> set[str]:
    """Names of a jaxpr's sites; the same name is legal only in exclusive branches of one `cond`."""
    seen: set[str] = set()

    def add(names: set[str]) -> None:
        if repeated := seen & names:
            name = sorted(repeated)[0]
            raise SiteNameError(
                f"site {name!r} is declared twice; names are unique, save in exclusive branches of one `lax.cond`: rename "
                "one, or put it under `with ppl.scope(...)`"
            )
        seen.update(names)

    for eqn in body_of(closed).eqns:
        if eqn.primitive in NAMED_SITES:
            add({eqn.params["name"]})
        inner = [_check_names(j) for j in inner_jaxprs(eqn) if not is_site(eqn) or eqn.primitive is plate_p]
        if eqn.primitive.name == "cond":
            add(set().union(*inner))
        else:
            for names in inner:
                add(names)
    return seen


def _twists(closed: Any, plates: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for eqn in body_of(closed).eqns:
        if eqn.primitive is twist_p or (eqn.primitive is generate_p and _steers(eqn.params)):
            found[eqn.params["name"]] = plates
        elif not is_site(eqn) or eqn.primitive is plate_p:
            inside = (*plates, eqn.params["size"]) if eqn.primitive is plate_p else plates
            for inner in inner_jaxprs(eqn):
                found.update(_twists(inner, inside))
    return found


def _steers(generate: dict[str, Any]) -> bool:
    """Whether a `generate` equation with these parameters moves a twist inside its text."""
    return generate["twist"] is not None or has_potentials(generate["constraint"]) or has_potentials(generate["head"])


def need(closed: Any, *, nested: bool = False) -> Need:
    """Rows and slots that one pass through a jaxpr may take, loops unrolled and every branch counted."""
    total = Need()
    for eqn in body_of(closed).eqns:
        if eqn.primitive in CONTEXT_SITES:
            m, p = eqn.params["model"], eqn.params
            slots = p.get("max_tokens") or eqn.invars[-1].aval.shape[0]
            if eqn.primitive is prompt_p and not nested:
                slots = 0  # a prompt outside of loops has a block of its own
            total += Need({m: 1}, {m: slots})
            if (drafter := p.get("draft")) is not None:  # which grows as the text does, if only inside it
                total += Need({}, {drafter: slots})
        elif eqn.primitive is features_p:
            total += Need({}, {eqn.params["model"]: 1})
        elif eqn.primitive is plate_p:
            continue  # its elements have arenas of their own
        elif eqn.primitive.name == "scan" and holds_sites(eqn):
            total += need(eqn.params["jaxpr"], nested=True) * scan_of(eqn).length
        elif eqn.primitive.name == "while" and holds_sites(eqn):
            total += need(eqn.params["body_jaxpr"], nested=True) * loop_bound(eqn)[0]
        elif walks_into(eqn):
            for inner in inner_jaxprs(eqn):
                total += need(inner, nested=nested or eqn.primitive.name == "cond")
    return total


def loop_bound(eqn: Any) -> tuple[int, bool]:
    """The bound that a `while` with sites declares in its body, and whether it truncates there."""

    def bounds(closed: Any) -> list[Any]:
        found = []
        for e in body_of(closed).eqns:
            if e.primitive is bound_p:
                found.append(e)
            elif e.primitive.name not in ("while", "scan"):  # an inner loop has a bound of its own
                found += [b for inner in inner_jaxprs(e) for b in bounds(inner)]
        return found

    declared = bounds(eqn.params["body_jaxpr"])
    if not declared:
        name = next((e.params["name"] for e in all_eqns(eqn.params["body_jaxpr"]) if is_site(e)), "?")
        raise SiteError(f"site {name!r} stands in a while loop without a bound: call `ppl.bound(max_steps)` in the loop's body")
    return declared[0].params["max_steps"], declared[0].params["truncate"]


def check_given(staged: Staged, given: Mapping[str, Any]) -> None:
    """Every given name must be a random site."""
    random = random_sites(staged)
    for name in given:
        if name not in random:
            site = staged.sites.get(name)
            what = f"is a {site.kind} site, which has no value to give" if site else "does not exist"
            if site and site.in_rollout:
                what = "is inside `ppl.lookahead`, and cannot be given"
            raise SiteNameError(f"site {name!r} {what}; {near_misses(name, random)}")


def check_repeatable(staged: Staged, given: Collection[str]) -> None:
    """`SiteError` unless one particle of a population can repeat a trace, with the weights that it had."""
    for eqn in trace_eqns(staged.jaxpr):
        if eqn.primitive is plate_p and eqn.params["ess_threshold"]:
            raise SiteError(
                f"nested {eqn.params['name'].removesuffix('()')!r} resamples its samples, and a trace through it cannot be "
                "repeated: its values do not tell their ancestors; give it ess_threshold=0"
            )
        if eqn.primitive is generate_p and eqn.params["name"] not in given and checks_tokens(eqn.params["constraint"]):
            raise SiteError(
                f"site {eqn.params['name']!r}: its constraint is asked about one token at a time (`allows`), so its weight is "
                "random and a trace through it cannot be repeated; give the constraint a `mask`, or take SMC or PMMH"
            )


def optional_sites(closed: Any) -> set[str]:
    """The names of sites that may be inactive: those in branches and in `while` loops."""
    conditional = [eqn for eqn in trace_eqns(closed) if eqn.primitive.name in ("cond", "while")]
    return {name for eqn in conditional for inner in inner_jaxprs(eqn) for name in sites_inside(inner)}


def value_sites(staged: Staged) -> list[Site]:
    """The sites whose values a trace records."""
    kinds = {p.name for p in VALUE_SITES}
    return [s for s in staged.sites.values() if s.kind in kinds and not s.in_rollout]


def random_sites(staged: Staged) -> list[str]:
    """The names of a trace's random sites."""
    return [s.name for s in staged.sites.values() if s.kind in (sample_p.name, generate_p.name) and not s.in_rollout]
