"""Small programs, and the regeneration move on them as an exact matrix: its cuts and redraws are enumerated.

The density of every trace comes from `Exact`; its weight W from a run that repeats it. A run that repeats a trace up to a cut
in every world of what follows gives a row of the matrix.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from latentrace import inference, ppl
from latentrace.inference.chains import Draw, Target, Traces, traces_of
from latentrace.inference.exact import Layout
from latentrace.inference.mcmc.regenerate import log_ratio
from latentrace.ppl.choices import WHOLE, Retained
from latentrace.ppl.collectives import over_particles
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.jaxpr import all_eqns
from latentrace.ppl.run import Prefixes, RegeneratingSource, Settings, arrays_of
from latentrace.ppl.sites import sample_p
from latentrace.ppl.staging import stage

from . import control_flow_cases, language_cases, worlds  # noqa: F401  (they fill the table)
from .cases import CASES, H3, M2, M3, J


@partial(jax.tree_util.register_dataclass, data_fields=("own", "shared", "log_p_own", "log_p_shared"), meta_fields=("cuts",))
@dataclass(frozen=True)
class World(worlds.World):
    """Choices of one particle; elements of a plate, which choose uniformly among `RADIX`, share its digits."""

    def enter_element(self, i, jaxpr):
        return replace(self, own=self.own // RADIX**i)

    def leave_plate(self, size, jaxpr, elements):
        if not any(eqn.primitive is sample_p for eqn in all_eqns(jaxpr)):
            return self
        return replace(self, own=self.own // RADIX**size, log_p_own=self.log_p_own - size * np.log(RADIX))


RADIX = 3


def short_text():
    """Few traces of one to two choices; a part of the first ones is impossible."""
    text, _ = ppl.generate("text", ppl.prompt(M3), max_tokens=2, proposal=ppl.proposals.temperature(1.5))
    ppl.factor("reward", 2 * J[text.tokens].sum())
    ppl.condition("possible", text.tokens[0] != 1)
    return text.tokens


def steered_text():
    """A text with a proposal, a mask and a twist inside, then one more; not all masks allow everything."""
    promise = jnp.array([0.4, -0.9, 0.6])
    x, context = ppl.generate(
        "x",
        ppl.prompt(M3),
        max_tokens=2,
        constraint=jnp.array([True, True, False]),
        proposal=ppl.proposals.temperature(1.7),
        twist=lambda t: promise[t.tokens[t.length - 1]],
    )
    y, _ = ppl.generate("y", context, max_tokens=2, until=[2], proposal=ppl.proposals.temperature(0.6))
    ppl.factor("reward", J[y.tokens].sum() - 0.7 * x.length)
    ppl.condition("not both empty", (x.length > 1) | (y.length > 0))
    ppl.twist("late", 0.3 * y.length)
    return x.tokens, y.tokens


def exclusive_branches():
    """As many choices as the branch has: two in one, one in the other, which comes after an inactive one."""
    k = ppl.sample("k", dist.Bernoulli(0.35))

    def write():
        text, _ = ppl.generate("x", ppl.prompt(M2, [1]), max_tokens=2)
        ppl.factor("reward", 0.8 * text.length)
        return text.length

    def flip():
        b = ppl.sample("b", dist.Bernoulli(0.3))
        ppl.condition("possible", (b == 1) | (k == 0))
        return b

    n = jax.lax.cond(k == 1, write, flip)
    last = ppl.sample("last", dist.Categorical(logits=J * (n + 1)))
    ppl.factor("close", 0.6 * last - 0.4 * n)
    return k, n, last


def plate_between():
    """A plate, one choice, between two others; one plate draws nothing."""
    k = ppl.sample("k", dist.Bernoulli(0.4))

    def element(w):
        x = ppl.sample("x", dist.Categorical(logits=jnp.zeros(RADIX)))
        ppl.factor("f", w * x * (1 + k))
        return x

    xs = ppl.vmap(element)(jnp.array([0.5, -0.8]))
    ppl.vmap(lambda x: ppl.factor("g", 0.1 * x * x))(xs)
    text, _ = ppl.generate("text", ppl.prompt(M3, [1]), max_tokens=2)
    ppl.condition("possible", (text.tokens[0] != 1) | (xs.sum() > 0))
    ppl.factor("h", 0.5 * xs[0] * text.length)
    return k, xs, text.tokens


def words_in_a_loop():
    """Texts of any length in a loop: the number of choices varies from step to step."""

    def step(context, w):
        text, context = ppl.generate("x", context, max_tokens=2, until=[2])
        ppl.factor("reward", w * text.length)
        ppl.twist("promise", J[text.tokens[0]])
        return context, text.tokens

    return jax.lax.scan(step, ppl.prompt(H3), jnp.array([0.7, -0.5]))[1]


PROGRAMS = {
    "short text": short_text,
    "steered text": steered_text,
    "exclusive branches": exclusive_branches,
    "plate": plate_between,
    "words in a loop": words_in_a_loop,
    "reverse scan": CASES["reverse scan over data"].program,
    "while": CASES["while loop stops by data"].program,
}


@cache
def enumerated(name: str) -> "Enumerated":
    """The program of that name in `PROGRAMS`."""
    return Enumerated(PROGRAMS[name])


class Enumerated:
    """A program's traces of positive density, and what comes of repeating each up to any cut."""

    def __init__(self, program: Any):
        staged = stage(ppl.program(program) if not isinstance(program, ppl.Program) else program, ())
        self.target = Target(staged.skeleton(), arrays_of(staged), {})
        exact = inference.Exact().run(jax.random.key(0), program)
        values = {k: v.tokens if isinstance(v, ppl.Text) else v for k, v in exact.values.items()}
        self.values = {name: jnp.asarray(values[name]) for name in self.target.random}
        self.density = np.exp(exact.log_weights.astype(np.float64))
        self.key = self.keys(self.values)
        radices = Layout(frozenset(), tuple(lm.vocab_size for lm in staged.models)).radices(staged.jaxpr)
        self.num_worlds = math.prod(radices)
        consts = {name: jnp.asarray(array) for name, array in staged.consts.items()}

        def one(values, cut, world):
            def one_particle():
                zero = jnp.float32(0)
                drawn = World(world, jnp.int32(0), zero, zero, None)
                state = first_state(staged, staged.models, Retained(drawn, values, cut))
                run = Interpreter(staged, consts, staged.models, state)
                run.walk(staged.jaxpr, [])
                found = {name: run.frame.get(value) for name, (value, _) in run.records.items()}
                s = run.state
                spent = s.choices.drawn.own == 0  # else this world repeats one with fewer digits
                p = jnp.where(spent, jnp.exp(s.choices.drawn.log_p_own), 0.0)
                return self.target.choices(Draw(found, {}, [])), s.log_weight, s.made, p

            return jax.tree.map(lambda x: x[0], over_particles(one_particle, 1))

        over_worlds = jax.vmap(one, (None, None, 0))
        self.run = jax.jit(jax.vmap(over_worlds, (0, 0, None)))
        _, log_weight, made, _ = self.run(self.values, jnp.full(len(self.density), WHOLE), jnp.zeros(1, jnp.int32))
        self.log_weight, self.made = np.asarray(log_weight[:, 0]), np.asarray(made[:, 0])

    @staticmethod
    def keys(values: dict[str, Any]) -> list[bytes]:
        rows = [np.asarray(v).reshape(len(v), -1).astype(np.int32) for _, v in sorted(values.items())]
        return [row.tobytes() for row in np.concatenate(rows, axis=1)]

    def population(self, trace: int, count: int) -> Traces:
        """A trace, `count` times."""
        key, settings = jax.random.key(0), Settings(count, RegeneratingSource())
        repeat = lambda x: jnp.repeat(x[None, trace], count, axis=0)
        prefixes = Prefixes(jax.tree.map(repeat, self.values), jnp.full(count, WHOLE))
        return traces_of(self.target.population(key, settings, trace=prefixes))

    def transition(self, power: float) -> np.ndarray:
        """float64[X, X]: the kernel."""
        count = len(self.density)
        number = {key: i for i, key in enumerate(self.key)}
        matrix, worlds_ = np.zeros((count, count)), jnp.arange(self.num_worlds)
        for cut in range(self.made.max()):
            values, log_weight, made, p = self.run(self.values, jnp.full(count, cut), worlds_)
            here = self.made > cut
            np.testing.assert_allclose(np.asarray(p).sum(1)[here], 1.0, atol=1e-5)
            rise = power * (log_weight - self.log_weight[:, None])
            ratio = log_ratio(rise, jnp.asarray(self.made)[:, None], made)
            accepted = np.asarray(p * jnp.exp(jnp.minimum(ratio, 0.0)), np.float64)
            flat = {k: np.asarray(v).reshape(count * self.num_worlds, *v.shape[2:]) for k, v in values.items()}
            keys = self.keys(flat)
            for x in np.flatnonzero(here):
                for world in np.flatnonzero(accepted[x] > 0):
                    matrix[x, number[keys[x * self.num_worlds + world]]] += accepted[x, world] / self.made[x]
        return matrix + np.diag(1 - matrix.sum(1))
