"""Every way to draw tokens keeps SMC exactly unbiased: drafts of other models, rejection sampling and learned twists, by
enumeration of all draws that the algorithm makes, those inside a search for an allowed token included."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.ppl.language_model import empty_memory

from .test_smc_exact import EOS, LM, PROMISE, REWARD, V, check_measure

OTHER = programs.markov(V, eos_id=EOS, seed=11)
HIDDEN = programs.hmm(2, V, eos_id=EOS, seed=9)
draft = ppl.proposals.draft


def promise(text):
    return jnp.asarray(PROMISE)[text.length - 1, text.tokens[text.length - 1]]


def rewarded(path, *tokens):
    path.weigh(np.exp(REWARD[list(tokens)].sum()))


# --- another context drafts ---------------------------------------------------------------------------------------------


def drafted():
    """A text that another model drafts, with its logits changed, a mask and a twist on top."""
    other = draft(ppl.prompt(OTHER, [1]), ppl.proposals.temperature(1.4))
    allowed = jnp.array([True, True, False])
    x, _ = ppl.generate("x", ppl.prompt(LM), max_tokens=2, proposal=other, constraint=allowed, twist=promise)
    ppl.factor("reward", jnp.asarray(REWARD)[x.tokens].sum())
    return x.tokens


def drafted_density(path):
    a, b = programs.padded(path.text(LM, (), 2), 2, EOS)
    rewarded(path, a, b)
    path.weigh(EOS not in (a, b))
    return a, b


def hinted():
    """In a loop, one model that remembers everything drafts for itself from another prompt, which goes on with each text.
    The prompt ends with EOS, which is a token like others to a draft."""

    def step(carry, i):
        context, hint = carry
        text, context = ppl.generate("x", context, max_tokens=1, proposal=draft(hint))
        ppl.factor("reward", jnp.asarray(REWARD)[text.tokens[0]] * (1 + i))
        return (context, ppl.extend(hint, text)), text.tokens[0]

    start = ppl.prompt(HIDDEN, [0]), ppl.score("hint", ppl.prompt(HIDDEN, [1]), [EOS])
    return jax.lax.scan(step, start, jnp.arange(2))[1]


def hinted_density(path):
    a, b = programs.padded(path.text(HIDDEN, (0,), 2), 2, EOS)
    path.weigh(np.exp(REWARD[a] + 2 * REWARD[b]) * programs.next_probs(HIDDEN, (1,))[EOS])
    return a, b


def drafted_in_a_branch():
    """One branch has a draft, of a context that was forked before; the other goes on without."""
    start = ppl.prompt(HIDDEN)
    first, context = ppl.generate("k", start, max_tokens=1, twist=lambda text: 0.4 * text.tokens[0])

    def with_draft():
        text, after = ppl.generate("x", context, max_tokens=1, proposal=draft(start))
        return text.tokens[0], after

    def without():
        text, after = ppl.generate("y", context, max_tokens=1)
        return text.tokens[0], after

    second, after = jax.lax.cond(first.tokens[0] == 0, with_draft, without)
    last, _ = ppl.generate("z", after, max_tokens=1)
    ppl.factor("reward", jnp.asarray(REWARD)[last.tokens[0]])
    return jnp.stack([first.tokens[0], second, last.tokens[0]])


def drafted_in_a_branch_density(path):
    tokens = programs.padded(path.text(HIDDEN, (), 3), 3, EOS)
    path.weigh(np.exp(REWARD[tokens[-1]]))
    return tokens


# --- tokens are checked one at a time -----------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What may follow depends on the last token; row V is for the start."""

    table: Any
    """bool[V + 1, V]"""

    def start(self, max_tokens):
        return jnp.int32(V)

    def allows(self, state, token):
        return self.table[state, token] & (token >= 0)

    def next(self, state, token):
        return token.astype(jnp.int32)


class CheckedWithPotentials(NamedTuple):
    table: Any
    log_psi: Any

    def start(self, max_tokens):
        return jnp.int32(V)

    def allows(self, state, token):
        return self.table[state, token] & (token >= 0)

    def log_potentials(self, state):
        return self.log_psi[state]

    def next(self, state, token):
        return token.astype(jnp.int32)


TABLE = np.array([[True, False, True], [False, False, False], [True, True, True], [True, True, False]])
LOG_PSI = np.random.default_rng(4).normal(size=(V + 1, V))


def allowed(text):
    return all(TABLE[before, token] for before, token in zip((V, *text), text))


def checked():
    """From a proposal; after b nothing is allowed, and after a one token is not."""
    x, _ = ppl.generate(
        "x",
        ppl.prompt(LM),
        max_tokens=2,
        constraint=Checked(jnp.asarray(TABLE)),
        proposal=ppl.proposals.temperature(1.7),
        twist=promise,
    )
    ppl.factor("reward", jnp.asarray(REWARD)[x.tokens].sum())
    return x.tokens


def checked_density(path):
    text = path.text(LM, (), 2)
    rewarded(path, *programs.padded(text, 2, EOS))
    path.weigh(allowed(text))
    return programs.padded(text, 2, EOS)


def checked_with_all():
    """With a draft and potentials, in a loop, where most is not allowed."""
    table = jnp.asarray(np.roll(TABLE, 1, axis=0))  # at the start: all

    def step(carry, i):
        context, other = carry
        constraint = CheckedWithPotentials(jnp.where(i == 0, table, jnp.eye(V, dtype=bool)[jnp.array([1, 1, 1, 1])]), LOG_PSI)
        text, context = ppl.generate("x", context, max_tokens=1, constraint=constraint, proposal=draft(other))
        return (context, ppl.extend(other, text)), text.tokens[0]

    _, tokens = jax.lax.scan(step, (ppl.prompt(LM), ppl.prompt(HIDDEN)), jnp.arange(2))
    ppl.factor("reward", jnp.asarray(REWARD)[tokens].sum())
    return tokens


def checked_with_all_density(path):
    text = path.text(LM, (), 2)
    a, b = programs.padded(text, 2, EOS)
    rewarded(path, a, b)
    path.weigh(np.roll(TABLE, 1, axis=0)[V, a] and (a == EOS or b == 1))
    return a, b


def checked_branch():
    """In one of two branches, after a draw of another kind."""
    k = ppl.sample("k", dist.Bernoulli(0.3))
    constraint = Checked(jnp.asarray(TABLE))
    write = lambda: ppl.generate("x", ppl.prompt(LM), max_tokens=1, constraint=constraint)[0].tokens[0]
    y = jax.lax.cond(k == 1, write, lambda: jnp.int32(0))
    ppl.factor("reward", jnp.asarray(REWARD)[y] * (1 + k))
    return jnp.stack([k, y])


def checked_branch_density(path):
    k = path.flip(0.3)
    y = path.text(LM, (), 1)[0] if k else 0
    path.weigh(np.exp(REWARD[y] * (1 + k)) * (k == 0 or TABLE[V, y]))
    return k, y


# --- twists that read features ------------------------------------------------------------------------------------------


def arbitrary_head(lm, hidden=()):
    """Parameters that nobody has fitted."""
    head = ppl.proposals.twist_head(jax.random.key(1), lm, hidden)
    last = 1.3 * jax.random.normal(jax.random.key(2), head.kernels[-1].shape)
    return ppl.proposals.TwistHead((*head.kernels[:-1], last), (*head.biases[:-1], jnp.array([0.4, -0.7, 0.9])))


class Potentials(NamedTuple):
    """A constraint with potentials of its own, to which the head's are added."""

    log_psi: Any

    def start(self, max_tokens):
        return jnp.int32(V)

    def mask(self, state):
        return jnp.array([True, True, False]) | (state < V)

    def log_potentials(self, state):
        return jnp.where(self.mask(state), self.log_psi[state], -jnp.inf)

    def next(self, state, token):
        return token.astype(jnp.int32)


def headed():
    """Beside potentials of a constraint and a proposal; texts end by EOS, by `until`, and by being cut."""
    x, context = ppl.generate(
        "x",
        ppl.prompt(LM),
        max_tokens=2,
        until=1,
        constraint=Potentials(jnp.asarray(LOG_PSI)),
        proposal=ppl.proposals.temperature(1.3),
        twist=arbitrary_head(LM, (4,)),
    )
    y, _ = ppl.generate("y", context, max_tokens=1)
    ppl.factor("reward", jnp.asarray(REWARD)[x.tokens].sum() + 0.5 * y.tokens[0])
    return jnp.concatenate([x.tokens, y.tokens])


def headed_density(path):
    text = path.text(LM, (), 2, stop=lambda text: text[-1] == 1)
    x = programs.padded(text, 2, EOS)
    y = EOS if text[-1] == EOS else path.text(LM, text, 1)[0]
    rewarded(path, *x)
    path.weigh(np.exp(0.5 * y) * (text[0] != 2))
    return *x, y


def headed_in_a_loop():
    """Alone, on a model whose features are beliefs, read for other ends too."""

    def step(context, i):
        text, context = ppl.generate("x", context, max_tokens=1, twist=arbitrary_head(HIDDEN))
        ppl.factor("reward", jnp.asarray(REWARD)[text.tokens[0]] * (1 + i) + 0.3 * ppl.features(context)[0])
        return context, text.tokens[0]

    return jax.lax.scan(step, ppl.prompt(HIDDEN), jnp.arange(2))[1]


def headed_in_a_loop_density(path):
    text = path.text(HIDDEN, (), 2)
    tokens = programs.padded(text, 2, EOS)
    for i, token in enumerate(tokens):
        seen = [HIDDEN.start_id, *text[: i + 1]]
        features = HIDDEN.forward(jnp.array(seen), empty_memory())[0]
        path.weigh(np.exp(REWARD[token] * (1 + i) + 0.3 * float(features[-1, 0])))
    return tokens


THRESHOLDS = (0.0, 0.8, 1.1)
ONE_SEARCH = 3 * 3 * 2
"""Most ways to find two allowed ones of three tokens: each rejection leaves one less."""
# program, density, outcomes of a particle's draws, resamplings, inside texts
CASES: dict[str, tuple[Any, Any, int, int, bool]] = {
    "draft": (drafted, drafted_density, 2**2, 4, True),
    "hint to the same model": (hinted, hinted_density, V**2, 4, True),
    "draft in a branch": (drafted_in_a_branch, drafted_in_a_branch_density, V**4, 4, True),
    "checked": (checked, checked_density, ONE_SEARCH**2, 2, True),
    "checked, with draft and potentials": (checked_with_all, checked_with_all_density, 9 * ONE_SEARCH, 2, True),
    "checked branch": (checked_branch, checked_branch_density, 2 * ONE_SEARCH, 2, True),
    "learned twist": (headed, headed_density, V**3, 4, True),
    "learned twist in a loop": (headed_in_a_loop, headed_in_a_loop_density, V**2, 2, True),
}


SLOW = ("draft in a branch", "checked, with draft and potentials", "checked branch", "learned twist in a loop")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_expected_weighted_measure_is_the_target(case):
    check_measure(*CASES[case], THRESHOLDS)


@pytest.mark.parametrize("case", ["draft", "checked"])
def test_exact_inference_has_the_target(case):
    program, density, *_ = CASES[case]
    target = programs.measure(programs.paths(density))
    posterior = inference.Exact().run(jax.random.key(0), ppl.program(program))
    evidence = sum(target.values())
    assert abs(posterior.log_evidence - np.log(evidence)) < 1e-5
    found = programs.measure(zip(np.asarray(posterior.returned), posterior.weights))
    for trace in {*target, *found}:
        assert abs(found.get(trace, 0.0) - target.get(trace, 0.0) / evidence) < 1e-5
