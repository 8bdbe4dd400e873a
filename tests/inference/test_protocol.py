"""What every algorithm promises: the fields of a `Posterior`, what it says, and what its run cost."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl import errors

LM = programs.markov(3, seed=1)
KEY = jax.random.key(0)
N = 300
ALGORITHMS = {
    "Exact": inference.Exact(),
    "Exact in batches": inference.Exact(batch_size=7),
    "ImportanceSampling": inference.ImportanceSampling(N),
    "ImportanceSampling in batches": inference.ImportanceSampling(N, batch_size=128),
    "SMC": inference.SMC(N),
    "SMC that never resamples": inference.SMC(N, ess_threshold=0.0),
    "SMC that always resamples": inference.SMC(N, ess_threshold=1.1, granularity="site"),
    "SMC that tempers every other time": inference.SMC(N, resample=inference.smc.Tempered(0.6), when=inference.smc.EveryK(2)),
    "SMCSteering": inference.SMCSteering(N // 3, branches=3),
    "TemperedSMC": inference.TemperedSMC(N, temperatures=(0.5, 1.0)),
    "WasteFreeSMC": inference.WasteFreeSMC(N, chain_length=10, temperatures=(0.5, 1.0)),
    "ResampleMove": inference.ResampleMove(inference.SMC(N)),
}
RUNS = N + N // 10 * 9
WORK = {"TemperedSMC": (12 * N, 9 * N), "WasteFreeSMC": (4 * RUNS, 3 * RUNS), "ResampleMove": (17 * N, 9 * N)}
"""most tokens, and potentials, where a trace is written more than once"""


@ppl.program
def program(bias):
    k = ppl.sample("k", dist.Bernoulli(0.3))
    head, context = ppl.generate("head", ppl.prompt(LM), max_tokens=2)

    def step(context, _):
        text, context = ppl.generate("loop", context, max_tokens=1)
        ppl.factor("reward", bias * text.length * (1 + k))
        return context, text.length

    _, lengths = jax.lax.scan(step, context, None, length=2)
    ppl.deterministic("total", {"length": head.length + lengths.sum()})
    ppl.condition("not silent", head.tokens[0] != 0)
    return {"k": k, "head": head, "lengths": lengths}


@pytest.fixture(scope="module", params=ALGORITHMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def posterior(name):
    return ALGORITHMS[name].run(KEY, program, np.asarray(-0.4, np.float32))


@pytest.fixture(scope="module")
def exact():
    return inference.Exact().run(KEY, program, np.asarray(-0.4, np.float32))


def test_fields(posterior):
    n = len(posterior.log_weights)
    assert posterior.exact or n == N
    assert set(posterior.values) == {"k", "head", "loop", "total"}
    assert posterior.log_weights.dtype == np.float32
    assert not np.isnan(posterior.log_weights).any()
    assert posterior.values["k"].shape == (n,)
    head, loop = posterior.values["head"], posterior.values["loop"]
    assert isinstance(head, ppl.Text)
    for text, axes in [(head, (n,)), (loop, (n, 2))]:
        m = text.tokens.shape[-1]
        shapes = [(x.shape, x.dtype) for x in (text.tokens, text.length, text.ended, text.log_probs)]
        assert shapes == [((*axes, m), np.int32), (axes, np.int32), (axes, bool), ((*axes, m), np.float32)]
    assert posterior.values["total"]["length"].shape == (n,)
    np.testing.assert_array_equal(posterior.returned["lengths"], loop.length)
    np.testing.assert_array_equal(posterior.returned["head"].tokens, head.tokens)
    assert posterior.active["loop"].shape == (n, 2)
    assert not posterior.restricted


def test_weights_and_effective_sample_size(posterior):
    weights = np.exp(posterior.log_weights.astype(float))
    np.testing.assert_allclose(posterior.weights, weights / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(posterior.ess, weights.sum() ** 2 / (weights**2).sum(), rtol=1e-6)
    mean = weights.sum() if posterior.exact else weights.mean()
    np.testing.assert_allclose(posterior.log_evidence, np.log(mean), rtol=1e-6)


def test_what_it_says_agrees_with_itself_and_with_enumeration(posterior, exact):
    first = lambda v: int(v["head"].tokens[0])
    table = {row.value: row for row in posterior.marginal(first)}
    truth = {row.value: row.probability for row in exact.marginal(first)}
    assert set(table) == set(truth) == {1, 2}
    assert sum(row.probability for row in table.values()) == pytest.approx(1.0)
    for value, row in table.items():
        assert posterior.probability(lambda v, value=value: first(v) == value) == pytest.approx(row.probability)
        assert abs(row.probability - truth[value]) <= 5 * row.error + 1e-5
        assert (row.error == 0) == posterior.exact
    assert posterior.expectation("k") == pytest.approx(posterior.probability(lambda v: v["k"] == 1))
    assert posterior.expectation(lambda v: v["loop"].length).shape == (2,)
    assert posterior.marginal("head")[0].value in ("b", "bb", "bc", "c", "cb", "cc")
    assert posterior.marginal("total").top(1)[0].probability == max(r.probability for r in posterior.marginal("total"))
    # a relative error of the evidence of about sqrt(1 / ESS - 1 / N), and a half of it again for resampled families
    assert abs(posterior.log_evidence - exact.log_evidence) < (1e-5 if posterior.exact else 6 / np.sqrt(N))


def test_ledger(name, posterior):
    ledger, n = posterior.ledger, len(posterior.log_weights)
    most, potentials = WORK.get(name, (4 * n, 3 * n))
    lengths = posterior.values["head"].length.sum() + posterior.values["loop"].length.sum()
    assert ledger.seconds > 0
    if posterior.exact:
        assert (ledger.tokens_generated, ledger.tokens_scored) == (0, lengths)
    else:
        assert ledger.tokens_scored == 0
        assert ledger.tokens_generated <= most
        assert ledger.tokens_generated > 0
        assert ledger.potential_calls == potentials
        assert 0 < ledger.utilisation <= 1


def test_tokens_generated_are_counted_once():
    posterior = ALGORITHMS["ImportanceSampling"].run(KEY, program, np.asarray(-0.4, np.float32))
    text = posterior.values
    assert posterior.ledger.tokens_generated == text["head"].length.sum() + text["loop"].length.sum()


def test_equally_weighted_draws(posterior):
    draws = posterior.sample(jax.random.key(3), 2000)
    again = posterior.sample(jax.random.key(3), 2000)
    np.testing.assert_array_equal(draws.values["head"].tokens, again.values["head"].tokens)
    assert len(np.unique(draws.log_weights)) == 1
    assert draws.log_evidence == pytest.approx(posterior.log_evidence, abs=1e-5)
    # systematic draws from N weighted particles: each count is within 1 of its expectation
    assert draws.expectation("k") == pytest.approx(posterior.expectation("k"), abs=len(posterior.log_weights) / 2000)
    assert (draws.values["head"].tokens[:, 0] != 0).all()
    assert draws.returned["head"].tokens.shape == (2000, 2)
    order = draws.values["head"].tokens[:, 0]
    assert np.abs(np.diff(order)).sum() > 0  # not sorted by particle


def test_texts_for_people(posterior):
    assert f"{len(posterior.log_weights)} {'traces' if posterior.exact else 'particles'}" in repr(posterior)
    assert "k, head, loop, total" in repr(posterior)
    table = posterior.marginal("head")
    assert repr(table).splitlines()[0].split() == ["value", "probability", "error"]
    assert len(repr(table).splitlines()) == len(table) + 1
    html = table._repr_html_()
    assert html.count("<tr>") == len(table) + 1
    assert "<code>" in html


def test_markup_in_values_is_escaped():
    lm = programs.models.MarkovLM(np.zeros(2), np.zeros((2, 2)), 0, vocabulary=("", "<b>&"))
    posterior = inference.Exact().run(KEY, lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=1)[0] and None)
    assert "&lt;b&gt;&amp;" in posterior.marginal("x")._repr_html_()


def test_unknown_names(posterior):
    for ask in (posterior.marginal, posterior.expectation):
        with pytest.raises(errors.SiteNameError, match="did you mean 'head'"):
            ask("haed")


def test_arviz(posterior):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version on import
        pytest.importorskip("arviz")
        data = posterior.to_arviz()
    n = len(posterior.log_weights)
    assert data.posterior["k"].shape == (1, n)
    assert data.posterior["head"].dtype.kind in "UO"
    assert data.posterior["total.length"].shape == (1, n)
    np.testing.assert_array_equal(data.particles["log_weight"][0], posterior.log_weights)


def test_runs_leave_nothing_behind(exact):
    """The same run before and after others gives the same bits."""
    algorithm, bias = ALGORITHMS["SMC"], np.asarray(-0.4, np.float32)
    before = algorithm.run(KEY, program, bias)
    with pytest.raises(errors.AllParticlesDeadError):
        algorithm.run(KEY, lambda: ppl.condition("never", jnp.asarray(False)))
    algorithm.run(jax.random.key(9), program, bias)
    after = algorithm.run(KEY, program, bias)
    for a, b in zip(jax.tree.leaves((before.values, before.log_weights)), jax.tree.leaves((after.values, after.log_weights))):
        np.testing.assert_array_equal(a, b)


def test_a_restricted_target_says_so():
    cut = lambda: ppl.generate("x", ppl.prompt(LM), max_tokens=1, proposal=ppl.proposals.top_k(1))[0].tokens
    posterior = inference.SMC(4).run(KEY, cut)
    assert posterior.restricted
    assert "restricted to the proposal's support" in repr(posterior)
    assert posterior.log_evidence == pytest.approx(np.log(programs.next_probs(LM).max()), rel=1e-5)
