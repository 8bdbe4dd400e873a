"""A training run under way: its state, its curves, what the host does between compiled calls, and how it is saved."""

import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from latentrace.ppl.errors import NonFiniteGradientError, SiteError
from latentrace.ppl.sites import flatten

from .. import plots
from .checkpoints import Checkpoints
from .update import LONGEST, How, Keys, Shardings, State, Stretch, batch_of, num_rows, parts_of, shuffled

Array = jax.Array
SECONDS = 0.5
"""between two looks of the host at a run: Ctrl-C waits no longer, save for a single step"""


@dataclass(frozen=True)
class Fit:
    """What training came to."""

    params: Any
    """the last ones; with `validate`, those of the lowest validation loss"""
    losses: np.ndarray
    """float32[steps]: of each step, before its update"""
    stats: dict[str, np.ndarray]
    """float32[steps] each"""
    validated_at: np.ndarray
    """int32[looks]: steps done at each validation"""
    validations: np.ndarray
    """float32[looks]: validation losses"""
    stopped: str | None
    """why it ended before `num_steps`; None where it did not"""
    seconds: float
    last: State = field(repr=False)
    """parameters and the optimizer's state after the last step, for `resume`"""

    @property
    def steps(self) -> int:
        """Updates that were applied."""
        return len(self.losses)

    def figure(self, path: str | Path | None = None) -> Any:
        """A picture of the curves (`plots.learning_curves`)."""
        return plots.learning_curves(self, path=path)


class Loop:
    """A run under way."""

    def __init__(
        self,
        how: How,
        rng_key: Array,
        params: Any,
        data: Any,
        sharding: Shardings | None,
        segment: int,
        validate: Callable[[Any], Any] | None,
        patience: int | None,
    ):
        self.how, self.keys, self.segment = how, Keys.of(rng_key), segment
        self.validate, self.patience, self.sharding = validate, patience, sharding
        self.began = time.perf_counter()
        self.state = first_state(how, params, sharding)
        self.best, self.lowest = self.state.params if validate is None else own(self.state.params), float("inf")
        self.done, self.saved, self.pace = 0, 0, 1
        self.losses: list[np.ndarray] = []
        self.stats: list[dict[str, np.ndarray]] = []
        self.validations: list[tuple[int, float]] = []
        self.asks = data if callable(data) else None
        self.data: tuple[Any, ...] = () if data is None or self.asks else self._placed(data)
        self.stretches: dict[Any, Stretch] = {}
        if self.asks is None:
            self._stretch()  # what is wrong with a loss comes to light before anything else

    # --- going on ---

    def one_segment(self, num_steps: int, bar: Any) -> None:
        """Go on to the end of this segment, or of the run."""
        if self.asks is not None:
            rows_key = jax.random.fold_in(self.keys.rows, self.done)
            self.data = self._placed(self.asks(self.done, rows_key, own(self.state.params)))
        end = min((self.done // self.segment + 1) * self.segment, num_steps)
        while self.done < end:
            self._advance(min(self.pace, LONGEST, end - self.done), bar)
        if self.validate is not None:
            now = own(self.state.params)
            value = float(self.validate(now))
            self.validations.append((self.done, value))
            if value < self.lowest:
                self.best, self.lowest = now, value

    def _advance(self, count: int, bar: Any) -> None:
        """Up to `count` steps in one call."""
        before = time.monotonic()
        with uninterrupted():  # the state that goes in is given away, and what comes out must not be lost
            self.state, said, tried = self._stretch().run(self.state, self.data, self.done, count)
            bad = np.asarray(said.bad)
            good = tried - int(bad.any())
            self.losses.append(np.asarray(said.loss)[:good])
            self.stats.append({name: np.asarray(x)[:good] for name, x in said.stats.items()})
            self.done += good
        if bad.any():
            raise self._failure(bad, float(said.loss[good]))
        bar.set_postfix(loss=f"{self.losses[-1][-1]:.4g}", refresh=False)
        bar.update(good)
        each = (time.monotonic() - before) / count
        self.pace = int(np.clip(SECONDS / each, 1, 8 * count))

    def _stretch(self) -> Stretch:
        """What runs data of these shapes."""
        leaves, tree = jax.tree.flatten(self.data)
        shapes = tree, tuple((x.shape, x.dtype) for x in leaves)
        if shapes not in self.stretches:
            self._check_rows()
            self.stretches[shapes] = Stretch(self.how, self.keys, self.state, self.data)
        return self.stretches[shapes]

    def _check_rows(self) -> None:
        size, parts = self.how.batch_size, self.how.accumulate
        if not self.data:
            if size is not None:
                raise SiteError(f"fit: batch_size={size} needs data to draw from")
            return
        rows = num_rows(self.data[0]) if size is not None or parts > 1 else 0
        if size is not None and size > rows:
            raise SiteError(f"fit: batch_size={size} is more than the {rows} examples that there are")
        if (size or rows) % parts:
            raise SiteError(f"fit: a batch of {size or rows} examples cannot be split into {parts} equal parts (accumulate)")

    def _placed(self, data: Any) -> tuple[Any]:
        """Data as arrays, whole on each device of a mesh unless they are spread over it already."""
        data = jax.tree.map(jnp.asarray, data)
        if self.sharding is None:
            return (data,)
        everywhere = NamedSharding(jax.tree.leaves(self.sharding.batch)[0].mesh, PartitionSpec())
        return (jax.tree.map(lambda x: x if len(x.sharding.device_set) > 1 else jax.device_put(x, everywhere), data),)

    def out_of_patience(self) -> str | None:
        """Why to stop, if validations say so."""
        if self.patience is None or not self.validations:
            return None
        values = [np.inf if np.isnan(value) else value for _, value in self.validations]
        since = len(values) - 1 - int(np.argmin(values))
        return f"no better validation loss in {since} looks" if since >= self.patience else None

    def _failure(self, bad: np.ndarray, loss: float) -> NonFiniteGradientError:
        """What to raise about the step that comes next."""
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(self.state.params)]
        wrong = [path for path, is_bad in zip(paths, bad[1:]) if is_bad]
        names = ", ".join("params" + path for path in wrong)
        where = f"; not finite: the gradient or the new value of {names}" if wrong else ""
        why = self._explained()
        message = (
            f"fit: the loss of step {self.done} is {loss:.6g}{where}.{' ' + why if why else ''} The update was not applied; "
            "`fit` of this error holds the run up to there. Lower the learning rate, clip gradients "
            "(optax.clip_by_global_norm), or keep the loss away from log 0 and from 0 / 0"
        )
        return NonFiniteGradientError(message, step=self.done, paths=wrong, fit=self.fit("not finite"))

    def _explained(self) -> str | None:
        """What the loss itself says of the step that comes next."""
        explain = getattr(self.how.loss, "explain", None)
        if explain is None:
            return None
        batch, key = self.data, jax.random.fold_in(self.keys.loss, self.done)
        if size := self.how.batch_size:
            order = shuffled(self.keys, jnp.int32(self.done), num_rows(batch), size)
            batch = batch_of(batch, order, jnp.int32(self.done), size)
        if (parts := self.how.accumulate) == 1:
            return explain(key, self.state.params, *batch)  # type: ignore[no-any-return]
        keys, split = jax.random.split(key, parts), parts_of(self.how, batch)
        said = (explain(keys[i], self.state.params, *jax.tree.map(lambda x: x[i], split)) for i in range(parts))
        return next((sentence for sentence in said if sentence), None)

    # --- what there is ---

    def curves(self) -> dict[str, np.ndarray]:
        """Losses, stats and validations of all steps, by name."""
        at, values = zip(*self.validations) if self.validations else ((), ())
        joined = lambda parts: np.concatenate(parts) if parts else np.zeros(0, np.float32)
        stats = {f"stats {name}": joined([part[name] for part in self.stats]) for name in (self.stats[0] if self.stats else {})}
        looks = {"validated_at": np.array(at, np.int32), "validations": np.array(values, np.float32)}
        return {"losses": joined(self.losses), **looks, **stats}

    def fit(self, stopped: str | None = None) -> Fit:
        """The run so far, in arrays of its own."""
        curves, last = self.curves(), own(self.state)
        stats = {name.removeprefix("stats "): x for name, x in curves.items() if name.startswith("stats ")}
        seconds, best = (
            time.perf_counter() - self.began,
            last.params if self.validate is None or not self.validations else self.best,
        )
        return Fit(best, curves["losses"], stats, curves["validated_at"], curves["validations"], stopped, seconds, last)

    def go_on_from(self, fit: Fit) -> None:
        """Put the run where another one ended."""
        if flatten(fit.last)[1] != flatten(self.state)[1]:
            raise SiteError("fit: `resume` is the fit of other parameters or of another optimizer")
        self.state, self.best = own(fit.last), own(fit.params)
        stats = {f"stats {name}": x for name, x in fit.stats.items()}
        looks = {"validated_at": fit.validated_at, "validations": fit.validations}
        self._take({"losses": fit.losses, **looks, **stats})

    def _take(self, curves: dict[str, np.ndarray]) -> None:
        self.done = self.saved = len(curves["losses"])
        self.losses, self.stats = [curves["losses"]], [{k: x for k, x in curves.items() if k.startswith("stats ")}]
        self.stats = [{name.removeprefix("stats "): x for name, x in self.stats[0].items()}]
        self.validations = [(int(at), float(x)) for at, x in zip(curves["validated_at"], curves["validations"])]
        self.lowest = min([x for _, x in self.validations if not np.isnan(x)], default=float("inf"))

    # --- on disk ---

    def mark(self) -> dict[str, str]:
        """What a checkpoint has to agree with: the staged update, how it is run, the key, and every array that it reads."""
        read: Any = (self.state, self.data if self.asks is None else ())
        marks = {"rng_key": str(np.asarray(jax.random.key_data(self.keys.loss)).tolist())}
        how = self.how.batch_size, self.how.accumulate, str(self.how.dtype), self.segment, self.validate is not None
        marks["settings"] = str(how)
        if self.asks is None:
            stretch = self._stretch()
            marks["loss or optimizer"] = str(zlib.crc32(stretch.text().encode()))
            read = (read, stretch.consts)
        return {**marks, "arrays": str(checksum(read))}

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint. A run that asks for its data stands at the end of a segment in one, or its data would be lost."""
        lost = any(x.is_deleted() for x in jax.tree.leaves(self.state))  # in a call that failed
        if self.done and not lost and (self.asks is None or self.done % self.segment == 0):
            curves = {name: x for name, x in self.curves().items() if x.size}
            checkpoints.save(self.done, {"state": self.state, "best": self._kept()}, curves)
            self.saved = self.done

    def restore(self, checkpoints: Checkpoints) -> None:
        """Put the run where the newest checkpoint says, if there is one."""
        found = checkpoints.restore({"state": self.state, "best": self._kept()})
        if found is not None:
            _, saved, curves = found
            self.state, self.best = own(saved["state"]), saved["best"]
            self._take({"validated_at": np.zeros(0, np.int32), "validations": np.zeros(0, np.float32), **curves})

    def _kept(self) -> Any:
        """The best parameters, where they are others than the last."""
        return () if self.validate is None else self.best


def first_state(how: How, params: Any, sharding: Shardings | None) -> State:
    """Parameters and the optimizer's state before the first step, in arrays of the run's own."""
    for path, x in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise SiteError(
                f"fit: params{jax.tree_util.keystr(path)} is {jnp.result_type(x)}, which has no gradient; keep what is not "
                "trained out of params: the loss may close over it"
            )
    if not jax.tree.leaves(params):
        raise SiteError("fit: there are no arrays in params")
    params = own(params)
    if sharding is not None:
        params = jax.device_put(params, sharding.params)
    state = State(params, own(how.optimizer.init(params)))
    meshes = [x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)]
    if not meshes:
        return state
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere), state)


def own(tree: Any) -> Any:
    """Copies of arrays, of the same dtypes and places: those of a run are given away at its next step."""
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x)), tree)


def checksum(tree: Any) -> int:
    """A number of the bytes of all arrays of a tree."""
    data = 0
    for x in jax.tree.leaves(tree):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x
        data = zlib.crc32(np.ascontiguousarray(np.asarray(x)).tobytes(), data)
    return data


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
