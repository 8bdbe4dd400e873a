"""The texts of a posterior's traces as a tree: what they share is written once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np

from latentrace.ppl import Text
from latentrace.ppl.errors import SiteError
from latentrace.ppl.text import spellings


class Node(NamedTuple):
    """A piece of text that all traces below it share; pieces end where traces part, between tokens."""

    text: str
    mass: float
    """posterior probability of the traces below"""
    children: tuple["Node", ...]
    """most probable first; empty for a leaf, where traces end. A leaf of text "" is a trace that ends where others go on"""


@dataclass(frozen=True)
class TextTree:
    """A prefix tree of texts. Prints as an outline; shows in a notebook with a darker ground where there is more mass.

    >>> root = Node("", 1.0, (Node("4+4", 0.75, (Node("=8", 0.5, ()), Node("=9", 0.25, ()))), Node("1<2", 0.25, ())))
    >>> TextTree(root)
    100%
      75%  '4+4'
        50%  '=8'
        25%  '=9'
      25%  '1<2'
    """

    root: Node
    others: int = 0
    """how many more different texts there are, less probable than those shown"""

    @property
    def leaves(self) -> list[tuple[str, float]]:
        """The texts that are shown and their masses; with `rest` they sum to 1."""
        return list(_leaves(self.root, ""))

    @property
    def rest(self) -> float:
        """The mass of the texts that are not shown."""
        return max(0.0, 1 - self.root.mass)

    def __repr__(self) -> str:
        lines = [f"{'  ' * depth}{node.mass:.0%}  {node.text!r}" for depth, node in _outline(self.root)]
        lines[0] = lines[0].removesuffix("  ''")
        return "\n".join([*lines, *([f"  {self.rest:.0%}  in {self.others} others"] if self.others else [])])

    def _repr_html_(self) -> str:
        rest = f"<li>{_share(self.rest)} in {self.others} others</li>" if self.others else ""
        inside = "".join(map(_item, self.root.children)) if not self.root.text else _item(self.root)
        return f'<ul style="{LIST}">{inside}{rest}</ul>'


LIST = "list-style:none;margin:0 0 0 .6em;padding:0 0 0 .8em;border-left:1px solid rgba(128,128,128,.4)"


def _item(node: Node) -> str:
    text = escape(node.text.replace("\n", "⏎\n").removesuffix("\n")) or "<i>(ends here)</i>"
    ground = f"background:rgba(240,150,30,{0.06 + 0.6 * node.mass:.2f});color:inherit;white-space:pre-wrap;padding:0 .3em"
    below = f'<ul style="{LIST}">{"".join(map(_item, node.children))}</ul>' if node.children else ""
    return f'<li><code style="{ground}">{text}</code> {_share(node.mass)}{below}</li>'


def _share(mass: float) -> str:
    return f'<small style="opacity:.7">{mass:.1%}</small>'


def _leaves(node: Node, before: str) -> Iterator[tuple[str, float]]:
    text = before + node.text
    if not node.children:
        yield text, node.mass
    for child in node.children:
        yield from _leaves(child, text)


def _outline(node: Node, depth: int = 0) -> Iterator[tuple[int, Node]]:
    yield depth, node
    for child in node.children:
        yield from _outline(child, depth + 1)


# --- from a posterior -------------------------------------------------------------------------------------------------

Symbol = bytes | int
"""A token as it is spelled, or its number in a model that knows no strings."""


def tree_of(values: dict[str, Any], active: dict[str, np.ndarray], weights: np.ndarray, most: int) -> TextTree:
    """The tree of the texts of some sites, in the order in which they are named; see `Posterior.tree`."""
    if most < 1:
        raise SiteError(f"tree: most must be at least 1, not {most}")
    for name, value in values.items():
        if not isinstance(value, Text):
            raise SiteError(f"site {name!r}: a tree is one of generated texts, and this site is none")
    masses: dict[tuple[Symbol, ...], float] = {}
    for particle in np.flatnonzero(weights > 0):
        written = tuple(_written({k: v[particle] for k, v in values.items()}, {k: active[k][particle] for k in values}))
        masses[written] = masses.get(written, 0.0) + float(weights[particle])
    top = sorted(masses, key=lambda written: -masses[written])[:most]
    return TextTree(_grow([(written, masses[written]) for written in top]), len(masses) - len(top))


def _written(texts: dict[str, Text], active: dict[str, Any]) -> Iterator[Symbol]:
    """The tokens of one trace: step by step over sites with equally many texts, such as those of one loop."""
    shapes = [np.shape(text.length) for text in texts.values()]
    names = list(texts)
    for first, shape in enumerate(shapes):
        if first and shapes[first - 1] == shape:
            continue  # written along with the sites before it
        group = next((names[first:i] for i in range(first, len(names)) if shapes[i] != shape), names[first:])
        for step in np.ndindex(shape):
            for name in group:
                if np.asarray(active[name])[step]:
                    yield from _symbols(texts[name][step])


def _symbols(text: Text) -> Sequence[Symbol]:
    ids = [i for i in text.ids() if i != text.lm.eos_id]
    try:
        letters = spellings(text.lm)
    except ValueError:  # the model knows no strings
        return ids
    return [letters[i] for i in ids]


def _grow(traces: list[tuple[tuple[Symbol, ...], float]]) -> Node:
    """The tree of different traces, from what they all begin with."""
    shared = 0
    shortest = min(len(written) for written, _ in traces)
    while shared < shortest and len({written[shared] for written, _ in traces}) == 1:
        shared += 1
    piece = traces[0][0][:shared]
    mass = sum(mass for _, mass in traces)
    text = b"".join(s if isinstance(s, bytes) else b"%d " % s for s in piece).decode(errors="replace")
    if len(traces) == 1:
        return Node(text, mass, ())
    parts: dict[Symbol | None, list[tuple[tuple[Symbol, ...], float]]] = {}
    for written, share in traces:
        rest = written[shared:]
        parts.setdefault(rest[0] if rest else None, []).append((rest, share))
    return Node(text, mass, tuple(sorted(map(_grow, parts.values()), key=lambda node: -node.mass)))
