"""Markov chain Monte Carlo over traces."""

from .proposals import LogRandomWalk, RandomWalk
from .regenerate import Regenerate

__all__ = ["LogRandomWalk", "RandomWalk", "Regenerate"]
