"""Contexts of a model that reads everything: where prompts may stand, and the features at a context's last token."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl.arena import new_arena
from latentrace.ppl.language_model import empty_memory

PROMPT, REST = [1, 5, 6, 7, 8], [9, 3]


@pytest.fixture(scope="module")
def lm():
    return programs.attentive_model(20)


def scored(lm, prompt=PROMPT):
    return ppl.score("rest", ppl.prompt(lm, prompt), REST)


def in_plate(lm):
    def element(_):
        scored(lm)
        return 0.0

    return ppl.vmap(element)(jnp.zeros(1))


def in_loop(lm):
    def body(carry, _):
        scored(lm)
        return carry, None

    return jax.lax.scan(body, 0.0, length=1)[0]


def in_branch(lm):
    heads = ppl.sample("heads", dist.Bernoulli(0.5))

    def yes():
        scored(lm)
        return 0.0

    return jax.lax.cond(heads >= 0, yes, lambda: 1.0)


@pytest.mark.parametrize("place", [in_plate, in_loop, in_branch])
def test_a_prompt_means_the_same_wherever_it_stands(lm, place):
    log_probs = jax.nn.log_softmax(lm.logits([*PROMPT, *REST]))
    expected = log_probs[4, REST[0]] + log_probs[5, REST[1]]
    posterior = inference.ImportanceSampling(2).run(jax.random.key(0), ppl.program(place), lm)
    np.testing.assert_allclose(posterior.log_weights, expected, rtol=1e-5)


def recomputed(lm, tokens):
    """Features at the last token of a whole sequence."""
    return np.asarray(lm.forward(jnp.asarray(tokens), empty_memory())[0][len(tokens) - 1])


class TestFeatures:
    def test_of_prompts_and_given_texts(self, lm):
        @ppl.program
        def program():
            one, full = ppl.prompt(lm, ""), ppl.prompt(lm, PROMPT)
            longer, nothing = ppl.extend(full, REST), ppl.extend(full, [])
            observed = ppl.score("rest", longer, [4])
            fork = ppl.extend(full, [2])
            return [ppl.features(c) for c in (one, full, longer, nothing, observed, fork)]

        found = inference.ImportanceSampling(2).run(jax.random.key(0), program).returned
        texts = ([1], PROMPT, [*PROMPT, *REST], PROMPT, [*PROMPT, *REST, 4], [*PROMPT, 2])
        for features, tokens in zip(found, texts):
            assert features.shape == (2, lm.config.hidden_size)
            np.testing.assert_allclose(features, np.stack([recomputed(lm, tokens)] * 2), atol=2e-5)

    @pytest.mark.parametrize("threshold", [0.0, 2.0])
    def test_of_generated_texts_follow_their_particles(self, lm, threshold):
        @ppl.program
        def program():
            def step(context, _):
                twist = lambda text: -0.5 * (text.tokens == 3).sum()
                text, context = ppl.generate("text", context, max_tokens=3, until=7, twist=twist)
                before = ppl.features(context)
                ppl.factor("odd", 0.5 * (text.tokens % 2).sum())
                return context, (text, before)

            context, (texts, before) = jax.lax.scan(step, ppl.prompt(lm, PROMPT), length=3)
            return texts, before, ppl.features(context)

        posterior = inference.SMC(16, ess_threshold=threshold).run(jax.random.key(1), program)
        texts, before, last = posterior.returned
        for i in range(16):
            tokens = list(PROMPT)
            for t in range(3):
                tokens += texts.tokens[i, t, : texts.length[i, t]].tolist()
                np.testing.assert_allclose(before[i, t], recomputed(lm, tokens), atol=5e-5)
            np.testing.assert_allclose(last[i], before[i, -1], atol=0)

    def test_of_given_values_and_in_plates(self, lm):
        @ppl.program
        def program():
            start = ppl.prompt(lm, PROMPT)

            def element(_):
                _, context = ppl.generate("text", start, max_tokens=4)
                return ppl.features(context)

            return ppl.vmap(element)(jnp.arange(2))

        given = program.condition({"text": [[4, 5], [6, 0]]})
        found = inference.ImportanceSampling(1).run(jax.random.key(0), given).returned[0]
        # a text of two tokens that is not ended by EOS goes on with padding, which is EOS
        for features, tokens in zip(found, ([*PROMPT, 4, 5, 0], [*PROMPT, 6, 0])):
            np.testing.assert_allclose(features, recomputed(lm, tokens), atol=2e-5)

    def test_cost_a_pass_only_where_nothing_follows(self, lm):
        def program(read):
            def step(context, _):
                _, context = ppl.generate("text", context, max_tokens=3)
                return context, ppl.features(context) if read else None

            context, _ = jax.lax.scan(step, ppl.prompt(lm, PROMPT), length=3)
            if read:
                ppl.features(context)  # known by now

        runs = [inference.ImportanceSampling(4).run(jax.random.key(3), ppl.program(program), read) for read in (False, True)]
        assert runs[1].ledger.model_calls == runs[0].ledger.model_calls + 1
        np.testing.assert_array_equal(runs[0].values["text"].tokens, runs[1].values["text"].tokens)
        np.testing.assert_allclose(runs[0].values["text"].log_probs, runs[1].values["text"].log_probs, atol=2e-5)

    @pytest.mark.parametrize("follow", ["generate", "score", "fork"])
    def test_what_follows_is_as_if_nobody_had_read_them(self, lm, follow):
        """Also where only some particles have: those that took the branch."""

        def program(read):
            heads = ppl.sample("heads", dist.Bernoulli(0.5))
            start = ppl.prompt(lm, PROMPT)
            _, context = ppl.generate("first", start, max_tokens=2)
            if read:
                jax.lax.cond(heads == 1, lambda: ppl.features(context), lambda: jnp.zeros(lm.config.hidden_size))
            if follow == "score":
                context = ppl.score("rest", context, REST)
            elif follow == "fork":
                ppl.generate("other", context, max_tokens=2)
            ppl.generate("second", context, max_tokens=4)
            return ppl.tokens(context, last=8)

        runs = [inference.ImportanceSampling(8).run(jax.random.key(5), ppl.program(program), read) for read in (False, True)]
        for name in ("first", "second"):
            np.testing.assert_array_equal(runs[0].values[name].tokens, runs[1].values[name].tokens)
            np.testing.assert_allclose(runs[0].values[name].log_probs, runs[1].values[name].log_probs, atol=2e-5)
        np.testing.assert_allclose(runs[0].log_weights, runs[1].log_weights, atol=2e-5)
        np.testing.assert_array_equal(runs[0].returned[0], runs[1].returned[0])

    def test_are_a_site_and_cost_nothing_where_nobody_reads_them(self, lm):
        assert new_arena(lm, 3, 5, 0).table.features.shape == (3, 0)
        with pytest.raises(ppl.errors.SiteError, match="outside of inference"):
            ppl.features(ppl.Context(jnp.int32(0), lm))
