"""The training loop: updates are those of a plain loop, nothing is compiled twice, and nothing that was done is lost."""

import os
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentrace.inference import learning, plots
from latentrace.inference.learning.update import Keys
from latentrace.ppl.errors import NonFiniteGradientError, RunCheckpointError, SiteError

KEY = jax.random.key(3)
BACKEND = "/jax/core/compile/backend_compile_duration"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype(np.float32)
DATA = {"x": X, "y": X @ np.array([1.0, -2.0, 0.5], np.float32) + 0.3 * RNG.normal(size=24).astype(np.float32)}
PARAMS = {"w": np.zeros(3, np.float32), "b": np.float32(0.2)}
ADAM = optax.adam(0.05)


def regression(rng_key, params, batch):
    """Noise in the weights, so that keys matter."""
    w = params["w"] + 0.1 * jax.random.normal(rng_key, (3,))
    errors = batch["x"] @ w + params["b"] - batch["y"]
    return jnp.mean(errors**2), {"bias": params["b"]}


def fit(loss=regression, params=PARAMS, optimizer=ADAM, **how):
    return learning.fit(loss, params, optimizer, **{"num_steps": 20, "rng_key": KEY, "data": DATA, "batch_size": 5} | how)


def by_hand(num_steps, batch_size=5, rows=24):
    """The same in plain Python: batches as documented, one optax update after the other."""
    keys, params, losses = Keys.of(KEY), jax.tree.map(jnp.asarray, PARAMS), []
    state, each = ADAM.init(params), rows // batch_size
    for step in range(num_steps):
        order = jax.random.permutation(jax.random.fold_in(keys.order, step // each), rows)
        batch = jax.tree.map(lambda x: x[order[step % each * batch_size :][:batch_size]], DATA)
        key = jax.random.fold_in(keys.loss, step)
        (loss, _), gradients = jax.value_and_grad(regression, argnums=1, has_aux=True)(key, params, batch)
        updates, state = ADAM.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


class TestUpdates:
    def test_are_those_of_a_plain_loop(self):
        found = fit()
        params, losses = by_hand(20)
        np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, params)
        assert found.stats["bias"][0] == PARAMS["b"], "stats are of the parameters before the update"
        assert found.steps == 20
        assert found.stopped is None
        assert found.losses.dtype == np.float32

    def test_an_epoch_sees_every_example_once(self):
        seen = fit(lambda key, params, batch: (params["b"] * 0.0, {f"{i}": batch[i] for i in range(6)}), num_steps=8,
                   data=np.arange(24, dtype=np.float32), batch_size=6)  # fmt: skip
        rows = np.stack(list(seen.stats.values()), 1).reshape(2, 24)
        assert (np.sort(rows) == np.arange(24)).all()
        assert (rows[0] != rows[1]).any()

    def test_parts_of_a_batch_add_up_to_it(self):
        plain = lambda rng_key, params, batch: jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)
        whole = fit(plain, batch_size=12, num_steps=10)
        parts = fit(plain, batch_size=12, num_steps=10, accumulate=4)
        np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, parts.params)

    def test_without_data_parts_are_other_keys(self):
        noise = lambda rng_key, params: params["b"] * jax.random.normal(rng_key)
        key = jax.random.fold_in(Keys.of(KEY).loss, 0)
        one = fit(noise, data=None, batch_size=None, num_steps=1, optimizer=optax.sgd(1.0))
        four = fit(noise, data=None, batch_size=None, num_steps=1, optimizer=optax.sgd(1.0), accumulate=4)
        np.testing.assert_allclose(one.params["b"], PARAMS["b"] - jax.random.normal(key), rtol=1e-6)
        mean = jax.vmap(jax.random.normal)(jax.random.split(key, 4)).mean()
        np.testing.assert_allclose(four.params["b"], PARAMS["b"] - mean, rtol=1e-5)

    def test_low_precision_of_the_loss_alone(self):
        seen = []

        def loss(rng_key, params, batch):
            seen.append((params["w"].dtype, batch["x"].dtype))
            return jnp.mean((batch["x"].astype(params["w"].dtype) @ params["w"] + params["b"] - batch["y"]) ** 2)

        low, full = fit(loss, dtype=jnp.bfloat16, num_steps=60), fit(loss, num_steps=60)
        assert seen[0] == (jnp.bfloat16, jnp.float32)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((low.params, low.last.opt_state[0].mu)))
        assert 0 < np.abs(low.params["w"] - full.params["w"]).max() < 0.02
        assert (low.params["w"] != low.params["w"].astype(jnp.bfloat16)).any(), "the parameters themselves are not rounded"

    def test_a_function_gives_data_of_each_segment(self):
        asked = []

        def rollouts(step, rng_key, params):
            asked.append((step, float(params["b"])))
            return {name: x + (0.01 * jax.random.normal(rng_key) if name == "y" else 0) for name, x in DATA.items()}

        found = fit(data=rollouts, batch_size=4, segment=6, num_steps=20)
        assert [step for step, _ in asked] == [0, 6, 12, 18]
        assert [b for _, b in asked] == [pytest.approx(found.stats["bias"][step]) for step, _ in asked]
        asked.clear()
        assert len(fit(data=rollouts, batch_size=None, num_steps=3).losses) == len(asked) == 3

    def test_optimizers_may_look_at_the_loss(self):
        slower = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
        rising = lambda rng_key, params: 1e-3 * params["b"] + 10.0 * jax.lax.stop_gradient(-params["b"])
        found = fit(rising, data=None, batch_size=None, optimizer=slower, num_steps=12)
        assert float(found.last.opt_state[1].scale) < 1


class TestCompilation:
    def test_other_objects_of_the_same_structure_compile_nothing(self):
        count = 0

        def listen(event, seconds, **_):
            nonlocal count
            count += event == BACKEND

        def run(scale, steps):
            weights = scale * jnp.ones(24)
            loss = lambda rng_key, params, batch: jnp.mean(jnp.sum(weights) * (batch["x"] @ params["w"] - batch["y"]) ** 2)
            return fit(loss, optimizer=optax.adam(0.1), num_steps=steps)

        run(1.0, 5), run(1.0, 5)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            one, other = run(2.0, 7), run(3.0, 9)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert count == 0
        assert other.losses[0] == pytest.approx(1.5 * one.losses[0]), "what it closes over is an input"

    def test_parameters_given_are_not_used_up(self):
        mine = jax.tree.map(jnp.asarray, PARAMS)
        kept = []
        found = fit(params=mine, segment=5, on_segment=kept.append, validate=lambda params: float(params["b"]))
        assert float(mine["w"].sum()) == 0
        assert [k.steps for k in kept] == [5, 10, 15, 20]
        assert_same(kept[-1].last, found.last)
        assert np.isfinite(kept[0].params["w"]).all(), "and neither are those of a look"


class TestStopping:
    @pytest.fixture(autouse=True)
    def interruptible(self):
        """A process that a shell starts in the background ignores interrupts."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_patience_keeps_the_best(self):
        losses, seen = iter([3.0, 1.0, np.nan, 2.0, 1.5, 0.0]), []
        found = fit(num_steps=100, segment=4, patience=3, validate=lambda p: seen.append(p) or next(losses))
        assert found.steps == 20
        assert found.stopped == "no better validation loss in 3 looks"
        assert_same(found.params, seen[1])
        assert_same(found.last.params, seen[4])
        np.testing.assert_array_equal(found.validated_at, [4, 8, 12, 16, 20])
        np.testing.assert_array_equal(found.validations, np.float32([3.0, 1.0, np.nan, 2.0, 1.5]))

    def test_an_interrupt_waits_for_the_step_and_keeps_what_is_done(self):
        straight = fit(num_steps=24)
        stop = lambda so_far: so_far.steps == 12 and signal.raise_signal(signal.SIGINT)
        with pytest.warns(UserWarning, match="interrupted after 12 of 24 steps"):
            stopped = fit(num_steps=24, segment=6, on_segment=stop)
        assert stopped.stopped == "interrupted"
        assert_same(stopped.losses, straight.losses[:12])
        assert_same(fit(num_steps=24, resume=stopped).losses, straight.losses)

    def test_an_interrupt_inside_a_compiled_call(self):
        sent = []

        def in_the_middle(x):
            if len(sent) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            sent.append(x)
            return np.float32(0)

        def loss(rng_key, params, batch):
            extra = jax.pure_callback(in_the_middle, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(params["b"]))
            return regression(rng_key, params, batch)[0] + extra

        with pytest.warns(UserWarning, match="interrupted after"):
            stopped = fit(loss, num_steps=500)
        assert 3 < stopped.steps < 500
        assert np.isfinite(stopped.params["w"]).all(), "donated or not"

    def test_an_interrupt_before_the_first_step_is_raised(self):
        def data(step, rng_key, params):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(data=data)

    @pytest.mark.parametrize("accumulate", [1, 5])
    def test_what_is_not_finite_is_named_and_not_applied(self, accumulate):
        class Loss:
            def __call__(self, rng_key, params, batch):
                bad = jnp.where(params["a"]["n"] >= 0.0697, jnp.nan, 0.0)
                return jnp.mean(batch["y"]) ** 2 + jnp.sum(params["b"] ** 2 + bad * params["b"]) + 0.01 * -params["a"]["n"]

            def explain(self, rng_key, params, batch):
                assert len(batch["y"]) == 5 // accumulate
                return f"It came from site 'z' at {float(params['a']['n']):.2f}."

        start = {"a": {"n": 0.0}, "b": np.ones(2, np.float32), "c": 1.0}
        with pytest.raises(
            NonFiniteGradientError, match=r"loss of step 7 is nan.*params\['b'\]\..*site 'z' at 0\.07"
        ) as caught:
            fit(Loss(), start, optimizer=optax.sgd(1.0), accumulate=accumulate)
        error = caught.value
        assert (error.step, error.paths) == (7, ["['b']"])
        assert error.fit.steps == 7
        assert error.fit.stopped == "not finite"
        assert float(error.fit.params["a"]["n"]) == pytest.approx(0.07)
        assert np.isfinite(error.fit.losses).all()

    def test_infinite_updates(self):
        with pytest.raises(NonFiniteGradientError, match=r"loss of step 0 is 0\.2; not finite: .*params\['b'\]"):
            fit(lambda key, params: params["b"], {"b": 0.2}, optimizer=optax.sgd(jnp.inf), data=None, batch_size=None)


class TestCheckpoints:
    @pytest.mark.parametrize("how", [{}, {"segment": 4, "validate": lambda p: float(jnp.sum(p["b"]) - 0.1) ** 2}])
    def test_a_resumed_run_is_the_same_bit_for_bit(self, tmp_path, how):
        straight = fit(num_steps=17, **how)
        fit(num_steps=10, checkpoint=tmp_path / "run", **how)
        resumed = fit(num_steps=17, checkpoint=tmp_path / "run", **how)
        for part in ("losses", "stats", "params", "last"):
            assert_same(getattr(resumed, part), getattr(straight, part))
        assert_same(resumed.validations[-1:], straight.validations[-1:])
        again = fit(num_steps=17, checkpoint=tmp_path / "run", **how)
        assert_same((again.losses, again.params), (straight.losses, straight.params))

    def test_an_interrupted_run(self, tmp_path):
        straight, seen = fit(num_steps=18, segment=3, checkpoint=tmp_path / "straight"), []

        def stop(so_far):
            seen.append(so_far.steps)
            if so_far.steps == 12 and seen.count(12) == 1:
                raise KeyboardInterrupt

        how = {"num_steps": 18, "segment": 3, "checkpoint": tmp_path / "run", "checkpoint_every": 9}
        with pytest.warns(UserWarning, match="interrupted after 12"):
            fit(**how, on_segment=stop)
        assert_same(fit(**how, on_segment=stop).losses, straight.losses)
        assert seen == [3, 6, 9, 12, 15, 18]

    def test_damaged_ones_are_set_aside(self, tmp_path):
        how = {"num_steps": 12, "segment": 4, "checkpoint": tmp_path, "checkpoint_every": 4}
        straight = fit(**how)
        ruin = lambda step: [p.write_bytes(b"") for p in (tmp_path / step).rglob("*") if p.is_file()]
        ruin("12")
        with pytest.warns(UserWarning, match="12 cannot be read .*going back to the one before"):
            assert_same(fit(**how).losses, straight.losses)
        assert list(tmp_path.glob("unreadable-12-*")), "nothing is thrown away"
        for step in ("8", "12"):
            ruin(step)
        with (
            pytest.warns(UserWarning, match="cannot be read"),
            pytest.raises(RunCheckpointError, match=r"none of the checkpoints \[12, 8\]"),
        ):
            fit(**how)

    @pytest.mark.parametrize(
        ("what", "other"),
        [
            ("loss or optimizer", {"optimizer": optax.adam(0.01)}),
            ("loss or optimizer", {"loss": lambda key, params, batch: regression(key, params, batch)[0] * 2}),
            ("rng_key", {"rng_key": jax.random.key(4)}),
            ("settings", {"batch_size": 6}),
            ("settings", {"validate": lambda params: 0.0}),
            ("arrays", {"data": {**DATA, "y": DATA["y"] + 1}}),
        ],
    )
    def test_another_run_is_refused(self, tmp_path, what, other):
        fit(num_steps=2, checkpoint=tmp_path)
        with pytest.raises(RunCheckpointError, match=f"another run .its.* {what} "):
            fit(num_steps=4, checkpoint=tmp_path, **other)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"loss": lambda k, p, b: b["y"]}, r"must return float32\[\].*found float32\[5\]"),
        ({"loss": lambda k, p, b: (p["b"], [p["b"]])}, r"stats beside the loss.*\[float32\[\]\]"),
        ({"loss": lambda k, p, b: (p["b"], {"x": p["w"]})}, r"stats beside the loss.*\{x: float32\[3\]\}"),
        ({"params": {"w": PARAMS["w"], "n": {"i": 3}}}, r"params\['n'\]\['i'\] is int32, which has no gradient"),
        ({"params": {}}, "no arrays in params"),
        ({"data": {"x": X, "y": X[:3]}}, r"one leading axis.*data\['x'\] \[24\], data\['y'\] \[3\]"),
        ({"batch_size": 25}, "batch_size=25 is more than the 24 examples"),
        ({"data": None}, "batch_size=5 needs data"),
        ({"accumulate": 2}, "a batch of 5 examples cannot be split into 2 equal parts"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, not 0"),
        ({"segment": 2.5}, "segment must be a whole number"),
        ({"patience": 3}, "patience counts validations; give `validate` too"),
        ({"dtype": jnp.float16}, "dtype is bfloat16 or float32, not float16"),
    ],
)
def test_what_does_not_fit_is_refused(what, message):
    with pytest.raises(SiteError, match=message):
        fit(**what)


class Handle(NamedTuple):
    """What a notebook gives to change a picture that it shows."""

    shown: list

    def update(self, picture):
        self.shown.append(picture)


def test_pictures(tmp_path, monkeypatch):
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    plt.close("all")
    found = fit(
        segment=5, validate=lambda p: float(p["b"]), on_segment=lambda so_far: plt.close(so_far.figure(tmp_path / "now.png"))
    )
    drawing = found.figure(tmp_path / "curves.png")
    assert [panel.get_title(loc="left") for panel in drawing.axes] == ["loss", "bias"]
    assert (tmp_path / "curves.png").stat().st_size > 5000
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda picture, display_id: shown.append(picture) or Handle(shown))
    live = plots.LiveCurves(every=0.0)
    live(found), live(found)
    assert len(shown) == 2, "the second one takes the place of the first"
    assert plt.get_fignums() == [drawing.number], "pictures that are shown are closed"
    plt.close("all")


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from latentrace.inference import learning

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
on = lambda *spec: NamedSharding(mesh, P(*spec))
rng = np.random.default_rng(0)
data = {"x": rng.normal(size=(30, 6)).astype(np.float32), "y": rng.normal(size=30).astype(np.float32)}
params = {"w": 0.3 * rng.normal(size=(6, 8)).astype(np.float32), "v": 0.3 * rng.normal(size=8).astype(np.float32)}
count, placed = 0, learning.Shardings({"w": on(None, "model"), "v": on("model")}, on("data"))

def loss(key, params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + 0.1 * jax.random.normal(key, (8,)))
    return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)

def fit(**how):
    return learning.fit(loss, params, optax.adam(0.05), num_steps=25, rng_key=jax.random.key(0), data=data, batch_size=8,
                        segment=10, accumulate=2, **how)

alone, spread = fit(), fit(sharding=placed)
np.testing.assert_allclose(spread.losses, alone.losses, atol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread.params, alone.params)
assert {s.data.shape for s in spread.params["w"].addressable_shards} == {(6, 4)}
assert {s.data.shape for s in spread.last.opt_state[0].mu["w"].addressable_shards} == {(6, 4)}

def listen(event, seconds, **_):
    global count
    count += event == "/jax/core/compile/backend_compile_duration"

jax.monitoring.register_event_duration_secs_listener(listen)
fit(sharding=placed)
assert count == 0, count
import sys
fit(sharding=placed, checkpoint=sys.argv[1])
again = fit(sharding=placed, checkpoint=sys.argv[1])
np.testing.assert_array_equal(again.losses, spread.losses)
assert {s.data.shape for s in again.params["w"].addressable_shards} == {(6, 4)}
"""


def test_four_devices_give_what_one_gives(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", DEVICES, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
