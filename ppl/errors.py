"""Errors of the library. Each names the site, the values found there, and the mend."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class LatentraceError(Exception):
    """Base class of every error that this library raises on purpose."""


class SiteError(LatentraceError, ValueError):
    """A site was declared or used wrongly; found while the program is staged, before any computation."""


class SiteNameError(SiteError, KeyError):
    """A site name is repeated, or a name was asked for that the program does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class TransformationError(SiteError):
    """A site stands under a JAX transformation that would change its meaning."""


class NotEnumerableError(SiteError):
    """The program cannot be enumerated: a site has no finite support, or there are too many traces."""


class RunCheckpointError(SiteError):
    """A run's checkpoint that cannot be read, or that belongs to another run."""


class RunError(LatentraceError, RuntimeError):
    """A run went wrong at a site; found when its results come back."""


class AllParticlesDeadError(RunError):
    """Every particle reached weight 0."""


class NonFiniteError(RunError):
    """A log-weight was NaN or +inf."""


class NonFiniteGradientError(RunError):
    """In training, a loss, a gradient, or a parameter after its update was NaN or infinite; that update was not applied."""

    def __init__(self, message: str, *, step: int, paths: list[str], fit: Any):
        super().__init__(message)
        self.step = step
        """number of the step, from 0: so many were applied"""
        self.paths = paths
        """of the arrays of parameters whose gradient or new value was not finite, such as "['w']" """
        self.fit = fit
        """the run up to there, an `inference.learning.Fit`"""


class BoundReachedError(RunError):
    """A `while` loop was still going when it reached its declared bound."""


class ContextOverflowError(RunError):
    """A context grew past the model's maximum length."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what it may have meant, or all that exists."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "the names are " + ", ".join(map(repr, known)) if known else "there are none"
