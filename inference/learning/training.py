"""The training loop: whatever has a loss that is a function of parameters is fitted here."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from latentrace.ppl.errors import SiteError

from ..driver import wants_progress
from .checkpoints import Checkpoints
from .loop import Fit, Loop
from .update import How, Shardings

Array = jax.Array


def fit(
    loss: Callable[..., Any],
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    rng_key: Array,
    data: Any = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    dtype: Any = None,
    sharding: Shardings | None = None,
    segment: int | None = None,
    validate: Callable[[Any], Any] | None = None,
    patience: int | None = None,
    on_segment: Callable[[Fit], Any] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: Fit | None = None,
    progress: bool | None = None,
) -> Fit:
    """Minimise a loss by stochastic gradients, many steps in one compiled call.

    Step t sees a key and a minibatch that are functions of `rng_key` and t, so that a run which was interrupted goes on
    bit-identically. The loss is staged at each call, and what it closes over is an input of the compiled program: another call
    with a loss and an optimizer of the same structure and shapes compiles nothing.

    Args:
        loss: `loss(rng_key, params, batch)`, or `loss(rng_key, params)` without data; float32[], or that and a dictionary of
            float32[], whose curves are kept.
        params: a pytree of floating-point arrays.
        num_steps: updates in all, those of a resumed run included.
        data: a pytree of arrays with one leading axis in common, that of examples; or a function `(step, rng_key, params)`,
            called on the host before each segment, which returns such data for it, such as rollouts of these parameters.
        batch_size: examples of a minibatch, drawn without replacement from epoch to epoch; what is left of an epoch is left out
            of it. By default a batch is all data.
        accumulate: parts of a batch, of equal size, whose gradients are computed one after the other and averaged. A loss
            without data sees as many keys.
        dtype: what parameters are cast to for the loss, such as bfloat16; the parameters that are updated, their gradients and
            the loss stay float32. What else the loss should have in low precision it casts itself.
        sharding: where parameters and batches lie on a mesh; by default parameters stay where they are.
        segment: steps from one validation, checkpoint, `on_segment` or call of `data` to the next; by default 100, and 1 where
            `data` is a function.
        validate: the validation loss of parameters, asked for on the host after each segment. The best parameters are kept.
        patience: stop after so many validations in a row that are no better than the best one before.
        on_segment: called with the `Fit` so far after each segment.
        checkpoint: a folder where the run is saved every `checkpoint_every` steps, at the end of a segment, and where it stops;
            the same call resumes it from there. Needs orbax (`latentrace[train]`).
        resume: a `Fit` of the same call, to go on from.
        progress: whether to show a bar (by default on a terminal or in a notebook, after a few seconds).

    An interrupt (Ctrl-C) ends the run after the step that it is at, with a warning, and returns what there is; before the first
    step it is raised. Raises `SiteError` for arguments that do not fit; `NonFiniteGradientError` where a loss, a gradient or an
    updated parameter is not finite: that update is not applied, and the error's `fit` holds the run up to there. A loss that
    has an attribute `explain(rng_key, params, batch)` may return a sentence for its message, such as at which site.
    `RunCheckpointError` for a checkpoint of another run.

    >>> import jax, jax.numpy as jnp, optax
    >>> from latentrace.inference import learning
    >>> x = jnp.linspace(-1, 1, 64)
    >>> loss = lambda rng_key, params, batch: jnp.mean((params["w"] * batch["x"] - batch["y"]) ** 2)
    >>> found = learning.fit(loss, {"w": 0.0}, optax.adam(0.1), num_steps=200, rng_key=jax.random.key(0),
    ...                      data={"x": x, "y": 3 * x}, batch_size=16)
    >>> round(float(found.params["w"]), 2), found.losses.shape
    (3.0, (200,))
    """
    asks = callable(data)
    segment = (1 if asks else 100) if segment is None else segment
    counts = {"num_steps": num_steps, "accumulate": accumulate, "segment": segment, "checkpoint_every": checkpoint_every}
    _check_counts({**counts, **{k: v for k, v in {"batch_size": batch_size, "patience": patience}.items() if v is not None}})
    if patience is not None and validate is None:
        raise SiteError("fit: patience counts validations; give `validate` too")
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise SiteError(f"fit: dtype is bfloat16 or float32, not {jnp.dtype(dtype)}; float16 gradients underflow unscaled")
    if checkpoint is not None and resume is not None:
        raise SiteError("fit: `resume` and `checkpoint` both say where to go on from; give one of them")
    how = How(loss, optimizer, batch_size, accumulate, dtype, None if sharding is None else sharding.batch)
    run = Loop(how, rng_key, params, data, sharding, segment, validate, patience)
    opened = nullcontext() if checkpoint is None else Checkpoints(checkpoint, run.mark())
    with opened as checkpoints:
        if checkpoints is not None:
            run.restore(checkpoints)
        if resume is not None:
            run.go_on_from(resume)
        bar = tqdm(total=num_steps, initial=run.done, unit=" steps", desc="fitting", leave=False, delay=3,
                   disable=not wants_progress(progress))  # fmt: skip
        stopped = None
        try:
            while run.done < num_steps and not (stopped := run.out_of_patience()):
                run.one_segment(num_steps, bar)
                if on_segment is not None:
                    on_segment(run.fit())
                if checkpoints is not None and run.done - run.saved >= checkpoint_every:
                    run.save(checkpoints)
        except KeyboardInterrupt:
            if not run.done:
                raise
            stopped = "interrupted"
            warnings.warn(f"fit: interrupted after {run.done} of {num_steps} steps, which are returned", stacklevel=2)
        finally:
            bar.close()
            if checkpoints is not None:
                run.save(checkpoints)
    return run.fit(stopped)


def _check_counts(counts: dict[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise SiteError(f"fit: {name} must be a whole number of at least 1, not {value!r}")
