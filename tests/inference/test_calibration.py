"""Tests of calibration pass exact samplers and find wrong ones, with a power that is computed beforehand.

The quick ones sample a conjugate posterior in NumPy, exactly or wrong on purpose; the slow ones test SMC and particle Gibbs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from scipy import stats

from latentrace import inference, ppl
from latentrace.inference import calibration
from latentrace.inference.calibration import Replications, coverage_test, rank_test, replicate, simultaneous_band
from latentrace.inference.mcmc import RandomWalk
from latentrace.inference.posterior import Ledger, Posterior
from latentrace.ppl import errors, run

KEY = jax.random.key(3)
S, L = 300, 19
LEVEL = 1e-3
"""p-values below it reject; keys are fixed"""


@ppl.program
def normal():
    theta = ppl.sample("theta", dist.Normal(jnp.zeros(2), 1.0))
    ppl.sample("y", dist.Normal(theta, 1.0))


class Conjugate:
    """The posterior Normal(y / 2, 1 / 2) of each element, shifted by `shift` and widened `scale` times, in its deviations."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0):
        self.shift, self.scale = shift, scale

    def draw(self, generator, y):
        return y / 2 + np.sqrt(0.5) * (self.shift + self.scale * generator.normal(size=(L, *y.shape)))

    def run(self, rng_key, program, *args):
        y = np.asarray(program.given["y"])
        theta = self.draw(np.random.default_rng(np.asarray(jax.random.key_data(rng_key))), y)
        values = {"theta": theta, "y": np.broadcast_to(y, theta.shape)}
        return Posterior(values, None, np.zeros(L, np.float32), Ledger(0, 0, 0, 0, 0.0, 0.0), chains=1)


class Blind(Conjugate):
    """The prior, whatever the data."""

    def draw(self, generator, y):
        return generator.normal(size=(L, *y.shape))


WRONG = {"narrow": Conjugate(scale=0.5), "shifted": Conjugate(shift=1.3)}


def first(values):
    return values["theta"][0]


def second(values):
    return values["theta"][1]


def positive(values):
    return values["theta"][0] > 0


def fit(values):
    return -((values["y"] - values["theta"]) ** 2).sum()


def replications(algorithm, statistics=(first, second, positive, fit)):
    return replicate(KEY, normal, (), ["y"], statistics, algorithm, S, L)


def embedded(found, *which):
    """With some of the statistics only."""
    return Replications(*(x[..., list(which)] for x in found[:3]), tuple(found.names[k] for k in which))


@pytest.fixture(scope="module")
def exact():
    return replications(Conjugate())


def test_an_exact_sampler_passes(exact):
    found = rank_test(KEY, exact)
    assert found.names == ("first", "second", "positive", "fit")
    assert found.ranks.shape == (S, 4)
    assert found.ranks.min() == 0  # and ties of `positive` reach both ends
    assert (found.ranks.max(axis=0) == L).all()
    assert (found.p_values > LEVEL).all(), found.p_values
    for which in [(0,), (0, 1), (0, 1, 3)]:
        assert coverage_test(KEY, embedded(exact, *which)).p_value > LEVEL


def test_ties_left_unbroken_would_be_rejected(exact):
    less = (exact.draws[..., 2] < exact.truths[:, None, 2]).sum(axis=1)
    assert calibration._chi_square(less, L) < LEVEL


def rank_distribution(wrong: Conjugate) -> np.ndarray:
    """P(rank) of an element: a draw is below the truth, z deviations from its posterior mean, by Phi((z - shift) / scale)."""
    z = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    below = stats.norm.cdf((z - wrong.shift) / wrong.scale)
    return np.array([stats.binom.pmf(r, L, below).mean() for r in range(L + 1)])


@pytest.mark.parametrize("name", WRONG)
def test_ranks_reject_a_wrong_sampler(name):
    found = rank_test(KEY, replications(WRONG[name], (first, second)))
    # under the alternative the statistic is chi-square with noncentrality S sum (p - p0)^2 / p0, by bins
    bins = np.array_split(rank_distribution(WRONG[name]), int(2 * S**0.4))
    p, p0 = np.array([b.sum() for b in bins]), np.array([len(b) / (L + 1) for b in bins])
    degrees = len(bins) - 1
    power = stats.ncx2.sf(stats.chi2.isf(LEVEL, degrees), degrees, S * ((p - p0) ** 2 / p0).sum())
    assert power > 0.9999
    assert (found.p_values < LEVEL).all(), found.p_values


def coverage_of(wrong: Conjugate, generator, simulations=20_000) -> np.ndarray:
    """Coverage at k / (L + 1), k = 1, ..., L, by the definition of TARP, of that many simulations of its own."""
    theta, point = generator.normal(size=(2, simulations, 2))
    draws = wrong.draw(generator, theta + generator.normal(size=theta.shape))
    rank = (np.linalg.norm(draws - point, axis=-1) < np.linalg.norm(theta - point, axis=-1)).sum(axis=0)
    return np.array([(rank < k).mean() for k in range(1, L + 1)])


@pytest.mark.parametrize("name", WRONG)
def test_coverage_rejects_a_wrong_sampler(name):
    found = coverage_test(KEY, replications(WRONG[name], (first, second)))
    generator = np.random.default_rng(0)
    expected, credibility = coverage_of(WRONG[name], generator), np.arange(1, L + 1) / (L + 1)
    null = np.sort(generator.integers(0, L + 1, size=(20_000, S)), axis=1)
    null = np.stack([(null < k).mean(axis=1) for k in range(1, L + 1)], axis=1)
    critical = np.quantile(np.abs(null - credibility).max(axis=1), 1 - LEVEL)
    k = np.abs(expected - credibility).argmax()  # already there the coverage is farther off than the critical value
    covered = stats.binom(S, expected[k])
    power = covered.sf(S * (credibility[k] + critical)) + covered.cdf(S * (credibility[k] - critical))
    assert power > 0.999
    assert found.p_value < LEVEL, found
    np.testing.assert_array_less(np.abs(found.coverage[1:-1] - expected), 5 * np.sqrt(0.25 / S))  # five standard errors


def test_only_a_statistic_of_the_data_finds_a_sampler_that_ignores_them():
    blind = replications(Blind())
    found = rank_test(KEY, blind)
    assert (found.p_values[:3] > LEVEL).all()
    assert found.p_values[3] < LEVEL
    assert coverage_test(KEY, embedded(blind, 0, 1)).p_value > LEVEL
    assert coverage_test(KEY, embedded(blind, 0, 1, 3)).p_value < LEVEL


def test_coverage_by_hand():
    truths, points = np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]])  # one standard deviation of the points is 1
    draws = np.array([[[0.5], [-2.0]], [[2.5], [1.5]]])  # nearer to its point than the truth: one of 2, both of 2
    found = coverage_test(KEY, Replications(truths, draws, points, ("x",)))
    assert found.ranks.tolist() == [1, 2]
    np.testing.assert_allclose(found.credibility, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(found.coverage, [0, 0, 1 / 2, 1])
    assert found.deviation == pytest.approx(1 / 3)
    # of two uniform ranks on 0, 1, 2 only (0, 2) and (2, 0) deviate by less than 1 / 3: by 1 / 6
    assert stats.binomtest(round(found.p_value * 10_000), 10_000, 7 / 9).pvalue > LEVEL


def test_the_band_holds_95_percent_of_uniform_ranks():
    low, high = simultaneous_band(100, 9)
    ranks = np.random.default_rng(1).integers(0, 10, size=(4000, 100))
    below = np.stack([(ranks < k).sum(axis=1) for k in range(1, 10)], axis=1)
    assert ((low <= 10 * np.arange(1, 10)) & (10 * np.arange(1, 10) <= high)).all()
    inside = int(((low <= below) & (below <= high)).all(axis=1).sum())
    assert stats.binomtest(inside, 4000, 0.95, alternative="less").pvalue > LEVEL
    tighter = int(((low < below) & (below < high)).all(axis=1).sum())  # a band narrower by one count is too narrow
    assert stats.binomtest(tighter, 4000, 0.95, alternative="less").pvalue < LEVEL


def test_weighted_traces_are_drawn_independently():
    """Evenly spread draws of three traces that lie in order would hold each as often as its weight says, every time."""
    weights = np.array([0.5, 0.3, 0.2])
    traces = Posterior({"x": np.arange(3)}, None, np.log(weights).astype(np.float32), Ledger(0, 0, 0, 0, 0.0, 0.0), exact=True)
    generator = np.random.default_rng(0)
    drawn = np.array([calibration._equally_weighted(traces, generator, 10).values["x"] for _ in range(1000)])
    for value, weight in enumerate(weights):
        found = np.bincount((drawn == value).sum(axis=1), minlength=11)
        expected = 1000 * stats.binom(10, weight).pmf(np.arange(11))
        common = expected >= 5
        counts, expected = [*found[common], found[~common].sum()], [*expected[common], expected[~common].sum()]
        assert stats.chisquare(counts, expected).pvalue > LEVEL


def test_chains_are_thinned_evenly():
    values = {"x": np.arange(10.0)}
    chain = Posterior(values, None, np.zeros(10, np.float32), Ledger(0, 0, 0, 0, 0.0, 0.0), chains=1)
    thinned = calibration._equally_weighted(chain, np.random.default_rng(0), 3)
    assert thinned.values["x"].tolist() == [2.0, 5.0, 9.0]
    with pytest.raises(errors.SiteError, match="10 draws of chains, fewer than num_draws = 11"):
        calibration._equally_weighted(chain, np.random.default_rng(0), 11)


M3 = programs.markov(3)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (lambda x: ppl.observe("bad", dist.Normal(x, 1.0), 0.3), "'bad'.*cannot be observed.*ppl.sample"),
        (lambda x: ppl.factor("bad", x), "'bad' is a factor or a condition"),
        (lambda x: ppl.condition("bad", x > 0), "'bad' is a factor or a condition"),
        (lambda x: ppl.score("bad", ppl.prompt(programs.markov(3)), [1]), "'bad'.*cannot be observed.*ppl.generate"),
        (
            lambda x: ppl.generate("bad", ppl.prompt(programs.markov(3)), max_tokens=1, proposal=lambda logits: logits),
            "'bad' has a proposal or a constraint",
        ),
        (
            lambda x: ppl.generate("bad", ppl.prompt(programs.markov(3)), max_tokens=1, constraint=np.ones(3, bool)),
            "'bad' has a proposal or a constraint",
        ),
        (
            lambda x: ppl.generate("bad", ppl.prompt(M3), max_tokens=1, proposal=ppl.proposals.draft(ppl.prompt(M3))),
            "'bad' has a proposal or a constraint",
        ),
        (
            lambda x: ppl.generate("bad", ppl.prompt(M3), max_tokens=1, twist=ppl.proposals.twist_head(jax.random.key(0), M3)),
            "a learned twist proposes too",
        ),
    ],
)
def test_programs_that_cannot_be_simulated(site, message):
    @ppl.program
    def program():
        site(ppl.sample("x", dist.Normal(0.0, 1.0)))
        ppl.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(errors.SiteError, match=message):
        inference.simulation_based_calibration(KEY, program, (), ["y"], ["x"], inference.SMC(4), 10, 1)


def test_wrong_arguments():
    calibrate = lambda program=normal, observed=("y",), statistics=(first,), size=10: replicate(
        KEY, program, (), observed, statistics, Conjugate(), size, 1
    )
    with pytest.raises(errors.SiteNameError, match="site 'z' does not exist"):
        calibrate(observed=["z"])
    with pytest.raises(errors.SiteError, match="at least one site in `observed`"):
        calibrate(observed=[])
    with pytest.raises(errors.SiteError, match="'theta' has a given value"):
        calibrate(normal.condition({"theta": np.zeros(2)}))
    with pytest.raises(errors.SiteError, match="statistic 'theta' is not one number"):
        calibrate(statistics=["theta"])
    with pytest.raises(errors.SiteError, match="at least 10 simulations"):
        calibrate(size=9)
    infinite = np.full((10, 1), np.inf)
    with pytest.raises(errors.SiteError, match="statistic 'x' is infinite"):
        coverage_test(KEY, Replications(infinite, infinite[:, None], infinite, ("x",)))


def test_a_figure(exact, tmp_path):
    drawing = rank_test(KEY, exact).figure(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 0
    assert [panel.get_title().split(",")[0] for panel in drawing.axes] == ["first", "second", "positive", "fit"]
    line = coverage_test(KEY, exact).figure().axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(line[[0, -1]], 0, atol=0)


# --- a hidden Markov model whose stickiness is unknown ----------------------------------------------------------------


@ppl.program
def sticky(means):
    stay = ppl.sample("stay", dist.Beta(4.0, 2.0))

    def step(x, mean):
        x = ppl.sample("x", dist.Bernoulli(jnp.where(x == 1, stay, 1 - stay)))
        ppl.sample("y", dist.Normal(mean * (2.0 * x - 1), 1.0))
        return x, None

    jax.lax.scan(step, ppl.sample("start", dist.Bernoulli(0.4)), means)


MEANS = np.array([1.0, 0.5, 1.5, 1.0, 0.7], np.float32)


def ones(values):
    return values["x"].sum()


def log_likelihood(values):
    return -0.5 * ((values["y"] - MEANS * (2.0 * values["x"] - 1)) ** 2).sum()


def calibrated(algorithm, simulations=S):
    """p-values of the ranks of three statistics and of the coverage of all of them, from the same runs."""
    found = replicate(KEY, sticky, (MEANS,), ["y"], ["stay", ones, log_likelihood], algorithm, simulations, L)
    return np.array([*rank_test(KEY, found).p_values, coverage_test(KEY, found).p_value])


def test_no_simulation_compiles_again():
    before = run.traced
    call = lambda key: inference.simulation_based_calibration(key, sticky, (MEANS,), ["y"], ["stay"], inference.SMC(8), 10, 3)
    found = call(jax.random.key(0))
    assert run.traced == before + 2  # the simulations together, and SMC given the data
    assert (call(jax.random.key(1)).ranks != found.ranks).any()
    assert run.traced == before + 2


@pytest.mark.slow
def test_smc_is_calibrated():
    p_values = calibrated(inference.SMC(1000))
    assert (p_values > LEVEL).all(), p_values


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_particle_gibbs_is_calibrated(scheme):
    gibbs = inference.ParticleGibbs(8, 10 * L, RandomWalk(stay=0.4), num_warmup=10, resample=scheme)
    p_values = calibrated(gibbs)
    assert (p_values > LEVEL).all(), p_values


@pytest.mark.slow
def test_smc_of_two_particles_is_not():
    p_values = calibrated(inference.SMC(2, ess_threshold=0.0))
    assert (p_values < LEVEL).all(), p_values
