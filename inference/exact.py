"""Exact inference: every trace of a finite program, as one more population of particles."""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.choices import Spec
from latentrace.ppl.errors import NotEnumerableError
from latentrace.ppl.jaxpr import body_of, inner_jaxprs, scan_of
from latentrace.ppl.run import Settings, execute
from latentrace.ppl.sites import LOOKAHEAD, NESTED, generate_p, plate_p, sample_p
from latentrace.ppl.staging import Staged, holds_sites, loop_bound

from .driver import PROGRESS, finish, prepare, wants_progress
from .posterior import Posterior

Array = jax.Array


class Layout(NamedTuple):
    """What decides how many digits a stretch of program takes."""

    given: frozenset[str]
    vocabularies: tuple[int, ...]

    def radices(self, closed: Any) -> list[int]:
        """The radix of every digit of one pass through a jaxpr, in the interpreter's order."""
        found: list[int] = []
        for eqn in body_of(closed).eqns:
            p, inside, times = eqn.params, inner_jaxprs(eqn), 1
            if eqn.primitive in (sample_p, generate_p):
                inside = []
                if p["name"] not in self.given:
                    found += self._site(eqn)
            elif eqn.primitive is plate_p:
                if p["role"] == NESTED:
                    raise NotEnumerableError("`ppl.nested` estimates by sampling; to enumerate, call its function in its place")
                times = 0 if p["role"] == LOOKAHEAD else p["size"]
            elif eqn.primitive.name == "scan" and holds_sites(eqn):
                times = scan_of(eqn).length
            elif eqn.primitive.name == "while" and holds_sites(eqn):
                times = loop_bound(eqn)[0]
            for inner in inside:
                found += self.radices(inner) * times
        return found

    def _site(self, eqn: Any) -> list[int]:
        p = eqn.params
        if eqn.primitive is generate_p:
            return [self.vocabularies[p["model"]]] * p["max_tokens"]
        if p["support"] is None:
            raise NotEnumerableError(
                f"site {p['name']!r} has no finite support that is known before the run; use ImportanceSampling or SMC, or "
                "give the site a value with `program.condition`"
            )
        return [len(p["support"])] * math.prod(p["out"][0])


@partial(jax.tree_util.register_dataclass, data_fields=["digits", "cursor"], meta_fields=["layout"])
@dataclass(frozen=True)
class Digits:
    """The choices of one trace. An inactive site takes digit 0, so that every trace is met once."""

    digits: Array
    """int32[D]: digits of every site in the order of the walk, loops unrolled, all branches of a `cond`"""
    cursor: Array
    """int32[]: the next site's first digit"""
    layout: Layout

    def supply(self, spec: Spec | None, active: Any) -> tuple[Array, Array, "Digits"]:
        assert spec is not None, "a site without finite support is refused before the run"
        room = jnp.pad(self.digits, (0, spec.digits))  # the body of a loop of no steps is traced, but has no digits
        digits = jax.lax.dynamic_slice(room, (self.cursor,), (spec.digits,))
        return digits, jnp.asarray(active) | (digits == 0).all(), self._skip(spec.digits)

    def enter_element(self, i: Array, jaxpr: Any) -> "Digits":
        return self._skip(i * len(self.layout.radices(jaxpr)))

    def leave_plate(self, size: int, jaxpr: Any, elements: Any) -> "Digits":
        return self._skip(size * len(self.layout.radices(jaxpr)))

    def _skip(self, count: Any) -> "Digits":
        return Digits(self.digits, self.cursor + count, self.layout)


class Counter(NamedTuple):
    """Particle number i as a mixed-radix number."""

    radices: tuple[int, ...]
    layout: Layout

    def choices(self, rng_key: Array, particle: Array, trace: dict[str, Array]) -> Any:
        strides = np.cumprod([1, *self.radices[::-1]])[:-1][::-1].astype(np.int32)
        digits = particle // jnp.asarray(strides) % jnp.asarray(self.radices, jnp.int32)
        return Digits(digits.astype(jnp.int32), jnp.int32(0), self.layout)


@dataclass(frozen=True)
class Exact:
    """Enumeration of a finite program: every text of every `generate` site, every value of every discrete site.

    Proposals and twists play no part. Particles of the posterior are the traces of positive density, and `log_evidence` is
    exact up to float32 rounding.

    Args:
        max_traces: refuse programs with more candidate traces than this.
        batch_size: traces evaluated at once.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def two_coins():
    ...     a, b = ppl.sample("a", dist.Bernoulli(0.5)), ppl.sample("b", dist.Bernoulli(0.2))
    ...     ppl.condition("one at least", a + b >= 1)
    >>> inference.Exact().run(jax.random.key(0), two_coins).marginal("a")
    value  probability  error
    1           0.8333  0.0000
    0           0.1667  0.0000
    """

    max_traces: int = 2_000_000
    batch_size: int = 8192

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program. The key is not used: nothing is random.

        Raises `NotEnumerableError` for a site without finite support, and for more than `max_traces` candidates.
        """
        start = time.perf_counter()
        staged, given = prepare(program, args)
        settings, total = self._settings(staged, frozenset(given), wants_progress(progress))
        kept: list[Any] = []
        calls = 0
        with PROGRESS:
            for first in range(0, total, settings.num_particles):
                output = jax.tree.map(np.asarray, execute(staged, rng_key, given, settings, first))
                number = first + np.arange(settings.num_particles)
                possible = (number < total) & (output.log_weight > -np.inf)
                faulty = (output.faults.non_finite >= 0) | (output.faults.bound >= 0) | (output.faults.overflow >= 0)
                keep = possible | (faulty & (number < total))
                if not kept and not keep.any() and first + settings.num_particles >= total:
                    keep[:] = True  # nothing is possible: let the check of faults say where it all died
                kept.append(jax.tree.map(lambda x, keep=keep: x[keep], output))
                calls += int(output.counts.model_calls.max(initial=0))
        output = jax.tree.map(lambda *xs: np.concatenate(xs), *kept)
        return finish(staged, output, calls=calls, seconds=time.perf_counter() - start, exact=True)

    def _settings(self, staged: Staged, given: frozenset[str], progress: bool) -> tuple[Settings, int]:
        layout = Layout(given, tuple(lm.vocab_size for lm in staged.models))
        radices = tuple(layout.radices(staged.jaxpr))
        total = math.prod(radices)
        if total > min(self.max_traces, 2**31 - 1):
            raise NotEnumerableError(
                f"the program has up to {total:,} traces, more than max_traces={self.max_traces:,}; shorten its texts and "
                "loops, or use SMC"
            )
        size = min(self.batch_size, total)
        return Settings(size, Counter(radices, layout), progress=PROGRESS if progress else None), total
