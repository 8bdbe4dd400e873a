"""SMC is exactly unbiased: its own random choices are enumerated, so nothing here has a Monte Carlo error.

All randomness passes through `Choices`. Here a token is a digit of the number of a world, and a resampling's uniform
number is one of the few that lead to different ancestors. For every trace x, the sum over worlds of
P(world) * Z_hat * (posterior weight of x) must be p(x), the target's unnormalised density.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference.smc.resampling import SCHEMES
from latentrace.inference.smc.smc import Resample
from latentrace.inference.smc.triggers import ESSBelow
from latentrace.ppl.collectives import PARTICLES, index
from latentrace.ppl.constraints import compile_regex
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.staging import stage

N, V, EOS = 2, 3, 2
LM = programs.markov(V, eos_id=EOS, seed=3)
REWARD = np.array([0.9, -1.3, 0.4])
PROMISE = np.array([[0.2, -0.7, 1.1], [-0.4, 0.8, 0.1]])


class World(NamedTuple):
    """The choices of one particle in one world: digits of its own, and of resamplings, which all particles share."""

    own: Any
    """a number of mixed radix, of as many digits as there are draws"""
    shared: Any
    log_p_own: Any
    log_p_shared: Any
    code: tuple = ()
    """as many entries as the number of the resampling scheme: a tuple's length is part of the pytree's structure"""

    def supply(self, spec, active):
        return None

    def _choose(self, logits):
        """The digit counts what is possible; where nothing is, the particle is dead and anything will do."""
        logits = jnp.where(logits.max() > -jnp.inf, logits, 0.0)
        possible = logits > -jnp.inf
        radix = possible.sum()
        choice = jnp.argmax(jnp.cumsum(possible) > self.own % radix).astype(jnp.int32)
        log_p = self.log_p_own + jax.nn.log_softmax(logits)[choice]
        return choice, self._replace(own=self.own // radix, log_p_own=log_p)

    def value(self, site, distribution, number):
        support = distribution.enumerate_support()
        digit, choices = self._choose(jax.vmap(distribution.log_prob)(support))
        return support[digit], choices

    def token(self, site, step, logits, number):
        return self._choose(logits)

    def uniforms(self, clock, weights, count):
        """The middle of one of the stretches of [0, 1)^count on which resampling two particles has the same outcome."""
        cuts, log_p, chosen, rest = boundaries(self.scheme, weights), self.log_p_shared, [], self.shared
        for i in range(count):
            second, rest = rest % 2, rest // 2
            low, high = jnp.where(second == 1, cuts[i], 0.0), jnp.where(second == 1, 1.0, cuts[i])
            log_p += jnp.log(high - low)
            chosen.append((low + high) / 2)
        return jnp.stack(chosen), self._replace(shared=rest, log_p_shared=log_p)

    @property
    def scheme(self):
        return next(name for name, code in CODES.items() if code == len(self.code))


CODES = {name: i for i, name in enumerate(SCHEMES)}


def boundaries(scheme, weights):
    """For N = 2, where each uniform number of a resampling starts to have its other outcome: float32[2]."""
    w = weights[0]
    whole = jnp.floor(2 * weights)
    rest = 2 * weights - whole
    none_left = rest.sum() < 0.5
    return {
        "multinomial": jnp.stack([w, w]),
        "stratified": jnp.clip(jnp.stack([2 * w, 2 * w - 1]), 0, 1),
        "systematic": jnp.stack([2 * w % 1.0]),
        "residual": jnp.full(2, jnp.where(none_left, 0.5, rest[0] / jnp.maximum(rest.sum(), 1e-9))),
        "ssp": jnp.stack([jnp.float32(0.5), jnp.where(none_left, 0.5, jnp.clip(rest[0], 0, 1))]),
    }[scheme]


def estimated_measure(
    program, own: int, shared: int, inside_texts: bool, thresholds, scheme="systematic", world_type=World
) -> tuple[np.ndarray, list[dict]]:
    """For each threshold, the sum of P(world), and of P(world) * Z_hat * weight over each trace.

    `own` is how many outcomes a particle's draws have, `shared` how often the population may resample.
    """
    staged = stage(ppl.program(program), ())
    consts = {name: jnp.asarray(array) for name, array in staged.consts.items()}

    def one_world(threshold, world):
        policy = Resample(ESSBelow(threshold), SCHEMES[scheme], inside_texts)

        def one_particle(_):
            zero = jnp.float32(0)
            choices = world_type(world // own ** index() % own, world // own**N, zero, zero, (zero,) * CODES[scheme])
            state = first_state(staged, staged.models, choices)
            run = Interpreter(staged, consts, staged.models, state, policy=policy)
            cells = run.walk(staged.jaxpr, [])
            return jnp.asarray(run.frame.get(cells[0])), run.state.log_weight, run.state.choices

        trace, log_weight, choices = jax.vmap(one_particle, axis_name=PARTICLES)(jnp.zeros(N))
        spent = (choices.own == 0).all() & (choices.shared == 0).all()  # else this world repeats one with fewer digits
        log_p = jnp.where(spent, choices.log_p_own.sum() + choices.log_p_shared[0], -jnp.inf)
        return log_p, log_weight, trace

    outcomes = 2 if SCHEMES[scheme].single else 4  # of one resampling
    worlds = jnp.arange(own**N * outcomes**shared)
    over_worlds = jax.vmap(one_world, in_axes=(None, 0))
    results = jax.jit(jax.vmap(over_worlds, in_axes=(0, None)))(jnp.asarray(thresholds), worlds)
    log_p, log_weight, traces = (np.asarray(r) for r in results)
    p, weight = np.exp(log_p.astype(np.float64)), np.exp(log_weight.astype(np.float64))
    measures = []
    for t in range(len(thresholds)):
        # Z_hat times the self-normalised average of f is the mean over particles of weight times f
        mass = p[t][:, None] * weight[t] / N
        measures.append(programs.measure(zip(traces[t].reshape(-1, traces.shape[-1]), mass.ravel())))
    return p.sum(1), measures


# --- programs, each with its unnormalised density written out in NumPy -----------------------------------------------


def loop():
    """Texts of one token in a scan, each rewarded and twisted. b after b is impossible, and so is a at last."""

    def step(carry, i):
        context, before = carry
        text, context = ppl.generate("x", context, max_tokens=1)
        token = text.tokens[0]  # EOS where the context has finished
        ppl.factor("reward", jnp.where((before == 1) & (token == 1), -jnp.inf, jnp.asarray(REWARD)[token]))
        ppl.twist("promise", jnp.asarray(PROMISE)[i, token])
        return (context, token), token

    (_, last), tokens = jax.lax.scan(step, (ppl.prompt(LM), jnp.int32(0)), jnp.arange(2))
    ppl.condition("not a at last", last != 0)
    return tokens


def loop_density(path):
    a, b = programs.padded(path.text(LM, (), 2), 2, EOS)
    path.weigh(np.exp(REWARD[a] + REWARD[b]) * (not a == b == 1) * (b != 0))
    return a, b


class NothingAfterB(NamedTuple):
    """A constraint that kills: whoever writes b has no token to go on with."""

    masks: Any

    def start(self, max_tokens):
        return jnp.int32(0)

    def mask(self, state):
        return self.masks[state]

    def next(self, state, token):
        return (token == 1).astype(jnp.int32)


def text():
    """One text with a twist, a proposal and a constraint of its own, all of which move weights inside it."""
    x, _ = ppl.generate(
        "x",
        ppl.prompt(LM),
        max_tokens=2,
        constraint=NothingAfterB(jnp.array([[True, True, True], [False, False, False]])),
        proposal=ppl.proposals.temperature(1.7),
        twist=lambda t: jnp.asarray(PROMISE)[t.length - 1, t.tokens[t.length - 1]],
    )
    ppl.factor("reward", jnp.asarray(REWARD)[x.tokens].sum())
    ppl.condition("no a at first", x.tokens[0] != 0)
    ppl.twist("late", x.length * 0.7)
    return x.tokens


def text_density(path):
    a, b = programs.padded(path.text(LM, (), 2), 2, EOS)
    path.weigh(np.exp(REWARD[a] + REWARD[b]) * (a != 1) * (a != 0))
    return a, b


class Steered(NamedTuple):
    """A constraint with potentials of its own, at the last token too, and one that rules out what the mask allows."""

    masks: Any
    log_psi: Any

    def start(self, max_tokens):
        return jnp.int32(0), jnp.int32(0)

    def mask(self, state):
        return self.masks[state[0]]

    def log_potentials(self, state):
        step, before = state
        return jnp.where(self.mask(state), self.log_psi[step, before], -jnp.inf)

    def next(self, state, token):
        return state[0] + 1, token.astype(jnp.int32)


MASKS = np.array([[True, True, True], [True, False, True]])
LOG_PSI = np.array([1.6, -1.1, 0.3, -0.6, 0.8, 2.1, -1.9, 0.2, 0.7, 1.3, -0.4, 0.9, -2.2, 0.1, 1.2, 0.6, -0.3, 0.5])


def potentials():
    """A text with potentials, a proposal and a twist, and one after it."""
    x, context = ppl.generate(
        "x",
        ppl.prompt(LM),
        max_tokens=2,
        constraint=Steered(jnp.asarray(MASKS), jnp.asarray(LOG_PSI).reshape(2, V, V)),
        proposal=ppl.proposals.temperature(1.3),
        twist=lambda t: jnp.asarray(PROMISE)[t.length - 1, t.tokens[t.length - 1]],
    )
    y, _ = ppl.generate("y", context, max_tokens=1)
    ppl.factor("reward", jnp.asarray(REWARD)[x.tokens].sum() + 0.5 * y.tokens[0])
    return jnp.concatenate([x.tokens, y.tokens])


def potentials_density(path):
    text = path.text(LM, (), 2)
    allowed = all(MASKS[i, token] for i, token in enumerate(text))
    x = programs.padded(text, 2, EOS)
    y = path.text(LM, text, 1)[0] if EOS not in text else EOS
    path.weigh(np.exp(REWARD[list(x)].sum() + 0.5 * y) * allowed)
    return *x, y


AUTOMATON = compile_regex("b(?:a|bb?)?|a[ab]b?")
STATE_LOG_PSI = np.array([0.0, -0.9, 1.4, 0.8, -1.7])


def weighted_automaton():
    """A text that an automaton accepts, with potentials for its states."""
    constraint = ppl.constraints.weighted(ppl.constraints.automaton(LM, AUTOMATON), STATE_LOG_PSI)
    return ppl.generate("x", ppl.prompt(LM), max_tokens=3, constraint=constraint)[0].tokens


def weighted_automaton_density(path):
    text = path.text(LM, (), 3)
    state = 0
    for token in text:
        if token != EOS:
            state = AUTOMATON.next[state, b"ab"[token]] if state >= 0 else -1
    path.weigh(state >= 0 and AUTOMATON.accepting[state])
    return programs.padded(text, 3, EOS)


GUIDE = programs.hmm(2, V, eos_id=EOS, seed=6)


def guided():
    """The same, steered by a hidden Markov model that writes otherwise than the language model does."""
    automaton = ppl.constraints.automaton(LM, AUTOMATON)
    constraint = ppl.constraints.lookahead(automaton, GUIDE, max_tokens=3)
    return ppl.generate("x", ppl.prompt(LM), max_tokens=3, constraint=constraint)[0].tokens


LOGITS = np.array([0.3, -0.9, 0.5])


def branches():
    """A choice of branch: one generates and is rewarded, the other draws, twists and may die."""
    k = ppl.sample("k", dist.Categorical(logits=jnp.asarray(LOGITS)))

    def write():
        token = ppl.generate("x", ppl.prompt(LM), max_tokens=1)[0].tokens[0]
        ppl.factor("reward", jnp.asarray(REWARD)[token])
        return token

    def flip():
        b = ppl.sample("b", dist.Bernoulli(0.3))
        ppl.twist("promise", jnp.asarray(PROMISE)[b, k])
        ppl.condition("possible", (k == 0) | (b == 1))
        return b

    y = jax.lax.cond(k == 1, write, flip)
    ppl.factor("last", 0.5 * y - 0.2 * k)
    return jnp.stack([k, y])


def branches_density(path):
    k = path.choose(np.exp(LOGITS) / np.exp(LOGITS).sum())
    if k == 1:
        (y,) = path.text(LM, (), 1)
        path.weigh(np.exp(REWARD[y]))
    else:
        y = path.flip(0.3)
        path.weigh(k == 0 or y == 1)
    path.weigh(np.exp(0.5 * y - 0.2 * k))
    return k, y


THRESHOLDS = (0.0, 0.5, 0.8, 1.1)
CASES = {
    "loop": (loop, loop_density, V**2, 5, True),
    "text": (text, text_density, V**2, 5, True),
    "text, resampled at sites": (text, text_density, V**2, 4, False),
    "potentials": (potentials, potentials_density, V**3, 4, True),
    "potentials, resampled at sites": (potentials, potentials_density, V**3, 3, False),
    "weighted automaton": (weighted_automaton, weighted_automaton_density, V**3, 4, True),
    "guided": (guided, weighted_automaton_density, V**3, 4, True),
    "branches": (branches, branches_density, 3 * V * 2, 4, True),
}


def check_measure(program, density, own: int, shared: int, inside_texts: bool, thresholds, scheme="systematic") -> None:
    """At every threshold the expected weighted measure is the target: E[Z_hat f] = Z E[f] for every f."""
    target = programs.measure(programs.paths(density))
    evidence = sum(target.values())
    total, measures = estimated_measure(program, own, shared, inside_texts, thresholds, scheme)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    for threshold, measure in zip(thresholds, measures):
        for trace in {*target, *measure}:
            error = measure.get(trace, 0.0) - target.get(trace, 0.0)
            assert abs(error) < 1e-5 * evidence, (threshold, trace, error)


@pytest.mark.parametrize("case", CASES)
def test_expected_weighted_measure_is_the_target(case):
    check_measure(*CASES[case], THRESHOLDS)


UNBIASED = [name for name, scheme in SCHEMES.items() if not scheme.biased]
QUICK = ("multinomial", "text, resampled at sites")
OTHERS = [(scheme, case) for scheme in UNBIASED if scheme != "systematic" for case in ("loop", "text", "branches")]


@pytest.mark.parametrize(("scheme", "case"), [QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)])
def test_every_scheme_keeps_the_expected_measure(scheme, case):
    check_measure(*CASES[case], (0.8, 1.1), scheme)


@pytest.mark.parametrize("case", ["loop", "text", "potentials", "weighted automaton", "branches"])
def test_exact_inference_has_the_target(case):
    program, density, *_ = CASES[case]
    target = programs.measure(programs.paths(density))
    posterior = inference.Exact().run(jax.random.key(0), ppl.program(program))
    evidence = sum(target.values())
    assert abs(posterior.log_evidence - np.log(evidence)) < 1e-5
    found = programs.measure(zip(np.asarray(posterior.returned), posterior.weights))
    for trace in {*target, *found}:
        assert abs(found.get(trace, 0.0) - target.get(trace, 0.0) / evidence) < 1e-5
