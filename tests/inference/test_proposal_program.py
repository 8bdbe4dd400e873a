"""Proposals by a program are in detailed balance: what the program draws is enumerated, without Monte Carlo error."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.chains import Target
from latentrace.inference.mcmc import mcmc as driver
from latentrace.inference.mcmc import proposal_program
from latentrace.ppl import errors
from latentrace.ppl.choices import Choices
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage

from . import worlds
from .cases import H3, M3, J

KEY = jax.random.key(0)


def pair():
    """A choice beside a text of one to two tokens; some pairs are impossible."""
    k = ppl.sample("k", dist.Categorical(logits=J))
    text, _ = ppl.generate("text", ppl.prompt(M3), max_tokens=2, until=[2])
    ppl.factor("reward", 0.9 * k * text.length - J[text.tokens[0]])
    ppl.condition("possible", (k < 2) | (text.length > 1))


def other_choice(values):
    """Not itself; from 2 only to 0, whence it is never proposed."""
    logits = jnp.array([[-jnp.inf, 0.4, -jnp.inf], [0.7, -jnp.inf, -0.3], [0.0, -jnp.inf, -jnp.inf]])
    ppl.sample("k", dist.Categorical(logits=logits[values["k"]]))


def other_text(values, lm):
    """By another model, without a token, and less so the longer the text; it does not stop where the target's does."""
    context = ppl.prompt(lm, [1])
    proposal = ppl.proposals.temperature(0.5 + values["text"][1])
    allowed = jnp.array([True, True, True]).at[values["k"]].set(False)
    ppl.generate("text", context, max_tokens=2, proposal=proposal, constraint=allowed)


def both(values):
    """The text first, which the target draws last; what it writes goes on from the old one."""
    text, _ = ppl.generate("text", ppl.extend(ppl.prompt(H3), values["text"][:1]), max_tokens=2, until=[2])
    ppl.sample("k", dist.Categorical(logits=J * text.length + 0.3 * values["k"] * J[::-1]))


def branches():
    """A text or a flip, which is no part of the trace where the other one is."""
    k = ppl.sample("k", dist.Bernoulli(0.35))

    def write():
        text, _ = ppl.generate("x", ppl.prompt(M3), max_tokens=2)
        ppl.factor("long", 0.8 * text.length)
        return text.length

    def flip():
        b = ppl.sample("b", dist.Bernoulli(0.3))
        ppl.factor("heads", 0.7 * b)
        return b

    jax.lax.cond(k == 1, write, flip)
    ppl.sample("last", dist.Bernoulli(0.2))


def switch(values):
    """To the other branch, with what stands in it."""
    k = ppl.sample("k", dist.Bernoulli(jnp.where(values["k"] == 1, 0.1, 0.8)))

    def write():
        text, _ = ppl.generate("x", ppl.prompt(H3), max_tokens=2)
        return text.length

    jax.lax.cond(k == 1, write, lambda: ppl.sample("b", dist.Bernoulli(0.6)))


def switch_alone(values):
    """To the other branch, but only from the text a flip is drawn."""
    k = ppl.sample("k", dist.Bernoulli(0.5))
    jax.lax.cond((k == 0) & (values["k"] == 1), lambda: ppl.sample("b", dist.Bernoulli(0.6)), lambda: 0)


def too_much(values):
    """Whatever the branch, a flip: where there is none in the trace it has nowhere to go."""
    ppl.sample("k", dist.Bernoulli(0.5))
    ppl.sample("b", dist.Bernoulli(0.6))


def sometimes(values):
    """The flip where the last one is 1: a choice that it changes may be one that the way back does not draw."""
    last = ppl.sample("last", dist.Bernoulli(0.4 + 0.2 * values["b"]))
    jax.lax.cond(last == 1, lambda: ppl.sample("b", dist.Bernoulli(0.6)), lambda: 0)


def loop():
    def step(k, w):
        k = ppl.sample("k", dist.Categorical(logits=J * (1 + k)))
        ppl.factor("f", w * k)
        return k, k

    return jax.lax.scan(step, 0, jnp.array([0.5, -0.9]))[1]


def loop_backwards(values):
    jax.lax.scan(lambda _, k: (0, ppl.sample("k", dist.Categorical(logits=J * k))), 0, values["k"][::-1], reverse=True)


CASES = {
    "choice": (pair, other_choice, ()),
    "text": (pair, other_text, (H3,)),
    "both": (pair, both, ()),
    "switch": (branches, switch, ()),
    "switch alone": (branches, switch_alone, ()),
    "too much": (branches, too_much, ()),
    "sometimes": (branches, sometimes, ()),
    "loop": (loop, loop_backwards, ()),
}


class Worlds(NamedTuple):
    """The source of choices of one world, whose number stands in place of a key."""

    def choices(self, rng_key, particle, trace) -> Choices:
        zero = jnp.float32(0)
        return worlds.World(rng_key["world"], jnp.int32(0), zero, zero, None)


class EnumeratedTarget(Target):
    def population(self, rng_key, settings, given=None, trace=None):
        if isinstance(rng_key, dict):
            settings = settings._replace(source=Worlds())
        return super().population(rng_key, settings, given or {}, trace)


@pytest.fixture
def seen(monkeypatch):
    """Keys name worlds; the argument of the acceptance is kept here."""
    random = SimpleNamespace(split=lambda key, n=2: [key] * n, key=jax.random.key)
    monkeypatch.setattr(proposal_program, "jax", SimpleNamespace(tree=jax.tree, random=random))
    monkeypatch.setattr(proposal_program, "Target", EnumeratedTarget)
    found = []
    monkeypatch.setattr(proposal_program, "accepts", lambda key, log_ratio: found.append(log_ratio) or jnp.asarray(True))
    return found


def target_of(fn):
    staged = stage(fn, ())
    return Target(staged.skeleton(), jax.tree.map(jnp.asarray, arrays_of(staged)), {})


def transition(program, proposal, args, seen, most=100):
    """The kernel's matrix over the traces of positive density, their probabilities, and whether there is a way back."""
    exact = inference.Exact().run(KEY, program)
    target, kernel = target_of(program), mcmc.ProposalProgram(proposal, args)
    kernel.check(target)
    as_array = lambda v: jnp.asarray(v.tokens if isinstance(v, ppl.Text) else v)
    traces = {name: as_array(exact.values[name]) for name in target.random}

    def probability(values, world):
        staged = stage(proposal, (values, *args))
        state = first_state(staged, staged.models, Worlds().choices({"world": world}, 0, None))
        run = Interpreter(staged, {k: jnp.asarray(c) for k, c in staged.consts.items()}, staged.models, state)
        run.walk(staged.jaxpr, [run.frame.put(x) for x in staged.inputs])
        choices = run.state.choices
        return jnp.where(choices.own == 0, jnp.exp(choices.log_p_own), 0.0)

    def one(values, world):
        draw = target.evaluate(values)[0]
        after, info = kernel.step(target, {"world": world}, kernel.init(target, KEY, draw))
        p = jax.vmap(lambda _: probability(values, world), axis_name="particles")(jnp.zeros(1))[0]
        return target.choices(after.draw), seen.pop(), p, info.stats["returns"]

    moved, log_ratio, p, returns = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(traces, jnp.arange(most))
    np.testing.assert_allclose(np.asarray(p).sum(1), 1.0, atol=1e-5)
    rows = lambda values, axes: np.concatenate([np.asarray(values[n]).reshape(*axes, -1) for n in target.random], axis=-1)
    number = {tuple(row): i for i, row in enumerate(rows(traces, (len(exact.weights),)).tolist())}
    moved, accepted = rows(moved, p.shape), np.asarray(p * jnp.exp(jnp.minimum(log_ratio, 0.0)), np.float64)
    matrix = np.zeros((len(number), len(number)))
    for i, world in np.argwhere(accepted > 0):
        matrix[i, number[tuple(moved[i, world].tolist())]] += accepted[i, world]
    return matrix + np.diag(1 - matrix.sum(1)), exact.weights, np.asarray(returns)[np.asarray(p) > 0]


SLOW = ("both", "switch alone", "too much")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_detailed_balance(seen, name):
    matrix, posterior, returns = transition(*CASES[name], seen)
    assert (matrix > -1e-6).all()
    flow = posterior[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-6)
    moves = (flow - np.diag(np.diag(flow)) > 1e-4).sum()
    assert moves == 0 if name == "switch alone" else moves >= 4
    assert returns.all() == (name in ("both", "switch", "loop"))


@pytest.mark.slow
def test_chains_by_a_program():
    kernel = mcmc.Cycle(mcmc.ProposalProgram(other_text, (H3,)), mcmc.ProposalProgram(both))
    posterior = inference.MCMC(kernel, 500, 50, num_chains=4).run(KEY, ppl.program(pair))
    for row in inference.Exact().run(KEY, pair).marginal("text"):
        found = posterior.probability(lambda v, row=row: v["text"].decode() == row.value)
        assert abs(found - row.probability) < 0.1
    assert not posterior.restricted, "what a proposal leaves out the target may have"
    assert posterior.moves.stats["ProposalProgram 2"]["returns"].all()


def test_a_chain_without_a_way_back_says_why():
    def down(values):
        ppl.sample("n", dist.Delta(values["n"] + 1))

    poisson = ppl.program(lambda: ppl.sample("n", dist.Poisson(3.0)))
    with pytest.warns(UserWarning, match="never moved.*; their proposal program could never have drawn the way back"):
        posterior = inference.MCMC(mcmc.ProposalProgram(down), 20).run(KEY, poisson)
    assert not posterior.moves.stats["returns"].any()


def test_faults_name_the_site_of_the_target():
    def broken(values):
        ppl.sample("b", dist.Bernoulli(0.5))
        ppl.sample("a", dist.Bernoulli(jnp.nan * values["a"]))

    coins = ppl.program(lambda: [ppl.sample(name, dist.Bernoulli(0.5)) for name in ("a", "b")])
    with pytest.raises(errors.NonFiniteError, match="site 'a': its log-weight was NaN"):
        inference.MCMC(mcmc.ProposalProgram(broken), 2).run(KEY, coins)


def test_models_and_arrays_of_the_program_are_inputs():
    lm = programs.wide_cache_model()

    def rewrite(values, bias, lm):
        ppl.generate("text", ppl.prompt(lm), max_tokens=2, proposal=lambda logits: logits + bias)

    target = ppl.program(lambda: ppl.generate("text", ppl.prompt(M3), max_tokens=2)[0])
    kernel = mcmc.ProposalProgram(rewrite, (jnp.array([0.0, 0.3, -0.2]), lm))
    chains = driver.Chains(inference.MCMC(kernel, 1), KEY, target, ())
    part = chains.part(driver.one_draw)
    text = part.func.lower(*part.args, *chains._shapes()[:2], KEY, jnp.int32(0), jnp.int32(1)).as_text()
    assert "3x256" in text
    assert "dense" not in "".join(line for line in text.splitlines() if "constant" in line and "3x256" in line)
    other = mcmc.ProposalProgram(rewrite, (jnp.array([0.0, 0.3, -0.1]), lm))
    assert chains.mark()["arrays"] != driver.Chains(inference.MCMC(other, 1), KEY, target, ()).mark()["arrays"]


def wrong(site):
    return lambda values: site()


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (wrong(lambda: None), "the program draws nothing"),
        (wrong(lambda: ppl.sample("kk", dist.Bernoulli(0.5))), "site 'kk' is no random site of the target.*did you mean 'k'"),
        (wrong(lambda: ppl.sample("text", dist.Bernoulli(0.5))), r"site 'text' is sample \(\) of int32, but generate \(2,\)"),
        (wrong(lambda: ppl.sample("k", dist.Normal(0.0, 1.0))), r"of float32, but sample \(\) of int32 in the target"),
        (wrong(lambda: ppl.generate("text", ppl.prompt(M3), max_tokens=3)), r"generate \(3,\) of tokens, but generate \(2,\)"),
        (wrong(lambda: ppl.generate("text", ppl.prompt(programs.markov(2)), max_tokens=2)), "a model of 2 tokens.*of 3 tokens"),
        (wrong(lambda: (ppl.sample("k", dist.Categorical(logits=J)), ppl.factor("f", 1.0))), "site 'f' is a factor site"),
        (lambda values: [0] * int(values["k"]), "asks for concrete numbers of its values"),
    ],
)
def test_errors(proposal, message):
    with pytest.raises(errors.SiteError, match=message):
        inference.MCMC(mcmc.ProposalProgram(proposal), 2).run(KEY, pair)


def test_given_sites_have_no_way_back():
    given = ppl.program(pair).condition({"k": 1})
    with pytest.raises(errors.SiteError, match="site 'k' is given in the target"):
        inference.MCMC(mcmc.ProposalProgram(wrong(lambda: ppl.sample("k", dist.Bernoulli(0.5)))), 2).run(KEY, given)
