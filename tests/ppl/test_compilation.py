"""What is compiled, and when: once for each structure, never again for other numbers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, models, ppl
from latentrace.inference.chains import Draw, State, Target
from latentrace.inference.smc.ancestor_sampling import AncestorSampling
from latentrace.ppl.staging import stage

run = importlib.import_module("latentrace.ppl.run")
LM = programs.markov(3, seed=1)
BACKEND = "/jax/core/compile/backend_compile_duration"
STRENGTH = 1.0


class Compilations:
    """Counts programs that were traced by us and compiled by XLA inside a `with`."""

    def __enter__(self):
        self.traced, self.compiled = -run.traced, 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def listen(self, event, seconds, **_):
        self.compiled += event == BACKEND

    def __exit__(self, *_):
        self.traced += run.traced
        jax.monitoring.unregister_event_duration_listener(self.listen)


def program(lm, ids, bias, table):
    @jax.jit
    def reward(tokens):
        return table[tokens].sum()

    def step(context, _):
        text, context = ppl.generate("x", context, max_tokens=2, twist=lambda t: bias * t.length)
        ppl.factor("reward", reward(text.tokens))
        return context, text.tokens

    b = ppl.sample("b", dist.Normal(bias, 1.0))
    _, tokens = jax.lax.scan(step, ppl.prompt(lm, ids), None, length=2)
    return b, tokens


def closing_over(lm, ids, bias, table):
    """The same program with everything captured rather than passed."""
    return lambda: program(lm, ids, bias, table)


BIAS, TABLE = np.asarray(0.2, np.float32), jnp.array([0.1, 0.5, -0.4])
ALGORITHM = inference.SMC(6, 1.1)


def execute(key=0, lm=LM, ids=(1, 2), bias=BIAS, table=TABLE, algorithm=ALGORITHM):
    return algorithm.run(jax.random.key(key), program, lm, ids, bias, table)


@pytest.fixture(scope="module", autouse=True)
def warm():
    execute(), execute(1)  # the first run compiles, the second settles small host-side programs
    ALGORITHM.run(jax.random.key(0), closing_over(LM, (1, 2), BIAS, TABLE))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"key": 7},
        {"ids": (2,)},
        {"ids": [0, 1, 2, 0, 1, 2, 1, 1]},
        {"lm": programs.markov(3, seed=9)},
        {"bias": np.asarray(-1.5, np.float32)},
        {"table": jnp.array([3.0, 0.0, 1.0])},
    ],
    ids=["nothing", "key", "shorter prompt", "longer prompt", "weights", "argument", "array"],
)
@pytest.mark.parametrize("captured", [False, True], ids=["passed", "captured"])
def test_other_numbers_compile_nothing(change, captured):
    if captured and "bias" in change:
        pytest.skip("JAX makes a literal of a captured scalar, be it an array: pass it as an argument")
    if captured:
        numbers = {"lm": LM, "ids": (1, 2), "bias": BIAS, "table": TABLE, **change}
        key = numbers.pop("key", 0)
        call = lambda: ALGORITHM.run(jax.random.key(key), closing_over(**numbers))
    else:
        call = lambda: execute(**change)
    with Compilations() as seen:
        call()
    assert (seen.traced, seen.compiled) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [{"lm": programs.markov(4, seed=1)}, {"ids": [1] * 9}, {"table": jnp.zeros(5)}, {"algorithm": inference.SMC(7, 1.1)}],
    ids=["vocabulary", "bucket", "shape", "particles"],
)
def test_another_structure_compiles(change):
    with Compilations() as seen:
        execute(**change)
    assert seen.traced == 1
    assert seen.compiled >= 1


def test_other_numbers_give_other_results():
    """Nothing of an earlier run's numbers is left in the compiled program."""
    base = execute(bias=np.asarray(0.0, np.float32), table=jnp.zeros(3))
    assert base.log_evidence == pytest.approx(0.0, abs=1e-6)
    table = jnp.array([1.0, 1.0, 1.0])
    assert execute(bias=np.asarray(0.0, np.float32), table=table).log_evidence == pytest.approx(4.0, rel=1e-5)
    only_two = models.MarkovLM([-np.inf, -np.inf, 0.0], np.tile([-np.inf, -np.inf, 0.0], (3, 1)), 0)
    assert (execute(lm=only_two).returned[1] == 2).all()


def test_a_changed_global_is_seen(monkeypatch):
    def with_global():
        ppl.factor("f", STRENGTH)

    def with_global_array():
        ppl.factor("f", TABLES["a"].sum())

    evidence = lambda fn: inference.ImportanceSampling(2).run(jax.random.key(0), fn).log_evidence
    before = evidence(with_global), evidence(with_global_array)
    monkeypatch.setitem(globals(), "STRENGTH", 2.5)
    monkeypatch.setitem(TABLES, "a", jnp.array([4.0, 5.0]))
    with Compilations() as seen:
        assert (evidence(with_global), evidence(with_global_array)) == pytest.approx((2.5, 9.0))
    assert before == pytest.approx((1.0, 3.0))
    assert seen.traced == 1  # the scalar is a literal of the program, the array an input


TABLES = {"a": jnp.array([1.0, 2.0])}


def test_site_names_are_part_of_the_structure():
    evidence = lambda name: inference.SMC(2).run(jax.random.key(0), lambda: ppl.sample(name, dist.Normal(0.0, 1.0)))
    assert set(evidence("a").values) == {"a"}
    assert set(evidence("b").values) == {"b"}


def test_scopes_are_seen_by_jitted_helpers():
    helper = jax.jit(lambda: ppl.sample("z", dist.Normal(0.0, 1.0)))

    def scoped():
        with ppl.scope("one"):
            helper()
        with ppl.scope("two"):
            helper()

    assert set(inference.SMC(2).run(jax.random.key(0), scoped).values) == {"one/z", "two/z"}


def peak_memory(kind: str, num_particles: int, prompt: int) -> int:
    """Bytes of everything that a compiled run of a model with a wide cache holds at once."""
    lm = programs.wide_cache_model()
    ids, texts = [1] * prompt, "xy" if kind == "ancestor sampling" else "x"

    def fn():
        context = ppl.prompt(lm, ids)
        for name in texts:
            write = lambda name=name: ppl.generate(name, context, max_tokens=4, twist=lambda t: 0.1 * t.length)[0].tokens
            if kind == "nested":
                write = ppl.nested(f"which {name}", write, num_samples=4, ess_threshold=1.1)
            ppl.factor(f"reward of {name}", 0.1 * write().sum())

    staged = stage(fn, ())
    if kind == "ancestor sampling":
        kernel = AncestorSampling(num_particles, ess_threshold=1.1)
        trace = {name: jnp.zeros(4, jnp.int32) for name in texts}
        draw = Draw({k: (v,) for k, v in trace.items()}, dict.fromkeys(trace, jnp.asarray(True)), [])
        skeleton = staged.skeleton()
        step = lambda key, arrays: kernel.step(Target(skeleton, arrays, {}), key, State(draw))
        call, args = jax.jit(step), (jax.random.key(0), run.arrays_of(staged))
    else:
        policy = inference.SMC(num_particles, ess_threshold=1.1).policy()
        call = jax.jit(run.runner(staged, run.Settings(num_particles, policy=policy)))
        args = (jax.random.key(0), jnp.int32(0), run.arrays_of(staged), {}, {})
    memory = call.lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("nested", "ancestor sampling")]


@pytest.mark.parametrize("kind", ["SMC", *SLOW])
def test_memory_of_the_prompt_does_not_grow_with_the_particles(kind):
    few, many = 2, 32
    prompt_bytes = 1000 * programs.WIDTH * 4  # what 1,000 more tokens of the prompt take, once
    long_, short = 1024, 24
    growth = {n: peak_memory(kind, n, long_) - peak_memory(kind, n, short) for n in (few, many)}
    assert growth[few] > 0.5 * prompt_bytes
    assert growth[many] < growth[few] + 2 * prompt_bytes  # a copy for each would be 30 more
