"""What algorithms share: run a staged program, show progress, check what came back, make a posterior of it."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from latentrace.ppl.program import as_program
from latentrace.ppl.run import Output, Settings, check_faults, execute, label_values
from latentrace.ppl.staging import Staged, check_given, stage
from latentrace.ppl.state import Counts

from .genealogy import Genealogy
from .posterior import Ledger, Posterior


class Progress:
    """A bar that appears when a run, compilation left out, takes longer than a few seconds; fed by the compiled program."""

    def __init__(self, delay: float = 3.0):
        self.delay = delay
        self.start: float | None = None
        self.bar: Any = None

    def __call__(self, count: Any) -> None:
        """Called from inside the run with the number of model calls so far."""
        if self.start is None:
            self.start = time.monotonic()
        if time.monotonic() - self.start < self.delay:
            return
        if self.bar is None:
            self.bar = tqdm(desc="generating", unit=" model calls", file=sys.stderr, leave=False)
        self.bar.n = max(self.bar.n, int(count))
        self.bar.refresh()

    def __enter__(self) -> "Progress":
        self.start = None
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


PROGRESS = Progress()  # one object for the process: compiled programs refer to it


def wants_progress(progress: bool | None) -> bool:
    """The default shows progress to people: on a terminal and in notebooks."""
    return ("ipykernel" in sys.modules or sys.stderr.isatty()) if progress is None else progress


def prepare(program: Any, args: tuple[Any, ...]) -> tuple[Staged, dict[str, Any]]:
    """Stage a program and check the values given for its sites."""
    program = as_program(program)
    staged = stage(program.fn, args)
    check_given(staged, program.given)
    return staged, program.given


def run_particles(
    rng_key: jax.Array,
    program: Any,
    args: tuple[Any, ...],
    make_settings: Callable[[Staged, Any], Settings],
    *,
    total: int,
    progress: bool | None,
) -> Posterior:
    """Run `total` particles in equal chunks of `settings.num_particles`."""
    start = time.perf_counter()
    staged, given = prepare(program, args)
    with PROGRESS:
        settings = make_settings(staged, PROGRESS if wants_progress(progress) else None)
        size = settings.num_particles
        chunks = [execute(staged, rng_key, given, settings, first) for first in range(0, total, size)]
        jax.block_until_ready(chunks)
        if settings.progress is not None:
            jax.effects_barrier()
    joined = chunks[0] if len(chunks) == 1 else jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *chunks)
    output = jax.tree.map(lambda x: np.asarray(x)[:total], joined)
    calls = sum(int(np.asarray(c.counts.model_calls).max(initial=0)) for c in chunks)
    return finish(staged, output, calls=calls, seconds=time.perf_counter() - start)


def finish(
    staged: Staged, output: Output, *, calls: int, seconds: float, exact: bool = False, stopped: str | None = None
) -> Posterior:
    """Check a run's faults and make its posterior."""
    check_faults(staged, output.faults, np.asarray(output.log_weight))
    kept = output.resamplings
    return Posterior(
        values=label_values(staged, output.values),
        returned=None if stopped else staged.out_tree.unflatten(output.returned),
        log_weights=np.asarray(output.log_weight),
        ledger=ledger_of(output.counts, len(output.log_weight), calls, seconds),
        active={k: np.asarray(v) for k, v in output.active.items()},
        exact=exact,
        roots=np.asarray(output.root),
        restricted=bool(np.asarray(output.faults.restricted).any()),
        stopped=stopped,
        resamplings=None if kept is None else Genealogy.of(kept, np.asarray(output.log_weight) > -np.inf),
    )


def ledger_of(counts: Counts, num_particles: float, calls: int, seconds: float) -> Ledger:
    """What a run of `calls` passes, of `num_particles` each on average, cost, from counts of its work, for each particle or in
    all."""
    generated = int(np.sum(counts.generated))
    return Ledger(
        tokens_generated=generated,
        tokens_scored=int(np.sum(counts.scored)),
        model_calls=calls,
        potential_calls=int(np.sum(counts.potentials)),
        seconds=seconds,
        utilisation=generated / max(num_particles * calls, 1),
    )
