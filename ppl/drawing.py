"""Choosing a token: what it is drawn from, and what it pays.

A token x is drawn from q(x) = exp(proposed[x]) / S on the allowed tokens, S being their sum, and pays log p(x) - log q(x).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .choices import Choices, SiteRef
from .collectives import anybody, reindex
from .errors import SiteError
from .proposals import checks_tokens, has_potentials
from .text import Text

Array = jax.Array


class Options(NamedTuple):
    """The parts of a `generate` site besides its context; None where absent."""

    table: Array | None
    """int32[Q, V]: the stop automaton"""
    constraint: Any
    proposal: Any
    proposal_operands: tuple[Array, ...]
    draft: Array | None
    """int32[]: handle of the context that is drawn from in place of the site's own"""
    twist: Any
    twist_operands: tuple[Array, ...]
    head: Any
    """a twist that reads features"""

    def follow(self, ancestor: Array) -> "Options":
        """The same, as particle number `ancestor` has it."""
        return self._replace(
            table=reindex(self.table, ancestor),
            constraint=reindex(self.constraint, ancestor),
            proposal_operands=reindex(self.proposal_operands, ancestor),
            twist_operands=reindex(self.twist_operands, ancestor),
            head=reindex(self.head, ancestor),
        )

    def stops(self, state: Array, token: Array) -> tuple[Array, Array]:
        """The stop automaton's next state, and whether it says that the text is over."""
        if self.table is None:
            return state, jnp.asarray(False)
        after = jnp.asarray(self.table)[state, token]
        return jnp.minimum(after, self.table.shape[0] - 1), after == self.table.shape[0]

    def allows(self, state: Any, token: Array, asked: Array) -> Array:
        """Whether the constraint, in `state`, allows one token; anything where it is not `asked`."""
        if self.constraint is None:
            return jnp.asarray(True)
        if checks_tokens(self.constraint):
            return jnp.asarray(self.constraint.allows(state, jnp.where(asked, token, -1)))
        return jnp.asarray(self.constraint.mask(state)[token])

    @property
    def steers(self) -> bool:
        """Whether the site has a twist."""
        return self.twist is not None or has_potentials(self.constraint) or has_potentials(self.head)

    @property
    def draws_from_the_model(self) -> bool:
        """Whether tokens are drawn from the model itself."""
        return all(part is None for part in (self.constraint, self.proposal, self.draft, self.head))

    def propose(self, logits: Array) -> Array:
        """The proposal's logits; the model's where there is none."""
        if self.proposal is None:
            return logits
        return jax.core.eval_jaxpr(_open(self.proposal), (), *self.proposal_operands, logits)[0].astype(jnp.float32)

    def log_potentials(self, site: str, state: Any, features: Array, shape: tuple[int, ...]) -> Array | None:
        """float32[V]: log psi of the text after each next token, by the constraint and by a twist that reads features; None
        where neither has potentials."""
        sources = [("constraint", self.constraint, state), ("twist", self.head, features.astype(jnp.float32))]
        found = [
            over_tokens(site, f"{what}'s `log_potentials`", source.log_potentials(seen), shape)
            for what, source, seen in sources
            if has_potentials(source)
        ]
        return sum(found[1:], found[0]) if found else None

    def log_psi(self, text: Text) -> Array:
        leaves = jax.tree.leaves(text)
        return jax.core.eval_jaxpr(_open(self.twist), (), *self.twist_operands, *leaves)[0]


def _open(closed: Any) -> Any:
    return getattr(closed, "jaxpr", closed)


def read_options(operands: tuple[Array, ...], parts: dict[str, Any]) -> Options:
    """The options of a `generate` equation, from its operands after the first and its parameters."""
    groups, start = {}, 0
    for name, n in parts["counts"]:
        groups[name] = operands[start : start + n]
        start += n
    only = lambda group: group[0] if group else None
    constraint, head = (parts[name].unflatten(groups[name]) for name in ("constraint", "head"))
    return Options(only(groups["until"]), constraint, parts["proposal"], groups["proposal"], only(groups["draft"]),
                   parts["twist"], groups["twist"], head)  # fmt: skip


class Next(NamedTuple):
    """What is known before a token is chosen."""

    logits: Array
    """float32[V]: the model's"""
    drafted: Array
    """float32[V]: those that the proposal is made from, of the draft where there is one"""
    features: Array
    """[D]: the model's"""
    state: Any
    """of the constraint"""
    live: Array
    """bool[]: whether this particle needs a token"""


class Drawn(NamedTuple):
    """A token, and what the particle pays for it."""

    token: Array
    log_p: Array
    log_q: Array
    """nats; of a restricted proposal whose normaliser is estimated, such that exp(log_p - log_q) is unbiased"""
    log_psi: Array
    """nats: the potential of the text after it"""
    checks: Array | int
    """int32[]: how many tokens the constraint was asked about, one by one"""
    restricted: Array
    """bool[]: whether the proposal's support is smaller than the target's"""


def draw(
    choices: Choices, site: SiteRef, step: Array, now: Next, options: Options, number: Array, axes: tuple[str, ...]
) -> tuple[Drawn, Choices]:
    """The token number `step` of a text, which is choice number `number` of the trace."""
    logits, normaliser, none = now.logits, log_total(now.logits), jnp.float32(0)
    if options.draws_from_the_model:
        token, choices = choices.token(site, step, logits, number)
        log_p = logits[token] - normaliser
        return Drawn(token, log_p, log_p, none, 0, jnp.asarray(False)), choices
    proposed, allowed, checks = options.propose(now.drafted), jnp.asarray(True), jnp.int32(0)
    log_psi = options.log_potentials(site.name, now.state, now.features, logits.shape)
    if log_psi is not None:
        proposed = proposed + log_psi
    if checks_tokens(options.constraint):
        token, total, checks, choices = draw_by_rejection(choices, site, step, now, proposed, options, number, axes)
    else:
        if options.constraint is not None:
            allowed = over_tokens(site.name, "constraint's `mask`", options.constraint.mask(now.state), logits.shape)
            proposed = jnp.where(allowed, proposed, -jnp.inf)
        token, choices = choices.token(site, step, proposed, number)
        total = log_total(proposed)
    log_p, log_q = logits[token] - normaliser, proposed[token] - total
    restricted = jnp.asarray(False)
    if options.proposal is not None or options.draft is not None or log_psi is not None:
        restricted = (allowed & (proposed == -jnp.inf) & (logits > -jnp.inf)).any()
    dead = total == -jnp.inf  # nothing may follow
    log_p, log_q = jnp.where(dead, -jnp.inf, log_p), jnp.where(dead, 0.0, log_q)
    return Drawn(token, log_p, log_q, none if log_psi is None else log_psi[token], checks, restricted), choices


class Search(NamedTuple):
    """A particle's search for two allowed tokens."""

    tries: Array
    """int32[]: draws so far, the same for all particles"""
    rejected: Array
    """bool[V]"""
    log_left: Array
    """log S_k, S_k being the sum of exp(proposed) over the tokens that are not rejected"""
    log_inverse: Array
    """log of the sum of 1 / S_i, i = 0 to k"""
    token: Array
    """the first allowed one"""
    accepted: Array
    """int32[]: how many times a draw was allowed"""
    checks: Array
    choices: Any


def draw_by_rejection(
    choices: Choices,
    site: SiteRef,
    step: Array,
    now: Next,
    proposed: Array,
    options: Options,
    number: Array,
    axes: tuple[str, ...],
) -> tuple[Array, Array, Array, Choices]:
    """Adaptive weighted rejection sampling (Lipkin et al. 2025): draw, never twice what was rejected, until allowed.

    Returns the token, the log of an estimate of S, the sum of exp(proposed) over allowed tokens, the number of tokens that the
    constraint was asked about, and the choices. The log is -inf where no token is allowed.

    With S_k left after rejections r_1 ... r_k, these and then x have probability prod_i exp(proposed[r_i]) / S_{i-1} times
    exp(proposed[x]) / S_k: x is drawn as if the others were masked, and is independent of what was rejected before it. Go on
    until a second draw (x again, perhaps) is allowed, after n rejections in all. Given x, the event that x was the first draw
    of all has probability S / S_0, so S_0 1[k = 0] is an unbiased estimate of S. Given all but where among r_1 ... r_n the
    token x was met, its place k has probability proportional to 1 / S_k. So by Rao and Blackwell

        S_hat = S_0 P(k = 0 | r_1 ... r_n) = 1 / (1 / S_0 + ... + 1 / S_n)

    is unbiased given x, less variable, never 0, and S_0 itself where nothing is rejected. A particle is done after at most as
    many draws as there are tokens, and two: each rejection leaves one token less.
    """
    remaining = lambda rejected: jnp.where(rejected, -jnp.inf, proposed)
    searching = lambda s: now.live & (s.accepted < 2) & (s.log_left > -jnp.inf)

    def one_draw(s: Search) -> Search:
        here, place = searching(s), SiteRef(site.name, (*site.path, s.tries))
        drawn, choices = s.choices.token(place, step, remaining(s.rejected), number)
        again = (s.accepted == 1) & (drawn == s.token)  # known to be allowed
        asked = here & ~again
        good = again | options.allows(now.state, drawn, asked)
        accepts, rejects = here & good, here & ~good
        rejected = s.rejected.at[drawn].set(s.rejected[drawn] | rejects)
        log_left = jnp.where(rejects, log_total(remaining(rejected)), s.log_left)
        return Search(
            tries=s.tries + 1,
            rejected=rejected,
            log_left=log_left,
            log_inverse=jnp.where(rejects, jnp.logaddexp(s.log_inverse, -log_left), s.log_inverse),
            token=jnp.where(accepts & (s.accepted == 0), drawn, s.token),
            accepted=s.accepted + accepts,
            checks=s.checks + asked,
            choices=jax.tree.map(lambda new, old: new if new is old else jnp.where(here, new, old), choices, s.choices),
        )

    total, zero = log_total(proposed), jnp.int32(0)
    start = Search(zero, jnp.zeros(proposed.shape, bool), total, -total, zero, zero, zero, choices)
    s = jax.lax.while_loop(lambda s: anybody(searching(s), axes), one_draw, start)
    # nothing was accepted: all that could be drawn was rejected, or the proposal is NaN, which is said elsewhere
    return s.token, jnp.where(s.accepted > 0, -s.log_inverse, s.log_left), s.checks, s.choices


def log_total(logits: Array) -> Array:
    """log(sum(exp(logits))), of the same exponentials that a draw takes: XLA computes them once."""
    top = logits.max()
    return jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(jnp.exp(logits - top).sum()))


def over_tokens(site: str, what: str, found: Array, expected: tuple[int, ...]) -> Array:
    """What something says of every token, checked for its shape."""
    if jnp.shape(found) != expected:
        raise SiteError(
            f"site {site!r}: the {what} must have one entry for each of {expected[0]} tokens, found shape "
            f"{list(jnp.shape(found))}"
        )
    return found
