"""Markov chain Monte Carlo over traces."""

from .proposals import LogRandomWalk, RandomWalk

__all__ = ["LogRandomWalk", "RandomWalk"]
