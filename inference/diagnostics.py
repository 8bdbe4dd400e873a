"""Whether Markov chains have mixed, and at what price in tokens: numbers and tables of a posterior's draws."""

from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpyro.diagnostics import autocovariance, effective_sample_size
from scipy import stats

from latentrace.ppl import Text

if TYPE_CHECKING:
    from .posterior import Posterior

Of = str | Callable[[dict[str, Any]], Any]
"""a site's name, or a function of one trace's values, as `Posterior.of` takes it; numbers, truth values or arrays of them"""


# --- of one number, as a chain has it ---------------------------------------------------------------------------------
# x: float64[chains, draws]


def normal_scores(x: np.ndarray) -> np.ndarray:
    """The numbers' ranks among all chains as quantiles of a normal distribution; ties share their mean rank (Vehtari, Gelman,
    Simpson, Carpenter and Buerkner 2021, equation 14)."""
    ranks = stats.rankdata(x, method="average").reshape(x.shape)
    return np.asarray(stats.norm.ppf((ranks - 3 / 8) / (x.size + 1 / 4)))


def halves(x: np.ndarray) -> np.ndarray:
    """Each chain as two; of an odd number of draws the middle one is left out."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def rank_r_hat(x: np.ndarray) -> float:
    """R-hat of split chains, of their ranks or of their distances' from the median, whichever is larger (the same, section 4);
    NaN for a constant or fewer than 4 draws, infinite for chains that are each constant."""
    if x.shape[1] < 4 or np.ptp(split := halves(x)) == 0:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [split_r_hat(normal_scores(y)) for y in (split, np.abs(split - np.median(split)))]
    return float(np.nanmax(found))


def split_r_hat(split: np.ndarray) -> float:
    """R-hat of chains that have been split."""
    length = split.shape[1]
    within, between = split.var(axis=1, ddof=1).mean(), split.mean(axis=1).var(ddof=1)
    return float(np.sqrt((length - 1) / length + np.float64(between) / within))


def mean_ess(x: np.ndarray) -> float:
    """Effective sample size of split chains for their mean, at most N log10 N of N draws (the same, equations 10 to 13; Geyer
    1992); NaN for fewer than 4 draws."""
    if x.shape[1] < 4:
        return float("nan")
    if np.ptp(split := halves(x)) == 0:
        return float(x.size)
    found, most = float(effective_sample_size(split)), x.size * np.log10(x.size)
    return found if 0 < found < most else float(most)  # below 0 where draws alternate so that their errors cancel


def bulk_ess(x: np.ndarray) -> float:
    """Effective sample size for the middle of the distribution: of the ranks."""
    return mean_ess(normal_scores(x)) if np.ptp(x) > 0 else mean_ess(x)


def tail_ess(x: np.ndarray) -> float:
    """Effective sample size for the 5 % and 95 % quantiles, whichever is smaller."""
    return min(mean_ess((x <= np.quantile(x, q)).astype(float)) for q in (0.05, 0.95))


def correlations(x: np.ndarray) -> np.ndarray:
    """Autocorrelation float64[draws] by lag, of all chains together (the same, equation 10); NaN after lag 0 for a constant."""
    covariance = autocovariance(x, axis=1).mean(axis=0)
    within = x.var(axis=1, ddof=1).mean()
    spread = within * (1 - 1 / x.shape[1]) + (x.mean(axis=1).var(ddof=1) if len(x) > 1 else 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 1 - (within - covariance) / np.float64(spread)
    found[0] = 1.0
    return np.asarray(found)


# --- of a posterior ---------------------------------------------------------------------------------------------------


def series(posterior: "Posterior", of: Of) -> np.ndarray:
    """A number, or an array of them, for each draw: float64[chains, draws, ...]. `ValueError` for what is none, and for a
    posterior that does not come from Markov chains."""
    if posterior.chains is None:
        raise ValueError("these draws come from no Markov chain: their weights and `posterior.ess` say how good they are")
    value = posterior.values[of] if isinstance(of, str) else None
    if isinstance(value, Text):
        raise ValueError(f"site {of!r} is a text: give a function of it, such as lambda values: values[{of!r}].length")
    try:
        x = np.asarray(posterior.of(of) if callable(of) else value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_name(of, 0)}: expected a number for each trace, or an array of them ({error})") from error
    return x.reshape(posterior.chains, -1, *x.shape[1:])


def r_hat(posterior: "Posterior", of: Of) -> Any:
    """Rank-normalised split R-hat, of the bulk or folded, whichever is larger (Vehtari et al. 2021): about 1 where chains
    agree; more than 1.01 says that they do not. NaN for a constant; an array for an array.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import diagnostics, mcmc
    >>> coin = ppl.program(lambda: ppl.sample("coin", dist.Bernoulli(0.3)))
    >>> posterior = inference.MCMC(mcmc.Regenerate(), num_samples=200, num_chains=4).run(jax.random.key(0), coin)
    >>> bool(diagnostics.r_hat(posterior, "coin") < 1.05)
    True
    """
    return _each(rank_r_hat, series(posterior, of))


def ess(posterior: "Posterior", of: Of, kind: str = "bulk") -> Any:
    """Effective sample size, draws: for the "bulk" of the distribution, its "tail" (5 % and 95 % quantiles), or the "mean"
    (Vehtari et al. 2021); an array for an array."""
    kinds = {"bulk": bulk_ess, "tail": tail_ess, "mean": mean_ess}
    if kind not in kinds:
        raise ValueError(f"ess: kind must be one of {', '.join(kinds)}, not {kind!r}")
    return _each(kinds[kind], series(posterior, of))


class Autocorrelation(NamedTuple):
    """How long chains remember a number."""

    correlation: np.ndarray
    """float64[lags], by lag in draws; 1 at lag 0"""
    tokens: np.ndarray
    """float64[lags]: tokens that one chain spends on so many draws"""
    time: float
    """the integrated autocorrelation time, in draws: so many are worth an independent one"""

    @property
    def tokens_per_independent_draw(self) -> float:
        """The same time, in tokens."""
        return self.time * float(self.tokens[1])


def autocorrelation(posterior: "Posterior", of: Of) -> Autocorrelation:
    """Autocorrelation of a number, by lag in draws and in the tokens that they cost."""
    x = series(posterior, of)
    if x.ndim > 2:
        raise ValueError(f"{_name(of, 0)}: expected one number for each trace, found an array of shape {x.shape[2:]}")
    each = float(posterior.moves.tokens.mean()) if posterior.moves is not None else float("nan")
    return Autocorrelation(correlations(x), each * np.arange(x.shape[1]), x.size / mean_ess(x))


def tokens_per_change(posterior: "Posterior") -> float:
    """Tokens generated and scored for each proposal that was accepted; infinite where none was."""
    moves = _moves(posterior)
    changes = float(moves.accepted.sum()) * moves.thinning
    return float(moves.tokens.sum()) / changes if changes else float("inf")


# --- tables -----------------------------------------------------------------------------------------------------------


class Table(tuple[Any, ...]):
    """Rows that print as a table, and show as one in a notebook."""

    __slots__ = ()

    @property
    def header(self) -> tuple[str, ...]:
        raise NotImplementedError

    def cells(self) -> Iterator[list[str]]:
        """The words of each row."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = [list(self.header), *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.header))]
        line = lambda row: "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        return "\n".join(line(row).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        row = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"
        return f"<table>{row('th', self.header)}{''.join(row('td', cells) for cells in self.cells())}</table>"


class SummaryRow(NamedTuple):
    """What chains say of one number."""

    name: str
    mean: float
    sd: float
    mcse: float
    """Monte Carlo standard error of the mean"""
    r_hat: float
    ess_bulk: float
    ess_tail: float
    ess_per_1000_tokens: float
    """bulk, over the tokens that the draws cost, warm-up left out; infinite where they cost none"""

    @property
    def constant(self) -> bool:
        """Whether all draws of all chains are the same, so that nothing can be said of mixing."""
        return self.sd == 0


class Summary(Table):
    """One row for each number."""

    __slots__ = ()
    header = ("", "mean", "sd", "MCSE", "R-hat", "ESS bulk", "ESS tail", "ESS / 1000 tokens")  # type: ignore[assignment]

    def cells(self) -> Iterator[list[str]]:
        for row in self:
            shown = [row.name, f"{row.mean:.4g}", f"{row.sd:.3g}"]
            if row.constant:
                yield [*shown, "constant", "", "", "", ""]
            else:
                rest = f"{row.r_hat:.3f}", f"{row.ess_bulk:.0f}", f"{row.ess_tail:.0f}", f"{row.ess_per_1000_tokens:.3g}"
                yield [*shown, f"{row.mcse:.2g}", *rest]


def summary(posterior: "Posterior", *of: Of, **named: Of) -> Summary:
    """Mean, spread, R-hat and effective sample sizes of numbers: sites, and functions of a trace. Without any: of all sites, of
    texts their length and log probability. Arrays have a row for each element.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import diagnostics, mcmc
    >>> coins = ppl.program(lambda: [ppl.sample(f"coin {i}", dist.Bernoulli(0.5)) for i in range(2)])
    >>> posterior = inference.MCMC(mcmc.Regenerate(), num_samples=100, num_chains=2).run(jax.random.key(0), coins)
    >>> table = diagnostics.summary(posterior, "coin 0", both=lambda v: v["coin 0"] & v["coin 1"], one=lambda _: 1)
    >>> [row.name for row in table if row.r_hat < 1.2], [row.name for row in table if row.constant]
    (['coin 0', 'both'], ['one'])
    """
    return Summary(summary_row(posterior, name, x) for name, x in columns(posterior, of, named))


def summary_row(posterior: "Posterior", name: str, x: np.ndarray) -> SummaryRow:
    """Of one number float64[chains, draws]."""
    tokens = int(posterior.moves.tokens.sum()) if posterior.moves is not None else 0
    sd, bulk = float(x.std(ddof=1)) if np.ptp(x) > 0 else 0.0, bulk_ess(x)
    rate = 1000 * bulk / tokens if tokens else float("inf")
    return SummaryRow(name, float(x.mean()), sd, sd / np.sqrt(mean_ess(x)), rank_r_hat(x), bulk, tail_ess(x), rate)


class CutRow(NamedTuple):
    """Proposals whose cut lay in one stretch."""

    start: float
    """the first cut of the stretch"""
    end: float
    """the first cut after it"""
    proposals: int
    accepted: float
    """how many of them were accepted"""
    low: float
    high: float
    """95 % interval of the acceptance rate (Wilson 1927), as if proposals were independent"""

    @property
    def rate(self) -> float:
        """NaN where there was no proposal."""
        return self.accepted / self.proposals if self.proposals else float("nan")


class CutTable(Table):
    """One row for each stretch of cuts."""

    __slots__ = ()
    header = ("cut", "proposals", "accepted", "95 % interval")  # type: ignore[assignment]

    def cells(self) -> Iterator[list[str]]:
        for row in self:
            share = f"{row.rate:.3f}" if row.proposals else "-"
            yield [f"{row.start:g} to {row.end:g}", str(row.proposals), share, f"{row.low:.3f} to {row.high:.3f}"]


def acceptance_by_cut(posterior: "Posterior", bins: int = 8, relative: bool = False) -> CutTable:
    """How often traces that were cut there and redrawn were accepted: cuts are how many choices were kept, as
    `moves.stats["cut"]` has them, or with `relative` that part of `moves.stats["length"]`.

    `ValueError` where no kernel says where it cut, and where only the last of several steps is known (`thinning`).

    >>> cuts = CutTable([CutRow(0, 4, 20, 3.0, 0.052, 0.36), CutRow(4, 8, 20, 12.0, 0.387, 0.781)])
    >>> cuts
    cut     proposals  accepted   95 % interval
    0 to 4         20     0.150  0.052 to 0.360
    4 to 8         20     0.600  0.387 to 0.781
    """
    moves = _moves(posterior)
    found = next(_cutting({"accepted": moves.accepted, **moves.stats}), None)
    if found is None:
        raise ValueError("no kernel of these chains says where it cut a trace; `mcmc.Regenerate` does")
    if moves.thinning > 1 or found["cut"].shape != found["accepted"].shape:
        raise ValueError("acceptance is known for several steps together, but only the last one's cut: run with thinning=1")
    cut, accepted = (np.asarray(found[name], np.float64).ravel() for name in ("cut", "accepted"))
    if relative:
        cut = cut / np.maximum(np.asarray(found["length"], np.float64).ravel(), 1)
    ran = ~np.isnan(accepted)  # a mixture does not run all its parts
    ran &= cut >= 0  # a trace that is shorter than the cut stays as it is, and nothing was proposed
    cut, accepted = cut[ran], accepted[ran]
    edges = np.linspace(0, 1, bins + 1) if relative else np.unique(np.linspace(0, cut.max(initial=0) + 1, bins + 1).astype(int))
    which = np.clip(np.searchsorted(edges, cut, side="right") - 1, 0, len(edges) - 2)
    counts, sums = (np.bincount(which, w, minlength=len(edges) - 1) for w in (None, accepted))
    return CutTable(
        CutRow(float(a), float(b), int(n), float(k), *wilson(k, n)) for a, b, n, k in zip(edges, edges[1:], counts, sums)
    )


def wilson(successes: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Interval of a probability (Wilson 1927); from 0 to 1 without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, shrink = successes / trials, 1 + z**2 / trials
    middle, half = rate + z**2 / (2 * trials), z * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return float(max((middle - half) / shrink, 0.0)), float(min((middle + half) / shrink, 1.0))


def _cutting(stats_: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What those kernels say that cut traces, be they parts of others."""
    if "cut" in stats_:
        yield stats_
    for value in stats_.values():
        if isinstance(value, dict):
            yield from _cutting(value)


def _moves(posterior: "Posterior") -> Any:
    if posterior.moves is None:
        raise ValueError("these draws come from no Markov chain: there are no moves to look at")
    return posterior.moves


def _each(fn: Callable[[np.ndarray], float], x: np.ndarray) -> Any:
    """`fn` of every element of an array float64[chains, draws, ...]."""
    flat = x.reshape(*x.shape[:2], -1)
    found = np.array([fn(flat[..., i]) for i in range(flat.shape[-1])])
    return found.reshape(x.shape[2:]) if x.ndim > 2 else float(found[0])


def _name(of: Of, number: int) -> str:
    name = of if isinstance(of, str) else getattr(of, "__name__", "<lambda>")
    return f"function {number}" if name == "<lambda>" else name


def columns(posterior: "Posterior", of: tuple[Of, ...], named: dict[str, Of]) -> Iterator[tuple[str, np.ndarray]]:
    """A name and float64[chains, draws] for every number."""
    for name, x in _arrays(posterior, of, named):
        for where in np.ndindex(x.shape[2:]):
            yield name + (f"[{', '.join(map(str, where))}]" if where else ""), x[(..., *where)]


def _arrays(posterior: "Posterior", of: tuple[Of, ...], named: dict[str, Of]) -> Iterator[tuple[str, np.ndarray]]:
    if of or named:
        yield from ((_name(f, i), series(posterior, f)) for i, f in enumerate(of))
        yield from ((name, series(posterior, f)) for name, f in named.items())
        return
    for name, value in posterior.values.items():
        if isinstance(value, Text):
            yield f"{name}.length", series(posterior, lambda values, name=name: values[name].length)  # type: ignore[misc]
            yield f"{name}.log_prob", series(posterior, lambda values, name=name: values[name].log_probs.sum(-1))  # type: ignore[misc]
        elif not isinstance(value, (dict, list, tuple)):
            yield name, series(posterior, name)
