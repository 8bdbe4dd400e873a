"""Programs with every kind of control flow, each beside its twin in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from programs import padded

from latentrace import ppl

from .cases import EOS, H2, H3, M2, M3, J, R, case

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
