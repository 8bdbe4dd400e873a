"""Pictures of a posterior's draws."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .diagnostics import CutTable, Of, acceptance_by_cut, columns, correlations, mean_ess, rank_r_hat

if TYPE_CHECKING:
    from .learning.loop import Fit
    from .posterior import Posterior


def mixing(posterior: "Posterior", *of: Of, path: str | Path | None = None, **named: Of) -> Any:
    """A picture of how chains mix: for each number, as `diagnostics.summary` takes them, its trace, the ranks of each chain's
    draws among all (flat where chains agree: Vehtari et al. 2021), and its autocorrelation by tokens spent; below them,
    acceptance by cut where a kernel cuts traces. Written to `path` if there is one. Needs matplotlib.
    """
    import matplotlib.pyplot as plt

    numbers = list(columns(posterior, of, named))
    cuts = _cuts_or_none(posterior)
    rows = len(numbers) + (cuts is not None)
    drawing, panels = plt.subplots(rows, 3, figsize=(11, 2.3 * rows), layout="constrained", squeeze=False)
    for (name, x), (trace, ranks, memory) in zip(numbers, panels):
        _trace(trace, name, x)
        _ranks(ranks, x)
        _memory(memory, posterior, x)
    if cuts is not None:
        _acceptance(panels[-1][0], cuts)
        for panel in panels[-1][1:]:
            panel.set_visible(False)
    if path is not None:
        drawing.savefig(path, dpi=150)
    return drawing


def learning_curves(fit: "Fit", path: str | Path | None = None) -> Any:
    """A picture of how training went: the loss of each step and its running mean, validation losses, and every stat. Written to
    `path` if there is one. Needs matplotlib.
    """
    import matplotlib.pyplot as plt

    curves = {"loss": fit.losses, **fit.stats}
    drawing, panels = plt.subplots(len(curves), 1, figsize=(7, 2.3 * len(curves)), layout="constrained", squeeze=False)
    for (name, values), panel in zip(curves.items(), panels[:, 0]):
        panel.plot(np.arange(1, len(values) + 1), values, color=COLOURS[0], linewidth=0.5, alpha=0.4)
        width = max(1, len(values) // 50)
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        panel.plot(np.arange(width, len(values) + 1), mean, color=COLOURS[0], linewidth=1.2, label=f"mean of {width} steps")
        if name == "loss" and len(fit.validations):
            panel.plot(
                fit.validated_at, fit.validations, "o-", color=COLOURS[1], markersize=3, linewidth=0.9, label="validation"
            )
        panel.legend(fontsize=7, frameon=False)
        panel.set_title(name.replace("$", r"\$"), fontsize=9, loc="left")
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=7)
    if path is not None:
        drawing.savefig(path, dpi=150)
    return drawing


class LiveCurves:
    """Curves that are drawn anew as training goes on, in a notebook: `fit(..., on_segment=plots.LiveCurves())`.

    Args:
        every: seconds from one drawing to the next.
    """

    def __init__(self, every: float = 2.0):
        self.every, self.last, self.shown = every, -np.inf, None

    def __call__(self, fit: "Fit") -> None:
        """Draw a run so far. Needs IPython and matplotlib."""
        import matplotlib.pyplot as plt
        from IPython.display import display

        if time.monotonic() - self.last < self.every:
            return
        drawing = learning_curves(fit)
        if self.shown is None:
            self.shown = display(drawing, display_id=True)
        else:
            self.shown.update(drawing)
        plt.close(drawing)
        self.last = time.monotonic()


COLOURS = ("#1b3a5c", "#c8553d", "#5b8e7d", "#e0a458", "#7d5ba6", "#8a8d91")


def _trace(panel: Any, name: str, x: np.ndarray) -> None:
    for chain, draws in enumerate(x):
        panel.plot(draws, color=COLOURS[chain % len(COLOURS)], linewidth=0.7, alpha=0.8)
    panel.set_title(name.replace("$", r"\$"), fontsize=9, loc="left")
    panel.set_xlabel("draw", fontsize=8)
    panel.tick_params(labelsize=7)


def _ranks(panel: Any, x: np.ndarray, bins: int = 20) -> None:
    """Histograms of ranks; ties are broken at random, since equal numbers have no order."""
    panel.set_xlabel("rank among all draws", fontsize=8)
    panel.tick_params(labelsize=7)
    if np.ptp(x) == 0:
        panel.set_title("ranks: constant", fontsize=9, loc="left")
        return
    order = np.lexsort((np.random.default_rng(0).random(x.size), x.ravel()))
    ranks = np.argsort(order).reshape(x.shape)
    edges = np.linspace(0, x.size, min(bins, x.shape[1]) + 1)
    for chain, row in enumerate(ranks):
        counts, _ = np.histogram(row, edges)
        panel.stairs(counts, edges, color=COLOURS[chain % len(COLOURS)], linewidth=1.0)
    panel.axhline(x.shape[1] / (len(edges) - 1), color="#8a8d91", linestyle=":", linewidth=0.8)
    panel.set_ylim(bottom=0)
    panel.set_title(f"ranks, R-hat {rank_r_hat(x):.3f}", fontsize=9, loc="left")


def _memory(panel: Any, posterior: "Posterior", x: np.ndarray) -> None:
    tokens = float(posterior.moves.tokens.mean()) if posterior.moves is not None else 0.0
    each, unit, what = (tokens, "tokens spent by a chain", "tokens") if tokens else (1.0, "lag, draws", "draws")
    title = "autocorrelation: constant"
    if np.ptp(x) > 0 and x.shape[1] >= 4:
        time = x.size / mean_ess(x)
        most = int(min(max(5 * time, 10), x.shape[1] - 1))
        panel.plot(each * np.arange(most + 1), correlations(x)[: most + 1], color=COLOURS[0], linewidth=1.0)
        panel.axvline(each * time, color=COLOURS[1], linestyle="--", linewidth=0.8)
        title = f"autocorrelation: independent per {each * time:,.0f} {what}"
    panel.axhline(0, color="#8a8d91", linewidth=0.6)
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel(unit, fontsize=8)
    panel.tick_params(labelsize=7)


def _acceptance(panel: Any, cuts: CutTable) -> None:
    seen = [row for row in cuts if row.proposals]
    middle, rate = [(row.start + row.end - 1) / 2 for row in seen], np.array([row.rate for row in seen])
    spread = np.array([[row.rate - row.low, row.high - row.rate] for row in seen]).T.clip(0)
    panel.errorbar(middle, rate, yerr=spread, fmt="o", color=COLOURS[0], markersize=4, capsize=2, linewidth=0.9)
    panel.set_ylim(0, 1)
    panel.set_title("acceptance by cut, 95 % intervals", fontsize=9, loc="left")
    panel.set_xlabel("choices kept", fontsize=8)
    panel.tick_params(labelsize=7)


def _cuts_or_none(posterior: "Posterior") -> CutTable | None:
    try:
        return acceptance_by_cut(posterior)
    except ValueError:
        return None
