"""Replica exchange leaves the product of its targets invariant: swaps are enumerated, without Monte Carlo error."""

import dataclasses
import itertools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.chains import Kernel, State, Target
from latentrace.inference.mcmc import replica_exchange
from latentrace.ppl import errors
from latentrace.ppl.run import arrays_of
from latentrace.ppl.staging import stage
from latentrace.ppl.state import Tempering

from .cases import M2, J

KEY = jax.random.key(0)


@ppl.program
def program():
    """A text of one to three tokens beside a choice; some pairs are impossible."""
    k = ppl.sample("k", dist.Categorical(logits=J))
    text, _ = ppl.generate("text", ppl.prompt(M2), max_tokens=3)
    ppl.factor("reward", 1.3 * k * text.length - 2.0 * text.length)
    ppl.condition("possible", k + text.length < 5)
    return jnp.concatenate([k[None], text.tokens])


def density(path, sharpness=1.0, power=1.0):
    k = path.choose(np.asarray(jax.nn.softmax(J)))
    prior = path.density
    text = path.text(M2, (), 3)
    likelihood = np.exp(1.3 * k * len(text) - 2.0 * len(text)) * (k + len(text) < 5)
    path.density = prior * (path.density / prior) ** sharpness * (likelihood**power if likelihood else 0.0)
    return (k, *programs.padded(text, 3))


TARGETS = {"sharpness": (0.3, 1.7, 1.0), "power": (0.0, 0.4, 1.0)}
"""neither rises evenly with the other"""


def target_of(fn):
    staged = stage(fn, ())
    return Target(staged.skeleton(), arrays_of(staged), {})


def all_densities():
    """Log densities [traces, K] of all traces, impossible ones included, and their probabilities by hand."""
    tables = [programs.measure(programs.paths(lambda p: density(p, s, b))) for s, b in zip(*TARGETS.values())]
    traces = [(k, *text) for k in range(3) for text in [(0, 0, 0), *[(1, *t) for t in [(0, 0), (1, 0), (1, 1)]]]]
    target, temperings = target_of(program), Tempering(*map(jnp.asarray, TARGETS.values()))

    def one(trace):
        draw = target.evaluate({"k": trace[0], "text": trace[1:]})[0]
        return replica_exchange.log_densities(target, draw, temperings)[0]

    found = jax.jit(jax.vmap(one))(jnp.asarray(traces))
    return np.asarray(found, np.float64), np.array([[table.get(trace, 0.0) for table in tables] for trace in traces])


def test_one_pass_gives_the_density_at_every_target():
    found, by_hand = all_densities()
    assert (by_hand == 0).any()
    np.testing.assert_allclose(np.exp(found), by_hand, atol=1e-6)
    np.testing.assert_array_equal((found == -np.inf).any(1), (by_hand == 0).all(1))
    target = target_of(program)
    draw = jax.eval_shape(lambda: target.evaluate({"k": jnp.int32(0), "text": jnp.zeros(3, jnp.int32)})[0])
    seven = Tempering(jnp.ones(7), jnp.ones(7))
    jaxpr = str(jax.make_jaxpr(lambda draw: replica_exchange.log_densities(target, draw, seven))(draw))
    assert re.search(r"f32\[7\]", jaxpr)
    assert not re.search(r"\[7,(?!1\])", jaxpr), "no text, nor what the model says of it, is there once for each target"


@pytest.mark.parametrize("odd", [0, 1])
def test_swaps_are_in_detailed_balance(monkeypatch, odd):
    """On all triples of traces; the outcome of each swap is enumerated."""
    monkeypatch.setattr(replica_exchange, "accepts", lambda key, log_ratio: key)
    log_density, by_hand = all_densities()
    possible = (by_hand > 0).all(1)
    log_density, by_hand = jnp.asarray(log_density[possible], jnp.float32), by_hand[possible]
    triples = np.array(list(itertools.product(range(possible.sum()), repeat=3)))
    law = (by_hand / by_hand.sum(0))[triples, np.arange(3)].prod(1)
    outcomes = jnp.array(list(itertools.product([False, True], repeat=2)))

    def one(triple, outcome):
        source, tried, swapped, chance = replica_exchange.exchange(outcome, log_density[triple], odd)
        happens = jnp.where(tried, jnp.where(swapped, chance, 1 - chance), ~outcome)
        return triple[source], happens.prod()

    after, p = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(triples, outcomes)
    number = np.ravel_multi_index(np.moveaxis(np.asarray(after), -1, 0), [possible.sum()] * 3)
    matrix = np.zeros((len(triples), len(triples)))
    np.add.at(matrix, (np.arange(len(triples))[:, None], number), np.asarray(p, np.float64))
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    flow = law[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-8)
    assert np.diag(matrix).min() < 0.5 < np.diag(matrix).max(), "traces swap"
    moved = np.any(triples[:, None] != triples[number], axis=(0, 1))
    np.testing.assert_array_equal(moved, [odd == 0, True, odd == 1])


# --- the whole step ---------------------------------------------------------------------------------------------------


WALK = mcmc.Metropolis(mcmc.RandomWalk(x=1.5))


@dataclass(frozen=True)
class Telling(Kernel):
    """Walks, and says between which values, at what target, and with which keys."""

    def init(self, target, rng_key, draw):
        return State(draw)

    def step(self, target, rng_key, state):
        now = target.choices(state.draw)["x"]
        state, info = WALK.step(target, rng_key, state)
        draws = jax.random.uniform(rng_key), jax.random.uniform(target.shared(rng_key))
        stats = dict(zip(("own", "shared"), draws), now=now, then=target.choices(state.draw)["x"])
        return state, info._replace(stats={**stats, "power": target.tempering.power})


@ppl.program
def modes():
    x = ppl.sample("x", dist.Normal(0.0, 3.0))
    ppl.factor("modes", -20.0 * (abs(x - 0.3) - 2.0) ** 2)


def run(kernel, num_samples=100, num_warmup=0, **options):
    return inference.MCMC(kernel, num_samples, num_warmup, num_chains=2, **options).run(KEY, modes)


@pytest.fixture(scope="module")
def adapted():
    return run(mcmc.ReplicaExchange(Telling(), powers=(0.0, 0.5, 0.8, 1.0)), num_warmup=128)


def test_replicas_move_at_their_own_targets_and_swap(adapted):
    stats = adapted.moves.stats
    kernel = stats["kernel"]
    np.testing.assert_array_equal(kernel["power"], stats["powers"])
    own, shared = kernel["own"], kernel["shared"]
    assert len(np.unique(own)) == own.size, "each replica of each chain has its own key"
    assert len(np.unique(shared)) == shared[0].size, "chains have keys in common, replicas do not"
    np.testing.assert_array_equal(shared[0], shared[1])
    tried, swapped = stats["tried"], stats["swapped"]
    np.testing.assert_array_equal(tried[:, 1:], ~tried[:, :-1])  # even pairs and odd pairs in turn
    np.testing.assert_array_equal(tried[..., 0], ~tried[..., 1])
    assert not (swapped & ~tried).any()
    then, now = kernel["then"][:, :-1], kernel["now"][:, 1:]
    after = then.copy()
    for i in range(3):  # the traces that the swaps of the step before have left
        pair = swapped[:, :-1, i]
        after[..., i] = np.where(pair, then[..., i + 1], after[..., i])
        after[..., i + 1] = np.where(pair, then[..., i], after[..., i + 1])
    np.testing.assert_array_equal(now, after)
    np.testing.assert_array_equal(adapted.values["x"].reshape(2, -1)[:, :-1], now[..., -1])
    half = (kernel["accepted"][..., -1] + swapped[..., -1]) / 2
    np.testing.assert_allclose(adapted.moves.accepted, np.where(tried[..., -1], half, kernel["accepted"][..., -1]))


def test_round_trips_are_those_of_the_replicas(adapted):
    stats = adapted.moves.stats
    replica, trips = stats["replica"], stats["round_trips"]
    assert (np.sort(replica, axis=-1) == np.arange(4)).all()
    assert (trips[:, -1] > trips[:, 0] + 3).all()
    for chain in range(2):
        rises = np.flatnonzero(np.diff(trips[chain])) + 1
        for before, at in itertools.pairwise(rises):
            number, between = replica[chain, at, -1], replica[chain, before:at]
            left = np.flatnonzero(between[:, -1] == number)
            assert (between[(left[-1] if len(left) else 0) :, 0] == number).any() or not len(left)


def test_the_ladder_adapts_in_warmup_only(adapted):
    powers = adapted.moves.stats["powers"]
    np.testing.assert_array_equal(powers, np.broadcast_to(powers[:, :1], powers.shape))
    first = np.float32([0.0, 0.5, 0.8, 1.0])
    assert (powers[..., [0, 3]] == first[[0, 3]]).all()
    assert (powers[:, 0, 1] < 0.3).all(), "the first step was much too wide"
    still = mcmc.ReplicaExchange(Telling(), powers=(0.0, 0.5, 0.8, 1.0), adapt=False)
    assert (run(still, 20, num_warmup=64).moves.stats["powers"] == first).all()


def test_targets_reject_alike_where_the_barrier_is_cut_evenly():
    places = replica_exchange.evened(jnp.arange(4.0), jnp.array([0.6, 0.2, 0.1]))
    np.testing.assert_allclose(places, [0.0, 0.5, 1.0, 3.0], atol=1e-6)
    np.testing.assert_allclose(replica_exchange.evened(places, jnp.full(3, 0.3)), places, atol=1e-6)
    np.testing.assert_allclose(replica_exchange.evened(places, jnp.zeros(3)), places, atol=1e-6)


def test_exponents_are_multiples_of_those_of_the_chain():
    kernel = mcmc.ReplicaExchange(mcmc.Regenerate(), sharpness=(0.25, 0.5, 1.0))
    target = target_of(program)._replace(tempering=Tempering(jnp.float32(4), jnp.float32(0.5)))
    found = kernel.targets(target, jnp.array([0.0, 0.5, 2.0]))
    np.testing.assert_allclose(found.sharpness, [1.0, 1.5, 4.0])
    np.testing.assert_allclose(found.power, 0.5)
    evenly = mcmc.ReplicaExchange(mcmc.Regenerate(), num_replicas=5).targets(target_of(program), jnp.arange(5.0))
    np.testing.assert_allclose(evenly.power, np.linspace(0, 1, 5))
    np.testing.assert_allclose(evenly.sharpness, 1.0)


def test_part_of_a_cycle():
    """Other kernels move the chain's own trace, and the replicas go on from there."""
    cycle = mcmc.Cycle(mcmc.ReplicaExchange(Telling(), num_replicas=2), mcmc.Metropolis(mcmc.RandomWalk(x=0.3)))
    posterior = run(cycle)
    now = posterior.moves.stats["ReplicaExchange"]["kernel"]["now"]
    np.testing.assert_array_equal(posterior.values["x"].reshape(2, -1)[:, :-1], now[:, 1:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [True, False])
def test_texts_have_the_posterior_at_every_target(adapt):
    kernel = mcmc.ReplicaExchange(mcmc.Regenerate(), powers=TARGETS["power"], sharpness=TARGETS["sharpness"], adapt=adapt)
    posterior = inference.MCMC(kernel, 6000, 300, num_chains=4).run(KEY, program)
    exact = {row.value: row.probability for row in inference.Exact().run(KEY, program).marginal("text")}
    for row in posterior.marginal("text"):
        assert abs(row.probability - exact[row.value]) < 5 * row.error + 1e-4
    with_tempered = inference.MCMC(kernel, 6000, 300, num_chains=4, target=mcmc.Tempered(2.0, 0.5)).run(KEY, program)
    table = programs.measure(programs.paths(lambda p: density(p, 2.0, 0.5)))
    for k in range(3):
        p = sum(v for key, v in table.items() if key[0] == k) / sum(table.values())
        row = next(row for row in with_tempered.marginal("k") if row.value == k)
        assert abs(row.probability - p) < 5 * row.error + 1e-4


@pytest.mark.slow
def test_replicas_go_on_from_a_file(tmp_path):
    kernel = mcmc.Cycle(
        mcmc.ReplicaExchange(mcmc.Regenerate(), num_replicas=3), mcmc.Mixture(mcmc.Regenerate(), mcmc.SingleSite())
    )
    how, checkpoint = inference.MCMC(kernel, 12, 16, num_chains=2), inference.Checkpoint(tmp_path / "chains")
    whole = how.run(KEY, program)
    dataclasses.replace(how, num_samples=5).run(KEY, program, checkpoint=checkpoint)
    resumed = how.run(KEY, program, checkpoint=checkpoint)
    about = lambda posterior: (posterior.values["text"].tokens, posterior.values["text"].log_probs, posterior.moves.stats)
    jax.tree.map(np.testing.assert_array_equal, about(resumed), about(whole))


@pytest.mark.slow
def test_adapted_neighbours_reject_alike():
    kernel = mcmc.ReplicaExchange(mcmc.Metropolis(mcmc.RandomWalk(x=1.0)), num_replicas=6)
    rates = []
    for warmup in (0, 2000):
        stats = inference.MCMC(kernel, 3000, warmup, num_chains=2).run(KEY, modes).moves.stats
        rates.append(1 - stats["swapped"].sum((0, 1)) / stats["tried"].sum((0, 1)))
    assert np.ptp(rates[1]) < 0.5 * np.ptp(rates[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least 2; found none"),
        ({"num_replicas": 1}, "at least 2; found 1 by num_replicas"),
        ({"powers": (0.5, 1.0), "sharpness": (0.1, 0.5, 1.0)}, "found 2 by powers, 3 by sharpness"),
        ({"powers": (0.5, 1.0), "num_replicas": 2}, "not both"),
        ({"powers": (0.5, 0.9)}, "the last of powers is the chain's own target and must be 1, not 0.9"),
        ({"powers": (-0.5, 1.0)}, "powers must be 0 or more"),
        ({"sharpness": (0.0, 1.0)}, "sharpness must be positive"),
    ],
)
def test_errors(options, message):
    with pytest.raises(errors.SiteError, match=message):
        mcmc.ReplicaExchange(mcmc.Regenerate(), **options)


def test_nested_programs_are_refused():
    @ppl.program
    def estimated():
        ppl.nested("inner", lambda: ppl.sample("y", dist.Normal(0.0, 1.0)), num_samples=2)()
        ppl.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(errors.SiteError, match=r"nested 'inner' only estimates its density.*take another kernel"):
        inference.MCMC(mcmc.ReplicaExchange(mcmc.Regenerate(), num_replicas=2), 2).run(KEY, estimated)
