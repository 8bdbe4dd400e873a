"""The interpreter: walks a staged program for one particle, written as if it were alone.

It runs under `vmap` over the particles' axis. Control flow that holds sites is walked: loops become scans that carry the
particle's `State`, every branch runs under a mask. What particles need of each other are collectives.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from . import decode, rules, sites
from .arena import Prompt, new_arena, with_level
from .choices import SiteRef
from .collectives import PARTICLES, index
from .errors import SiteError, TransformationError
from .jaxpr import DropVar, Literal, all_eqns, bind, body_of, called_jaxpr, consts_of, is_site, sites_inside
from .lineage import Cell, Frame, Policy, resample
from .loops import walk_loop
from .nested import Samples
from .notes import Notes
from .staging import Staged, need, random_sites, trace_eqns, walks_into
from .state import Faults, State, Tempering, choose, no_counts, no_faults, pay, spread_over, steer, together

Array = jax.Array


class Interpreter:
    """One particle's walk through a program. `state` is what it carries; the rest is fixed or belongs to the frame."""

    def __init__(
        self,
        staged: Staged,
        consts: dict[int, Any],
        models: list[Any],
        state: State,
        *,
        given: dict[str, Any] | None = None,
        policy: Policy | None = None,
        progress: Callable[[Array], None] | None = None,
        axes: tuple[str, ...] = (PARTICLES,),
        tempering: Tempering | None = None,
    ):
        self.staged, self.consts, self.models, self.state = staged, consts, models, state
        self.policy, self.progress, self.tempering = policy, progress, tempering
        self.steered = policy is not None  # somebody resamples, be it outside of a plate, so that twists have an effect
        self.frame = Frame()
        self.moved = False  # whether weights have moved since the population could last resample
        self.axes = axes  # of all that runs side by side with this particle
        self.path: tuple[Array, ...] = ()
        self.nested = False  # inside a loop or plate: prompts go to the particle's own slots
        self.active: Cell = self.frame.put(True)
        self.drawn: frozenset[str] = frozenset()
        """texts among the given that were drawn: outside of their proposal's support they have density 0"""
        self.only: str | None = None
        """the one site whose weight counts, to find out what each adds"""
        self.notes: Notes | None = None
        """what to record of how choices are made"""
        self.prompts_before: dict[int, list[Prompt]] = {}
        """of the walk before"""
        self.given = {k: self.frame.put(v) for k, v in (given or {}).items()}
        self.prompts: dict[int, list[Cell]] = {m: [] for m in range(len(models))}
        self.records: dict[str, tuple[Cell, Cell]] = {}
        self.is_density = policy is None and all(name in self.given for name in random_sites(staged))

    # --- weights ------------------------------------------------------------------------------------------------------

    def is_active(self) -> Any:
        return self.frame.get(self.active)

    def add_weight(self, name: str, log_weight: Array, *, always: bool = False) -> None:
        """Move this particle's log-weight where it is active (or `always`)."""
        active = True if always else self.is_active()
        if self.only is not None and name != self.only:
            return
        self.state = pay(self.state, self.staged.sites[name].number, log_weight, active)
        self.weights_moved()

    def add_evidence(self, name: str, log_weight: Array) -> None:
        """The same for what is no density of a random choice."""
        self.add_weight(name, log_weight if self.tempering is None else self.tempering.weigh(log_weight))

    def set_twist(self, name: str, log_psi: Array) -> None:
        self.state = steer(self.state, name, self.staged.sites[name].number, log_psi, self.is_active())
        self.weights_moved()

    def weights_moved(self) -> None:
        """The clock ticks, and the population may resample before the next draw: after the last one it never does."""
        self.state = self.state._replace(clock=self.state.clock + 1)
        self.moved = True

    def before_draw(self) -> None:
        """Let the population resample if weights have moved; every value of this frame follows when it is read."""
        if self.policy is not None and self.moved:
            self.state, _, ancestor = resample(self.policy, self.state, ())
            self.frame.lineage.append(ancestor)
            self.moved = False

    def draws(self, eqn: Any) -> bool:
        """Whether an equation draws something, and leaves it to us to let the population resample first."""
        if eqn.primitive not in (sites.sample_p, sites.generate_p, sites.plate_p) or eqn.params["name"] in self.given:
            return False
        if eqn.primitive is sites.plate_p and eqn.params["role"] == sites.LOOKAHEAD:
            return False  # it makes the twist by which to resample
        inside = self.policy is not None and self.policy.inside_texts
        return not (inside and eqn.primitive is sites.generate_p and decode.weighted(eqn.params))

    def draws_inside(self, closed: Any) -> bool:
        """Whether a jaxpr holds a random site whose value is not given."""
        random = (sites.sample_p, sites.generate_p)
        return any(e.primitive in random and e.params["name"] not in self.given for e in trace_eqns(closed))

    @property
    def in_plate(self) -> bool:
        return bool(self.axes) and self.axes[-1].startswith("plate")

    def count_choice(self, active: Any) -> None:
        """Count a choice of the trace where it is active; in a plate the plate itself is counted."""
        if not self.in_plate:
            self.state = choose(self.state, active)

    def count(self, **more: Any) -> None:
        counts = self.state.counts
        self.state = self.state._replace(
            counts=counts._replace(**{k: getattr(counts, k) + jnp.asarray(v).astype(jnp.int32) for k, v in more.items()})
        )

    # --- values -------------------------------------------------------------------------------------------------------

    def site(self, name: str) -> SiteRef:
        return SiteRef(name, self.path)

    def recorded_before(self, name: str, otherwise: Any) -> Any:
        """What the walk before recorded at this visit of a site, where there was one."""
        if self.state.same is None or self.in_plate:
            return otherwise
        return self.state.choices.record_before(self.site(name))  # type: ignore[attr-defined]

    def record(self, name: str, value: Any, blank: Any = None) -> None:
        """Keep a site's value for the trace, or `blank` (zeros) where the site is inactive. In exclusive branches of one
        `cond` the active one counts."""
        active = jnp.asarray(self.is_active())
        blank = jax.tree.map(jnp.zeros_like, value) if blank is None else blank
        value = jax.tree.map(lambda x, b: jnp.where(active, x, jnp.asarray(b, x.dtype)), value, blank)
        if name in self.records:
            before, was_active = (self.frame.get(c) for c in self.records[name])
            value = jax.tree.map(lambda x, b: jnp.where(active, x, b), value, before)
            active = active | was_active
        self.records[name] = self.frame.put(value), self.frame.put(active)

    def read_prompts(self, model: int) -> list[Prompt]:
        return [self.frame.get(cell) for cell in self.prompts[model]]

    # --- walking ------------------------------------------------------------------------------------------------------

    def walk(self, closed: Any, inputs: list[Cell]) -> list[Cell]:
        """Interpret a jaxpr in this frame."""
        jaxpr, env = body_of(closed), self.constants(closed)
        env.update(zip(jaxpr.invars, inputs))
        self.walk_equations(jaxpr.eqns, env)
        return [self.read(env, a) for a in jaxpr.outvars]

    def constants(self, closed: Any) -> dict[Any, Cell]:
        """The variables of a jaxpr that hold constants."""
        pairs = zip(body_of(closed).constvars, consts_of(closed))
        return {v: Cell(self.consts.get(id(c), c), len(self.frame.lineage)) for v, c in pairs}

    def read(self, env: dict[Any, Cell], atom: Any) -> Cell:
        return self.frame.put(atom.val) if isinstance(atom, Literal) else env[atom]

    def walk_equations(self, eqns: Sequence[Any], env: dict[Any, Cell]) -> None:
        """Interpret equations, and add what they define to `env`."""
        for eqn in eqns:
            outputs = self.equation(eqn, [self.read(env, a) for a in eqn.invars])
            env.update((v, o) for v, o in zip(eqn.outvars, outputs) if not isinstance(v, DropVar))

    def equation(self, eqn: Any, inputs: list[Cell]) -> list[Cell]:
        name = eqn.primitive.name
        if self.draws(eqn):
            self.before_draw()
        if is_site(eqn) and eqn.primitive is not sites.plate_p:
            values = rules.RULES[eqn.primitive](self, *[self.frame.get(c) for c in inputs], **eqn.params)
        elif eqn.primitive is sites.plate_p:
            values = self.plate(inputs, **eqn.params)
        elif not walks_into(eqn):
            values = bind(eqn, [self.frame.get(c) for c in inputs])
        elif name in ("scan", "while"):
            return walk_loop(self, eqn, inputs)
        elif name == "cond":
            return self.cond(eqn.params["branches"], inputs)
        elif (called := called_jaxpr(eqn)) is not None:
            return self.walk(called, inputs)
        else:
            inside = next(e.params.get("name") for e in all_eqns(next(iter(eqn.params.values()))) if is_site(e))
            raise TransformationError(f"site {inside!r} stands under {name}, which inference cannot see through")
        return [self.frame.put(v) for v in values]

    def cond(self, branches: Any, inputs: list[Cell]) -> list[Cell]:
        """One branch counts. Particles take different ones, so every branch runs under a mask and the taken one's outputs are
        selected; a density, which has one particle, runs one branch."""
        which, *operands = inputs
        if self.is_density:
            return self.switch(branches, which, operands)
        nested, self.nested = self.nested, True  # a prompt in a branch is no shared block
        outer = self.active
        taken = []
        for k, branch in enumerate(branches):
            here = jnp.clip(self.frame.get(which).astype(jnp.int32), 0, len(branches) - 1) == k
            self.active = self.frame.put(jnp.asarray(self.frame.get(outer)) & here)
            taken.append(self.walk(branch, operands))
        self.active, self.nested = outer, nested
        chosen = jnp.clip(self.frame.get(which).astype(jnp.int32), 0, len(branches) - 1)
        select = lambda *xs: jax.lax.select_n(chosen, *map(jnp.asarray, xs)) if len(xs) > 1 else xs[0]
        return [self.frame.put(select(*[self.frame.get(c) for c in out])) for out in zip(*taken)]

    def switch(self, branches: Any, which: Cell, operands: list[Cell]) -> list[Cell]:
        """A real `lax.switch`: the density of a program has no gradient through branches that are not taken."""
        self.settle()
        values = [self.frame.get(c) for c in operands]

        def walk(branch: Any, values: list[Any], state: State) -> tuple[list[Any], dict[str, Any], State]:
            with self.inside([]):
                self.state = state
                out = [jnp.asarray(self.frame.get(c)) for c in self.walk(branch, [self.frame.put(v) for v in values])]
                return out, self.recorded(), self.state

        before = self.state
        shapes = [jax.eval_shape(partial(walk, branch), values, before)[1] for branch in branches]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), {k: v for found in shapes for k, v in found.items()})

        def taken(branch: Any, values: list[Any], state: State) -> Any:
            out, found, state = walk(branch, values, state)
            return out, {**blank, **found}, state

        index = self.frame.get(which).astype(jnp.int32)
        out, records, self.state = jax.lax.switch(index, [partial(taken, b) for b in branches], values, before)
        self.moved = True
        self.merge_records(records)
        return [self.frame.put(o) for o in out]

    def settle(self) -> None:
        """Bring everything that a body may see to its start; not from inside its trace, whose values must not leak."""
        for cell in [self.active, *self.given.values(), *[c for cells in self.prompts.values() for c in cells]]:
            self.frame.get(cell)

    @contextlib.contextmanager
    def inside(self, lineage: list[Array], path: tuple[Array, ...] = ()) -> Iterator[None]:
        """Walk the body of an inner trace of JAX, after `settle`: values of this frame are seen from there by `enter`."""
        saved = self.frame, self.active, self.given, self.prompts, self.path, self.nested, self.records
        self.frame, self.path, self.nested, self.records = Frame(lineage), (*self.path, *path), True, {}
        self.active = self.enter(self.active)
        self.given = {k: self.enter(c) for k, c in self.given.items()}
        self.prompts = {m: [self.enter(c) for c in cells] for m, cells in self.prompts.items()}
        try:
            yield
        finally:
            self.frame, self.active, self.given, self.prompts, self.path, self.nested, self.records = saved

    def recorded(self) -> dict[str, tuple[Any, Array]]:
        """Values and activity of the sites met in this frame."""
        return {k: (self.frame.get(v), self.frame.get(a)) for k, (v, a) in self.records.items()}

    def enter(self, cell: Cell) -> Cell:
        """A value of the enclosing frame, seen from a loop body: it has to follow everything since the loop began."""
        return Cell(cell.value, 0)

    def merge_records(self, records: dict[str, tuple[Any, Array]]) -> None:
        """Take over what a loop or plate recorded; a name met before stands in an exclusive branch."""
        for name, (value, active) in records.items():
            if name in self.records:
                before, was_active = (self.frame.get(c) for c in self.records[name])
                pick = lambda x, b, active=active: jnp.where(spread_over(active, x), x, b)
                value, active = jax.tree.map(pick, value, before), active | was_active
            self.records[name] = self.frame.put(value), self.frame.put(active)

    def plate(
        self, inputs: list[Cell], *, jaxpr: Any, size: int, mapped: tuple[bool, ...], name: str, role: str, ess_threshold: float
    ) -> list[Any]:
        """Walk the body for each element under a `vmap` of its own. Their weights add up, or are returned where they are
        samples of an estimate, which resample among themselves if they have a threshold; those of a twist leave nothing else
        behind."""
        is_part, is_rollout = role == sites.PLATE, role == sites.LOOKAHEAD
        if is_rollout and not self.steered:
            return [jnp.zeros(size, jnp.float32)]
        values = [self.frame.get(c) for c in inputs]
        axis, outer, wants = f"plate{len(self.axes)}", self.state, need(jaxpr, nested=True)
        inside = set(sites_inside(jaxpr))
        twists = {k: v for k, v in outer.log_twists.items() if k in inside}
        given = {k: self.frame.get(c) for k, c in self.given.items() if k in inside}
        if given and not is_part:
            raise SiteError(
                f"site {next(iter(given))!r} is inside `ppl.nested` and cannot be given: an estimate has no density"
            )
        active, prompts = self.is_active(), {m: self.read_prompts(m) for m in self.prompts}
        if is_rollout:
            active &= outer.log_weight > -jnp.inf
        policy = Samples(ess_threshold, (*self.axes, axis), self.site(name)) if ess_threshold else None

        def element(i: Array, values: list[Any], twists: Any, given: Any) -> Any:
            state = outer._replace(
                choices=outer.choices,
                log_weight=jnp.float32(0),
                log_twists=twists,
                arenas=tuple(
                    with_level(a, lm, wants.handles.get(m, 0), wants.slots.get(m, 0))
                    for m, (a, lm) in enumerate(zip(outer.arenas, self.models))
                ),
                counts=jax.tree.map(jnp.zeros_like, outer.counts),
                asked=outer.clock,
                chances=jnp.int32(0),
                same=None if outer.same is None else jnp.asarray(False),  # its contexts are not kept
                resamplings=None,
                credit=None if outer.credit is None else outer.credit.inside_plate(),
            )
            state = state._replace(choices=outer.choices.enter_element(i, jaxpr))
            body = Interpreter(self.staged, self.consts, self.models, state, given=given, policy=policy)
            body.tempering, body.notes, body.only = self.tempering, self.notes, self.only
            body.axes, body.path, body.nested, body.drawn = (*self.axes, axis), (*self.path, i), True, self.drawn
            body.active, body.is_density = body.frame.put(active), self.is_density
            body.steered = policy is not None or (self.steered and is_part)
            body.prompts = {m: [body.frame.put(p) for p in ps] for m, ps in prompts.items()}
            cells = body.walk(jaxpr, [body.frame.put(v) for v in values])
            out, s = [jnp.asarray(body.frame.get(c)) for c in cells], body.state
            return out, body.recorded(), s.log_weight, s.log_twists, s.faults, s.counts, s.clock, s.choices, s.credit

        out, found, log_weight, twists, faults, counts, clock, choices, credit = jax.vmap(
            element, in_axes=(0, [0 if m else None for m in mapped], 0, 0), axis_name=axis
        )(jnp.arange(size, dtype=jnp.int32), values, twists, given)
        self.state = outer._replace(
            choices=outer.choices.leave_plate(size, jaxpr, choices),
            log_twists={**outer.log_twists, **twists} if is_part else outer.log_twists,
            faults=merge_faults(faults, outer, is_rollout),
            counts=jax.tree.map(lambda new, old: old + new.sum(), counts, outer.counts)._replace(
                model_calls=outer.counts.model_calls + counts.model_calls.max()),
            clock=clock.max(),
            credit=None if outer.credit is None else outer.credit.after_plate(credit),
        )  # fmt: skip
        if not is_rollout:
            self.merge_records(found)
            if self.draws_inside(jaxpr):
                self.count_choice(active)
        if not is_part:  # for `ppl.nested` to pay, or to be the twist of `ppl.lookahead`
            return [*out, log_weight]
        # deaths inside are already noted there; the sum itself belongs to no one site
        self.state = self.state._replace(log_weight=outer.log_weight + jnp.where(active, log_weight.sum(), 0.0))
        cells = [self.frame.put(o) for o in out]
        self.weights_moved()
        return [self.frame.get(c) for c in cells]


def merge_faults(faults: Faults, outer: State, are_rollouts: bool) -> Faults:
    """What went wrong in a plate's elements; in a particle that was dead before, nothing counts. A rollout may die, and leave
    out what it likes."""
    alive, found, before = outer.log_weight > -jnp.inf, together(faults), outer.faults
    if are_rollouts:
        found = found._replace(died=before.died, died_at=before.died_at, restricted=before.restricted)
    return jax.tree.map(lambda new, old: jnp.where(alive, new, old), found, before)


def first_state(staged: Staged, models: list[Any], choices: Any, root: Array | None = None) -> State:
    """The state before the first site; `root` is the particle's number, by default that on the axis of particles."""
    wants = need(staged.jaxpr)
    read = {e.params["model"]: e.params["size"] for e in all_eqns(staged.jaxpr) if e.primitive is sites.features_p}
    arenas = tuple(new_arena(lm, wants.handles.get(m, 0), wants.slots.get(m, 0), read.get(m, 0)) for m, lm in enumerate(models))
    twists = {name: jnp.zeros(plates, jnp.float32) for name, plates in staged.twists.items()}
    zero, root = jnp.int32(0), index() if root is None else root
    return State(
        choices, jnp.float32(0), twists, arenas, no_faults(), no_counts(), zero, zero, zero, root, jnp.float32(0), zero
    )
