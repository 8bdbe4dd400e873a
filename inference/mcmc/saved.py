"""Where chains stand: their states, their draws so far, and how both are written to disk and read again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.boundary import Boundary
from latentrace.ppl.errors import RunCheckpointError
from latentrace.ppl.state import Counts

from ..anytime import like, read, write
from ..chains import Draw, Info

Array = jax.Array


class Kept(NamedTuple):
    """What the host keeps of a stretch of chains; leading axes of draws and chains."""

    draw: Draw
    info: Info
    """counts summed and acceptance averaged over the steps from draw to draw; `stats` of the last"""


@dataclass
class Saved:
    """Chains after some steps."""

    mark: Callable[[], dict[str, str]]
    """what they belong to"""
    boundary: Boundary
    """the states"""
    blank: Info
    """zeros like what a step says, chains side by side"""
    done: int = 0
    """steps of each chain"""
    kept: list[Kept] = field(default_factory=list)
    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys([*Counts._fields, "restricted"], 0))
    """what all steps cost, and whether a proposal left out tokens"""

    def pay(self, info: Info) -> None:
        """Add what steps cost: leading axes, the last one of chains."""
        for name in Counts._fields:
            count = np.asarray(getattr(info.counts, name), np.int64)
            self.spent[name] += int(np.max(count, axis=-1).sum() if name == "model_calls" else count.sum())
        self.spent["restricted"] |= int(np.any(info.faults.restricted))

    def without_draws(self) -> "Saved":
        """The chains alone, to go on from."""
        nothing = dict.fromkeys(self.spent, 0)
        return replace(self, kept=[], spent=nothing | {"restricted": self.spent["restricted"]})

    def draws(self) -> Kept:
        """All that was kept, as one."""
        return jax.tree.map(lambda *xs: np.concatenate(xs), *self.kept)  # type: ignore[no-any-return]


def save(saved: Saved, path: str | Path) -> None:
    """Write chains and their draws."""
    arrays: dict[str, Any] = {f"state.{i}": x for i, x in enumerate(saved.boundary.leaves)}
    if saved.kept:
        arrays |= {f"kept.{i}": x for i, x in enumerate(jax.tree.leaves(saved.draws()))}
    count = len(jax.tree.leaves(saved.draws())[0]) if saved.kept else 0
    spent = {f"spent {name}": str(value) for name, value in saved.spent.items()}
    write(path, arrays, {**saved.mark(), **spent, "steps": str(saved.done), "draws": str(count)})


def load(path: str | Path, mark: Callable[[], dict[str, str]], shapes: tuple[Boundary, Info, Draw], rng_key: Array) -> Saved:
    """Read them. `shapes` are the states, what a step says, and one draw of all chains, without their numbers."""
    arrays, about = read(path, mark())
    boundary, blank, draw = shapes
    count, kept = int(about["draws"]), []
    if count:
        widened = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), Kept(draw, blank))
        kept = [jax.device_get(like(widened, arrays, "kept", rng_key))]
    spent = {name.removeprefix("spent "): int(value) for name, value in about.items() if name.startswith("spent ")}
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)
    return Saved(mark, like(boundary, arrays, "state", rng_key), blank, int(about["steps"]), kept, spent)


def check_mark(mark: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Whether chains belong to another run."""
    if wrong := [name for name in mark if found.get(name) != mark[name]]:
        raise RunCheckpointError(f"resume: the posterior belongs to another run (its {' and '.join(wrong)} differ)")
