"""The genealogy that a run keeps is the one that its values followed; its figure and the tree of texts show it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, models, ppl
from latentrace.inference.genealogy import Genealogy
from latentrace.inference.posterior import Ledger, Posterior

N, STEPS = 7, 6
KEY = jax.random.key(3)


@ppl.program
def steps():
    """Draws that depend on nothing: what is drawn at a place does not depend on who stands there."""

    def step(total, _):
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.factor("reward", 1.5 * x)
        return total + x, None

    return jax.lax.scan(step, 0.0, length=STEPS)[0]


@pytest.fixture(scope="module")
def resampled():
    return inference.SMC(N, ess_threshold=1.1).run(KEY, steps)


def test_values_follow_the_ancestors(resampled):
    """A trace's value of step t is what was drawn at the place of its ancestor then."""
    drawn = inference.ImportanceSampling(N).run(KEY, steps).values["x"]
    genealogy = resampled.genealogy
    assert genealogy.ancestors.shape == (STEPS - 1, N)
    assert (genealogy.ancestors != np.arange(N)).any(axis=1).all()
    np.testing.assert_array_equal(genealogy.clocks, np.arange(1, STEPS))
    history = [drawn[genealogy.paths[t], t] for t in range(STEPS)]
    np.testing.assert_array_equal(np.stack(history, axis=1), resampled.values["x"])
    np.testing.assert_array_equal(genealogy.follow(drawn[:, 0]), resampled.values["x"][:, 0])


def test_early_resamplings_are_merged_when_there_are_more_than_fit(resampled):
    few, full = inference.SMC(N, ess_threshold=1.1, generations=2).run(KEY, steps), resampled.genealogy
    assert (few.genealogy.merged, full.merged) == (STEPS - 3, 0)
    np.testing.assert_array_equal(few.genealogy.ancestors, full.ancestors[-2:])
    np.testing.assert_array_equal(few.genealogy.clocks, full.clocks[-2:])
    np.testing.assert_array_equal(few.genealogy.paths, full.paths[[0, -3, -2, -1]])
    np.testing.assert_array_equal(few.genealogy.survivors(), full.survivors()[[0, -3, -2, -1]])
    np.testing.assert_array_equal(few.values["x"], resampled.values["x"])
    assert "the first 3 merged" in repr(few.genealogy)


LM = programs.hmm(2, 3, seed=4)


@ppl.program
def story():
    """Texts that are resampled inside, in a loop and in a branch, and a plate."""
    ground = jax.jit(lambda: ppl.sample("ground", dist.Normal(0.0, 1.0)))()
    ppl.factor("early", ground)
    shift = ppl.sample("shift", dist.Normal(ground, 1.0))

    def step(context, i):
        line, context = ppl.generate("line", context, max_tokens=2, twist=lambda text: 0.9 * text.tokens.sum())
        ppl.factor("reward", 0.2 * i - 0.7 * line.tokens[0])
        return context, line.tokens[0]

    _, firsts = jax.lax.scan(step, ppl.prompt(LM, [1, 2]), jnp.arange(3))

    more = jax.lax.cond(firsts.sum() > 2, lambda: ppl.sample("more", dist.Normal(shift, 1.0)), lambda: 0.0)
    noise = ppl.vmap(lambda scale: ppl.sample("noise", dist.Normal(0.0, scale)))(jnp.array([1.0, 2.0]))
    ppl.factor("late", 0.1 * more + 0.1 * noise.sum())
    ppl.sample("last", dist.Normal(shift, 1.0))


@pytest.mark.slow
def test_it_is_the_same_in_segments_and_changes_no_draw():
    kept = inference.SMC(N, ess_threshold=0.95, generations=4).run(KEY, story)
    cut = inference.SMC(N, ess_threshold=0.95, generations=4).run(KEY, story, budget=inference.Budget(tokens=10**6))
    without = inference.SMC(N, ess_threshold=0.95, generations=0).run(KEY, story)
    assert kept.genealogy.merged > 1
    np.testing.assert_array_equal(kept.genealogy.paths[0], kept.roots)
    for field in ("ancestors", "clocks", "merged", "before", "alive"):
        np.testing.assert_array_equal(getattr(kept.genealogy, field), getattr(cut.genealogy, field))
    for field in ("values", "log_weights", "roots"):
        jax.tree.map(np.testing.assert_array_equal, getattr(kept, field), getattr(without, field))
    with pytest.raises(ValueError, match="generations=0"):
        _ = without.genealogy


def test_who_has_no_population_has_no_genealogy():
    flip = ppl.program(lambda: ppl.sample("x", dist.Bernoulli(0.3)))
    for algorithm in (inference.Exact(), inference.ImportanceSampling(3)):
        with pytest.raises(ValueError, match="comes with runs of SMC"):
            _ = algorithm.run(KEY, flip).genealogy
    with pytest.raises(ppl.errors.SiteError, match="generations must be at least 0"):
        inference.SMC(2, generations=-1)


def test_lines_of_the_figure_never_cross(resampled):
    genealogy, keys = resampled.genealogy, np.arange(N)[::-1] % 3
    for rank in (genealogy.ranks(), genealogy.ranks(keys)):
        assert (np.sort(rank, axis=1) == np.arange(N)).all()
        for step, ancestor in enumerate(genealogy.maps):
            assert (np.diff(rank[step][ancestor][np.argsort(rank[step + 1])]) >= 0).all()


def hand_made(lm, texts, weights, genealogy=None):
    """A posterior of given texts, a line for each step."""
    tokens = np.asarray([[list(lm.encode(line)) for line in text] for text in texts], np.int32)
    tokens = np.where(tokens < 0, lm.eos_id, tokens)
    length = np.full(tokens.shape[:2], tokens.shape[2], np.int32)
    line = ppl.Text(tokens, length, np.ones(length.shape, bool), np.zeros(tokens.shape, np.float32), lm)
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(weights, np.float32))
    active = {"line": np.ones(length.shape, bool)}
    return Posterior({"line": line}, None, log_weights, Ledger(0, 0, 0, 0, 0.0, 0.0), active, resamplings=genealogy)


MARKUP = models.MarkovLM(np.zeros(4), np.zeros((4, 4)), eos_id=0, vocabulary=("", "<b>", "&", "x"))


def test_figure_renders(tmp_path, resampled):
    """With merged resamplings and labels; with none, a star; with one particle."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    few = inference.SMC(N, ess_threshold=1.1, generations=2).run(KEY, steps)
    star = Genealogy(np.zeros((0, 3), int), np.zeros(0, int), 0, np.arange(3), np.array([True, False, True]))
    alone = Genealogy(np.zeros((2, 1), int), np.array([1, 2]), 0, np.zeros(1, int), np.array([True]))
    lines = ["x$", "&x", "x&"]
    cases = {
        "chain": (resampled, None, STEPS * N, STEPS * N),
        "merged": (few, lambda trace: round(float(trace["x"].sum()), 1), 4 * N, 4 * N),
        "star": (hand_made(MARKUP, [["xx"], ["&x"], ["x&"]], [1, 0, 3], star), "line", 3, 2),
        "alone": (hand_made(MARKUP, [["xx"]], [1], alone), lambda _: lines[0], 3, 3),
    }
    for name, (posterior, label, edges, most_dark) in cases.items():
        drawing = posterior.genealogy.figure(posterior, tmp_path / f"{name}.png", label=label)
        curves = [c for c in drawing.axes[0].collections if hasattr(c, "get_segments")]
        dark = [len(c.get_segments()) for c in curves if c.get_zorder() == 2]
        assert sum(len(c.get_segments()) for c in curves) == edges
        expected = posterior.genealogy.survivors().sum()
        assert sum(dark) == expected <= most_dark
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        pyplot.close(drawing)


def test_tree_of_texts_writes_once_what_traces_share():
    texts = [["xx", "<b>x"], ["xx", "<b>&"], ["xx", "<b>x"], ["&x", "xx"], ["x&", "xx"]]
    posterior = hand_made(MARKUP, texts, [1, 2, 3, 4, 0])
    tree = posterior.tree("line")
    assert [(text, round(mass, 6)) for text, mass in tree.leaves] == [("xx<b>x", 0.4), ("xx<b>&", 0.2), ("&xxx", 0.4)]
    assert [child.text for child in tree.root.children] == ["xx<b>", "&xxx"]
    assert [child.text for child in tree.root.children[0].children] == ["x", "&"]
    page = tree._repr_html_()
    assert "xx&lt;b&gt;</code>" in page
    assert "&amp;xxx</code>" in page
    assert "<b>" not in page
    some = posterior.tree("line", most=2)
    assert sum(mass for _, mass in some.leaves) + some.rest == pytest.approx(1.0)
    assert some.others == 1
    assert some.rest == pytest.approx(0.2)
    assert "20.0%</small> in 1 others" in some._repr_html_()


def test_tree_of_one_text_and_of_sites_that_are_none(resampled):
    tree = hand_made(MARKUP, [["x&"]], [1]).tree("line")
    assert tree.leaves == [("x&", 1.0)]
    assert "x&amp;</code>" in tree._repr_html_()
    with pytest.raises(ppl.errors.SiteError, match="'x'"):
        resampled.tree("x")
    with pytest.raises(ppl.errors.SiteNameError, match="lime"):
        hand_made(MARKUP, [["x&"]], [1]).tree("lime")
    with pytest.raises(ppl.errors.SiteNameError, match="name the sites"):
        resampled.tree()
