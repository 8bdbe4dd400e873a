"""Generating a text: the decode loop, and the density of a text whose tokens are known."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from .again import is_same, new_context, read_given, recall, run_automata, taken_again
from .arena import Prompt, Row, read_pending, read_row, take
from .collectives import anybody, index, reindex
from .credit import Known, Redrawn
from .drawing import Drawn, Next, Options, draw, read_options
from .language_model import CHUNK, LanguageModel
from .lineage import Policy, resample
from .notes import entropy_of, note_text
from .proposals import checks_tokens, has_potentials
from .state import State, choose, note_overflow, pay, steer, with_arena
from .text import Text

if TYPE_CHECKING:
    from .interpreter import Interpreter

Array = jax.Array


class Writing(NamedTuple):
    """A text in the making; moves as a whole when particles resample inside it."""

    row: Row
    draft: Row | None
    """the context that tokens are drawn from, where it is another one"""
    tokens: Array
    length: Array
    ended: Array
    done: Array
    log_probs: Array
    log_qs: Array | None
    """float32[max_tokens], where somebody takes notes"""
    entropies: Array | None
    stop_state: Array
    constraint_state: Any

    def followed_by(
        self, drawn: Drawn, step: Array, row: Row, draft: Row | None, options: Options, eos_id: int, logits: Array
    ) -> "Writing":
        """The text with token number `step`, unless it is done; `row` and `draft` have read what comes before it."""
        live, token = ~self.done, drawn.token
        ends = token == eos_id
        stop_state, stops = options.stops(self.stop_state, token)
        ended = live & (ends | stops)
        put = lambda x, value: x.at[step].set(jnp.where(live, value, x[step]))
        read = lambda row: row._replace(pending=jnp.where(live, token, row.pending))
        constraint_state = self.constraint_state
        if options.constraint is not None:
            keep = lambda new, old: jnp.where(live, new, old)
            constraint_state = jax.tree.map(keep, options.constraint.next(constraint_state, token), constraint_state)
        return Writing(
            row=read(row)._replace(finished=jnp.where(live, ends, row.finished)),
            draft=None if draft is None else read(draft),
            tokens=put(self.tokens, token),
            length=self.length + live,
            ended=self.ended | ended,
            done=self.done | ended | (step + 1 >= self.tokens.shape[0]),
            log_probs=put(self.log_probs, drawn.log_p),
            log_qs=None if self.log_qs is None else put(self.log_qs, drawn.log_q),
            entropies=None if self.entropies is None else put(self.entropies, entropy_of(logits)),
            stop_state=stop_state,
            constraint_state=constraint_state,
        )


def weighted(params: dict[str, Any]) -> bool:
    """Whether weights can move inside the text of a `generate` equation with these parameters."""
    none = jax.tree.structure(None)
    some = any(params[part] is not None for part in ("proposal", "draft", "twist"))
    return some or params["constraint"] != none or params["head"] != none


def begin_again(
    run: "Interpreter", w: Writing, handle: Array, idle: Array, options: Options, *, name: str, model: int
) -> tuple[Writing, State]:
    """A text whose first tokens are repeated, as far as the caches hold them: no pass through the model."""
    lm, arena, site = run.models[model], run.state.arenas[model], run.site(name)
    count, (tokens, length, ended, log_probs), note = recall(run, model, site, w.row, handle, idle)
    inside = jnp.arange(tokens.shape[0]) < count
    keep: Any = lambda before, now: None if now is None else jnp.where(inside, before, now)
    ended = jnp.where(count > 0, (count == length) & ended, w.ended)
    states = w.stop_state, w.constraint_state

    def step(states: Any, token: Array) -> Any:
        constraint = options.constraint
        return options.stops(states[0], token)[0], states[1] if constraint is None else constraint.next(states[1], token)

    if options.table is not None or options.constraint is not None:
        states = run_automata(step, states, tokens, count, run.axes)
    arena, row = taken_again(arena, w.row, tokens, count, lm.eos_id)
    state, number = with_arena(run.state, model, arena), run.staged.sites[name].number
    paid = log_probs - note.log_q
    if run.tempering is not None:
        paid += run.tempering.sharpen(log_probs) - log_probs
    state = pay(state, number, jnp.where(inside, paid, 0.0).sum(), count > 0)
    w = w._replace(
        row=row,
        tokens=keep(tokens, w.tokens),
        length=count,
        ended=ended,
        done=w.done | ended | (count >= tokens.shape[0]),
        log_probs=keep(log_probs, w.log_probs),
        log_qs=keep(note.log_q, w.log_qs),
        entropies=keep(note.entropy, w.entropies),
        stop_state=states[0],
        constraint_state=states[1],
    )
    return w, state if run.in_plate else state._replace(made=state.made + count)


def decode(
    run: "Interpreter", handle: Array, operands: tuple[Array, ...], *, name: str, model: int, max_tokens: int, **parts: Any
) -> list[Any]:
    """Draw a text token by token. Returns tokens, length, ended, log_probs and the handle of the context after it."""
    lm, site, number = run.models[model], run.site(name), run.staged.sites[name].number
    options, drafter = read_options(operands, parts), parts["draft"]
    active, prompts = run.is_active(), {m: run.read_prompts(m) for m in (model, drafter) if m is not None}
    row = read_row(run.state.arenas[model], handle)
    policy, progress, moves = run.policy, run.progress, weighted(parts)
    inside = policy is not None and policy.inside_texts and moves
    me = index(cast(Policy, policy).axes[-1]) if inside else jnp.int32(0)
    dead = lambda state: state.log_weight == -jnp.inf  # spends nothing more, whatever follows
    idle = row.finished | ~jnp.asarray(active) | dead(run.state)
    begins, first, blank = run.state.arenas[model].used, run.state.made, jnp.zeros(max_tokens, jnp.float32)
    writing = Writing(
        row=row,
        draft=None if options.draft is None else read_row(run.state.arenas[drafter], options.draft),
        tokens=jnp.full(max_tokens, lm.eos_id, jnp.int32),
        length=jnp.int32(0),
        ended=row.finished,
        done=idle,
        log_probs=blank,
        log_qs=blank if run.notes else None,
        entropies=blank if run.notes and run.notes.entropies else None,
        stop_state=jnp.int32(0),
        constraint_state=() if options.constraint is None else options.constraint.start(max_tokens),
    )

    again, state = run.state.same is not None, run.state
    if again and drafter is None and not run.in_plate:
        writing, state = begin_again(run, writing, handle, idle, options, name=name, model=model)

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
        live, draft, at = ~w.done, w.draft, w.length if again else step
        features, row, state = read_on(run, model, w.row, known[model], live, state)
        drafted = logits = side_by_side(lm.unembed(features)[0])
        if draft is not None:
            foreseen, draft, state = read_on(run, drafter, draft, known[drafter], live, state)
            drafted = side_by_side(run.models[drafter].unembed(foreseen)[0])
        now = Next(logits, drafted, features[0], w.constraint_state, live)
        drawn, choices = draw(state.choices, site, at, now, here, state.made, run.axes)
        w = w.followed_by(drawn, at, row, draft, here, lm.eos_id, logits)
        asked = state.counts.potentials + drawn.checks
        counts = state.counts._replace(generated=state.counts.generated + live, potentials=asked)
        faults = state.faults._replace(restricted=state.faults.restricted | (live & drawn.restricted))
        state = state._replace(choices=choices, counts=counts, faults=faults)
        state = state if run.in_plate else choose(state, live)
        over = row.position + 1 > lm.max_length
        if draft is not None:
            over |= draft.position + 1 > run.models[drafter].max_length
        state = note_overflow(state, number, live & over)
        # without a proposal nothing is paid, but a model that answers NaN is noted
        ratio = drawn.log_p - drawn.log_q if moves else jnp.where(jnp.isnan(drawn.log_p), jnp.nan, 0.0)
        if again:  # a token that is repeated may be one that cannot be drawn here
            ratio = jnp.where(drawn.log_q == -jnp.inf, -jnp.inf, ratio)
        if run.tempering is not None:
            ratio += jnp.where(drawn.log_p == -jnp.inf, 0.0, run.tempering.sharpen(drawn.log_p) - drawn.log_p)
        state = pay(state, number, ratio, live)._replace(clock=state.clock + 1)
        if options.steers:
            log_psi = jnp.where(w.done, 0.0, drawn.log_psi)  # the text is over: its potential is taken back
            if options.twist is not None:
                log_psi += here.log_psi(Text(w.tokens, w.length, w.ended, w.log_probs, lm))
                state = state._replace(counts=state.counts._replace(potentials=state.counts.potentials + live))
            state = steer(state, name, number, log_psi, live)
        w = w._replace(done=w.done | dead(state))
        if progress is not None:
            jax.lax.cond(step % 16 == 15, lambda: progress(state.counts.model_calls), lambda: None)
        return step + 1, w, since, state

    _, w, since, run.state = jax.lax.while_loop(going, one_token, (jnp.int32(0), writing, me, state))
    arena, same = run.state.arenas[model], None
    if again:
        before = run.state.choices.record_before(site)[0]  # type: ignore[attr-defined]
        same_tokens = (jnp.arange(max_tokens) >= w.length) | (w.tokens == before)
        same = is_same(run.state, arena, w.row, handle, begins) & same_tokens.all()
    handle = new_context(run, model, arena, w.row, handle, begins, same)
    if inside:
        run.frame.lineage.append(since)
    outputs = [run.frame.put(x) for x in (w.tokens, w.length, w.ended, w.log_probs, handle)]
    if moves:
        run.weights_moved()
    run.record(name, [run.frame.get(c) for c in outputs[:4]], blank=[lm.eos_id, 0, True, 0])
    if w.log_qs is not None:
        note_text(run, name, w.log_qs, w.entropies, first)
    return [run.frame.get(c) for c in outputs]


def read_on(
    run: "Interpreter", model: int, row: Row, prompts: list[Prompt], live: Array, state: State
) -> tuple[Array, Row, State]:
    """The features [1, D] that predict what follows a context, whose pending token has a slot from now on where `live`."""
    needed = lambda unread: anybody(live & unread, run.axes)
    only = None if state.same is None else live
    features, arena, passed = read_pending(run.models[model], state.arenas[model], row, prompts, needed, only)
    arena, row = take(arena, row, live)
    counts = state.counts._replace(model_calls=state.counts.model_calls + passed)
    return features, row, with_arena(state, model, arena)._replace(counts=counts)


def side_by_side(logits: Array) -> Array:
    """The same, one particle's logits side by side in memory.

    A product of a large matrix and few columns leaves those of one token side by side, and each pass that reads them so takes
    several times as long on a CPU. Under a mesh of devices they stay as they are: such a demand would gather them all.
    """
    return with_layout_constraint(logits, Layout((0,))) if jax.sharding.get_abstract_mesh().empty else logits


def replay(run: "Interpreter", handle: Array, operands: tuple[Array, ...], known: Any, canonical: Array, *, name: str,
           model: int, max_tokens: int, **parts: Any) -> list[Any]:  # fmt: skip
    """The site with known tokens int32[max_tokens], EOS-padded: it pays their log density, unless they are the walk's own
    choice (`Redrawn`). One pass through the model."""
    lm, arena, active = run.models[model], run.state.arenas[model], jnp.asarray(run.is_active())
    options = read_options(operands, parts)
    row = read_row(arena, handle)
    start = () if options.constraint is None else options.constraint.start(max_tokens)

    def scan_ends(carry: Any, token: Array) -> Any:
        done, stop_state, constraint_state = carry
        allowed = jnp.asarray(True)
        if options.constraint is not None:
            allowed = done | options.allows(constraint_state, token, ~done)
            if name in run.drawn and has_potentials(options.constraint):
                allowed &= done | (options.constraint.log_potentials(constraint_state)[token] > -jnp.inf)
            keep = lambda new, old: jnp.where(done, old, new)
            constraint_state = jax.tree.map(keep, options.constraint.next(constraint_state, token), constraint_state)
        stop_state, stops = options.stops(stop_state, token)
        valid = jnp.where(done, token == lm.eos_id, allowed)
        return (done | stops | (token == lm.eos_id), stop_state, constraint_state), (~done, valid)

    given = known.tokens if isinstance(known, Redrawn) else known.value if isinstance(known, Known) else known
    given = jnp.asarray(given).astype(jnp.int32)
    (done, _, _), (inside, valid) = jax.lax.scan(scan_ends, (row.finished, jnp.int32(0), start), given)
    length = inside.sum().astype(jnp.int32)
    count, begins, blank = jnp.where(active, length, 0), arena.used, jnp.zeros(max_tokens, jnp.float32)
    before = run.recorded_before(name, [None, None, None, blank])[3]
    features, log_probs, arena, row, same = read_given(run, model, row, handle, given, count, before)
    log_probs = jnp.where(inside, log_probs, 0.0)
    if name in run.drawn and options.draft is None and (options.proposal is not None or has_potentials(options.head)):
        valid &= ~inside | proposable(lm, options, features, given)
    ends = jnp.where(length > 0, given[jnp.maximum(length - 1, 0)] == lm.eos_id, row.finished)
    handle = new_context(run, model, arena, row._replace(finished=ends), handle, begins, same)
    run.count(scored=count, potentials=count if checks_tokens(options.constraint) else 0)
    over = (count > 0) & (row.position + 1 > lm.max_length)
    run.state = note_overflow(run.state, run.staged.sites[name].number, over)
    out = [run.frame.put(x) for x in (given, length, done, log_probs, handle)]
    log_weight = jnp.where(valid.all(), log_probs.sum(), -jnp.inf)
    if run.tempering is not None:
        log_weight = run.tempering.sharpen(log_weight)
    credit = run.state.credit
    if isinstance(known, Redrawn):
        note_text(run, name, log_probs, None, run.state.made)
        run.state = run.state if run.in_plate else run.state._replace(made=run.state.made + count)
    else:
        run.add_weight(name, jnp.where(canonical, jnp.where(active, log_weight, 0.0), -jnp.inf), always=True)
    if credit is not None and isinstance(known, Known):  # each token pays as it becomes known
        run.state = run.state._replace(credit=credit.book_text(log_probs, known.number, inside & active))
    run.record(name, [run.frame.get(c) for c in out[:4]], blank=[lm.eos_id, 0, True, 0])
    return [run.frame.get(c) for c in out]


def proposable(lm: LanguageModel, options: Options, features: Array, tokens: Array) -> Array:
    """bool[T]: whether tokens int32[T] are drawn after features [T, D] with positive probability, masks left out."""

    def one(row: tuple[Array, Array]) -> Array:
        proposed = options.propose(lm.unembed(row[0][None])[0])
        if has_potentials(options.head):
            proposed += options.head.log_potentials(row[0].astype(jnp.float32))
        return proposed[row[1]] > -jnp.inf

    return jax.lax.map(one, (features, tokens), batch_size=min(CHUNK, tokens.shape[0]))
