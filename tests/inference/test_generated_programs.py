"""Programs written by Hypothesis: nested loops, branches, texts, weights and twists, against enumeration.

A program is drawn as a tree of statements. `interpret` writes it with sites and JAX control flow, `enumerate_` runs the same
tree in plain Python.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrace import inference, ppl

MODELS = {"markov": programs.markov(2, seed=3), "hmm": programs.hmm(2, 2, eos_id=1, seed=6)}
KEY = jax.random.key(0)
HOW = ["plain", "twist", "constraint", "heat", "until"]
numbers = st.sampled_from([-1.3, -0.4, 0.3, 0.9])

# Every statement reads and changes one number, `x`, and the context that it grows.
simple = st.one_of(
    st.tuples(
        st.just("generate"), st.integers(1, 2), st.sampled_from(["plain", "twist", "constraint", "heat", "until"]), numbers
    ),
    st.tuples(st.just("flip"), numbers),
    st.tuples(st.just("factor"), numbers),
    st.tuples(st.just("twist"), numbers),
    st.tuples(st.just("condition"), st.integers(0, 3)),
    st.tuples(st.just("fork"), st.just(0)),
)
statements = st.recursive(
    st.lists(simple, min_size=1, max_size=2),
    lambda body: st.lists(
        st.one_of(
            simple,
            st.tuples(st.just("scan"), body),
            st.tuples(st.just("while"), body, st.integers(1, 2)),
            st.tuples(st.just("cond"), body, body),
            st.tuples(st.just("jit"), body),
        ),
        min_size=1,
        max_size=3,
    ),
    max_leaves=4,
)


def size(tree: Any, vocab_size: int) -> float:
    """Most candidate traces of a tree."""
    total = 1.0
    for kind, *rest in tree:
        if kind == "generate":
            total *= vocab_size ** rest[0]
        elif kind == "flip":
            total *= 2
        elif kind in ("scan", "while"):
            total *= size(rest[0], vocab_size) ** 2
        elif kind in ("cond", "jit"):
            total *= np.prod([size(body, vocab_size) for body in rest])
    return total


def interpret(lm: Any, tree: Any):
    def block(tree, start, context, x):
        for kind, *rest in tree:
            name = f"{kind} {next(names)}"
            if kind == "generate":
                n, how, a = rest
                options = {
                    "plain": {},
                    "twist": {"twist": lambda t, a=a, x=x: a * t.length + 0.2 * x},
                    "constraint": {"constraint": jnp.array([True, True])},
                    "heat": {"proposal": ppl.proposals.temperature(1.5)},
                    "until": {"until": [0]},
                }[how]
                text, context = ppl.generate(name, context, max_tokens=n, **options)
                x = x + text.length + (text.tokens == 0).sum()
            elif kind == "flip":
                x = x + ppl.sample(name, dist.Bernoulli(logits=rest[0] + 0.3 * (x % 2)))
            elif kind == "factor":
                ppl.factor(name, rest[0] * (x % 3))
            elif kind == "twist":
                ppl.twist(name, rest[0] * (x % 3))
            elif kind == "condition":
                ppl.condition(name, x % 4 != rest[0])
            elif kind == "fork":
                context = jax.tree.map(lambda a, b, x=x: jnp.where(x % 2 == 1, a, b), start, context)
            elif kind == "scan":
                body = lambda c, _, rest=rest: (block(rest[0], start, *c), None)
                (context, x), _ = jax.lax.scan(body, (context, x), None, length=2)
            elif kind == "while":

                def body(c, rest=rest):
                    ppl.bound(2)
                    return c[0] + 1, *block(rest[0], start, *c[1:])

                going = lambda c, rest=rest: (c[0] < rest[1]) | ((c[0] < 2) & (c[2] % 2 == 0))
                _, context, x = jax.lax.while_loop(going, body, (0, context, x))
            elif kind == "cond":
                yes, no = (lambda c, x, body=body: block(body, start, c, x) for body in rest)
                context, x = jax.lax.cond(x % 2 == 0, yes, no, context, x)
            elif kind == "jit":
                context, x = jax.jit(lambda c, x, rest=rest: block(rest[0], start, c, x))(context, x)
        return context, jnp.asarray(x, jnp.int32)

    names = iter(())

    def program():
        nonlocal names
        names = iter(range(1000))  # the same names at every staging, or each run would compile anew
        start = ppl.prompt(lm)
        return block(tree, start, start, jnp.int32(0))[1]

    return ppl.program(program)


def enumerate_(lm: Any, tree: Any) -> dict[Any, float]:
    def block(path, tree, context, x):
        for kind, *rest in tree:
            if kind == "generate":
                n, how, _ = rest
                stop = (lambda t: t[-1] == 0) if how == "until" else None
                text = () if context[-1:] == (lm.eos_id,) else path.text(lm, context, n, stop)
                context += text
                x += len(text) + programs.padded(text, n, lm.eos_id).count(0)
            elif kind == "flip":
                x += path.flip(1 / (1 + np.exp(-rest[0] - 0.3 * (x % 2))))
            elif kind == "factor":
                path.weigh(np.exp(rest[0] * (x % 3)))
            elif kind == "condition":
                path.weigh(x % 4 != rest[0])
            elif kind == "fork":
                context = () if x % 2 == 1 else context
            elif kind == "scan":
                for _ in range(2):
                    context, x = block(path, rest[0], context, x)
            elif kind == "while":
                i = 0
                while i < rest[1] or (i < 2 and x % 2 == 0):
                    context, x = block(path, rest[0], context, x)
                    i += 1
            elif kind == "cond":
                context, x = block(path, rest[x % 2], context, x)
            elif kind == "jit":
                context, x = block(path, rest[0], context, x)
        return context, x

    return programs.measure(programs.paths(lambda path: block(path, tree, (), 0)[1]))


def check(lm: Any, tree: Any) -> None:
    target, program = enumerate_(lm, tree), interpret(lm, tree)
    evidence = sum(target.values())
    if evidence == 0:
        with pytest.raises(ppl.errors.AllParticlesDeadError):
            inference.Exact().run(KEY, program)
        return
    exact = inference.Exact().run(KEY, program)
    assert abs(exact.log_evidence - np.log(evidence)) < 1e-4  # float32 sums of a few dozen terms
    found = programs.measure(zip(exact.returned, exact.weights))
    for x in {*target, *found}:
        assert abs(found.get(x, 0.0) - target.get(x, 0.0) / evidence) < 1e-4
    runs, n = 12, 400
    for algorithm in (inference.SMC(n, 1.1), inference.SMC(n, 0.5)):
        estimates = []
        for seed in range(runs):
            try:
                posterior = algorithm.run(jax.random.key(seed), program)
            except ppl.errors.AllParticlesDeadError:
                return  # too rare an event to say anything of
            ratio = np.exp(posterior.log_evidence - np.log(evidence))
            assert {(x,) for x in posterior.returned[posterior.weights > 0].tolist()} <= set(target)
            estimates.append([ratio, ratio * (posterior.weights @ posterior.returned)])
        mean = sum(x[0] * p for x, p in target.items()) / evidence
        estimates, truth = np.array(estimates), np.array([1.0, mean])
        error = np.maximum(estimates.std(0, ddof=1) / np.sqrt(runs), 1e-4)
        if error[0] < 0.05:  # |t| with 11 degrees of freedom passes 8 once in 150,000 times
            assert (np.abs(estimates.mean(0) - truth) < 8 * error).all(), (estimates.mean(0), truth, error)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=statements.filter(lambda tree: 1 < size(tree, 2) <= 2000), lm=st.sampled_from(sorted(MODELS)))
def test_generated_programs(tree, lm):
    check(MODELS[lm], tree)


NESTED = [
    ("generate", 1, "twist", 0.9),
    ("scan", [("cond", [("generate", 1, "heat", 0.3), ("twist", 0.9)], [("flip", -0.4), ("factor", 0.9)])]),
    ("while", [("fork", 0), ("jit", [("generate", 1, "plain", 0.3)]), ("factor", -0.4)], 1),
    ("condition", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("lm", MODELS)
def test_a_nested_program(lm):
    check(MODELS[lm], NESTED)
