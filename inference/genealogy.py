"""Where the traces of a population come from: the genealogy of its resamplings, and the tree of the texts that they wrote."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrace.ppl.state import Resamplings

if TYPE_CHECKING:
    from .posterior import Posterior


@dataclass(frozen=True)
class Genealogy:
    """The resamplings of a run, oldest first; a population of N has N places, before and after each.

    >>> ancestors, nobody = np.array([[0, 0, 2], [2, 1, 1]]), np.arange(3)
    >>> genealogy = Genealogy(ancestors, np.array([1, 4]), merged=0, before=nobody, alive=np.array([True, True, False]))
    >>> genealogy.paths.tolist()
    [[2, 0, 0], [2, 1, 1], [0, 1, 2]]
    >>> genealogy.survivors().tolist()
    [2, 2, 2]
    """

    ancestors: np.ndarray
    """int32[R, N]: the place, before each resampling, of the ancestor of each place after it"""
    clocks: np.ndarray
    """int32[R]: how often weights had moved at each"""
    merged: int
    """how many earlier resamplings are known by their composition only; 0 where `ancestors` are all"""
    before: np.ndarray = field(repr=False)
    """int32[N]: that composition: for each place before the oldest of `ancestors`, its place at the start of the run"""
    alive: np.ndarray = field(repr=False)
    """bool[N]: which places have a positive weight at the end"""

    @classmethod
    def of(cls, kept: Resamplings, alive: np.ndarray) -> "Genealogy":
        """From what a run brings back, with a leading axis of particles."""
        count, capacity = int(np.max(kept.total)), np.shape(kept.ancestors)[1]
        slots = np.arange(max(count - capacity, 0), count) % capacity
        ancestors, clocks = np.asarray(kept.ancestors).T[slots], np.asarray(kept.clocks)[0, slots]
        return cls(ancestors, clocks, max(count - capacity, 0), np.asarray(kept.before), alive)

    @property
    def maps(self) -> np.ndarray:
        """int32[G, N]: `ancestors`, after the map of merged ones where there are such: they lead back to the start."""
        return np.concatenate([self.before[None], self.ancestors]) if self.merged else self.ancestors

    @cached_property
    def paths(self) -> np.ndarray:
        """int32[G + 1, N]: the place, before each of `maps` and at the end, of the ancestor of each place at the end."""
        found = [np.arange(len(self.alive))]
        for ancestor in self.maps[::-1]:
            found.append(ancestor[found[-1]])
        return np.stack(found[::-1])

    def survivors(self) -> np.ndarray:
        """int[G + 1]: how many different places, before each of `maps` and at the end, have a living descendant at the end."""
        return np.array([len(np.unique(row[self.alive])) for row in self.paths])

    def follow(self, values: Any) -> np.ndarray:
        """Values of the places at the start (an array [N, ...]), as their descendants at the end have them."""
        return np.asarray(values)[self.paths[0]]

    def ranks(self, keys: np.ndarray | None = None) -> np.ndarray:
        """int[G + 1, N]: an order of the places before each of `maps` and at the end in which no two lines cross.

        Siblings stand in order of `keys` (int[N], for each place at the end): of the least one among their living descendants.
        """
        n = len(self.alive)
        keys, nobody = (np.zeros(n, int), 0) if keys is None else (keys, int(keys.max()) + 1)
        parent, found = np.zeros(n, int), []
        for step, row in enumerate(self.paths):
            least = np.full(n, nobody)
            np.minimum.at(least, row[self.alive], keys[self.alive])
            found.append(np.argsort(np.lexsort((np.arange(n), least, parent))))
            if step < len(self.maps):
                parent = found[-1][self.maps[step]]
        return np.stack(found)

    def figure(self, posterior: "Posterior", path: str | Path | None = None, label: Any = None) -> Any:
        """The traces as a tree from left to right, a column for each resampling; written to `path` if there is one.

        Lines lead from ancestor to child: dark ones to traces of the posterior, as wide as their share of it, light ones
        to traces that died out. `label`, a site or a function as for `Posterior.marginal`, names the most probable values
        at the right. Needs matplotlib.
        """
        import matplotlib.pyplot as plt

        groups = [] if label is None else _groups(posterior, label)
        keys = np.full(len(self.alive), len(groups))
        for number, (_, members) in enumerate(groups):
            keys[members] = number
        rank, n, generations = self.ranks(keys if groups else None), len(self.alive), len(self.paths)
        masses = [np.bincount(row, posterior.weights, minlength=n) for row in self.paths]
        column = min(1.1, 11 / generations)  # inches
        letters = max((len(text) for text, _ in groups), default=0)
        right = (0.6 + 0.06 * letters) / column if groups else 0.3  # columns that labels take
        size = max(column * (generations + 0.3 + right), 5.0), min(2.2 + 0.045 * n, 9)
        drawing, panel = plt.subplots(figsize=size, layout="constrained")
        _edges(panel, -1, np.full(n, (n - 1) / 2), rank[0], masses[0])
        for step, ancestor in enumerate(self.maps):
            _edges(panel, step, rank[step][ancestor], rank[step + 1], masses[step + 1])
        for step in range(generations):
            _places(panel, step, rank[step], masses[step])
        _leaves(panel, generations - 1, rank[-1], masses[-1])
        _labels(panel, groups, posterior.weights, generations - 1, rank[-1], 0.35 / column)
        self._axes(panel, right)
        if path is not None:
            drawing.savefig(path, dpi=150)
        return drawing

    def _axes(self, panel: Any, right: float) -> None:
        """What stands around the tree."""
        clocks = ["start", *(["merged"] if self.merged else []), *self.clocks]
        panel.set_xticks(range(len(clocks)), [f"{c}\n{s}" for c, s in zip(clocks, self.survivors())], fontsize=8)
        panel.set_xlim(-1.05, len(clocks) - 1 + right)
        panel.set_yticks([])
        panel.invert_yaxis()
        panel.spines[:].set_visible(False)
        panel.set_xlabel(
            "clock of the resampling\nsurvivors: how many there have a trace in the posterior", fontsize=8, loc="left"
        )
        panel.set_title(self._summary(), fontsize=9, loc="left")

    def _summary(self) -> str:
        count = len(self.clocks) + self.merged
        note = f", the first {self.merged} merged" if self.merged else ""
        return f"{len(self.alive)} particles, {count} resampling{'s' * (count != 1)}{note}; {self.alive.sum()} alive at the end"

    def __repr__(self) -> str:
        return f"Genealogy({self._summary()}; survivors {self.survivors().tolist()})"


# --- the parts of the figure ------------------------------------------------------------------------------------------

DARK, LIGHT = "#1b3a5c", "#c9ced6"
CURVE = np.linspace(0, 1, 32)


def _width(mass: np.ndarray) -> np.ndarray:
    """Width of a line, points: what is in the posterior is always seen."""
    return np.where(mass > 0, 0.7 + 5 * mass, 0.5)


def _edges(panel: Any, step: int, start: np.ndarray, end: np.ndarray, mass: np.ndarray) -> None:
    """Curves from places at height `start` of column `step` to those at `end` of the next, the dark ones on top."""
    from matplotlib.collections import LineCollection

    bend = CURVE**2 * (3 - 2 * CURVE)
    height = start[:, None] + (end - start)[:, None] * bend
    curves = np.stack(np.broadcast_arrays(step + CURVE, height), axis=-1)
    for chosen, colour, order in ((mass == 0, LIGHT, 1), (mass > 0, DARK, 2)):
        lines = LineCollection(list(curves[chosen]), colors=colour, linewidths=_width(mass[chosen]), zorder=order)
        panel.add_collection(lines)


def _places(panel: Any, step: int, rank: np.ndarray, mass: np.ndarray) -> None:
    """A column of places."""
    panel.scatter(np.full(len(rank), step), rank, s=2, color=np.where(mass > 0, DARK, LIGHT), zorder=3)


def _leaves(panel: Any, step: int, rank: np.ndarray, mass: np.ndarray) -> None:
    """The traces of the posterior: dots as large and as red as each is heavy."""
    alive, heavy = mass > 0, mass / mass.max()
    size = (6 + 30 * heavy)[alive]
    panel.scatter(np.full(alive.sum(), step), rank[alive], s=size, c=heavy[alive], cmap="YlOrRd", vmin=0, vmax=1.2,
                  edgecolors=DARK, linewidths=0.4, zorder=4)  # fmt: skip


def _groups(posterior: "Posterior", label: Any, most: int = 10) -> list[tuple[str, list[int]]]:
    """The most probable values with the share of each, and the particles that have them."""
    from .posterior import hashable

    members: dict[Any, list[int]] = {}
    for particle, value in zip(np.flatnonzero(posterior.weights > 0), posterior.of(label)):
        members.setdefault(hashable(value), []).append(int(particle))
    mass = {value: posterior.weights[who].sum() for value, who in members.items()}
    top = sorted(members, key=lambda value: -mass[value])[:most]
    words = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [(f"{mass[value]:.0%}  {_short(words(value))}", members[value]) for value in top]


def _labels(panel: Any, groups: list[Any], weights: np.ndarray, x: float, rank: np.ndarray, shift: float) -> None:
    """Values beside the traces that have them, at heights that keep the lines of text apart."""
    middles = [float(np.average(rank[members], weights=weights[members])) for _, members in groups]
    heights = _apart(middles, 3.4, len(rank) - 1)
    for (text, members), height in zip(groups, heights):
        panel.text(x + shift, height, f" {text}", fontsize=7, va="center").set_in_layout(False)
        for place in rank[members]:
            panel.plot([x, x + shift], [place, height], color=LIGHT, linewidth=0.5, zorder=1)


def _apart(middles: list[float], gap: float, bottom: float) -> list[float]:
    """Heights near `middles` that are at least `gap` apart, none below `bottom` if there is room."""
    order = np.argsort(middles)
    heights, free = np.zeros(len(middles)), -np.inf
    for i in order:
        heights[i] = free = max(middles[i], free + gap)
    free = max(bottom, gap * (len(middles) - 1)) + gap
    for i in order[::-1]:
        heights[i] = free = min(heights[i], free - gap)
    return heights.tolist()


def _short(text: str, most: int = 48) -> str:
    text = text.strip().replace("\n", " ⏎ ").replace("$", r"\$")
    return text if len(text) <= most else text[: most - 1] + "…"
