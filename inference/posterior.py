"""What every algorithm returns: weighted traces, and what they say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from scipy.special import logsumexp

from latentrace.ppl import Text
from latentrace.ppl.errors import SiteNameError, near_misses

from .diagnostics import mean_ess
from .genealogy import Genealogy
from .text_tree import TextTree, tree_of

if TYPE_CHECKING:
    from .mcmc.moves import Moves
    from .mcmc.saved import Saved
    from .smc.ladder import Ladder


@dataclass(frozen=True)
class Ledger:
    """What a run cost."""

    tokens_generated: int
    tokens_scored: int
    """tokens of given, observed or enumerated texts"""
    model_calls: int
    """passes through a language model, each for the whole population"""
    potential_calls: int
    """evaluations of factors, conditions and twists, summed over particles"""
    seconds: float
    """wall time, compilation included where there was any"""
    utilisation: float
    """tokens generated per particle and model call: how busy the population was while it generated"""


class Row(NamedTuple):
    """One line of a marginal."""

    value: Any
    probability: float
    error: float
    """Monte Carlo standard error of `probability`; 0 under exact inference"""


class Marginal(tuple[Row, ...]):
    """The distribution of one value, most probable first. Prints as a table; shows as one in a notebook."""

    __slots__ = ()

    def top(self, k: int) -> "Marginal":
        return Marginal(self[i] for i in range(min(k, len(self))))

    def __repr__(self) -> str:
        width = max([5, *(len(_cell(r.value)) for r in self)])
        lines = [f"{'value':{width}}  probability  error"]
        lines += [f"{_cell(r.value):{width}}  {r.probability:11.4f}  {r.error:.4f}" for r in self]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><td><code>{escape(_cell(r.value))}</code></td><td>{r.probability:.4f}</td><td>{r.error:.4f}</td></tr>"
            for r in self
        )
        return f"<table><tr><th>value</th><th>probability</th><th>error</th></tr>{rows}</table>"


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def readable(text: Text) -> Any:
    """Texts as strings, or as tuples of token ids where the model knows no strings."""
    try:
        return text.decode()
    except ValueError:
        return text.ids()


def hashable(value: Any) -> Any:
    """A value as it stands in a marginal: strings, numbers and tuples."""
    if isinstance(value, Text):
        value = readable(value)
    if isinstance(value, (list, tuple)):
        return tuple(hashable(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, hashable(v)) for k, v in value.items())
    if isinstance(value, (np.ndarray, jax.Array)):
        return hashable(np.asarray(value).tolist())
    return value.item() if isinstance(value, np.generic) else value


class Values(dict[str, Any]):
    """Values by site name; a misspelt name is an error with the near misses."""

    def __missing__(self, name: str) -> Any:
        raise SiteNameError(f"no site {name!r}: {near_misses(name, self)}")


def _flatten(values: Values) -> tuple[list[Any], Any]:
    return list(values.values()), tuple(values)


jax.tree_util.register_pytree_node(Values, _flatten, lambda names, values: Values(zip(names, values)))


@dataclass(frozen=True)
class Posterior:
    """Weighted traces. Every array of `values` and `returned` has particles as its leading axis, of length N."""

    values: dict[str, Any]
    """value of every site: an array, or a `Text` whose fields have leading axes"""
    returned: Any
    """what the program returned"""
    log_weights: np.ndarray
    """float32[N], nats: log of target over proposal; not normalised"""
    ledger: Ledger
    active: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """bool[N, ...] for every site: False where it stood in an untaken branch or past a loop's end"""
    exact: bool = False
    """whether the traces are all that exist, so that nothing is estimated"""
    roots: np.ndarray | None = field(default=None, repr=False)
    """int[N]: each particle's ancestor at the start; None where particles are independent"""
    restricted: bool = False
    """whether a proposal left out tokens that the model allows: the target is then p on the proposal's support"""
    stopped: str | None = None
    """where a run was stopped before its end: `log_weights` are then for the intermediate target there, twists included,
    sites that were not reached are missing or inactive, and `returned` is None"""
    chains: int | None = None
    """of how many Markov chains of equal length the traces are the draws, chain after chain; None where they are none"""
    moves: "Moves | None" = field(default=None, repr=False)
    """what the steps of Markov chains did; None where there are none"""
    chain_state: "Saved | None" = field(default=None, repr=False)
    """where Markov chains stand, for `inference.MCMC` to go on from"""
    biased: bool = False
    """whether the algorithm resampled by a scheme that is biased by name: no estimate, nor the evidence, is then unbiased"""
    resamplings: Genealogy | None = field(default=None, repr=False)
    """what `genealogy` gives; None where an algorithm keeps none"""
    ladder: "Ladder | None" = field(default=None, repr=False)
    """the temperatures of a tempered run, with effective sample sizes and acceptance; None where there are none"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", Values(self.values))

    @cached_property
    def log_evidence(self) -> float:
        """log of the target's normaliser, nats; its estimate is unbiased on the natural scale, unless `biased`.

        `ValueError` for draws of Markov chains, which do not tell.
        """
        if self.chains is not None:
            raise ValueError("draws of a Markov chain do not estimate the evidence; SMC and importance sampling do")
        total = float(logsumexp(self.log_weights.astype(np.float64)))
        return total if self.exact else total - float(np.log(len(self.log_weights)))

    @cached_property
    def weights(self) -> np.ndarray:
        """float64[N], normalised."""
        log_weights = self.log_weights.astype(np.float64)
        return np.exp(log_weights - logsumexp(log_weights))

    @cached_property
    def ess(self) -> float:
        """Effective sample size 1 / sum of squared weights, between 1 and N."""
        return float(1 / (self.weights**2).sum())

    @cached_property
    def _alive(self) -> np.ndarray:
        """int[K]: the particles of positive weight."""
        return np.flatnonzero(self.weights > 0)

    def of(self, name_or_fn: str | Callable[[dict[str, Any]], Any]) -> list[Any]:
        """The value of a site, or of a function of one trace's values, for every particle of positive weight, in order.

        A function receives a dictionary with each site's value for one particle: NumPy arrays, and `Text`s whose
        `decode()` gives their string.
        """
        if callable(name_or_fn):
            return [name_or_fn({k: self._at(v, i) for k, v in self.values.items()}) for i in self._alive]
        value = self._at(self.values[name_or_fn], self._alive)
        return readable(value) if isinstance(value, Text) else list(value)

    @staticmethod
    def _at(value: Any, i: Any) -> Any:
        return value[i] if isinstance(value, Text) else jax.tree.map(lambda x: x[i], value)

    def marginal(self, name_or_fn: str | Callable[[dict[str, Any]], Any]) -> Marginal:
        """The distribution of a site's value or of a function of the trace: value, probability, Monte Carlo error."""
        members: dict[Any, list[int]] = {}
        for i, value in zip(self._alive, self.of(name_or_fn)):
            members.setdefault(hashable(value), []).append(i)
        rows = []
        for value, particles in members.items():
            holds = np.zeros(len(self.weights))
            holds[particles] = 1.0
            rows.append(Row(value, float(self.weights @ holds), self.error(holds)))
        return Marginal(sorted(rows, key=lambda r: -r.probability))

    def error(self, values: np.ndarray) -> float:
        """Monte Carlo standard error of the posterior mean of `values` (float[N], one for each particle).

        Particles that descend from one root of the run are dependent: their deviations are summed before squaring (Chan
        and Lai 2013; Lee and Whiteley 2018). Never less than for independent particles, and 0 under
        exact inference. Draws of Markov chains count by their effective sample size (Vehtari et al. 2021).
        """
        if self.exact:
            return 0.0
        if self.chains is not None:
            return _chain_error(np.asarray(values, np.float64).reshape(self.chains, -1))
        deviations = self.weights * np.nan_to_num(values - self.weights @ values)
        independent = float((deviations**2).sum())
        families = deviations if self.roots is None else np.bincount(np.unique(self.roots, return_inverse=True)[1], deviations)
        return float(np.sqrt(max(independent, (families**2).sum())))

    def expectation(self, fn: Callable[[dict[str, Any]], Any] | str) -> Any:
        """The posterior mean of a site or of a function of the trace (see `of`)."""
        values = np.asarray([np.asarray(v, np.float64) for v in self.of(fn)])
        return np.tensordot(self.weights[self._alive], values, axes=1)

    def probability(self, fn: Callable[[dict[str, Any]], Any]) -> float:
        """The posterior probability that `fn` holds for a trace."""
        holds = np.asarray([bool(v) for v in self.of(fn)])
        return float(self.weights[self._alive][holds].sum())

    def sample(self, rng_key: jax.Array, n: int) -> "Posterior":
        """`n` equally weighted traces, drawn from this posterior with replacement (systematically)."""
        u = (float(jax.random.uniform(rng_key)) + np.arange(n)) / n
        cumulative = np.cumsum(self.weights)
        index = np.searchsorted(cumulative / cumulative[-1], u, side="right")
        index = np.random.default_rng(np.asarray(jax.random.key_data(rng_key))).permutation(index)
        take = lambda tree: jax.tree.map(lambda x: np.asarray(x)[index], tree)
        log_weights = np.full(n, 0.0 if self.chains else self.log_evidence, np.float32)
        return Posterior(take(self.values), take(self.returned), log_weights, self.ledger, take(self.active),
                         restricted=self.restricted, biased=self.biased)  # fmt: skip

    @property
    def genealogy(self) -> Genealogy:
        """The resamplings of an SMC run; `ValueError` for algorithms without a population, and where none were kept."""
        if self.resamplings is None:
            raise ValueError("this posterior has no genealogy: it comes with runs of SMC, unless with generations=0")
        return self.resamplings

    def tree(self, *sites: str, most: int = 12) -> TextTree:
        """The texts of some sites, trace by trace, as a tree of what they share; the `most` probable ones.

        A site in a loop is read step by step, together with those named next to it that have as many steps.
        """
        if not sites:
            raise SiteNameError(f"tree: name the sites whose texts to show, of {', '.join(self.values)}")
        return tree_of({name: self.values[name] for name in sites}, self.active, self.weights, most)

    def to_arviz(self) -> Any:
        """The posterior for ArviZ: N equal-weight draws, resampled by us, with the weighted particles beside them.

        Texts enter as strings. ArviZ 0.x gives an `InferenceData`, 1.x a `DataTree`; the group `particles` holds the raw
        values with `log_weight` and `ancestor`, the particle of the run's start that each descends from.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError("to_arviz needs ArviZ: pip install 'latentrace[plots]'") from error

        draws = self.sample(jax.random.key(0), len(self.log_weights))
        group, raw = _columns(draws.values), _columns(self.values)
        raw["log_weight"] = self.log_weights[None]
        raw["ancestor"] = (np.arange(len(self.log_weights)) if self.roots is None else self.roots)[None]
        if int(arviz.__version__.split(".")[0]) >= 1:
            return arviz.from_dict({"posterior": group, "particles": raw})
        data = arviz.from_dict(posterior=group)
        data.add_groups({"particles": arviz.dict_to_dataset(raw)})
        return data

    def __repr__(self) -> str:
        note = ", target restricted to the proposal's support" if self.restricted else ""
        note += f", stopped before {self.stopped}" if self.stopped else ""
        note += ", biased resampling" if self.biased else ""
        if self.chains is not None:
            found = f"{len(self.log_weights)} draws of {self.chains} {'chain' if self.chains == 1 else 'chains'}"
        else:
            kind = "traces" if self.exact else "particles"
            found = f"{len(self.log_weights)} {kind}, log evidence {self.log_evidence:.3f}, ESS {self.ess:.1f}"
        return f"Posterior({found}{note}; sites: {', '.join(self.values)})"


def _chain_error(values: np.ndarray) -> float:
    """Standard error of the mean of float[chains, draws]; infinite where the draws are too few to tell."""
    spread = float(values.std())
    if values.shape[1] < 4:
        return float("inf")
    return spread / float(np.sqrt(mean_ess(values))) if spread > 0 else 0.0


def _columns(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Sites as arrays with a leading axis of one chain; a pytree's leaves become `site.leaf`, texts become strings."""
    columns = {}
    for name, value in values.items():
        leaves, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: isinstance(x, Text))
        for path, leaf in leaves:
            array = np.asarray(list(map(str, readable(leaf))) if isinstance(leaf, Text) else leaf)
            columns[".".join([name, *[jax.tree_util.keystr((k,), simple=True) for k in path]])] = array[None]
    return columns
