"""A text drafted by another context: what it pays, whose row moves, what it costs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx

from latentrace import inference, models, ppl
from latentrace.models.transformer import Transformer, TransformerConfig, TransformerLM
from latentrace.ppl import errors

draft = ppl.proposals.draft
KEY = jax.random.key(0)


def transformer(seed, **more):
    config = TransformerConfig(vocab_size=11, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
                               head_dim=8, eos_id=0, bos_id=1, tied=False, **{"max_length": 64, **more})  # fmt: skip
    lm = TransformerLM.from_module(Transformer(config, rngs=nnx.Rngs(seed)))
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, lm)


@pytest.fixture(scope="module")
def lm():
    return transformer(0)


def log_prob(lm, context, text):
    """log p(text after context), nats, by one pass over the whole sequence."""
    ids = [*context, *text]
    table = jax.nn.log_softmax(lm.logits(ids))
    return sum(float(table[len(context) + i - 1, token]) for i, token in enumerate(text))


PROMPT, HINT = [1, 5, 6, 7], [1, 9, 9]


def looping(lm, other):
    """Two texts in a loop, each drafted by a context whose features were read before, of a fork that stays as it is."""

    def step(carry, _):
        context, hint = carry
        ppl.features(hint)
        text, context = ppl.generate("x", context, max_tokens=3, until=7, proposal=draft(hint))
        ppl.features(context)
        return (context, ppl.extend(hint, text)), text

    (_, hint), texts = jax.lax.scan(step, (ppl.prompt(lm, PROMPT), ppl.prompt(other, HINT)), length=2)
    return texts, ppl.tokens(hint, last=9)


def in_a_plate(lm, other):
    """The same, where each element begins from contexts of outside and writes once."""
    context, hint = ppl.prompt(lm, PROMPT), ppl.extend(ppl.prompt(other, HINT[:-1]), HINT[-1:])

    def element(_):
        text, after = ppl.generate("x", context, max_tokens=3, until=7, proposal=draft(hint))
        return text, ppl.tokens(hint, last=9), ppl.tokens(after, last=4)

    texts, tokens, _ = ppl.vmap(element)(jnp.arange(2))
    return texts, tokens


PLACES = [
    pytest.param(looping, True, id="looping, same model"),
    pytest.param(looping, False, id="looping, another model", marks=pytest.mark.slow),
    pytest.param(in_a_plate, True, id="in a plate, same model", marks=pytest.mark.slow),
    pytest.param(in_a_plate, False, id="in a plate, another model", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("place", "same"), PLACES)
def test_weights_are_those_of_both_models(lm, place, same):
    """Computed anew from whole sequences: nothing of one context is lost to the other, though they may share an arena."""
    other = lm if same else transformer(1)
    posterior = inference.ImportanceSampling(8).run(KEY, ppl.program(place), lm, other)
    texts, (_, real) = posterior.returned
    for i in range(8):
        p, q, context, hint = 0.0, 0.0, list(PROMPT), list(HINT)
        for t in range(2):
            text = texts.tokens[i, t, : texts.length[i, t]].tolist()
            p, q = p + log_prob(lm, context, text), q + log_prob(other, hint, text)
            if place is looping:
                context, hint = context + text, hint + text
        np.testing.assert_allclose(texts.log_probs[i].sum(), p, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(posterior.log_weights[i], p - q, rtol=1e-3, atol=1e-4)
        assert np.asarray(real)[i].ravel()[0] == min(9, len(hint))


def test_the_row_of_a_draft_follows_its_particle():
    """The draft chooses one of two letters and stays with it; its memory is in its cache, and particles are resampled at every
    token."""
    letters = np.array([[-9e9, 0, 0, -9e9, -9e9], [-9e9, -9e9, -9e9, 0, 0]])
    faithful = models.HMMLM([0.0, 0.0], [[0.0, -9e9], [-9e9, 0.0]], letters, 0)
    lm = models.MarkovLM(np.zeros(5), np.zeros((5, 5)), 0)

    @ppl.program
    def program():
        noise = lambda text: jnp.sin(7.0 * text.tokens.sum() + 3.0 * text.length)
        ppl.prompt(faithful)
        return ppl.generate("x", ppl.prompt(lm), max_tokens=6, proposal=draft(ppl.prompt(faithful)), twist=noise)[0].tokens

    posterior = inference.SMC(64, ess_threshold=1.1, resample="multinomial").run(KEY, program)
    low = np.asarray(posterior.returned) < 3
    assert (low.all(1) | ~low.any(1)).all()
    assert 0 < low[:, 0].sum() < 64
    assert len(np.unique(posterior.roots)) < 32, "it resamples"


SMALL = programs.markov(5, seed=2)


def test_passes_are_counted_and_given_values_need_none():
    @ppl.program
    def program(drafted):
        hint = ppl.prompt(SMALL, [1]) if drafted else None
        proposal, endless = draft(hint) if drafted else None, jnp.arange(5) > 0
        return ppl.generate("x", ppl.prompt(SMALL, [2]), max_tokens=5, proposal=proposal, constraint=endless)[0]

    calls = {drafted: inference.ImportanceSampling(4).run(KEY, program, drafted).ledger for drafted in (True, False)}
    assert (calls[True].model_calls, calls[False].model_calls) == (2 + 10, 1 + 5)
    given = {drafted: program.condition({"x": [3, 4, 2, 1, 4]}) for drafted in (True, False)}
    runs = {drafted: inference.ImportanceSampling(4).run(KEY, given[drafted], drafted) for drafted in (True, False)}
    assert runs[True].ledger.model_calls == runs[False].ledger.model_calls + 1, "the hint's prompt"
    np.testing.assert_array_equal(runs[True].log_weights, runs[False].log_weights)


def test_what_a_draft_rules_out_is_said():
    masked = lambda logits: jnp.where(jnp.arange(5) == 4, -jnp.inf, logits)
    run = lambda then: inference.SMC(8).run(
        KEY, lambda: ppl.generate("x", ppl.prompt(SMALL), max_tokens=2, proposal=draft(ppl.prompt(SMALL, [3]), then))[0]
    )
    assert not run(None).restricted
    assert run(masked).restricted
    assert (run(masked).values["x"].tokens != 4).all()


def test_bad_drafts_are_refused_before_anything_runs(lm):
    def program(make):
        return lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=2, proposal=make())[0]

    run = lambda make: inference.SMC(4).run(KEY, program(make))
    with pytest.raises(errors.SiteError, match="site 'x': a draft must have the model's vocabulary of 11 tokens with EOS 0"):
        run(lambda: draft(ppl.prompt(SMALL)))
    with pytest.raises(errors.SiteError, match=r"draft\(context\)`, found Context in its place"):
        run(lambda: ppl.prompt(lm))
    with pytest.raises(errors.SiteError, match=r"draft\(context\)`, found TransformerLM in its place"):
        run(lambda: draft(lm))
    with pytest.raises(errors.SiteError, match=r"must return logits of shape \[11\], found \[\(10,\)\]"):
        run(lambda: draft(ppl.prompt(lm), lambda logits: logits[1:]))
    with pytest.raises(errors.SiteError, match=r"a proposal is a function of logits or .*, found float"):
        run(lambda: 0.7)
    one, two = (models.MarkovLM(np.zeros(3), np.zeros((3, 3)), 0, x) for x in (("", "a", "b"), ("", "a", "c")))
    with pytest.raises(errors.SiteError, match="vocabulary; token 2 is b'c', not b'b'"):
        inference.SMC(4).run(KEY, lambda: ppl.generate("x", ppl.prompt(one), max_tokens=2, proposal=draft(ppl.prompt(two))))
    short = transformer(2, max_length=8)
    with pytest.raises(errors.ContextOverflowError, match="site 'x': a context grew past the model's 8 or 64 tokens"):
        inference.SMC(4).run(
            KEY, lambda: ppl.generate("x", ppl.prompt(lm), max_tokens=9, constraint=jnp.arange(11) > 0,
                                      proposal=draft(ppl.prompt(short)))[0]
        )  # fmt: skip
