"""Checkpoints of training, by orbax: a folder with one folder for each step that was saved."""

import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latentrace.ppl.errors import RunCheckpointError, SiteError


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise SiteError("checkpoints are written by orbax, which is not installed: pip install latentrace[train]") from None
    return orbax.checkpoint


class Checkpoints:
    """The checkpoints of one run in a folder, of which the newest `keep` stay.

    `mark` says what they belong to: a run with another one is refused. A checkpoint is a tree of arrays, whose shapes the
    one who restores it knows, and curves, whose lengths are those of the run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, {"seed": "0"}) as checkpoints:
    ...     checkpoints.save(3, {"w": jax.numpy.ones(2)}, {"losses": np.zeros(3)})
    ...     step, state, curves = checkpoints.restore({"w": jax.numpy.zeros(2)})
    >>> step, state["w"].tolist(), curves["losses"].shape
    (3, [1.0, 1.0], (3,))
    """

    def __init__(self, path: str | Path, mark: dict[str, str] | None = None, keep: int = 2):
        self.ocp, self.folder, self.mark = _orbax(), Path(path).resolve(), mark or {}
        options = self.ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.manager = self.ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, curves: dict[str, np.ndarray]) -> None:
        """Write one; one of the same step that is there stays. Waits until it is written, since the arrays may be donated."""
        if step in self.manager.all_steps():
            return
        save = self.ocp.args
        about = {"mark": self.mark, "curves": {name: [x.shape, str(x.dtype)] for name, x in curves.items()}}
        parts = {"about": save.JsonSave(about), "state": save.StandardSave({"state": state, "curves": curves})}
        self.manager.save(step, args=save.Composite(**parts))
        self.manager.wait_until_finished()

    def restore(self, state: Any) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """The newest readable one: its step, a tree of arrays of these shapes and places, and the curves; None without any.

        One that cannot be read is set aside under another name, with a warning. Raises `RunCheckpointError` where none can
        be, or where it belongs to another run.
        """
        broken = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                about = self.manager.restore(step, args=self.ocp.args.Composite(about=self.ocp.args.JsonRestore())).about
                self._check(step, about["mark"])
                shapes = {name: np.zeros(shape, dtype) for name, (shape, dtype) in about["curves"].items()}
                how = self.ocp.args.StandardRestore({"state": state, "curves": shapes})
                found = self.manager.restore(step, args=self.ocp.args.Composite(state=how)).state
            except RunCheckpointError:
                raise
            except Exception as error:  # whatever a damaged file makes orbax raise
                self._set_aside(step, error)
                broken.append(step)
                continue
            return step, found["state"], jax.tree.map(np.asarray, found["curves"])
        if broken:
            raise RunCheckpointError(
                f"none of the checkpoints {broken} under {self.folder} can be read; put one back under its step's name, or "
                "choose another folder to start anew"
            )
        return None

    def _check(self, step: int, found: dict[str, str]) -> None:
        if wrong := [name for name in self.mark if found.get(name) != self.mark[name]]:
            raise RunCheckpointError(
                f"{self.folder / str(step)}: belongs to another run (its {' and '.join(wrong)} differ); choose another folder, "
                "or delete this one to start anew"
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        path = self.folder / str(step)
        warnings.warn(f"{path} cannot be read ({type(error).__name__}); going back to the one before", stacklevel=4)
        path.rename(self.folder / f"unreadable-{step}-{time.time_ns()}")
        self.manager.reload()
