"""Calibration: whether an algorithm's posteriors are right on average over data that the program itself simulates.

If theta and y come from the joint, and draws theta_1, ..., theta_L from the posterior given y, then theta and the draws are
exchangeable given y: among the L + 1, the rank of any statistic of theta is uniform on 0, ..., L. That holds exactly, at
every L and for discrete statistics too if ties are broken at random, so a rank that is not uniform shows a wrong sampler.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from scipy import stats
from tqdm import tqdm

from latentrace.ppl.errors import SiteError
from latentrace.ppl.program import Program, as_program
from latentrace.ppl.sites import factor_p, generate_p, observe_p, sample_p, score_p
from latentrace.ppl.staging import check_given, stage, trace_eqns

from .driver import wants_progress
from .importance import ImportanceSampling
from .posterior import Posterior

Statistic = str | Callable[[dict[str, Any]], Any]
NULL_SIMULATIONS = 9_999
"""how many sets of uniform ranks stand for the null distribution: the least p-value is then 1e-4"""


class Algorithm(Protocol):
    """What `inference.SMC`, `inference.ParticleGibbs` and the others are."""

    def run(self, rng_key: jax.Array, program: Any, *args: Any) -> Posterior: ...


class Replications(NamedTuple):
    """Simulated truths with what an algorithm drew for their data. S simulations, L draws of each, K statistics."""

    truths: np.ndarray
    """float64[S, K]: the statistics of the traces that the data came from"""
    draws: np.ndarray
    """float64[S, L, K]: the statistics of the algorithm's equally weighted draws given those data"""
    references: np.ndarray
    """float64[S, K]: the statistics of as many other traces of the joint distribution"""
    names: tuple[str, ...]
    """of the statistics"""


class Calibration(NamedTuple):
    """Ranks of simulated truths among an algorithm's draws."""

    ranks: np.ndarray
    """int64[S, K]: between 0 and `num_draws`"""
    num_draws: int
    names: tuple[str, ...]
    """of the K statistics"""
    p_values: np.ndarray
    """float64[K]: of the chi-square test that the binned ranks are uniform; one for each statistic, not corrected for K"""

    def figure(self, path: str | Path | None = None) -> Any:
        """A panel for each statistic, as `ecdf_figure` draws it; written to `path` if there is one. Needs matplotlib."""
        titles = [f"{name}, p = {p:.2g}" for name, p in zip(self.names, self.p_values)]
        return ecdf_figure(self.ranks, self.num_draws, titles, ("rank / (number of draws + 1)", "ECDF - uniform"), path)


class Coverage(NamedTuple):
    """How often regions of an algorithm's posteriors hold the truth, against how often they should."""

    ranks: np.ndarray
    """int64[S]: how many of the draws are nearer to the random point than the truth is"""
    num_draws: int
    credibility: np.ndarray
    """float64[L + 2]: 0, 1 / (L + 1), ..., 1"""
    coverage: np.ndarray
    """float64[L + 2]: share of simulations in which the region of that credibility holds the truth"""
    deviation: float
    """max |coverage - credibility|"""
    p_value: float
    """of that deviation, by simulation of the null distribution"""

    def figure(self, path: str | Path | None = None) -> Any:
        """Coverage less credibility, as `ecdf_figure` draws it; written to `path` if there is one. Needs matplotlib."""
        title = [f"TARP, p = {self.p_value:.2g}"]
        return ecdf_figure(self.ranks[:, None], self.num_draws, title, ("credibility", "coverage - credibility"), path)


def simulation_based_calibration(
    rng_key: jax.Array,
    program: Any,
    args: Sequence[Any],
    observed: Sequence[str],
    statistics: Sequence[Statistic],
    algorithm: Algorithm,
    num_simulations: int,
    num_draws: int,
    *,
    progress: bool | None = None,
) -> Calibration:
    """Ranks of simulated truths among the algorithm's draws (Talts et al. 2018, algorithm 1).

    Ties are broken at random, so that discrete statistics have uniform ranks too (Modrak et al. 2023, section 2). An algorithm
    that ignores the data passes with statistics of the latent values alone: add one that looks at the data, such as the log
    likelihood (ibid., section 3). Takes what `replicate` takes, and raises what it raises.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def coin():
    ...     bias = ppl.sample("bias", dist.Beta(2.0, 1.0))
    ...     ppl.sample("heads", dist.Binomial(5, bias))
    >>> found = inference.simulation_based_calibration(
    ...     jax.random.key(0), coin, (), ["heads"], ["bias"], inference.ImportanceSampling(500), 20, 9)
    >>> found.ranks.shape, bool(found.p_values[0] > 0.001)
    ((20, 1), True)
    """
    keys = jax.random.split(rng_key)
    found = replicate(keys[0], program, args, observed, statistics, algorithm, num_simulations, num_draws, progress=progress)
    return rank_test(keys[1], found)


def tarp(
    rng_key: jax.Array,
    program: Any,
    args: Sequence[Any],
    observed: Sequence[str],
    statistics: Sequence[Statistic],
    algorithm: Algorithm,
    num_simulations: int,
    num_draws: int,
    *,
    progress: bool | None = None,
) -> Coverage:
    """Coverage of balls around random points, all statistics at once (Lemos et al. 2023, algorithm 2).

    The statistics embed a trace in R^K; `coverage_test` says how. Takes what `replicate` takes, and raises what it raises.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def coin():
    ...     bias = ppl.sample("bias", dist.Beta(2.0, 1.0))
    ...     ppl.sample("heads", dist.Binomial(5, bias))
    >>> found = inference.tarp(
    ...     jax.random.key(0), coin, (), ["heads"], ["bias"], inference.ImportanceSampling(500), 20, 9)
    >>> found.coverage.shape, found.p_value > 0.001
    ((11,), True)
    """
    keys = jax.random.split(rng_key)
    found = replicate(keys[0], program, args, observed, statistics, algorithm, num_simulations, num_draws, progress=progress)
    return coverage_test(keys[1], found)


def replicate(
    rng_key: jax.Array,
    program: Any,
    args: Sequence[Any],
    observed: Sequence[str],
    statistics: Sequence[Statistic],
    algorithm: Algorithm,
    num_simulations: int,
    num_draws: int,
    *,
    progress: bool | None = None,
) -> Replications:
    """Simulate traces, give their data to the program, and draw from its posterior; for `rank_test` and `coverage_test`.

    The data are given by `program.condition`, so all runs share what is compiled for the first. Draws of Markov chains are
    thinned evenly: too few steps between them show as ranks heaped at both ends. Weighted traces are drawn independently by
    weight: a population must be large against `num_draws`, or repeated draws show in the same way.

    Args:
        program: its data are `sample` or `generate` sites, which can be given. It has no `observe`, `score`, `factor`,
            `condition`, constraint, proposal or given value: its forward runs must be draws of the joint distribution.
        args: what the program is called with, the same in every simulation.
        observed: names of the sites that are data.
        statistics: each the name of a site with a scalar value, or a function of one trace's values (see `Posterior.of`),
            those of the data included, that returns a number.
        algorithm: anything with `run(rng_key, program, *args) -> Posterior`.
        num_simulations: S, at least 10, since the chi-square test wants five ranks in each of two bins or more.
        num_draws: L, at least 1.

    Raises:
        SiteError: where a forward run is no draw of the joint, a name is no random site, a statistic is no number, or a
            chain has fewer draws than `num_draws`.
    """
    program = as_program(program)
    check_simulable(program, args, observed)
    if num_simulations < 10 or num_draws < 1:
        raise SiteError(f"calibration needs at least 10 simulations and 1 draw of each, not {num_simulations} and {num_draws}")
    prior_key, run_key, draw_key = jax.random.split(rng_key, 3)
    joint = ImportanceSampling(2 * num_simulations).run(prior_key, program, *args)  # weights are equal: nothing is paid
    simulated = _evaluate(joint, statistics)
    generator, draws = _generator(draw_key), []
    for i in tqdm(range(num_simulations), unit=" simulations", leave=False, delay=3, disable=not wants_progress(progress)):
        data = {name: joint._at(joint.values[name], i) for name in observed}
        posterior = algorithm.run(jax.random.fold_in(run_key, i), program.condition(data), *args)
        draws.append(_evaluate(_equally_weighted(posterior, generator, num_draws), statistics))
    names = tuple(s if isinstance(s, str) else getattr(s, "__name__", repr(s)) for s in statistics)
    return Replications(simulated[:num_simulations], np.stack(draws), simulated[num_simulations:], names)


def rank_test(rng_key: jax.Array, replications: Replications) -> Calibration:
    """Each statistic's rank among the draws, and a chi-square test that ranks are uniform.

    There are 2 S^(2/5) bins of neighbouring ranks (Mann and Wald 1942), but no more than leave five simulations to each.

    >>> import jax, numpy as np
    >>> truths, draws = np.full((30, 1), 0.5), np.tile([[0.0], [1.0]], (30, 1, 1))
    >>> found = rank_test(jax.random.key(0), Replications(truths, draws, truths, ("x",)))
    >>> set(found.ranks[:, 0].tolist()), bool(found.p_values[0] < 0.001)
    ({1}, True)
    """
    truths, draws = replications.truths, replications.draws
    ranks, num_draws = _ranks(truths, draws, _generator(rng_key)), draws.shape[1]
    p_values = np.array([_chi_square(column, num_draws) for column in ranks.T])
    return Calibration(ranks, num_draws, replications.names, p_values)


def coverage_test(rng_key: jax.Array, replications: Replications) -> Coverage:
    """TARP: for a random point r, the ball around r that the truth lies on holds a uniform share of the draws.

    With f the share of draws nearer to r than the truth is, the region of credibility 1 - a holds the truth where f < 1 - a
    (Lemos et al. 2023, algorithm 2). Points are other traces of the joint distribution, and distances Euclidean in units of
    their standard deviations. f takes the values 0, 1/L, ..., 1, so credibilities are 0, 1/(L+1), ..., 1, at which coverage is
    exact. The points do not depend on the data: for a test that sees an algorithm which ignores them, one of the statistics
    must look at the data (see `simulation_based_calibration`). Ranks of single statistics find a shift with fewer simulations.

    Raises:
        SiteError: where a statistic is infinite.
    """
    for name, column in zip(replications.names, np.vstack([replications.truths, *replications.draws]).T):
        if not np.isfinite(column).all():
            raise SiteError(f"statistic {name!r} is infinite for some trace, which has no distance to others; bound it")
    generator, points = _generator(rng_key), replications.references
    spread = points.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    truth = np.linalg.norm((replications.truths - points) / scale, axis=-1)
    draws = np.linalg.norm((replications.draws - points[:, None]) / scale, axis=-1)
    ranks, num_draws = _ranks(truth[:, None], draws[..., None], generator)[:, 0], draws.shape[1]
    credibility = np.arange(num_draws + 2) / (num_draws + 1)
    below = _below(ranks, num_draws)
    # (L + 1) S times coverage less credibility: whole numbers, so that equal deviations are equal
    excess = lambda counts: np.abs((num_draws + 1) * counts - len(ranks) * np.arange(1, num_draws + 1)).max(axis=-1)
    deviation, null = excess(below[1:-1]), excess(_null_counts(len(ranks), num_draws, generator))
    p_value = float((1 + (null >= deviation).sum()) / (1 + len(null)))
    return Coverage(
        ranks, num_draws, credibility, below / len(ranks), float(deviation / ((num_draws + 1) * len(ranks))), p_value
    )


def check_simulable(program: Program, args: Sequence[Any], observed: Sequence[str]) -> None:
    """`SiteError` unless forward runs of the program are draws of its joint distribution, and its data can be given."""
    if program.given:
        raise SiteError(f"calibration simulates every site, but {', '.join(map(repr, program.given))} has a given value")
    staged = stage(program.fn, tuple(args))
    none = jax.tree.structure(None)
    for eqn in trace_eqns(staged.jaxpr):
        site, p = eqn.params.get("name"), eqn.params
        if eqn.primitive in (observe_p, score_p):
            raise SiteError(
                f"site {site!r}: calibration simulates the data, so it cannot be observed; draw it with "
                f"{'ppl.sample' if eqn.primitive is observe_p else 'ppl.generate'} and name it in `observed`"
            )
        if eqn.primitive is factor_p:
            raise SiteError(
                f"site {site!r} is a factor or a condition, so a forward run is no draw of the target; sample data instead"
            )
        if eqn.primitive is generate_p and (
            p["proposal"] is not None or p["draft"] is not None or p["constraint"] != none or p["head"] != none
        ):
            raise SiteError(
                f"site {site!r} has a proposal or a constraint (a learned twist proposes too), so a forward run is no draw of "
                "the model; omit it"
            )
        if eqn.primitive is sample_p and p["scaled"]:
            raise SiteError(f"site {site!r} has a scaled density, so a forward run is no draw from it; omit the scale")
    if not observed:
        raise SiteError("calibration needs at least one site in `observed`: the data")
    check_given(staged, dict.fromkeys(observed))


def _generator(rng_key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))


def _equally_weighted(posterior: Posterior, generator: np.random.Generator, num_draws: int) -> Posterior:
    """`num_draws` traces: evenly spaced ones of Markov chains, else independent ones by weight.

    Systematic resampling would not do: traces that are laid out in order, as enumerated ones are, give draws that repel each
    other, whose ranks are not uniform.
    """
    n = len(posterior.log_weights)
    if posterior.chains is None:
        index = generator.choice(n, num_draws, p=posterior.weights)
    elif n < num_draws:
        raise SiteError(f"calibration: the algorithm returned {n} draws of chains, fewer than num_draws = {num_draws}")
    else:
        index = np.arange(1, num_draws + 1) * n // num_draws - 1
    values = jax.tree.map(lambda x: np.asarray(x)[index], posterior.values)
    return Posterior(values, None, np.zeros(num_draws, np.float32), posterior.ledger)


def _evaluate(posterior: Posterior, statistics: Sequence[Statistic]) -> np.ndarray:
    """float64[N, K]: each statistic of each trace."""
    columns = []
    for statistic in statistics:
        values = posterior.of(statistic)
        try:
            column = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            column = np.empty(0)
        if column.shape != (len(values),) or np.isnan(column).any():
            raise SiteError(f"statistic {statistic!r} is not one number for a trace: found {values[0]!r}; use a function")
        columns.append(column)
    return np.stack(columns, axis=-1)


def _ranks(truths: np.ndarray, draws: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """int64[S, K]: how many draws are less than the truth, with those that equal it counted up to a random one."""
    less, equal = (draws < truths[:, None]).sum(axis=1), (draws == truths[:, None]).sum(axis=1)
    return less + generator.integers(0, equal + 1)


def _below(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """int64[L + 2]: how many of ranks int[S] are below 0, 1, ..., L + 1."""
    return np.concatenate([[0], np.bincount(ranks, minlength=num_draws + 1).cumsum()])


def _chi_square(ranks: np.ndarray, num_draws: int) -> float:
    """p-value of ranks int[S] under the uniform distribution on 0, ..., L."""
    bins = np.clip(int(2 * len(ranks) ** 0.4), 2, min(num_draws + 1, len(ranks) // 5))
    groups = np.array_split(np.bincount(ranks, minlength=num_draws + 1), bins)
    expected = [len(ranks) * len(group) / (num_draws + 1) for group in groups]
    return float(stats.chisquare([group.sum() for group in groups], expected).pvalue)


def _null_counts(num_simulations: int, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    """int64[NULL_SIMULATIONS, L]: of S uniform ranks, how many are below 1, ..., L."""
    uniform = np.full(num_draws + 1, 1 / (num_draws + 1))
    return generator.multinomial(num_simulations, uniform, size=NULL_SIMULATIONS).cumsum(axis=1)[:, :-1]


def simultaneous_band(num_simulations: int, num_draws: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest numbers of uniform ranks below 1, ..., L that leave all of them inside with probability `level`.

    int64[L] each. The band joins binomial intervals of one coverage for every rank, and that coverage is found by simulation
    (Sailynoja, Burkner and Vehtari 2022, algorithm 1), always with the same draws.

    >>> low, high = simultaneous_band(100, 3)
    >>> bool((low < [25, 50, 75]).all() and (high > [25, 50, 75]).all())
    True
    """
    share = np.arange(1, num_draws + 1) / (num_draws + 1)
    count = np.arange(num_simulations + 1)
    binomial = stats.binom(num_simulations, share[:, None])
    tail = np.minimum(binomial.cdf(count), binomial.sf(count - 1))  # [L, S + 1]: the lesser of both
    null = _null_counts(num_simulations, num_draws, np.random.default_rng(0))
    least = tail[np.arange(num_draws), null].min(axis=1)
    inside = tail >= np.quantile(least, 1 - level, method="lower")
    return inside.argmax(axis=1), num_simulations - inside[:, ::-1].argmax(axis=1)


def ecdf_figure(
    ranks: np.ndarray, num_draws: int, titles: Sequence[str], labels: tuple[str, str], path: str | Path | None = None
) -> Any:
    """The ECDF of ranks int[S, K] less the uniform one, a panel for each column, with the simultaneous 95 % band.

    Uniform ranks leave the band anywhere in 5 % of figures at most. Of one statistic, draws that are too narrow give ranks
    first above 0 and then below, too wide ones the reverse, shifted ones a single bow. `labels` are those of both axes.
    Needs matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'latentrace[plots]'") from error

    share = np.arange(num_draws + 2) / (num_draws + 1)
    low, high = (np.pad(edge, 1) / len(ranks) for edge in simultaneous_band(len(ranks), num_draws))
    low[-1] = high[-1] = 1.0
    drawing = Figure(figsize=(4.2 * len(titles), 3.4), layout="constrained")
    panels = drawing.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    for panel, column, title in zip(panels, ranks.T, titles):
        panel.fill_between(share, low - share, high - share, color="C0", alpha=0.2, linewidth=0, label="95 % band")
        panel.axhline(0, color="0.5", linewidth=0.8)
        panel.plot(share, _below(column, num_draws) / len(ranks) - share, color="C3", linewidth=1.5, marker=".", markersize=4)
        panel.set(xlabel=labels[0], title=title)
    panels[0].set_ylabel(labels[1])
    panels[0].legend(fontsize=8, frameon=False)
    if path is not None:
        drawing.savefig(path, dpi=150)
    return drawing
