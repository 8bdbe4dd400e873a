"""What each site means to a particle: one function per primitive, from the interpreter and the operands to the outputs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ExpandedDistribution, MaskedDistribution

from . import sites
from .again import is_same, new_context, read_given, read_prompt
from .arena import keep_features, last_tokens, read_pending, read_row, start_row
from .choices import Spec
from .collectives import anybody
from .credit import Known
from .decode import decode, replay
from .errors import SiteError
from .notes import note_value
from .state import note_overflow, with_arena
from .text import PAD
from .unconstrained import Point, PointOf, constrained, point_at

if TYPE_CHECKING:
    from .interpreter import Interpreter

Array = jax.Array


def log_prob(dist: Any, value: Array) -> Array:
    """log density float32[] of a value, summed over the batch; -inf, with zero gradient, outside the support."""
    try:
        support = dist.support
        inside, safe = support(value), support.feasible_like(value)
    except (NotImplementedError, AttributeError, TypeError):
        return jnp.sum(dist.log_prob(value)).astype(jnp.float32)
    event = jnp.ndim(value) - jnp.ndim(inside)
    widened = jnp.reshape(inside, jnp.shape(inside) + (1,) * event)
    per_element = dist.log_prob(jnp.where(widened, value, safe))
    inside = jnp.broadcast_to(inside, jnp.shape(per_element)) if jnp.ndim(inside) <= jnp.ndim(per_element) else inside.all()
    return jnp.sum(jnp.where(inside | ~counted(dist), per_element, -jnp.inf)).astype(jnp.float32)


def counted(dist: Any) -> Array:
    """bool: which elements of a masked distribution pay their density; the others may hold anything, such as NaN."""
    mask = jnp.asarray(True)
    while isinstance(dist, (MaskedDistribution, ExpandedDistribution)):
        mask = mask & dist._mask if isinstance(dist, MaskedDistribution) else mask
        dist = dist.base_dist
    return mask


def harmless(dist: Any, value: Array, active: Any) -> Array:
    """A given value, but one inside the support where its site is inactive: what a trace holds there, zeros, might be a scale
    of 0, and what follows would have NaN gradients though it does not count."""
    if active is True:
        return value
    try:
        return jnp.where(active, value, dist.support.feasible_like(value))
    except (NotImplementedError, AttributeError, TypeError):
        return value


def meet(run: "Interpreter", given: Any) -> None:
    """Note that a choice of the given values' drawer is known from here on."""
    if run.state.credit is not None and isinstance(given, Known):
        credit = run.state.credit.meet(given.number, jnp.asarray(run.is_active()))
        run.state = run.state._replace(credit=credit)


def sample(
    run: "Interpreter", *operands: Array, name: str, tree: Any, scaled: bool, out: Any, support: Any, auxiliary: bool
) -> list[Any]:
    leaves, scale = (operands[:-1], operands[-1]) if scaled else (operands, jnp.float32(1))
    dist, (shape, dtype) = tree.unflatten(leaves), out
    spec, recorded = None if support is None else Spec(int(np.prod(shape)), len(support)), None
    if name in run.given:
        given = run.frame.get(run.given[name])
        if isinstance(given, Point):
            value, log_jacobian = constrained(dist, given.point)
            log_weight = scale * jnp.sum(dist.log_prob(value)) + log_jacobian
        else:
            value = given.value if isinstance(given, (PointOf, Known)) else given
            value = harmless(dist, jnp.broadcast_to(jnp.asarray(value).astype(dtype), shape), run.is_active())
            meet(run, given)
            log_weight = scale * log_prob(dist, value)
            recorded = point_at(dist, value) if isinstance(given, PointOf) else None
    elif (supplied := run.state.choices.supply(spec, run.is_active())) is not None:
        digits, canonical, choices = supplied
        run.state = run.state._replace(choices=choices)
        value = jnp.asarray(support)[digits].reshape(shape).astype(dtype)
        log_weight = jnp.where(canonical, jnp.where(run.is_active(), scale * log_prob(dist, value), 0.0), -jnp.inf)
        run.add_weight(name, log_weight, always=True)  # enumeration does not resample: the value stays where it is
        run.record(name, value)
        return [value]
    else:
        try:
            value, choices = run.state.choices.value(run.site(name), dist, run.state.made)
        except NotImplementedError as error:
            raise SiteError(
                f"site {name!r}: {type(dist).__name__} cannot be simulated ({error}); give it a proper prior, or a value"
            ) from error
        note_value(run, name, dist, value, log_prob)
        run.state = run.state._replace(choices=choices)
        run.count_choice(run.is_active())
        log_weight = (scale - 1) * log_prob(dist, value) if scaled else None
    cell = run.frame.put(value)
    if log_weight is not None:
        run.add_weight(name, log_weight)
    run.record(name, run.frame.get(cell) if recorded is None else recorded)
    return [run.frame.get(cell)]


def observe(run: "Interpreter", *operands: Array, name: str, tree: Any, scaled: bool) -> list[Any]:
    *leaves, value, scale = operands if scaled else (*operands, jnp.float32(1))
    run.add_evidence(name, scale * log_prob(tree.unflatten(leaves), value))
    return []


def factor(run: "Interpreter", log_weight: Array, *, name: str) -> list[Any]:
    run.count(potentials=run.is_active())
    run.add_evidence(name, log_weight)
    return []


def twist(run: "Interpreter", log_psi: Array, *, name: str) -> list[Any]:
    run.count(potentials=run.is_active())
    run.set_twist(name, log_psi)
    return []


def deterministic(run: "Interpreter", *leaves: Array, name: str, tree: Any) -> list[Any]:
    run.record(name, tree.unflatten(leaves))
    return []


def bound(run: "Interpreter", **_: Any) -> list[Any]:
    return []


def prompt(run: "Interpreter", tokens: Array, *, model: int, name: str) -> list[Any]:
    lm, arena = run.models[model], run.state.arenas[model]
    row, count, begins = start_row(lm, arena), (tokens != PAD).sum().astype(jnp.int32), arena.used
    clean = jnp.where(tokens == PAD, lm.eos_id, tokens)
    known = jnp.maximum(count - 1, 0)  # the last token is pending
    if run.nested:
        row = row._replace(pending=jnp.where(count > 0, clean[0], lm.start_id).astype(jnp.int32))
        _, _, arena, row, same = read_given(run, model, row, row.parent, jnp.roll(clean, -1), known, None)
    else:
        block, known_block = read_prompt(run, model, clean, count)
        row = row._replace(
            prompt=jnp.int32(len(run.prompts[model])),
            position=block.cached,
            pending=jnp.where(count > 0, clean[known], lm.start_id).astype(jnp.int32),
        )
        run.prompts[model].append(run.frame.put(block))
        same = None if run.state.same is None else known_block & is_same(run.state, arena, row, row.parent, begins)
    return [new_context(run, model, arena, row, row.parent, begins, same)]


def extend(run: "Interpreter", handle: Array, tokens: Array, *, model: int, name: str) -> list[Any]:
    return [_append_given(run, handle, tokens, model, None)]


def score(run: "Interpreter", handle: Array, tokens: Array, *, model: int, name: str) -> list[Any]:
    new_handle = _append_given(run, handle, tokens, model, name)
    return [new_handle]


def _append_given(run: "Interpreter", handle: Array, tokens: Array, model: int, scored: str | None) -> Array:
    """Append given text to a context; a scored one pays its log probability."""
    lm, arena, active = run.models[model], run.state.arenas[model], run.is_active()
    row, given, begins = read_row(arena, handle), (tokens != PAD).sum().astype(jnp.int32), arena.used
    count = jnp.where(active, given, 0)
    clean = jnp.where(tokens == PAD, lm.eos_id, tokens)
    before = None if scored is None else run.recorded_before(scored, jnp.zeros(tokens.shape, jnp.float32))
    _, log_probs, arena, after, same = read_given(run, model, row, handle, clean, count, before)
    here = jnp.arange(tokens.shape[0]) < given
    ends = (clean == lm.eos_id) & here
    over = (count > 0) & (after.position + 1 > lm.max_length)
    run.state = note_overflow(run.state, run.staged.sites[scored or "extend()"].number, over)
    # observed text may end the context; given text goes on after one that had ended
    finished = jnp.where(given > 0, clean[jnp.maximum(given - 1, 0)] == lm.eos_id if scored else False, row.finished)
    new_handle = new_context(run, model, arena, after._replace(finished=finished), handle, begins, same)
    if scored is not None:
        run.count(scored=count)
        impossible = (row.finished & (given > 0)) | (ends & (jnp.arange(tokens.shape[0]) < given - 1)).any()
        total = jnp.where(impossible, -jnp.inf, jnp.where(here, log_probs, 0.0).sum())
        cell = run.frame.put(new_handle)
        run.add_evidence(scored, total)
        if run.notes is not None:
            run.record(scored, log_probs)
        return run.frame.get(cell)
    return new_handle


def tokens(run: "Interpreter", handle: Array, *, last: int, model: int, name: str) -> list[Any]:
    arena = run.state.arenas[model]
    return list(last_tokens(arena, read_row(arena, handle), run.read_prompts(model), last, run.models[model].eos_id))


def features(run: "Interpreter", handle: Array, *, model: int, **_: Any) -> list[Any]:
    lm, arena, active = run.models[model], run.state.arenas[model], jnp.asarray(run.is_active())
    row, needed = read_row(arena, handle), lambda unread: anybody(active & unread, run.axes)
    only = None if run.state.same is None else active & (row.ahead < 0)
    found, arena, passed = read_pending(lm, arena, row, run.read_prompts(model), needed, only)
    run.state = with_arena(run.state, model, keep_features(arena, handle, row, found, active))
    run.count(model_calls=passed)
    return [found[0].astype(jnp.float32)]


def generate(
    run: "Interpreter", handle: Array, *operands: Array, name: str, model: int, max_tokens: int, **options: Any
) -> list[Any]:
    if run.progress is not None:
        run.progress(run.state.clock)
    lm = run.models[model]
    spec = Spec(max_tokens, lm.vocab_size)
    if name in run.given:
        given, canonical = run.frame.get(run.given[name]), jnp.asarray(True)
    elif (supplied := run.state.choices.supply(spec, run.is_active())) is not None:
        digits, canonical, choices = supplied
        run.state = run.state._replace(choices=choices)
        given = (digits + lm.eos_id) % lm.vocab_size  # digit 0 is EOS, the padding
    else:
        return decode(run, handle, operands, name=name, model=model, max_tokens=max_tokens, **options)
    return replay(run, handle, operands, given, canonical, name=name, model=model, max_tokens=max_tokens, **options)


RULES: dict[Any, Callable[..., list[Any]]] = {
    sites.sample_p: sample,
    sites.observe_p: observe,
    sites.factor_p: factor,
    sites.twist_p: twist,
    sites.deterministic_p: deterministic,
    sites.bound_p: bound,
    sites.prompt_p: prompt,
    sites.extend_p: extend,
    sites.score_p: score,
    sites.tokens_p: tokens,
    sites.features_p: features,
    sites.generate_p: generate,
}
