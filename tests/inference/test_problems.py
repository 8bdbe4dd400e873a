"""Many problems side by side are the same runs as one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl import errors
from latentrace.ppl.problems import Problems

LM = programs.hmm(3, 4, seed=6)
REWARDS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
PROMPTS = ["b", "", "cb", "bcdbcdbcdbcd", "d"]
PROBLEMS = [(prompt, reward) for prompt, reward in zip(PROMPTS, REWARDS)]
KEY = jax.random.key(3)


@ppl.program
def straight(prompt, reward):
    """Two texts, resampled inside; the prompts are of different lengths."""
    likes = lambda text: reward[text.tokens].sum()
    first, context = ppl.generate("first", ppl.prompt(LM, prompt), max_tokens=3, twist=likes)
    ppl.factor("reward", 2 * reward[first.tokens].sum())
    second, _ = ppl.generate("second", context, max_tokens=2, constraint=reward > -1.0)
    return first.tokens, second.length


@ppl.program
def loops(prompt, reward):
    """A scan whose twist reads features; what comes after it reads its outputs; a plate."""

    def step(context, weight):
        text, context = ppl.generate("x", context, max_tokens=2)
        ppl.factor("reward", weight * reward[text.tokens].sum())
        ppl.twist("promise", 0.3 * ppl.features(context)[0])
        return context, text.tokens

    context, found = jax.lax.scan(step, ppl.prompt(LM, prompt, pad_to=12), jnp.array([0.5, 1.5, -1.0]))
    noise = ppl.sample("noise", dist.Normal(reward.sum(), 1.0))
    ppl.observe("seen", dist.Normal(noise, 0.5), found.sum())
    ends = ppl.vmap(lambda r: ppl.generate("end", context, max_tokens=2, constraint=r > -1.5)[0].tokens)(
        reward[None] * jnp.ones((2, 1))
    )
    return found, ends


@ppl.program
def ends_early(prompt, reward):
    """A loop that some problems leave after a step, and others after many."""
    patience = jnp.abs(reward).argmax() * 3

    def step(carry):
        i, context = carry
        ppl.bound(12)
        text, context = ppl.generate("x", context, max_tokens=2)
        ppl.factor("reward", reward[text.tokens].sum())
        return i + 1, context

    i, context = jax.lax.while_loop(lambda carry: carry[0] < patience, step, (0, ppl.prompt(LM, prompt, pad_to=12)))
    last, _ = ppl.generate("last", context, max_tokens=2)
    return i, last.tokens


def same(one, other):
    leaves = lambda p: jax.tree.leaves((p.values, p.returned, p.log_weights, p.active, p.roots))
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    assert one.ledger.tokens_generated == other.ledger.tokens_generated


LONG = [pytest.param(program, marks=pytest.mark.slow) for program in (straight, ends_early)]


@pytest.mark.parametrize("program", [loops, *LONG], ids=lambda p: p.__name__)
def test_the_same_as_one_by_one(program):
    """Batches that are full and batches that are not, refilled ones too."""
    smc = inference.SMC(6, ess_threshold=0.8)
    many = smc.run_many(KEY, program, PROBLEMS, at_once=3)
    assert len({tuple(p.log_weights.tolist()) for p in many}) == len(PROBLEMS)
    for number, posterior in enumerate(many):
        same(posterior, smc.run(jax.random.fold_in(KEY, number), program, *PROBLEMS[number]))


def test_waiting_problems_take_free_places(monkeypatch):
    """Of nine problems every third takes long: while those go on, the others come and go beside them."""
    taken = []
    monkeypatch.setattr(Problems, "step", lambda self, *args, step=Problems.step: taken.append(1) or step(self, *args))

    @ppl.program
    def waits(steps):
        def step(i):
            ppl.bound(12)
            ppl.factor("reward", 0.3 * ppl.sample("x", dist.Bernoulli(0.4)))
            return i + 1

        return jax.lax.while_loop(lambda i: i < steps, step, 0)

    steps = [12 if number % 3 == 0 else 1 for number in range(9)]
    found = inference.SMC(4).run_many(KEY, waits, [jnp.int32(n) for n in steps], at_once=3)
    assert [int(posterior.returned[0]) for posterior in found] == steps
    assert len(taken) < 25, "three rounds of 12 steps would be 36"


@ppl.program
def picky(digit):
    ppl.condition("is it", ppl.sample("x", dist.Categorical(jnp.full(5, 0.2))) == digit)


def test_a_problem_that_fails():
    digits = [jnp.int32(n) for n in (1, 7, 3)]
    smc = inference.SMC(40)
    one, dead, three = smc.run_many(KEY, picky, digits, return_errors=True)
    assert one.probability(lambda t: t["x"] == 1) > 0.999
    assert three.probability(lambda t: t["x"] == 3) > 0.999
    assert isinstance(dead, errors.AllParticlesDeadError)
    with pytest.raises(errors.AllParticlesDeadError, match="'is it'") as caught:
        smc.run_many(KEY, picky, digits)
    assert caught.value.__notes__ == [
        "in problem 1, counted from 0",
        "1 of 3 problems failed; with return_errors=True the others are returned",
    ]


def test_bad_input():
    smc = inference.SMC(4)
    assert smc.run_many(KEY, picky, []) == []
    with pytest.raises(errors.SiteError, match="at_once must be at least 1, not 0"):
        smc.run_many(KEY, picky, [1], at_once=0)
    with pytest.raises(errors.SiteError, match=r"problem 2 stages to another program than problem 0.*numbers as arrays"):
        smc.run_many(KEY, picky, [1, 1, 2])
    with pytest.raises(errors.SiteNameError, match="'y' does not exist"):
        smc.run_many(KEY, picky.condition({"y": 1}), [jnp.int32(1)])


def test_an_interrupt_keeps_what_has_finished(monkeypatch):
    def interrupted(self, *args, whole=Problems.whole):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(self, *args)

    calls = []
    monkeypatch.setattr(Problems, "whole", interrupted)
    found = inference.SMC(40).run_many(KEY, picky, [jnp.int32(n) for n in (1, 2, 3)], at_once=1)
    assert found[0].log_evidence < 0
    assert found[1:] == [None, None]
