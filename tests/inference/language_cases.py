"""Programs with every kind of site and option of a text, each beside its twin in plain Python."""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
from programs import padded

from latentrace import ppl

from .cases import EOS, H3, M2, M3, J, R, case

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

    def start(self, max_tokens):
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
