"""Where a move may cut a trace: a weight for each of its random choices."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError, near_misses
from latentrace.ppl.walk import Walk

Array = jax.Array


class Cuts(Protocol):
    """A rule that weighs the choices of a trace; one of them is taken in proportion. Hashable: it is compiled in."""

    @property
    def entropies(self) -> bool:
        """Whether it reads entropies."""
        ...

    def weights(self, walk: Walk, name: str) -> Array:
        """float32, 0 or more, for each choice of site `name`, as in `walk.notes[name].log_q`; what is inactive is left out by
        the caller. A trace all of whose weights are 0 is not moved."""
        ...


@dataclass(frozen=True)
class UniformCuts:
    """Every choice alike: each token of a text, each value; the elements of a plate, which are drawn side by side, count as
    many but are cut together."""

    entropies = False

    def weights(self, walk: Walk, name: str) -> Array:
        return jnp.ones_like(walk.notes[name].log_q)


@dataclass(frozen=True)
class SiteCuts:
    """The first choice of each site: a value, or a whole text. In a loop that writes a step of reasoning at a time these are
    the boundaries of steps."""

    entropies = False

    def weights(self, walk: Walk, name: str) -> Array:
        note = walk.notes[name].log_q
        text = note.ndim > walk.active[name].ndim
        return jnp.zeros_like(note).at[..., 0].set(1.0) if text else jnp.ones_like(note)


@dataclass(frozen=True)
class StepCuts:
    """The first token of each text, and those that follow given tokens, such as a newline: steps inside one text."""

    after: tuple[int, ...]
    entropies = False

    def weights(self, walk: Walk, name: str) -> Array:
        note = walk.notes[name].log_q
        if note.ndim == walk.active[name].ndim:
            return jnp.ones_like(note)
        ends = jnp.isin(walk.values[name][0], jnp.asarray(self.after, jnp.int32)).astype(jnp.float32)
        return jnp.concatenate([jnp.ones_like(ends[..., :1]), ends[..., :-1]], axis=-1)


@dataclass(frozen=True)
class EntropyCuts:
    """In proportion to how much the entropy of the model's next token jumps up there: where the text was decided.

    A token whose entropy is h nats, after one of entropy g, weighs max(h - g, 0) + floor; the first token of a text h + floor,
    a value of a `sample` site 1 + floor. The floor keeps every cut possible.
    """

    floor: float = 0.05
    entropies = True

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise SiteError(f"EntropyCuts: floor must be positive, so that every choice can be redrawn; not {self.floor}")

    def weights(self, walk: Walk, name: str) -> Array:
        note = walk.notes[name]
        if note.log_q.ndim == walk.active[name].ndim:
            return jnp.full_like(note.log_q, 1 + self.floor)
        before = jnp.concatenate([jnp.zeros_like(note.entropy[..., :1]), note.entropy[..., :-1]], axis=-1)
        return jnp.maximum(note.entropy - before, 0.0) + self.floor


RULES: dict[str, Cuts] = {"uniform": UniformCuts(), "sites": SiteCuts(), "entropy": EntropyCuts()}


def rule(cuts: Any, kernel: str) -> Cuts:
    """A rule by its name, or itself."""
    if isinstance(cuts, str):
        if cuts not in RULES:
            raise SiteError(f"{kernel}: no rule of cuts {cuts!r}; {near_misses(cuts, RULES)}")
        return RULES[cuts]
    if not hasattr(cuts, "weights") or not hasattr(cuts, "entropies"):
        raise SiteError(f"{kernel}: cuts are one of {', '.join(RULES)}, or have the members of `mcmc.Cuts`; found {cuts!r}")
    return cuts  # type: ignore[no-any-return]
