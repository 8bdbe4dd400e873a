"""Diagnostics of chains: against ArviZ, against what is known of autoregressive chains, and on texts."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import signal, stats

from latentrace import inference, ppl
from latentrace.inference import diagnostics, mcmc, plots
from latentrace.inference.mcmc import Moves

from .cases import M3

LEDGER = inference.Ledger(0, 0, 0, 0, 0.0, 0.0)


def chains_of(x, tokens=7, thinning=1, accepted=1.0, **stats):
    """A posterior whose site "x" has these draws [chains, draws, ...]."""
    shape = x.shape[:2]
    moves = Moves(np.full(shape, accepted, np.float32), np.full(shape, tokens), stats, thinning)
    values = {"x": x.reshape(-1, *x.shape[2:])}
    return inference.Posterior(values, None, np.zeros(x[..., 0].size if x.ndim == 3 else x.size, np.float32), LEDGER,
                               chains=shape[0], moves=moves)  # fmt: skip


def autoregressive(phi, shape=(4, 2000), seed=0):
    """Stationary, of variance 1: the autocorrelation at lag k is phi^k."""
    noise = np.random.default_rng(seed).normal(size=shape) * np.sqrt(1 - phi**2)
    start = np.random.default_rng(seed + 1).normal(size=(shape[0], 1))
    return signal.lfilter([1.0], [1.0, -phi], noise, axis=1, zi=phi * start)[0]


SERIES = {
    "independent": autoregressive(0.0),
    "slow": autoregressive(0.95),
    "heavy tails": stats.cauchy.ppf(stats.norm.cdf(autoregressive(0.5))),
    "counts": np.floor(2 * np.abs(autoregressive(0.6))),
    "rare": (autoregressive(0.8) > 1.2).astype(float),
    "apart": autoregressive(0.3) + np.array([[0.0], [0.1], [0.0], [0.4]]),
    "another spread": autoregressive(0.3) * np.array([[1.0], [1.0], [1.0], [3.0]]),
    "odd": autoregressive(0.5, (3, 501)),
}


@pytest.mark.parametrize("name", SERIES)
def test_numbers_are_those_of_arviz(name):
    arviz = pytest.importorskip("arviz")
    x, posterior = SERIES[name], chains_of(SERIES[name])
    assert diagnostics.r_hat(posterior, "x") == pytest.approx(float(arviz.rhat(x, method="rank")), rel=1e-9)
    for kind in ("bulk", "tail", "mean"):
        expected = float(arviz.ess(x, method=kind, prob=(0.05, 0.95) if kind == "tail" else None))
        assert diagnostics.ess(posterior, "x", kind) == pytest.approx(expected, rel=0.03), "two ends of Geyer's sum"
    row = diagnostics.summary(posterior)[0]
    assert row.mcse == pytest.approx(float(arviz.mcse(x, method="mean")), rel=0.02)
    assert (row.mean, row.sd) == pytest.approx((x.mean(), x.std(ddof=1)))


def test_what_is_known_of_autoregressive_chains():
    for phi in (0.5, 0.9):
        found = diagnostics.autocorrelation(chains_of(autoregressive(phi, (8, 20_000))), "x")
        np.testing.assert_allclose(found.correlation[:10], phi ** np.arange(10), atol=0.02)
        assert found.time == pytest.approx((1 + phi) / (1 - phi), rel=0.06)
        np.testing.assert_array_equal(found.tokens, 7 * np.arange(20_000))
        assert found.tokens_per_independent_draw == 7 * found.time
    assert diagnostics.r_hat(chains_of(autoregressive(0.5)), "x") < 1.01
    for name in ("apart", "another spread"):
        assert diagnostics.r_hat(chains_of(SERIES[name]), "x") > 1.01
    plain = diagnostics.split_r_hat(diagnostics.halves(SERIES["another spread"]))
    assert plain < 1.01, "only folding shows it"


def test_chains_that_alternate_are_worth_more_than_their_draws_but_not_without_end():
    x = np.tile([-1.0, 1.0], (4, 500)) * np.array([[1.0], [-1.0], [1.0], [-1.0]])
    found = diagnostics.ess(chains_of(x), "x", "mean")
    assert found == pytest.approx(4000 * np.log10(4000))
    assert np.isfinite(chains_of(x).error(x.ravel()))


def test_constants_are_called_so():
    x = np.full((3, 50), 2.5)
    posterior = chains_of(x)
    assert np.isnan(diagnostics.r_hat(posterior, "x"))
    assert np.isnan(diagnostics.autocorrelation(posterior, "x").correlation[1:]).all()
    (row,) = diagnostics.summary(posterior)
    assert row.constant
    assert (row.mean, row.sd, row.mcse) == (2.5, 0.0, 0.0)
    assert repr(diagnostics.summary(posterior)).split("\n")[1].split() == ["x", "2.5", "0", "constant"]
    each = chains_of(np.repeat([[1.0], [2.0], [2.0]], 50, axis=1))
    assert diagnostics.r_hat(each, "x") == np.inf
    assert np.isnan(diagnostics.r_hat(chains_of(np.ones((2, 3)) * [[1], [2]]), "x")), "too few draws to split"


def test_arrays_have_a_row_for_each_element():
    x = np.stack([SERIES["independent"], SERIES["slow"]], axis=-1)
    posterior = chains_of(x)
    rows = diagnostics.summary(posterior)
    assert [row.name for row in rows] == ["x[0]", "x[1]"]
    np.testing.assert_allclose(diagnostics.r_hat(posterior, "x"), [row.r_hat for row in rows])
    np.testing.assert_allclose(diagnostics.ess(posterior, "x", "tail"), [row.ess_tail for row in rows])
    assert rows[0].ess_bulk > 5 * rows[1].ess_bulk
    assert rows[0].ess_per_1000_tokens == pytest.approx(1000 * rows[0].ess_bulk / (7 * 8000))
    with pytest.raises(ValueError, match=r"expected one number for each trace, found an array of shape \(2,\)"):
        diagnostics.autocorrelation(posterior, "x")


# --- texts ------------------------------------------------------------------------------------------------------------


@ppl.program
def writing():
    patience = ppl.sample("patience", dist.Exponential(2.0))
    text, _ = ppl.generate("text", ppl.prompt(M3), max_tokens=5)
    ppl.factor("length", -patience * text.length)
    return text


@pytest.fixture(scope="module")
def texts():
    return inference.MCMC(mcmc.Regenerate(), num_samples=200, num_warmup=20, num_chains=3).run(jax.random.key(0), writing)


def test_texts(texts):
    rows = diagnostics.summary(texts)
    assert [row.name for row in rows] == ["patience", "text.length", "text.log_prob"]
    x = diagnostics.series(texts, lambda values: len(values["text"].decode()))
    assert x.shape == (3, 200)
    by_hand = texts.values["text"].length.reshape(3, 200)
    np.testing.assert_array_equal(diagnostics.series(texts, lambda values: values["text"].length), by_hand)
    named = diagnostics.summary(
        texts, "patience", lambda values: values["text"].ended, long=lambda values: values["text"].length > 2
    )
    assert [row.name for row in named] == ["patience", "function 1", "long"]
    assert named[2].mean == (by_hand > 2).mean()
    with pytest.raises(ValueError, match="site 'text' is a text: give a function of it"):
        diagnostics.r_hat(texts, "text")
    with pytest.raises(ValueError, match="function 0: expected a number for each trace"):
        diagnostics.r_hat(texts, lambda values: values["text"].decode())


def test_tokens_per_change(texts):
    moves = texts.moves
    assert diagnostics.tokens_per_change(texts) == pytest.approx(moves.tokens.sum() / moves.accepted.sum())
    assert diagnostics.tokens_per_change(chains_of(SERIES["odd"], tokens=30, thinning=5, accepted=0.2)) == pytest.approx(30.0)
    assert diagnostics.tokens_per_change(chains_of(SERIES["odd"], accepted=0.0)) == np.inf


def test_acceptance_by_cut():
    cut = np.tile(np.arange(10, dtype=np.int32), (2, 30))
    x, accepted = np.zeros((2, 300)), (cut >= 5) & (np.arange(300) % 20 < 10)
    posterior = chains_of(x, accepted=accepted, cut=cut, length=np.full((2, 300), 20, np.int32))
    low, high = diagnostics.acceptance_by_cut(posterior, bins=2)
    assert (low.start, low.end, low.proposals, low.rate) == (0, 5, 300, 0.0)
    assert (high.start, high.end, high.proposals, high.rate) == (5, 10, 300, 0.5)
    expected = stats.binomtest(150, 300).proportion_ci(0.95, "wilson")
    assert (high.low, high.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert low.low == 0 < low.high < 0.02
    assert [row.proposals for row in diagnostics.acceptance_by_cut(posterior, bins=4, relative=True)] == [300, 300, 0, 0]
    part = {"accepted": np.where(cut > 7, np.nan, accepted), "cut": cut}
    inside = chains_of(x, thinning=1, accepted=0.1, **{"Mixture": {"Regenerate": part, "which": cut > 7}})
    assert [row.proposals for row in diagnostics.acceptance_by_cut(inside, bins=2)] == [240, 240]
    with pytest.raises(ValueError, match="run with thinning=1"):
        diagnostics.acceptance_by_cut(chains_of(x, thinning=2, cut=cut))
    with pytest.raises(ValueError, match="no kernel of these chains says where it cut"):
        diagnostics.acceptance_by_cut(chains_of(x))


def test_regenerated_texts_tell_their_cuts(texts):
    rows = diagnostics.acceptance_by_cut(texts)
    proposed = (texts.moves.stats["cut"] >= 0).sum()
    assert 300 < proposed < 600, "shorter texts stay where others are cut"
    assert sum(row.proposals for row in rows) == proposed
    assert sum(row.accepted for row in rows) == texts.moves.accepted.sum()
    assert rows[0].start == 0
    assert rows[-1].end == texts.moves.stats["cut"].max() + 1
    by_part = diagnostics.acceptance_by_cut(texts, bins=4, relative=True)
    assert [row.end for row in by_part] == [0.25, 0.5, 0.75, 1.0]
    assert sum(row.proposals for row in by_part) == proposed


def test_tables_show_in_notebooks(texts):
    shown = diagnostics.summary(texts, **{"<b>": lambda values: values["patience"]})._repr_html_()
    assert "<td>&lt;b&gt;</td>" in shown
    assert shown.count("<tr>") == 2


def test_only_chains_have_them():
    with pytest.raises(ValueError, match="come from no Markov chain"):
        diagnostics.summary(inference.ImportanceSampling(20).run(jax.random.key(0), writing))


def test_the_picture(texts, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    drawing = plots.mixing(texts, "patience", same=lambda _: 1.0, path=tmp_path / "mixing.png")
    assert (tmp_path / "mixing.png").stat().st_size > 10_000
    titles = [panel.get_title(loc="left") for panel in drawing.axes if panel.get_visible()]
    assert titles[3:6] == ["same", "ranks: constant", "autocorrelation: constant"]
    assert titles[0] == "patience"
    assert titles[1].startswith("ranks, R-hat 1.")
    assert titles[2].endswith("tokens")
    assert titles[6:] == ["acceptance by cut, 95 % intervals"]
