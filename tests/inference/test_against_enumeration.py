"""Programs against enumeration: `Exact` against the same program written in plain Python, sampling against `Exact`.

Sampled estimates are compared with t statistics over independent runs, so that each run tells its own error: estimates of
the evidence times a probability are unbiased, and |t| with 15 degrees of freedom passes 6 once in 40,000 times.
"""

import jax
import numpy as np
import programs
import pytest

from latentrace import inference
from latentrace.inference import driver
from latentrace.ppl.staging import stage

from . import control_flow_cases, language_cases  # noqa: F401  (they fill the table)
from .cases import CASES

SEEDS, PARTICLES = 16, 600
LIMIT = 6.0


@pytest.fixture(scope="module", params=CASES)
def problem(request):
    """A program and its target: unnormalised density of each returned value."""
    found = CASES[request.param]
    return found, programs.measure(programs.paths(found.oracle))


@pytest.fixture
def staged_once(monkeypatch, problem):
    """Staging takes longer than running here: the sixteen runs share it."""
    staged = stage(problem[0].program, ())
    monkeypatch.setattr(driver, "stage", lambda program, args: staged)


def results(posterior) -> list[tuple]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(posterior.returned)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def test_exact_is_the_plain_python_program(problem):
    found, target = problem
    if found.restricted:
        pytest.skip("Exact enumerates the model's support, whatever the proposal leaves out")
    posterior = inference.Exact().run(jax.random.key(0), found.program)
    evidence = sum(target.values())
    assert abs(posterior.log_evidence - np.log(evidence)) < 1e-5  # float32 sums of a few terms
    measure = programs.measure(zip(results(posterior), posterior.weights))
    for result in {*target, *measure}:
        assert abs(measure.get(result, 0.0) - target.get(result, 0.0) / evidence) < 1e-5
    assert posterior.exact
    assert not posterior.restricted


def check_sampler(problem, algorithm):
    found, target = problem
    evidence = sum(target.values())
    likely = [r for r in sorted(target, key=target.get)[-5:] if target[r] > 0.02 * evidence]  # met in every run
    moment = np.mean([np.asarray(r, float) for r in target], axis=0) + 0.5  # an uneven direction
    truth = [1.0, *(target[r] / evidence for r in likely), sum(p / evidence * np.dot(moment, r) for r, p in target.items())]
    estimates, sizes = [], []
    for seed in range(SEEDS):
        posterior = algorithm.run(jax.random.key(seed), found.program)
        measure = programs.measure(zip(results(posterior), posterior.weights))
        assert set(measure) <= set(target)  # nothing impossible
        ratio = np.exp(posterior.log_evidence - np.log(evidence))
        mean = sum(p * np.dot(moment, r) for r, p in measure.items())
        estimates.append([ratio, *(ratio * measure.get(r, 0.0) for r in likely), ratio * mean])
        sizes.append(posterior.ess)
        assert posterior.restricted == found.restricted
    estimates = np.array(estimates)
    error = estimates.std(0, ddof=1) / np.sqrt(SEEDS)
    assert np.mean(sizes) > 0.05 * PARTICLES, "too few effective particles for the test to tell anything"
    assert (error[0] < 0.05).all(), "too noisy for the test to tell anything"
    t = (estimates.mean(0) - truth) / np.maximum(error, 2e-6)
    assert (np.abs(t) < LIMIT).all(), (t, estimates.mean(0), truth)


NAMES = sorted(CASES)
THIRD = NAMES[::3]
"""Sampled comparisons compile for seconds each: the default run takes a third of them, the slow one the rest."""


def problems(*, of_third: bool) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("problem", [n for n in NAMES if (n in THIRD) == of_third], indirect=True)


@pytest.mark.usefixtures("staged_once")
@problems(of_third=True)
def test_smc_that_always_resamples(problem):
    check_sampler(problem, inference.SMC(PARTICLES, ess_threshold=1.1))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@problems(of_third=False)
def test_smc_that_always_resamples_on_the_rest(problem):
    check_sampler(problem, inference.SMC(PARTICLES, ess_threshold=1.1))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
def test_smc_that_resamples_when_due(problem):
    check_sampler(problem, inference.SMC(PARTICLES))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@problems(of_third=True)
def test_smc_that_resamples_between_sites(problem):
    check_sampler(problem, inference.SMC(PARTICLES, granularity="site"))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@problems(of_third=True)
def test_smc_that_tempers(problem):
    check_sampler(problem, inference.SMC(PARTICLES, ess_threshold=0.9, resample=inference.smc.Tempered(0.6)))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@problems(of_third=True)
def test_smc_steering(problem):
    check_sampler(problem, inference.SMCSteering(PARTICLES // 4, branches=4))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
def test_importance_sampling(problem):
    check_sampler(problem, inference.ImportanceSampling(PARTICLES))
