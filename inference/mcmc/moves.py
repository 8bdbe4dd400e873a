"""What the steps of chains did: how many proposals were accepted, and what they cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..chains import Info

ENOUGH = 20
"""steps after which a chain should have moved"""


@dataclass(frozen=True)
class Moves:
    """The steps of chains; every array has leading axes of chains and draws."""

    accepted: np.ndarray
    """float32[chains, draws], from 0 to 1: of what was proposed from draw to draw, the part that was accepted"""
    tokens: np.ndarray
    """int[chains, draws]: tokens generated and scored from draw to draw"""
    stats: dict[str, Any]
    """what kernels say of their last step before each draw, such as where it cut, by name"""
    thinning: int = 1
    """steps from draw to draw"""

    @staticmethod
    def of(info: Info, thinning: int) -> "Moves":
        """From what was kept; leading axes of draws and chains."""
        chains_first = lambda x: np.swapaxes(np.asarray(x), 0, 1)
        tokens = np.asarray(info.counts.generated) + np.asarray(info.counts.scored)
        return Moves(chains_first(info.accepted), chains_first(tokens), jax.tree.map(chains_first, info.stats), thinning)

    def stuck(self) -> Iterator[str]:
        """What to warn of: chains that never moved, after enough steps to tell."""
        chains, draws = self.accepted.shape
        never, steps = np.flatnonzero((self.accepted == 0).all(axis=1)), draws * self.thinning
        if never.size and steps >= ENOUGH:
            which = ", ".join(map(str, never[:5])) + (", ..." if never.size > 5 else "")
            yield (
                f"{never.size} of {chains} chains never moved ({which}): none of their proposals in {steps} steps was "
                f"accepted, for {self.tokens[never].sum()} tokens{self._reason(never)}. Their draws are one trace each; take "
                "another kernel, smaller moves, or a tempered target"
            )

    def _reason(self, chains: np.ndarray) -> str:
        """Why chains that propose by a program cannot have moved."""

        def returns(stats: dict[str, Any]) -> Iterator[np.ndarray]:
            for name, value in stats.items():
                if isinstance(value, dict):
                    yield from returns(value)
                elif name == "returns":
                    yield value[chains]

        if any(not back.any() for back in returns(self.stats)):
            return "; their proposal program could never have drawn the way back (`stats['returns']` is False throughout)"
        return ""

    def __repr__(self) -> str:
        chains, draws = self.accepted.shape
        return f"Moves({chains} chains, {draws} draws, acceptance {self.accepted.mean():.3f}, {self.tokens.sum()} tokens)"
