"""Generating a text: the decode loop, and the density of a text whose tokens are known."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from .arena import Row, add_row, append, follow, read_pending, read_row
from .collectives import anybody, index, reindex
from .errors import SiteError
from .language_model import token_log_probs
from .lineage import Policy, resample
from .proposals import has_potentials
from .state import choose, note_overflow, pay, steer, with_arena
from .text import Text

if TYPE_CHECKING:
    from .interpreter import Interpreter

Array = jax.Array


class Options(NamedTuple):
    """The parts of a `generate` site besides its context; None where absent."""

    table: Array | None
    """int32[Q, V]: the stop automaton"""
    constraint: Any
    proposal: Any
    proposal_operands: tuple[Array, ...]
    twist: Any
    twist_operands: tuple[Array, ...]

    def follow(self, ancestor: Array) -> "Options":
        """The same, as particle number `ancestor` has it."""
        moved = reindex((self.table, self.constraint, self.proposal_operands, self.twist_operands), ancestor)
        return Options(moved[0], moved[1], self.proposal, moved[2], self.twist, moved[3])

    def stops(self, state: Array, token: Array) -> tuple[Array, Array]:
        """The stop automaton's next state, and whether it says that the text is over."""
        if self.table is None:
            return state, jnp.asarray(False)
        after = self.table[state, token]
        return jnp.minimum(after, self.table.shape[0] - 1), after == self.table.shape[0]

    @property
    def steers(self) -> bool:
        """Whether the site has a twist."""
        return self.twist is not None or has_potentials(self.constraint)

    def propose(self, logits: Array) -> Array:
        """The proposal's logits; the model's where there is none."""
        if self.proposal is None:
            return logits
        return jax.core.eval_jaxpr(_open(self.proposal), (), *self.proposal_operands, logits)[0].astype(jnp.float32)

    def log_psi(self, text: Text) -> Array:
        leaves = jax.tree.leaves(text)
        return jax.core.eval_jaxpr(_open(self.twist), (), *self.twist_operands, *leaves)[0]


def _open(closed: Any) -> Any:
    return getattr(closed, "jaxpr", closed)


def read_options(operands: tuple[Array, ...], counts: tuple[int, ...], constraint: Any, proposal: Any, twist: Any) -> Options:
    groups, start = [], 0
    for n in counts:
        groups.append(operands[start : start + n])
        start += n
    table, leaves, proposal_operands, twist_operands = groups
    return Options(
        table[0] if table else None, constraint.unflatten(leaves), proposal, proposal_operands, twist, twist_operands
    )


class Writing(NamedTuple):
    """A text in the making; moves as a whole when particles resample inside it."""

    row: Row
    tokens: Array
    length: Array
    ended: Array
    done: Array
    log_probs: Array
    stop_state: Array
    constraint_state: Any


def weighted(params: dict[str, Any]) -> bool:
    """Whether weights can move inside the text of a `generate` equation with these parameters."""
    constrained = params["constraint"] != jax.tree.structure(None)
    return constrained or params["proposal"] is not None or params["twist"] is not None


def decode(run: "Interpreter", handle: Array, operands: tuple[Array, ...], *, name: str, model: int, max_tokens: int,
           counts: Any, constraint: Any, proposal: Any, twist: Any) -> list[Any]:  # fmt: skip
    """Draw a text token by token. Returns tokens, length, ended, log_probs and the handle of the context after it."""
    lm, site, number = run.models[model], run.site(name), run.staged.sites[name].number
    options = read_options(operands, counts, constraint, proposal, twist)
    active, prompts = run.is_active(), run.read_prompts(model)
    row = read_row(run.state.arenas[model], handle)
    policy, progress = run.policy, run.progress
    moves = weighted({"constraint": constraint, "proposal": proposal, "twist": twist})
    inside = policy is not None and policy.inside_texts and moves
    me = index() if inside else jnp.int32(0)
    dead = lambda state: state.log_weight == -jnp.inf  # spends nothing more, whatever follows
    idle = row.finished | ~jnp.asarray(active) | dead(run.state)
    writing = Writing(
        row=row,
        tokens=jnp.full(max_tokens, lm.eos_id, jnp.int32),
        length=jnp.int32(0),
        ended=row.finished,
        done=idle,
        log_probs=jnp.zeros(max_tokens, jnp.float32),
        stop_state=jnp.int32(0),
        constraint_state=() if options.constraint is None else options.constraint.start(max_tokens),
    )

    def going(loop: Any) -> Array:
        step, writing, *_ = loop
        return (step < max_tokens) & anybody(~writing.done, run.axes)

    def one_token(loop: Any) -> Any:
        step, w, since, state = loop
        if inside:
            state, w, ancestor = resample(cast(Policy, policy), state, w)
            since = reindex(since, ancestor)
        here = options.follow(since) if inside else options
        known = reindex(prompts, since) if inside else prompts
        arena, live = state.arenas[model], ~w.done
        features, arena, passed = read_pending(lm, arena, w.row, known, lambda unread: anybody(live & unread, run.axes))
        logits = side_by_side(lm.unembed(features)[0])
        token, log_p, log_q, log_psi, choices, restricted = draw(
            state.choices, site, step, logits, here, w.constraint_state, state.made
        )
        arena, row = follow(arena, w.row, token, live)
        ends = token == lm.eos_id
        stop_state, stops = here.stops(w.stop_state, token)
        ended = live & (ends | stops)
        put = lambda x, value: x.at[step].set(jnp.where(live, value, x[step]))
        constraint_state = w.constraint_state
        if here.constraint is not None:
            keep = lambda new, old: jnp.where(live, new, old)
            constraint_state = jax.tree.map(keep, here.constraint.next(w.constraint_state, token), w.constraint_state)
        w = Writing(
            row=row._replace(finished=jnp.where(live, ends, row.finished)),
            tokens=put(w.tokens, token),
            length=w.length + live,
            ended=w.ended | ended,
            done=w.done | ended | (step + 1 >= max_tokens),
            log_probs=put(w.log_probs, log_p),
            stop_state=stop_state,
            constraint_state=constraint_state,
        )
        counts = state.counts._replace(generated=state.counts.generated + live, model_calls=state.counts.model_calls + passed)
        faults = state.faults._replace(restricted=state.faults.restricted | (live & restricted))
        state = with_arena(state, model, arena)._replace(choices=choices, counts=counts, faults=faults)
        state = state if run.in_plate else choose(state, live)
        state = note_overflow(state, number, live & (row.position + 1 > lm.max_length))
        # without a proposal nothing is paid, but a model that answers NaN is noted
        ratio = log_p - log_q if moves else jnp.where(jnp.isnan(log_p), jnp.nan, 0.0)
        state = pay(state, number, ratio, live)._replace(clock=state.clock + 1)
        if options.steers:
            log_psi = jnp.where(w.done, 0.0, log_psi)  # the text is over: its potential is taken back
            if options.twist is not None:
                log_psi += here.log_psi(Text(w.tokens, w.length, w.ended, w.log_probs, lm))
                state = state._replace(counts=state.counts._replace(potentials=state.counts.potentials + live))
            state = steer(state, name, number, log_psi, live)
        w = w._replace(done=w.done | dead(state))
        if progress is not None:
            jax.lax.cond(step % 16 == 15, lambda: progress(state.counts.model_calls), lambda: None)
        return step + 1, w, since, state

    start = (jnp.int32(0), writing, me, run.state)
    _, w, since, run.state = jax.lax.while_loop(going, one_token, start)
    arena, handle = add_row(run.state.arenas[model], w.row)
    run.state = with_arena(run.state, model, arena)
    if inside:
        run.frame.lineage.append(since)
    outputs = [run.frame.put(x) for x in (w.tokens, w.length, w.ended, w.log_probs, handle)]
    if moves:
        run.weights_moved()
    run.record(name, [run.frame.get(c) for c in outputs[:4]], blank=[lm.eos_id, 0, True, 0])
    return [run.frame.get(c) for c in outputs]


def draw(choices: Any, site: Any, step: Array, logits: Array, options: Options, state: Any, number: Array) -> tuple[Any, ...]:
    """A token, which is choice number `number`, its log probabilities under the model and the proposal, its log potential,
    the choices, and whether the proposal's support is smaller than the target's."""
    normaliser, none = log_total(logits), jnp.float32(0)
    if options.constraint is None and options.proposal is None:
        token, choices = choices.token(site, step, logits, number)
        log_p = logits[token] - normaliser
        return token, log_p, log_p, none, choices, jnp.asarray(False)
    proposed, allowed, log_psi = options.propose(logits), jnp.asarray(True), None
    if options.constraint is not None:
        allowed = over_tokens(site.name, "mask", options.constraint.mask(state), logits.shape)
        if has_potentials(options.constraint):
            log_psi = over_tokens(site.name, "log_potentials", options.constraint.log_potentials(state), logits.shape)
            proposed = proposed + log_psi
        proposed = jnp.where(allowed, proposed, -jnp.inf)
    token, choices = choices.token(site, step, proposed, number)
    log_p, total = logits[token] - normaliser, log_total(proposed)
    log_q = proposed[token] - total
    restricted = jnp.asarray(False)
    if options.proposal is not None or log_psi is not None:
        restricted = (allowed & (proposed == -jnp.inf) & (logits > -jnp.inf)).any()
    dead = total == -jnp.inf  # nothing may follow
    log_p, log_q = jnp.where(dead, -jnp.inf, log_p), jnp.where(dead, 0.0, log_q)
    return token, log_p, log_q, none if log_psi is None else log_psi[token], choices, restricted


def log_total(logits: Array) -> Array:
    """log(sum(exp(logits))), of the same exponentials that a draw takes: XLA computes them once."""
    top = logits.max()
    return jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(jnp.exp(logits - top).sum()))


def side_by_side(logits: Array) -> Array:
    """The same, one particle's logits side by side in memory.

    A product of a large matrix and few columns leaves those of one token side by side, and each pass that reads them so takes
    several times as long on a CPU. Under a mesh of devices they stay as they are: such a demand would gather them all.
    """
    return with_layout_constraint(logits, Layout((0,))) if jax.sharding.get_abstract_mesh().empty else logits


def over_tokens(site: str, method: str, found: Array, expected: tuple[int, ...]) -> Array:
    """What a constraint says of every token, checked for its shape."""
    if found.shape != expected:
        raise SiteError(
            f"site {site!r}: the constraint's `{method}` must have one entry for each of {expected[0]} tokens, found shape "
            f"{list(found.shape)}"
        )
    return found


def replay(run: "Interpreter", handle: Array, operands: tuple[Array, ...], given: Any, canonical: Array, *, name: str,
           model: int, max_tokens: int, counts: Any, constraint: Any, proposal: Any, twist: Any) -> list[Any]:  # fmt: skip
    """The site with known tokens int32[max_tokens], EOS-padded: it pays their log density. One pass through the model."""
    lm, arena, active = run.models[model], run.state.arenas[model], jnp.asarray(run.is_active())
    options = read_options(operands, counts, constraint, proposal, twist)
    row = read_row(arena, handle)
    start = () if options.constraint is None else options.constraint.start(max_tokens)

    def scan_ends(carry: Any, token: Array) -> Any:
        done, stop_state, constraint_state = carry
        allowed = jnp.asarray(True)
        if options.constraint is not None:
            allowed = done | options.constraint.mask(constraint_state)[token]
            keep = lambda new, old: jnp.where(done, old, new)
            constraint_state = jax.tree.map(keep, options.constraint.next(constraint_state, token), constraint_state)
        stop_state, stops = options.stops(stop_state, token)
        valid = jnp.where(done, token == lm.eos_id, allowed)
        return (done | stops | (token == lm.eos_id), stop_state, constraint_state), (~done, valid)

    given = jnp.asarray(given).astype(jnp.int32)
    (done, _, _), (inside, valid) = jax.lax.scan(scan_ends, (row.finished, jnp.int32(0), start), given)
    length = inside.sum().astype(jnp.int32)
    count = jnp.where(active, length, 0)
    features, arena, row = append(lm, arena, row, run.read_prompts(model), given, count)
    log_probs = jnp.where(inside, token_log_probs(lm, features, given), 0.0)
    ends = jnp.where(length > 0, given[jnp.maximum(length - 1, 0)] == lm.eos_id, row.finished)
    arena, handle = add_row(arena, row._replace(finished=ends))
    run.state = with_arena(run.state, model, arena)
    run.count(model_calls=1, scored=count)
    over = (count > 0) & (row.position + 1 > lm.max_length)
    run.state = note_overflow(run.state, run.staged.sites[name].number, over)
    out = [run.frame.put(x) for x in (given, length, done, log_probs, handle)]
    log_weight = jnp.where(valid.all(), log_probs.sum(), -jnp.inf)
    run.add_weight(name, jnp.where(canonical, jnp.where(active, log_weight, 0.0), -jnp.inf), always=True)
    run.record(name, [run.frame.get(c) for c in out[:4]], blank=[lm.eos_id, 0, True, 0])
    return [run.frame.get(c) for c in out]
