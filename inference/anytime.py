"""Runs that can be stopped and resumed: a budget, Ctrl-C, and checkpoints on disk."""

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from latentrace.ppl.errors import RunCheckpointError, SiteError
from latentrace.ppl.run import Settings, arrays_of
from latentrace.ppl.segments import SegmentedRun
from latentrace.ppl.staging import Staged

from .driver import finish, prepare, wants_progress
from .posterior import Posterior

Array = jax.Array


@dataclass(frozen=True)
class Budget:
    """What a run may spend. It stops at the first cut where something is used up: after a text, or a step of a loop.

    Args:
        tokens: generated tokens, summed over particles.
        seconds: of wall time, compilation included.

    >>> Budget(tokens=1000, seconds=60.0)
    Budget(tokens=1000, seconds=60.0)
    """

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("seconds", self.seconds)):
            if value is not None and not value > 0:
                raise SiteError(f"Budget: {name} must be positive, not {value}; leave it out for no limit")

    def spent(self, tokens: Callable[[], int], seconds: float) -> bool:
        """Whether nothing is left."""
        over_time = self.seconds is not None and seconds >= self.seconds
        return over_time or (self.tokens is not None and tokens() >= self.tokens)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is saved, and resumed from if the file is there: the resumed run gives bit-identical particles.

    A finished run's file holds its end; delete it to run again.

    Args:
        path: a file, replaced as a whole each time.
        every: save when so many seconds have passed since the last time, and when the run stops.
    """

    path: str | Path
    every: float = 60.0


def run_in_segments(
    rng_key: Array,
    program: Any,
    args: tuple[Any, ...],
    make_settings: Callable[[Staged, Any], Settings],
    *,
    budget: Budget | None,
    checkpoint: Checkpoint | None,
    progress: bool | None,
) -> Posterior:
    """Run a population segment by segment, until it ends, is spent, or is interrupted.

    An interrupt (Ctrl-C) before the first cut is raised; after it, the posterior so far is returned.
    """
    start = time.monotonic()
    staged, given = prepare(program, args)
    settings = make_settings(staged, None)
    run = SegmentedRun(staged, rng_key, given, settings)
    mark = fingerprint(staged, settings, run.given, rng_key) if checkpoint else {}
    if checkpoint and Path(checkpoint.path).exists():
        restore(run, checkpoint.path, mark, SegmentedRun(staged, rng_key, given, settings, abstract=True), rng_key)
    budget, saved, cuts = budget or Budget(), time.monotonic(), 0
    bar = tqdm(desc="generating", unit=" segments", leave=False, delay=3, disable=not wants_progress(progress))
    try:
        while not run.done and not budget.spent(lambda: run.tokens, time.monotonic() - start):
            run.advance()
            jax.block_until_ready(run.boundary.leaves)
            cuts += 1
            bar.update()
            if checkpoint and time.monotonic() - saved >= checkpoint.every:
                save(run, checkpoint.path, mark)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if not cuts:
            raise
    finally:
        bar.close()
    if checkpoint:
        save(run, checkpoint.path, mark)
    output = jax.tree.map(np.asarray, run.output())
    calls = int(output.counts.model_calls.max(initial=0))
    stopped = None if run.done else run.place
    return finish(staged, output, calls=calls, seconds=time.monotonic() - start, stopped=stopped)


def plain(value: Any) -> str:
    """How something is written, without the addresses of objects, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+|object at \S+", "", str(value))


def fingerprint(staged: Staged, settings: Any, given: Mapping[str, Any], rng_key: Array) -> dict[str, str]:
    """What a checkpoint has to agree with: the program's structure, how it is run, the key, and every array that it reads."""
    data = 0
    for array in jax.tree.leaves((arrays_of(staged), given)):
        data = zlib.crc32(_to_bytes(jax.numpy.asarray(array)).data, data)
    return {
        "program": str(zlib.crc32(plain(staged.jaxpr).encode())),
        "settings": plain(settings),
        "rng_key": str(np.asarray(jax.random.key_data(rng_key)).tolist()),
        "arrays": str(data),
    }


def save(run: SegmentedRun, path: str | Path, mark: dict[str, str]) -> None:
    """Write where a run stands."""
    arrays = {f"boundary.{i}": x for i, x in enumerate(run.boundary.leaves)}
    for step, collected in enumerate(run.collected):
        arrays |= {f"collected.{step}.{i}": x for i, x in enumerate(jax.tree.leaves(collected))}
    write(path, arrays, {**mark, "segment": str(run.segment), "steps": str(len(run.collected))})


def write(path: str | Path, arrays: Mapping[str, Any], about: dict[str, str]) -> None:
    """Write a checkpoint; a file that is there is replaced only by a whole one."""
    target = Path(path)
    unfinished = target.with_name(target.name + ".part")
    save_file({name: _to_bytes(x) for name, x in arrays.items()}, unfinished, metadata={"latentrace": json.dumps(about)})
    os.replace(unfinished, target)


def read(path: str | Path, mark: dict[str, str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a checkpoint, as bytes for `like` to read, and what `write` was told about them."""
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            found = json.loads((file.metadata() or {}).get("latentrace", "null"))
        arrays = load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise RunCheckpointError(f"{path}: cannot be read as a checkpoint ({error}); delete it to start anew") from error
    wrong = ["format"] if not isinstance(found, dict) else [name for name in mark if found.get(name) != mark[name]]
    if wrong:
        raise RunCheckpointError(
            f"{path}: belongs to another run (its {' and '.join(wrong)} differ); name another file, or delete it to start anew"
        )
    return arrays, found


def like(tree: Any, arrays: Mapping[str, np.ndarray], prefix: str, rng_key: Array) -> Any:
    """The arrays of a checkpoint named `prefix.0`, `prefix.1`, ... as the leaves of a tree of such shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    impl = jax.random.key_impl(rng_key)
    return jax.tree.unflatten(structure, [_from_bytes(arrays[f"{prefix}.{i}"], x, impl) for i, x in enumerate(leaves)])


def restore(run: SegmentedRun, path: str | Path, mark: dict[str, str], shapes: SegmentedRun, rng_key: Array) -> None:
    """Put a run where a checkpoint says. `shapes`, the same run without its numbers, tells what should be there."""
    arrays, found = read(path, mark)
    segment, steps = int(found["segment"]), int(found["steps"])
    while shapes.segment < segment or len(shapes.collected) < min(steps, 1):
        shapes.advance()
    run.boundary = like(shapes.boundary, arrays, "boundary", rng_key)
    run.segment = segment
    run.collected = [like(x, arrays, f"collected.{i}", rng_key) for i, x in enumerate(shapes.collected[:1] * steps)]


def _to_bytes(x: Array) -> np.ndarray:
    """An array as bytes, whatever its dtype."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def _from_bytes(data: np.ndarray, like: Any, impl: Any) -> Array:
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, like)
        return jax.random.wrap_key_data(_from_bytes(data, words, impl), impl=impl)
    return jax.numpy.asarray(data.view(like.dtype).reshape(like.shape))
