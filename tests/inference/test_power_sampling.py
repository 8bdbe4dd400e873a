"""Power sampling is exact, its published form is not, and both compute what they say."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace import inference, models, ppl
from latentrace.inference import mcmc
from latentrace.ppl import errors

ALPHA, LENGTH = 2.5, 4


def tiny(seed):
    rng = np.random.default_rng(seed)
    return models.MarkovLM(jnp.array(rng.normal(size=3)), jnp.array(rng.normal(size=(3, 3))), eos_id=0)


def powers(lm, length=LENGTH, alpha=ALPHA):
    """p^alpha of every text."""
    log_p = {}

    def visit(text, total):
        if len(text) == length or (text and text[-1] == 0):
            log_p[text] = total
            return
        row = jax.nn.log_softmax(lm.initial if not text else lm.transition[text[-1]])
        for token in range(3):
            visit((*text, token), total + float(row[token]))

    visit((), 0.0)
    weights = np.exp(alpha * np.array(list(log_p.values())))
    return dict(zip(log_p, weights / weights.sum()))


def distance(found, exact):
    counts = Counter(found.values["text"].ids())
    draws = sum(counts.values())
    return 0.5 * sum(abs(counts[text] / draws - exact.get(text, 0.0)) for text in {*counts, *exact})


def expected_distance(exact, draws):
    """Of independent draws: each frequency is about normal."""
    p = np.array(list(exact.values()))
    return 0.5 * np.sqrt(2 / np.pi) * np.sqrt(p * (1 - p) / draws).sum()


CHAINS = 3000


@pytest.fixture(scope="module")
def sampled():
    """Distances from p^alpha on three models: exact chains, published ones, and independent draws."""
    rows = []
    for seed in range(3):
        lm = tiny(seed)
        exact = powers(lm)
        run = lambda lm=lm, seed=seed, **how: mcmc.PowerSampling(ALPHA, 80, CHAINS, **how).run(
            jax.random.key(seed), lm, "", max_tokens=LENGTH
        )
        ours, published = run(), run(compat="published", blocks=2)
        assert published.biased
        assert not ours.biased
        for found in (ours, published):
            text = found.values["text"]
            assert text.tokens.shape == (CHAINS, LENGTH)
            # a text is ended by EOS, or as long as it may be
            assert (np.asarray(text.ended) == (text.tokens[np.arange(CHAINS), text.length - 1] == 0)).all()
            assert (text.length[~np.asarray(text.ended)] == LENGTH).all()
        rows.append((distance(ours, exact), distance(published, exact), expected_distance(exact, CHAINS)))
    return np.array(rows)


def test_chains_sample_from_the_power(sampled):
    ours, _, independent = sampled.T
    assert (ours < 2 * independent).all()


def test_the_published_form_does_not(sampled):
    _, published, independent = sampled.T
    assert (published > 5 * independent).any()


@pytest.mark.slow
def test_published_moves_on_texts_of_one_length_are_exact():
    """Without an end there is nothing to shrink."""
    rng = np.random.default_rng(3)
    impossible = jnp.array([-30.0, 0.0, 0.0])  # nearly
    initial, transition = jnp.array(rng.normal(size=3)), jnp.array(rng.normal(size=(3, 3)))
    lm = models.MarkovLM(initial + impossible, transition + impossible, eos_id=0)
    exact = {text: p for text, p in powers(lm).items() if 0 not in text}
    for blocks in (1, 2):
        how = mcmc.PowerSampling(ALPHA, 60, CHAINS, compat="published", blocks=blocks)
        found = how.run(jax.random.key(0), lm, "", max_tokens=LENGTH)
        assert distance(found, exact) < 2 * expected_distance(exact, CHAINS)


@pytest.mark.slow
def test_quest_is_exact_unless_rewards_differ_by_more_than_its_clip():
    lm = tiny(1)

    def rewarded(scale):
        text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=3)
        ppl.factor("reward", scale * (text.tokens == 2).sum())

    for scale, clip, is_exact in ((1.0, 20.0, True), (1.0, 0.5, False)):
        program = ppl.program(lambda scale=scale: rewarded(scale))
        exact = {row.value: row.probability for row in inference.Exact().run(jax.random.key(0), program).marginal("text")}
        chains = inference.MCMC(mcmc.Quest(clip=clip), 1, 60, CHAINS)
        found = distance(chains.run(jax.random.key(1), program), exact)
        assert (found < 2 * expected_distance(exact, CHAINS)) == is_exact


def test_errors():
    for wrong, message in (
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"num_moves": 0}, "num_moves must be at least 1"),
        ({"compat": "paper"}, "compat must be None or 'published'"),
        ({"compat": "published", "tries": 2}, "uniform cuts and one try"),
    ):
        with pytest.raises(errors.SiteError, match=message):
            mcmc.PowerSampling(**wrong)
    with pytest.raises(errors.SiteError, match="16 blocks do not divide max_tokens=6"):
        mcmc.PowerSampling(compat="published").run(jax.random.key(0), tiny(0), "", max_tokens=6)
    with pytest.raises(errors.SiteError, match="clip must be positive"):
        mcmc.Quest(clip=0.0)
