"""Runs in segments: the same particles as in one call, stopped by a budget or Ctrl-C, saved, resumed, refused."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl import errors
from latentrace.ppl.run import Settings, execute
from latentrace.ppl.segments import SegmentedRun
from latentrace.ppl.staging import stage

from . import control_flow_cases, language_cases  # noqa: F401  (they fill the table)
from .cases import CASES

LM = programs.hmm(2, 3, seed=4)
KEY = jax.random.key(5)
STEPS, N = 4, 6


@ppl.program
def story(bonus):
    """Texts before, in and after a loop that is twisted; a factor at each."""
    title, context = ppl.generate("title", ppl.prompt(LM, [1, 2]), max_tokens=2)
    ppl.factor("early", bonus * title.tokens[0])

    def step(context, i):
        line, context = ppl.generate("line", context, max_tokens=2)
        ppl.twist("promise", 0.4 * line.length + 0.1 * i)
        ppl.factor("reward", -0.3 * line.tokens[0])
        return context, line.length

    context, lengths = jax.lax.scan(step, context, jnp.arange(STEPS))
    end, _ = ppl.generate("end", context, max_tokens=2)
    ppl.factor("late", 0.2 * end.length)
    return lengths


BONUS = np.asarray(0.5, np.float32)
SMC = inference.SMC(N, ess_threshold=0.9)


@pytest.fixture(scope="module")
def uncut():
    return SMC.run(KEY, story, BONUS)


def same(one, other):
    for field in ("values", "returned", "log_weights", "active", "roots"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, field), getattr(other, field))
    assert one.ledger.tokens_generated == other.ledger.tokens_generated
    assert one.ledger.model_calls == other.ledger.model_calls


QUICK = ("while loop stops by data", "plate of texts from one context")
MORE = (
    "reverse scan over data",
    "jit in scan in cond in while",
    "plate in scan with scan inside",
    "forks of two prompts chosen by data",
    "list of contexts in a scan",
    "automaton in a loop",
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_segments_give_the_particles_of_one_call(name):
    """Bit for bit, whether or not the population resamples, and whoever looks at it in between."""
    staged = stage(CASES[name].program, ())
    settings = Settings(N, policy=inference.SMC(N, 0.9).policy())
    run = SegmentedRun(staged, KEY, {}, settings)
    while not run.done:
        run.advance()
    jax.tree.map(np.testing.assert_array_equal, execute(staged, KEY, {}, settings), run.output())


def test_a_large_budget_changes_nothing(uncut):
    posterior = SMC.run(KEY, story, BONUS, budget=inference.Budget(tokens=10**6))
    same(uncut, posterior)
    assert posterior.stopped is None


def stopped_after(cuts, monkeypatch, **options):
    """A run that is interrupted after some cuts."""
    advance, count = SegmentedRun.advance, [0]

    def interrupted(run):
        if not run.abstract:
            if count[0] == cuts:
                raise KeyboardInterrupt
            count[0] += 1
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentedRun, "advance", interrupted)
        return SMC.run(KEY, story, BONUS, budget=inference.Budget(), **options)


def test_an_interrupted_run_is_a_posterior_of_what_came_before(monkeypatch):
    """Its weights are those of the program that ends there, with the twist as a factor."""

    @ppl.program
    def shorter(bonus):
        title, context = ppl.generate("title", ppl.prompt(LM, [1, 2]), max_tokens=2)
        ppl.factor("early", bonus * title.tokens[0])

        def step(context, i):
            line, context = ppl.generate("line", context, max_tokens=2)
            ppl.twist("promise", 0.4 * line.length + 0.1 * i)
            ppl.factor("reward", -0.3 * line.tokens[0])
            return context, line.length

        _, lengths = jax.lax.scan(step, context, jnp.arange(2))
        ppl.factor("twist", 0.4 * lengths[1] + 0.1)

    posterior = stopped_after(4, monkeypatch)
    assert posterior.stopped == "step 2 of 4 of the loop of site 'line'"
    assert "stopped before step 2 of 4" in repr(posterior)
    assert posterior.returned is None
    assert set(posterior.values) == {"title", "line"}
    assert posterior.active["line"].tolist() == [[True, True, False, False]] * N
    expected = SMC.run(KEY, shorter, BONUS)
    np.testing.assert_allclose(posterior.log_weights, expected.log_weights, rtol=1e-5)
    np.testing.assert_array_equal(posterior.values["line"].tokens[:, :2], expected.values["line"].tokens)
    np.testing.assert_array_equal(posterior.values["title"].tokens, expected.values["title"].tokens)
    assert posterior.marginal("title")[0].probability == pytest.approx(expected.marginal("title")[0].probability, rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        stopped_after(0, monkeypatch)


def test_budgets_stop_at_the_next_cut(uncut):
    posterior = SMC.run(KEY, story, BONUS, budget=inference.Budget(tokens=1))
    assert set(posterior.values) == {"title"}
    assert 1 <= posterior.ledger.tokens_generated <= 2 * N
    limit = uncut.ledger.tokens_generated // 2
    posterior = SMC.run(KEY, story, BONUS, budget=inference.Budget(tokens=limit))
    assert limit <= posterior.ledger.tokens_generated < limit + 2 * N
    assert SMC.run(KEY, story, BONUS, budget=inference.Budget(seconds=1e-9)).stopped == "site 'title'"
    for wrong in ({"tokens": 0}, {"seconds": -1.0}):
        with pytest.raises(errors.SiteError, match="must be positive"):
            inference.Budget(**wrong)


@pytest.mark.parametrize("cuts", [1, 3, 5, 7])
def test_a_resumed_run_is_bit_identical(cuts, monkeypatch, tmp_path, uncut):
    checkpoint = inference.Checkpoint(tmp_path / "run.safetensors", every=0.0)
    stopped = stopped_after(cuts, monkeypatch, checkpoint=checkpoint)
    resumed = SMC.run(KEY, story, BONUS, checkpoint=checkpoint)
    same(uncut, resumed)
    assert resumed.stopped is None
    assert stopped.ledger.tokens_generated < resumed.ledger.tokens_generated or cuts == 7
    same(uncut, SMC.run(KEY, story, BONUS, checkpoint=checkpoint))  # the end is saved too
    assert os.listdir(tmp_path) == ["run.safetensors"]


RESUME = """
import sys, jax, numpy as np
sys.path[:0] = [{tests!r}, {root!r}]
from tests.inference import test_anytime as t
from latentrace import inference
posterior = t.SMC.run(t.KEY, t.story, t.BONUS, checkpoint=inference.Checkpoint({path!r}))
np.savez({out!r}, log_weights=posterior.log_weights, line=posterior.values["line"].tokens)
"""


@pytest.mark.slow
def test_another_process_resumes(monkeypatch, tmp_path, uncut):
    path, out = tmp_path / "run.safetensors", tmp_path / "out.npz"
    stopped_after(3, monkeypatch, checkpoint=inference.Checkpoint(path))
    root = Path(__file__).parents[2]
    code = RESUME.format(tests=str(root / "tests"), root=str(root), path=str(path), out=str(out))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    found = np.load(out)
    np.testing.assert_array_equal(found["log_weights"], uncut.log_weights)
    np.testing.assert_array_equal(found["line"], uncut.values["line"].tokens)


def test_foreign_and_broken_checkpoints_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "run.safetensors"
    stopped_after(3, monkeypatch, checkpoint=inference.Checkpoint(path))
    run = lambda key=KEY, bonus=BONUS, smc=SMC, program=story: smc.run(
        key, program, bonus, checkpoint=inference.Checkpoint(path)
    )
    with pytest.raises(errors.RunCheckpointError, match="its rng_key differ"):
        run(key=jax.random.key(6))
    with pytest.raises(errors.RunCheckpointError, match="its arrays differ"):
        run(bonus=np.asarray(0.6, np.float32))
    with pytest.raises(errors.RunCheckpointError, match="its settings differ"):
        run(smc=inference.SMC(N, ess_threshold=0.8))
    with pytest.raises(errors.RunCheckpointError, match="its program and arrays differ"):
        run(program=ppl.program(lambda bonus: ppl.factor("f", bonus + ppl.sample("x", dist.Normal(0.0, 1.0)))))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(errors.RunCheckpointError, match="cannot be read as a checkpoint"):
        run()
    path.write_bytes(b"hello")
    with pytest.raises(errors.RunCheckpointError, match="delete it to start anew"):
        run()
