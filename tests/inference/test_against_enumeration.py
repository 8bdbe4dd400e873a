"""Programs against enumeration: `Exact` against the same program written in plain Python, sampling against `Exact`.

Sampled estimates are compared with t statistics over independent runs, so that each run tells its own error: estimates of
the evidence times a probability are unbiased, and |t| with 15 degrees of freedom passes 6 once in 40,000 times.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest
from programs import padded

from latentrace import inference, ppl
from latentrace.inference import driver
from latentrace.ppl.staging import stage

M3 = programs.markov(3, seed=1)
M2 = programs.markov(2, seed=2)
H3 = programs.hmm(2, 3, seed=4)
H2 = programs.hmm(3, 2, eos_id=1, seed=5)
R = np.array([0.7, -1.1, 0.4])
J = jnp.asarray(R)
EOS = 0


class Case(NamedTuple):
    program: Any
    oracle: Any = None
    """the same program in plain Python; None: `Exact` alone is the reference"""
    restricted: bool = False


CASES: dict[str, Case] = {}


def case(program, oracle=None, **more):
    CASES[program.__name__.replace("_", " ")] = Case(ppl.program(program), oracle, **more)


# --- loops ------------------------------------------------------------------------------------------------------------


def scan_closes_over_a_latent():
    k = ppl.sample("k", dist.Categorical(logits=J))

    def step(context, _):
        text, context = ppl.generate("x", context, max_tokens=2, until=[2])
        ppl.factor("reward", -0.6 * k * text.length + J[text.tokens[0]])
        ppl.twist("promise", 0.9 * (text.tokens[0] == k))
        return context, text.tokens

    _, tokens = jax.lax.scan(step, ppl.prompt(M3), None, length=2)
    return k, tokens


def scan_twin(path):
    k = path.choose(np.exp(R) / np.exp(R).sum())
    context, out = (), []
    for _ in range(2):
        text = () if context[-1:] == (EOS,) else path.text(M3, context, 2, lambda t: t[-1] == 2)
        context += text
        path.weigh(np.exp(-0.6 * k * len(text) + R[padded(text, 2)[0]]))
        out += padded(text, 2)
    return k, *out


def while_loop_stops_by_data():
    def going(carry):
        _, n, last = carry
        return (n < 3) & (last != 1)

    def step(carry):
        context, n, _ = carry
        ppl.bound(3)
        text, context = ppl.generate("x", context, max_tokens=1)
        ppl.twist("promise", -0.8 * text.tokens[0])
        ppl.factor("reward", J[text.tokens[0]])
        return context, n + 1, text.tokens[0]

    _, n, last = jax.lax.while_loop(going, step, (ppl.prompt(H3), 0, 0))
    ppl.condition("possible", (n > 1) | (last == 1))
    return n, last


def while_twin(path):
    context, n, last = (), 0, 0
    while n < 3 and last != 1:
        text = () if context[-1:] == (EOS,) else path.text(H3, context, 1)
        context, n, last = context + text, n + 1, padded(text, 1)[0]
        path.weigh(np.exp(R[last]))
    path.weigh(n > 1 or last == 1)
    return n, last


def fori_loops_static_and_dynamic():
    def flip(i, total):
        b = ppl.sample("b", dist.Bernoulli(0.3 + 0.2 * i))
        ppl.factor("bonus", 0.4 * b * (i + 1))
        return total + b

    total = jax.lax.fori_loop(0, 2, flip, 0)

    def write(i, carry):
        ppl.bound(2)
        context, score = carry
        text, context = ppl.generate("x", context, max_tokens=1)
        ppl.factor("reward", J[text.tokens[0]] * (i + 1))
        return context, score + text.tokens[0]

    _, score = jax.lax.fori_loop(0, total, write, (ppl.prompt(M3, [1]), 0))
    return total, score


def fori_twin(path):
    total, score, context = 0, 0, (1,)
    for i in range(2):
        b = path.flip(0.3 + 0.2 * i)
        path.weigh(np.exp(0.4 * b * (i + 1)))
        total += b
    for i in range(total):
        text = () if len(context) > 1 and context[-1] == EOS else path.text(M3, context, 1)
        context += text
        token = padded(text, 1)[0]
        path.weigh(np.exp(R[token] * (i + 1)))
        score += token
    return total, score


def reverse_scan_over_data():
    def step(state, y):
        state = ppl.sample("z", dist.Categorical(logits=J * (1 + state)))
        ppl.observe("y", dist.Normal(state * 1.0, 0.7), y)
        return state, state

    return jax.lax.scan(step, 0, jnp.array([0.2, 1.9, 0.8]), reverse=True)[1]


def reverse_twin(path):
    state, out = 0, []
    for y in (0.8, 1.9, 0.2):
        probs = np.exp(R * (1 + state))
        state = path.choose(probs / probs.sum())
        path.weigh(np.exp(-0.5 * ((y - state) / 0.7) ** 2) / (0.7 * np.sqrt(2 * np.pi)))
        out = [state, *out]
    return out


case(scan_closes_over_a_latent, scan_twin)
case(while_loop_stops_by_data, while_twin)
case(fori_loops_static_and_dynamic, fori_twin)
case(reverse_scan_over_data, reverse_twin)


# --- branches and nesting ---------------------------------------------------------------------------------------------


def cond_returns_a_context():
    head, context = ppl.generate("head", ppl.prompt(M3), max_tokens=1)

    def long():
        text, after = ppl.generate("long", context, max_tokens=2)
        ppl.factor("price", -0.5 * text.length)
        return text.length, after

    def short():
        text, after = ppl.generate("short", context, max_tokens=1, until=[1])
        ppl.twist("liked", J[text.tokens[0]])
        return text.length, after

    n, after = jax.lax.cond(head.tokens[0] == 2, long, short)
    tail, _ = ppl.generate("tail", after, max_tokens=1)
    ppl.condition("odd", (n + tail.tokens[0]) % 2 == 1)
    return head.tokens, n, tail.tokens


def cond_twin(path):
    head = path.text(M3, (), 1)
    finished = head[-1] == EOS
    text = () if finished else path.text(M3, head, 2 if head == (2,) else 1)
    if head == (2,):
        path.weigh(np.exp(-0.5 * len(text)))
    tail = () if (head + text)[-1] == EOS else path.text(M3, head + text, 1)
    path.weigh((len(text) + padded(tail, 1)[0]) % 2 == 1)
    return head[0], len(text), padded(tail, 1)[0]


def switch_with_a_silent_branch():
    k = ppl.sample("k", dist.Categorical(logits=J[::-1]))
    text, context = ppl.generate("x", ppl.prompt(M3), max_tokens=1)

    def one(context):
        return ppl.generate("y", context, max_tokens=1, twist=lambda t: J[t.tokens[0]])[0].tokens[0]

    def two(context):
        b = ppl.sample("b", dist.Bernoulli(0.8))
        ppl.factor("bonus", 1.3 * b)
        return b

    y = jax.lax.switch(k, [lambda c: 2, jax.jit(one), two], context)
    ppl.observe("z", dist.Normal(0.5 * y, 1.0), 1.3)
    return k, text.tokens, y


def switch_twin(path):
    weights = np.exp(R[::-1])
    k = path.choose(weights / weights.sum())
    x = path.text(M3, (), 1)
    if k == 0:
        y = 2
    elif k == 1:
        y = EOS if x[-1] == EOS else path.text(M3, x, 1)[0]
    else:
        y = path.flip(0.8)
        path.weigh(np.exp(1.3 * y))
    path.weigh(np.exp(-0.5 * (1.3 - 0.5 * y) ** 2) / np.sqrt(2 * np.pi))
    return k, x[0], y


def jit_in_scan_in_cond_in_while():
    @jax.jit
    def step(context, _):
        text, context = ppl.generate("x", context, max_tokens=1)
        ppl.factor("reward", jax.nn.relu(J[text.tokens[0]]))
        return context, text.tokens[0]

    def round_(carry):
        context, i, total = carry
        ppl.bound(2)
        b = ppl.sample("b", dist.Bernoulli(0.4))

        def write():
            after, tokens = jax.lax.scan(step, context, None, length=2)
            ppl.twist("sum", -0.5 * tokens.sum())
            return after, tokens.sum()

        context, more = jax.lax.cond(b == 1, write, lambda: (context, jnp.int32(1)))
        return context, i + 1, total + more

    _, _, total = jax.lax.while_loop(lambda c: (c[1] < 2) & (c[2] < 3), round_, (ppl.prompt(M2), 0, 0))
    return total


def nested_twin(path):
    context, i, total = (), 0, 0
    while i < 2 and total < 3:
        more = 1
        if path.flip(0.4):
            more = 0
            for _ in range(2):
                text = () if context[-1:] == (EOS,) else path.text(M2, context, 1)
                context += text
                path.weigh(np.exp(max(R[padded(text, 1)[0]], 0)))
                more += padded(text, 1)[0]
        i, total = i + 1, total + more
    return (total,)


def checkpoint_and_scopes():
    @jax.checkpoint
    def part(context, x):
        text, context = ppl.generate("part", context, max_tokens=2)
        ppl.factor("reward", x * text.length)
        return context, text.tokens

    context = ppl.prompt(M2)
    with ppl.scope("first"):
        context, a = part(context, 0.8)
    with ppl.scope("second"):
        context, b = part(context, -0.3)
    return a, b


def checkpoint_twin(path):
    a = path.text(M2, (), 2)
    b = () if a[-1] == EOS else path.text(M2, a, 2)
    path.weigh(np.exp(0.8 * len(a) - 0.3 * len(b)))
    return padded(a, 2), padded(b, 2)


case(cond_returns_a_context, cond_twin)
case(switch_with_a_silent_branch, switch_twin)
case(jit_in_scan_in_cond_in_while, nested_twin)
case(checkpoint_and_scopes, checkpoint_twin)


# --- plates -----------------------------------------------------------------------------------------------------------


def plate_of_draws():
    shift = ppl.sample("shift", dist.Bernoulli(0.35))

    def element(y, w):
        z = ppl.sample("z", dist.Categorical(logits=J + 0.5 * shift))
        ppl.observe("y", dist.Normal(z - 0.4 * shift, w), y)
        ppl.twist("hint", 0.3 * z)
        return z

    z = ppl.vmap(element, in_axes=(0, None))(jnp.array([0.3, 1.8]), 0.9)
    ppl.condition("not both 0", z.sum() > 0)
    return shift, z


def plate_twin(path):
    shift, out = path.flip(0.35), []
    for y in (0.3, 1.8):
        out.append(path.choose(np.exp(R) / np.exp(R).sum()))
        path.weigh(np.exp(-0.5 * ((y - out[-1] + 0.4 * shift) / 0.9) ** 2) / (0.9 * np.sqrt(2 * np.pi)))
    path.weigh(sum(out) > 0)
    return shift, *out


def plate_of_texts_from_one_context():
    head, context = ppl.generate("head", ppl.prompt(H2, [0]), max_tokens=1)

    def element(i):
        first, after = ppl.generate("first", context, max_tokens=1, twist=lambda t: 0.6 * t.tokens[0] * i)
        second, _ = ppl.generate("second", after, max_tokens=1)
        ppl.factor("reward", jnp.where(second.length > 0, 0.5 * i, -0.9))
        return first.tokens[0] + 2 * second.tokens[0]

    codes = ppl.vmap(element)(jnp.arange(1, 3))
    tail, _ = ppl.generate("tail", context, max_tokens=1)
    ppl.factor("last", 0.3 * codes[0] * (tail.tokens[0] == 0) - 0.2 * codes[1])
    return head.tokens, codes, tail.tokens


def texts_twin(path):
    eos = 1
    head = path.text(H2, (0,), 1)
    done, codes = head[-1] == eos, []
    for i in (1, 2):
        first = () if done else path.text(H2, (0, *head), 1)
        second = () if (head + first)[-1] == eos else path.text(H2, (0, *head, *first), 1)
        path.weigh(np.exp(0.5 * i if second else -0.9))
        codes.append(padded(first, 1, eos)[0] + 2 * padded(second, 1, eos)[0])
    tail = padded(() if done else path.text(H2, (0, *head), 1), 1, eos)[0]
    path.weigh(np.exp(0.3 * codes[0] * (tail == 0) - 0.2 * codes[1]))
    return head[0], *codes, tail


def plate_in_scan_with_scan_inside():
    def row(total, _):
        def element(w):
            def step(x, _):
                x = ppl.sample("x", dist.Bernoulli(0.2 + 0.5 * x))
                ppl.factor("f", w * x)
                return x, x

            return jax.lax.scan(step, 0, None, length=2)[1].sum()

        sums = ppl.vmap(element)(jnp.array([0.8, -0.6]))
        ppl.twist("t", 0.5 * sums.sum())
        return total + sums.sum(), sums

    return jax.lax.scan(row, 0, None, length=2)[1]


def rows_twin(path):
    out = []
    for w in (0.8, -0.6, 0.8, -0.6):
        x = total = 0
        for _ in range(2):
            x = path.flip(0.2 + 0.5 * x)
            path.weigh(np.exp(w * x))
            total += x
        out.append(total)
    return out


case(plate_of_draws, plate_twin)
case(plate_of_texts_from_one_context, texts_twin)
case(plate_in_scan_with_scan_inside, rows_twin)


# --- contexts ---------------------------------------------------------------------------------------------------------


def forks_of_two_prompts_chosen_by_data():
    red, blue = ppl.prompt(H3, [1, 2]), ppl.prompt(H3, [2])
    a, red_after = ppl.generate("a", red, max_tokens=1)
    b, _ = ppl.generate("b", red, max_tokens=1)
    chosen = jax.tree.map(lambda x, y: jnp.where(a.tokens[0] == b.tokens[0], x, y), red_after, blue)
    c, _ = ppl.generate("c", chosen, max_tokens=2)
    ppl.factor("reward", J[c.tokens].sum())
    return a.tokens, b.tokens, c.tokens


def forks_twin(path):
    a, b = path.text(H3, (1, 2), 1), path.text(H3, (1, 2), 1)
    chosen = (1, 2, *a) if a == b else (2,)
    c = () if a == b == (EOS,) else path.text(H3, chosen, 2)
    path.weigh(np.exp(R[list(padded(c, 2))].sum()))
    return *a, *b, *padded(c, 2)


def list_of_contexts_in_a_scan():
    def step(contexts, _):
        k = ppl.sample("k", dist.Bernoulli(0.4))
        text, grown = ppl.generate("x", jax.lax.cond(k == 1, lambda: contexts[1], lambda: contexts[0]), max_tokens=1)
        ppl.factor("reward", J[text.tokens[0]])
        new = [jax.tree.map(lambda g, c, i=i: jax.lax.select(k == i, g, c), grown, c) for i, c in enumerate(contexts)]
        return new, (k, text.tokens[0])

    contexts, out = jax.lax.scan(step, [ppl.prompt(H3, [2]), ppl.prompt(H3)], None, length=2)
    last, count = ppl.tokens(contexts[0], last=2)
    ppl.factor("ends with 2", jnp.where(last[1] == 2, 0.8, -0.2) * count)
    return out


def list_twin(path):
    contexts, out = [(2,), ()], []
    done = [False, False]
    for _ in range(2):
        k = path.flip(0.4)
        text = () if done[k] else path.text(H3, contexts[k], 1)
        contexts[k] += text
        done[k] |= text == (EOS,)
        path.weigh(np.exp(R[padded(text, 1)[0]]))
        out.append((k, padded(text, 1)[0]))
    count = min(len(contexts[0]), 2)
    path.weigh(np.exp((0.8 if contexts[0][-1] == 2 else -0.2) * count))
    return [*(k for k, _ in out), *(t for _, t in out)]


def score_extend_and_tokens():
    a, context = ppl.generate("a", ppl.prompt(H3, [1]), max_tokens=2)
    context = ppl.extend(context, [2, 1])  # goes on, even after EOS
    context = ppl.score("seen", context, [1, 2])
    b, context = ppl.generate("b", context, max_tokens=1)
    last, _ = ppl.tokens(context, last=2)
    ppl.factor("reward", J[last[0]] - 0.4 * last[1])
    return a.tokens, b.tokens


def score_twin(path):
    a = path.text(H3, (1,), 2)
    context = (1, *a, 2, 1)
    for token in (1, 2):
        path.weigh(programs.next_probs(H3, context)[token])
        context += (token,)
    b = path.text(H3, context, 1)
    context += b
    path.weigh(np.exp(R[context[-2]] - 0.4 * context[-1]))
    return *padded(a, 2), *b


def two_models():
    a, _ = ppl.generate("a", ppl.prompt(M2), max_tokens=2)
    judge = ppl.score("judged", ppl.prompt(H3, [1]), a)
    b, _ = ppl.generate("b", judge, max_tokens=1)
    ppl.condition("goes on", b.tokens[0] != EOS)
    c, _ = ppl.generate("c", ppl.extend(ppl.prompt(M3), b), max_tokens=1)
    ppl.factor("reward", J[c.tokens[0]])
    return a.tokens, b.tokens, c.tokens


def models_twin(path):
    a = path.text(M2, (), 2)
    for i, token in enumerate(a):
        path.weigh(programs.next_probs(H3, (1, *a[:i]))[token])
    b = () if a[-1] == EOS else path.text(H3, (1, *a), 1)
    path.weigh(padded(b, 1) != (EOS,))
    c = padded(path.text(M3, b, 1), 1)
    path.weigh(np.exp(R[c[0]]))
    return *padded(a, 2), *padded(b, 1), *c


case(forks_of_two_prompts_chosen_by_data, forks_twin)
case(list_of_contexts_in_a_scan, list_twin)
case(score_extend_and_tokens, score_twin)
case(two_models, models_twin)


# --- proposals, constraints, twists and stops -------------------------------------------------------------------------


def twist_inside_a_text():
    k = ppl.sample("k", dist.Bernoulli(0.6))
    text, _ = ppl.generate("x", ppl.prompt(H3), max_tokens=3, twist=lambda t: (0.7 - 1.5 * k) * (t.tokens == 1).sum())
    ppl.factor("reward", jnp.where(text.ended, 1.2, -0.4) * k)
    ppl.condition("some", (text.tokens == 1).sum() != 2)
    return k, text.tokens


def twist_twin(path):
    k, text = path.flip(0.6), path.text(H3, (), 3)
    path.weigh(np.exp((1.2 if text[-1] == EOS else -0.4) * k) * (text.count(1) != 2))
    return k, *padded(text, 3)


def constraint_and_temperature():
    heat = ppl.sample("heat", dist.Bernoulli(0.5))
    only = jnp.array([True, False, True])
    a, context = ppl.generate("a", ppl.prompt(M3), max_tokens=2, constraint=only)
    b, _ = ppl.generate("b", context, max_tokens=2, proposal=ppl.proposals.temperature(0.6 + heat))
    ppl.factor("reward", J[b.tokens].sum() * heat)
    return heat, a.tokens, b.tokens


def constraint_twin(path):
    heat, a = path.flip(0.5), path.text(M3, (), 2)
    path.weigh(1 not in a)
    b = () if a[-1] == EOS else path.text(M3, a, 2)
    path.weigh(np.exp(R[list(padded(b, 2))].sum() * heat))
    return heat, *padded(a, 2), *padded(b, 2)


class NoRepeat(NamedTuple):
    """No token twice in a row; state: the last token."""

    masks: Any

    def start(self):
        return jnp.int32(3)

    def mask(self, state):
        return self.masks[state]

    def next(self, state, token):
        return token


def automaton_in_a_loop():
    masks = jnp.asarray(np.vstack([~np.eye(3, dtype=bool), np.ones(3, bool)]))

    def step(context, _):
        text, context = ppl.generate("x", context, max_tokens=2, constraint=NoRepeat(masks), until=[2])
        ppl.twist("hope", 0.4 * text.length)
        return context, text.tokens

    _, tokens = jax.lax.scan(step, ppl.prompt(M3), None, length=2)
    ppl.factor("reward", J[tokens].sum())
    return tokens


def automaton_twin(path):
    context, out = (), []
    for _ in range(2):
        text = () if context[-1:] == (EOS,) else path.text(M3, context, 2, lambda t: t[-1] == 2)
        path.weigh(all(x != y for x, y in pairwise(text)))
        context += text
        out += padded(text, 2)
    path.weigh(np.exp(R[out].sum()))
    return out


def top_k_restricts():
    a, context = ppl.generate("a", ppl.prompt(H3), max_tokens=2, proposal=ppl.proposals.top_k(2))
    b, _ = ppl.generate("b", context, max_tokens=1)
    ppl.factor("reward", J[b.tokens[0]] + a.length)
    return a.tokens, b.tokens


def top_k_twin(path):
    a = path.text(H3, (), 2, None, lambda probs: probs >= np.sort(probs)[-2])
    b = () if a[-1] == EOS else path.text(H3, a, 1)
    path.weigh(np.exp(R[padded(b, 1)[0]] + len(a)))
    return *padded(a, 2), *padded(b, 1)


def top_p_restricts():
    a, _ = ppl.generate("a", ppl.prompt(M3), max_tokens=3, proposal=ppl.proposals.top_p(0.7))
    ppl.factor("reward", J[a.tokens].sum())
    return a.tokens


def nucleus(probs):
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    return np.isin(np.arange(len(probs)), order[before < 0.7])


def top_p_twin(path):
    a = padded(path.text(M3, (), 3, None, nucleus), 3)
    path.weigh(np.exp(R[list(a)].sum()))
    return a


SPELLED = programs.markov(4, eos_id=3, seed=8)


def until_strings_and_ids():
    a, context = ppl.generate("a", ppl.prompt(SPELLED), max_tokens=3, until=["ab", "ca"])
    b, _ = ppl.generate("b", context, max_tokens=1, until=2)
    ppl.factor("reward", jnp.where(a.ended, 0.9, -0.7) + 0.3 * b.tokens[0] * b.ended)
    return a.tokens, a.ended, b.tokens


def until_twin(path):
    spell = lambda text: "".join("abc"[t] for t in text if t < 3)
    stop = lambda text: "ab" in spell(text) or "ca" in spell(text)
    a = path.text(SPELLED, (), 3, stop)
    ended = a[-1] == 3 or stop(a)
    b = padded(() if a[-1] == 3 else path.text(SPELLED, a, 1), 1, 3)
    path.weigh(np.exp((0.9 if ended else -0.7) + 0.3 * b[0] * (b[0] in (2, 3))))
    return *padded(a, 3, 3), ended, *b


case(twist_inside_a_text, twist_twin)
case(constraint_and_temperature, constraint_twin)
case(automaton_in_a_loop, automaton_twin)
case(top_k_restricts, top_k_twin, restricted=True)
case(top_p_restricts, top_p_twin, restricted=True)
case(until_strings_and_ids, until_twin)


# --- the comparisons --------------------------------------------------------------------------------------------------

SEEDS, PARTICLES = 16, 600
LIMIT = 6.0


@pytest.fixture(scope="module", params=CASES)
def problem(request):
    """A program and its target: unnormalised density of each returned value."""
    found = CASES[request.param]
    return found, programs.measure(programs.paths(found.oracle))


@pytest.fixture
def staged_once(monkeypatch, problem):
    """Staging takes longer than running here: the sixteen runs share it."""
    staged = stage(problem[0].program, ())
    monkeypatch.setattr(driver, "stage", lambda program, args: staged)


def results(posterior) -> list[tuple]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(posterior.returned)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def test_exact_is_the_plain_python_program(problem):
    found, target = problem
    if found.restricted:
        pytest.skip("Exact enumerates the model's support, whatever the proposal leaves out")
    posterior = inference.Exact().run(jax.random.key(0), found.program)
    evidence = sum(target.values())
    assert abs(posterior.log_evidence - np.log(evidence)) < 1e-5  # float32 sums of a few terms
    measure = programs.measure(zip(results(posterior), posterior.weights))
    for result in {*target, *measure}:
        assert abs(measure.get(result, 0.0) - target.get(result, 0.0) / evidence) < 1e-5
    assert posterior.exact
    assert not posterior.restricted


def check_sampler(problem, algorithm):
    found, target = problem
    evidence = sum(target.values())
    likely = [r for r in sorted(target, key=target.get)[-5:] if target[r] > 0.02 * evidence]  # met in every run
    moment = np.mean([np.asarray(r, float) for r in target], axis=0) + 0.5  # an uneven direction
    truth = [1.0, *(target[r] / evidence for r in likely), sum(p / evidence * np.dot(moment, r) for r, p in target.items())]
    estimates, sizes = [], []
    for seed in range(SEEDS):
        posterior = algorithm.run(jax.random.key(seed), found.program)
        measure = programs.measure(zip(results(posterior), posterior.weights))
        assert set(measure) <= set(target)  # nothing impossible
        ratio = np.exp(posterior.log_evidence - np.log(evidence))
        mean = sum(p * np.dot(moment, r) for r, p in measure.items())
        estimates.append([ratio, *(ratio * measure.get(r, 0.0) for r in likely), ratio * mean])
        sizes.append(posterior.ess)
        assert posterior.restricted == found.restricted
    estimates = np.array(estimates)
    error = estimates.std(0, ddof=1) / np.sqrt(SEEDS)
    assert np.mean(sizes) > 0.05 * PARTICLES, "too few effective particles for the test to tell anything"
    assert (error[0] < 0.05).all(), "too noisy for the test to tell anything"
    t = (estimates.mean(0) - truth) / np.maximum(error, 2e-6)
    assert (np.abs(t) < LIMIT).all(), (t, estimates.mean(0), truth)


NAMES = sorted(CASES)
THIRD = NAMES[::3]
"""Sampled comparisons compile for seconds each: the default run takes a third of them, the slow one the rest."""


def problems(*, of_third: bool) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("problem", [n for n in NAMES if (n in THIRD) == of_third], indirect=True)


@pytest.mark.usefixtures("staged_once")
@problems(of_third=True)
def test_smc_that_always_resamples(problem):
    check_sampler(problem, inference.SMC(PARTICLES, ess_threshold=1.1))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@problems(of_third=False)
def test_smc_that_always_resamples_on_the_rest(problem):
    check_sampler(problem, inference.SMC(PARTICLES, ess_threshold=1.1))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
def test_smc_that_resamples_when_due(problem):
    check_sampler(problem, inference.SMC(PARTICLES))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
@problems(of_third=True)
def test_smc_that_resamples_between_sites(problem):
    check_sampler(problem, inference.SMC(PARTICLES, granularity="site"))


@pytest.mark.slow
@pytest.mark.usefixtures("staged_once")
def test_importance_sampling(problem):
    check_sampler(problem, inference.ImportanceSampling(PARTICLES))
