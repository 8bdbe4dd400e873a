"""Constraints that a parser on the host decides: grammars, JSON schemas, and parsers that misbehave."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.errors import JaxRuntimeError

from latentrace import inference, models, ppl
from latentrace.ppl import constraints
from latentrace.ppl.errors import SiteError

pytest.importorskip("llguidance")
BRACKETS = programs.markov(3, seed=5)  # tokens spell a, b and c, and a ends


class Nested:
    """b opens and c closes."""

    def __init__(self, depth=0, fault=None):
        self.depth, self.fault = depth, fault

    def allowed(self):
        if self.depth == 1 and self.fault is not None:
            return self.fault()
        return np.array([self.depth == 0, True, self.depth > 0])

    def after(self, token):
        return Nested(self.depth + (1 if token == 1 else -1), self.fault)


def texts(lm, constraint, max_tokens, particles=64, seed=0):
    program = ppl.program(lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=max_tokens, constraint=constraint)[0])
    return inference.SMC(particles).run(jax.random.key(seed), program)


def balanced(ids):
    depths = np.cumsum([1 if i == 1 else -1 for i in ids])
    return (depths >= 0).all() and (not len(ids) or depths[-1] == 0)


def test_the_posterior_is_the_model_on_accepted_texts():
    """Against the enumeration of all texts of up to four tokens."""
    constraint = constraints.host(BRACKETS, Nested(), "nested brackets")
    exact = inference.Exact().run(
        jax.random.key(0), ppl.program(lambda: ppl.generate("x", ppl.prompt(BRACKETS), max_tokens=4)[0])
    )
    weights = {}
    for ids, weight in zip(exact.values["x"].ids(), np.exp(exact.log_weights)):
        inside = ids[:-1] if ids[-1] == 0 else ids
        if balanced(inside):
            weights[ids] = weights.get(ids, 0.0) + float(weight)
    ratios = []
    for seed in range(8):
        posterior = texts(BRACKETS, constraint, 4, 500, seed)
        assert set(row.value for row in posterior.marginal(lambda v: v["x"].ids())) <= set(weights)
        ratios.append(np.exp(posterior.log_evidence) / sum(weights.values()))
    assert abs(np.mean(ratios) - 1) < 6 * np.std(ratios, ddof=1) / np.sqrt(8)
    assert np.std(ratios) < 0.2
    assert constraint.cost.calls > 8
    assert constraint.cost.seconds > 0


@pytest.fixture(scope="module")
def letters():
    rng = np.random.default_rng(0)
    words = ("", "{", "}", '"', "a", "b", ":", ",", "1", "2", '"a', "true", "[", "]", '":', " ")
    size = len(words)
    return models.MarkovLM(rng.normal(size=size), rng.normal(size=(size, size)), 0, words)


def test_texts_satisfy_a_json_schema(letters):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    posterior = texts(letters, constraints.grammar(letters, schema), 12)
    found = posterior.of(lambda v: v["x"].decode())
    assert len(set(found)) > 3
    for text in found:
        assert isinstance(json.loads(text)["a"], int)


def test_texts_belong_to_a_grammar(letters):
    grammar = constraints.grammar(letters, 'start: "[" (item ("," item)*)? "]"\nitem: "a" | "b" | start')
    for text in texts(letters, grammar, 9).of(lambda v: v["x"].decode()):
        inside = text.replace("a", "0").replace("b", "0")
        assert isinstance(json.loads(inside), list), text


def test_bad_grammars_are_refused_before_anything_runs(letters):
    with pytest.raises(SiteError, match="grammar 'start: nothing'"):
        constraints.grammar(letters, "start: nothing")
    with pytest.raises(SiteError, match="is no JSON"):
        constraints.grammar(letters, "{'a'")
    with pytest.raises(SiteError, match="no token of this model begins"):
        constraints.grammar(letters, 'start: "z"')


def fail(error):
    raise error


FAULTS = {
    "its parser raised ZeroDivisionError": lambda: fail(ZeroDivisionError("oh")),
    "has not answered within 0.2 s": lambda: time.sleep(2) or np.ones(3, bool),
    r"must answer bool\[3\], found float64\[2\]": lambda: np.ones(2),
}


@pytest.mark.parametrize("message", FAULTS)
def test_parsers_that_misbehave_end_the_run(message):
    constraint = constraints.host(BRACKETS, Nested(fault=FAULTS[message]), "nested brackets", time_limit=0.2)
    with pytest.raises(JaxRuntimeError, match=message):
        jax.block_until_ready(texts(BRACKETS, constraint, 4).log_weights)
    assert jnp.ones(2).sum() == 2, "JAX goes on"
