"""Walking again from the caches of the walk before gives what a walk that reads everything gives."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import ppl
from latentrace.inference.chains import Target
from latentrace.ppl.collectives import PROBLEMS, index
from latentrace.ppl.notes import Notes
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage

PROMPT = [1, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def lm():
    return programs.attentive_model(12)


def two_texts(lm):
    first, context = ppl.generate("first", ppl.prompt(lm, PROMPT), max_tokens=4, until=7)
    context = ppl.extend(context, [2, 9])
    second, context = ppl.generate("second", context, max_tokens=3, proposal=ppl.proposals.temperature(1.5))
    ppl.factor("reward", 0.3 * first.length - 0.2 * second.tokens[0])
    return ppl.score("answer", context, [4, 3])


def chosen_prompt(lm):
    """What is read depends on a value, at the top and in a loop; what follows has the same tokens."""
    k = ppl.sample("k", dist.Bernoulli(0.4))
    context = ppl.prompt(lm, jnp.where(k == 1, 3, 4) * jnp.ones(3, jnp.int32))

    def step(context, i):
        context = ppl.extend(context, jnp.array([2, 5]) + k)
        text, context = ppl.generate("x", context, max_tokens=3)
        return context, text.length

    context, _ = jax.lax.scan(step, context, jnp.arange(3))
    return ppl.score("end", context, [9])


def forks_and_branches(lm):
    start = ppl.prompt(lm, PROMPT)
    one, after_one = ppl.generate("one", start, max_tokens=3)
    _, after_two = ppl.generate("two", start, max_tokens=3)
    k = ppl.sample("k", dist.Bernoulli(0.5))
    chosen = jax.tree.map(lambda a, b: jnp.where(k == 1, a, b), after_one, after_two)

    def long():
        _, context = ppl.generate("x", chosen, max_tokens=4, constraint=jnp.arange(11) != 3)
        return ppl.score("said long", context, [5, 2]).handle

    def short():
        _, context = ppl.generate("x", start, max_tokens=4)
        return context.handle

    handle = jax.lax.cond(one.length > 2, long, short)
    last, _ = ppl.generate("last", ppl.Context(handle, lm), max_tokens=3)
    return ppl.factor("reward", 0.2 * last.length)


def features_between(lm):
    def step(context, _):
        line, context = ppl.generate("line", context, max_tokens=3, until=7)
        seen = jax.lax.cond(line.length > 1, lambda: ppl.features(context), lambda: jnp.zeros(16))
        ppl.factor("promise", 0.1 * jnp.tanh(seen[0]))
        return context, None

    context, _ = jax.lax.scan(step, ppl.prompt(lm, PROMPT), length=3)
    ppl.factor("end", 0.1 * jnp.tanh(ppl.features(context)[1]))
    ppl.generate("answer", context, max_tokens=2)


def plate_and_draft(lm):
    start = ppl.prompt(lm, PROMPT)

    def element(i):
        text, _ = ppl.generate("thought", start, max_tokens=3)
        ppl.score("so", ppl.extend(start, jnp.stack([i + 2])), [4])
        return text.length

    lengths = ppl.vmap(element)(jnp.arange(2))
    hint = ppl.extend(start, jnp.stack([lengths.sum() % 11]))
    _, context = ppl.generate("text", start, max_tokens=4, proposal=ppl.proposals.draft(hint))
    ppl.generate("end", context, max_tokens=2)


def given_text(lm):
    _, context = ppl.generate("question", ppl.prompt(lm, PROMPT), max_tokens=3)
    _, context = ppl.generate("known", context, max_tokens=3)
    ppl.generate("answer", context, max_tokens=3)


PROGRAMS = [two_texts, chosen_prompt, forks_and_branches, features_between, plate_and_draft, given_text]


def compare(found, expected):
    """All that a walk says, and the log probabilities of its texts."""
    for part in ("values", "active", "notes"):
        for name, value in getattr(expected, part).items():
            there = getattr(found, part)[name]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, err_msg=f"{part} of {name}"), there, value)
    np.testing.assert_allclose(found.log_weight, expected.log_weight, atol=5e-4)
    np.testing.assert_array_equal(found.made, expected.made)


SLOW = [pytest.param(program, marks=pytest.mark.slow) for program in PROGRAMS if program not in (two_texts, chosen_prompt)]


@pytest.mark.parametrize("program", [two_texts, chosen_prompt, *SLOW])
def test_a_walk_again_is_as_good_as_a_new_one(lm, program):
    """Chains side by side, of which each repeats a random part of its walk before."""
    staged = stage(program, (lm,))
    sites, given = staged.sites, {"known": jnp.array([4, 5, 0])} if program is given_text else {}
    target = Target(staged.skeleton(), jax.tree.map(jnp.asarray, arrays_of(staged)), given, side_by_side=True)
    values_of = lambda walk: {n: walk.values[n][0] if sites[n].max_tokens else walk.values[n] for n in target.random}
    shape = lambda site: (*site.dims, site.max_tokens) if site.max_tokens else site.dims
    blank, notes = {n: jnp.zeros(shape(sites[n]), jnp.int32) for n in target.random}, Notes(entropies=True)

    def again(key, walk):
        """Keep a prefix, or all but a few choices."""
        keys = jax.random.split(jax.random.fold_in(key, index(PROBLEMS)), 4)
        cut, inside = jax.random.randint(keys[0], (), 0, walk.made + 1), walk.inside(target.random)
        prefix = {n: mask & (walk.notes[n].number < cut) for n, mask in inside.items()}
        few = {n: mask & ~jax.random.bernoulli(jax.random.fold_in(keys[1], i), 0.15, mask.shape)
               for i, (n, mask) in enumerate(inside.items())}  # fmt: skip
        kept = jax.tree.map(lambda a, b: jnp.where(jax.random.bernoulli(keys[2]), a, b), few, prefix)
        values = values_of(walk)
        found, _, counts = target.walk(keys[3], values, kept, before=walk, notes=notes)
        fresh, *_ = target.walk(keys[3], values, kept, notes=notes)
        # a walk that has died breaks off, and is never gone on from
        alive = lambda x: jax.tree.map(lambda a, b: jnp.where(found.log_weight > -jnp.inf, a, b), x, walk)
        here, fresh = alive(found), alive(fresh)
        every = jax.tree.map(jnp.ones_like, kept)
        same, _, none = target.walk(keys[3], values_of(here), every, before=here, notes=notes)
        return here, fresh, same, counts.model_calls, none.model_calls

    begin = lambda key: target.walk(key, blank, jax.tree.map(lambda x: x != 0, blank), notes=notes)[0]
    begin = jax.jit(jax.vmap(begin, axis_name=PROBLEMS))
    again = jax.jit(jax.vmap(again, (None, 0), axis_name=PROBLEMS))
    walk, calls = begin(jax.random.split(jax.random.key(0), 3)), []
    for number in range(12):
        walk, fresh, same, some, none = again(jax.random.key(number), walk)
        compare(walk, fresh)
        compare(same, walk)
        calls.append((int(some.max()), int(none.max())))
    if program is not plate_and_draft:  # where caches of elements are not kept, and drafts are drawn again
        assert all(none == 0 for _, none in calls), "what was read is not read again"
        assert len({some for some, _ in calls}) > 2, "moves cost what they draw"
