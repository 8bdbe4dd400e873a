"""Programs: functions whose sites inference interprets."""

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, NamedTuple

import jax

from .errors import SiteError
from .run import Settings, execute, label_values
from .staging import check_given, random_sites, stage


class Trace(NamedTuple):
    """One forward run of a program."""

    values: dict[str, Any]
    """value of every site; a `Text` for generated ones"""
    returned: Any
    log_weight: float
    """nats: what factors, conditions, observations and scored texts paid"""


class Program:
    """A function whose sites inference interprets, with values given for some of them.

    Calling it inside another program runs it there, as a part of that program. Every algorithm's `run` takes it.
    """

    def __init__(self, fn: Callable[..., Any], given: Mapping[str, Any] | None = None):
        self.fn = fn
        self.given = dict(given or {})
        update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.given:
            raise SiteError(f"{self.fn.__name__} has given values ({', '.join(self.given)}), which hold under inference only")
        return self.fn(*args, **kwargs)

    def condition(self, values: Mapping[str, Any]) -> "Program":
        """The program with some sites' values given: they are observed, and pay their log density.

        A text is given as a string, token ids, or a `Text`; values inside loops and plates have a leading axis for each.

        >>> from latentrace import ppl
        >>> import numpyro.distributions as dist
        >>> coin = ppl.program(lambda: ppl.sample("heads", dist.Bernoulli(0.3)))
        >>> round(float(coin.log_density({"heads": 1})), 4)
        -1.204
        """
        return Program(self.fn, {**self.given, **values})

    def simulate(self, rng_key: jax.Array, *args: Any) -> Trace:
        """One forward run under the prior and the proposals: every site's value, the return value, the log-weight."""
        staged = stage(self.fn, args)
        check_given(staged, self.given)
        output = execute(staged, rng_key, self.given, Settings(1))
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)
        returned = staged.out_tree.unflatten(first(output.returned))
        return Trace(label_values(staged, first(output.values)), returned, float(output.log_weight[0]))

    def log_density(self, values: Mapping[str, Any], *args: Any) -> jax.Array:
        """log p(values, conditions), float32[], nats: every random site must be given. Differentiable in `values`."""
        program = self.condition(values)
        staged = stage(self.fn, args)
        check_given(staged, program.given)
        if missing := [name for name in random_sites(staged) if name not in program.given]:
            raise SiteError(f"log_density needs a value for every random site; {', '.join(map(repr, missing))} has none")
        return execute(staged, jax.random.key(0), program.given, Settings(1)).log_weight[0]

    def __repr__(self) -> str:
        return f"<program {getattr(self.fn, '__name__', 'fn')}{' given ' + ', '.join(self.given) if self.given else ''}>"


def program(fn: Callable[..., Any]) -> Program:
    """Make a program of a Python function; a NumPyro model is one already.

    >>> from latentrace import ppl
    >>> import numpyro.distributions as dist
    >>> @ppl.program
    ... def coin():
    ...     return ppl.sample("heads", dist.Bernoulli(0.3))
    """
    return Program(fn)


def as_program(fn: Any) -> Program:
    return fn if isinstance(fn, Program) else Program(fn)
