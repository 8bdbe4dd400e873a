"""The driver of chains: what it keeps, how it stops and goes on, and what it refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import programs
import pytest

from latentrace import inference, ppl
from latentrace.inference import mcmc
from latentrace.inference.mcmc import mcmc as driver
from latentrace.ppl import errors
from latentrace.ppl import run as runs

from .cases import M3, J

KEY = jax.random.key(0)


@ppl.program
def program(bias):
    k = ppl.sample("k", dist.Bernoulli(0.3))
    text, _ = ppl.generate("text", ppl.prompt(M3), max_tokens=2)
    ppl.observe("seen", dist.Normal(0.0 + k, 1.0), 0.8)
    ppl.factor("reward", bias * text.length * (1 + k))
    ppl.condition("possible", (k == 0) | (text.tokens[0] != 1))
    return k, text.tokens


def density(path, sharpness=1.0, power=1.0):
    k = path.flip(0.3)
    path.density **= 1 / sharpness
    text = path.text(M3, (), 2)
    path.density **= sharpness
    path.weigh(np.exp(power * (-0.5 * (0.8 - k) ** 2 + 0.9 * len(text) * (1 + k))) * (k == 0 or text[0] != 1))
    return (k, *programs.padded(text, 2))


BIAS = np.asarray(0.9, np.float32)
PLAIN = inference.MCMC(mcmc.Regenerate(), num_samples=24, num_warmup=8, num_chains=3)


def run(how=PLAIN, key=KEY, bias=BIAS, **options):
    return how.run(key, program, bias, **options)


def same(one, other):
    """Bit-identical draws, and what their steps report."""
    texts = lambda text: (text.tokens, text.length, text.log_probs)
    about = lambda p: (p.values["k"], texts(p.values["text"]), p.returned, p.moves.accepted, p.moves.tokens, p.moves.stats)
    jax.tree.map(np.testing.assert_array_equal, about(one), about(other))


def part(posterior, draws):
    """Of the draws of each chain, those of these numbers."""
    chains = lambda x: x.reshape(posterior.chains, -1, *x.shape[1:])[:, draws]
    text = posterior.values["text"]
    return jax.tree.map(chains, (posterior.values["k"], text.tokens, text.log_probs))


@pytest.fixture(scope="module")
def plain():
    return run()


def test_shapes_and_the_order_of_chains(plain):
    assert (plain.chains, len(plain.log_weights)) == (3, 72)
    assert plain.values["k"].shape == (72,)
    assert plain.values["text"].tokens.shape == (72, 2)
    assert plain.returned[1].shape == (72, 2)
    assert plain.active["text"].shape == (72,)
    assert plain.moves.accepted.shape == plain.moves.tokens.shape == (3, 24)
    assert (plain.log_weights == 0).all()
    k, tokens, _ = part(plain, slice(None))
    still = plain.moves.accepted[:, 1:] == 0
    assert still.any()
    assert (plain.moves.accepted > 0).any()
    np.testing.assert_array_equal(k[:, 1:][still], k[:, :-1][still])  # only so within a chain
    np.testing.assert_array_equal(tokens[:, 1:][still], tokens[:, :-1][still])
    with pytest.raises(ValueError, match="do not estimate the evidence"):
        _ = plain.log_evidence


def test_the_ledger_pays_for_warmup_and_first_traces_too(plain):
    # whatever the cut, a step draws one token at least, and so does a first trace
    assert plain.ledger.tokens_generated >= plain.moves.tokens.sum() + 3 * 8 + 3
    assert plain.ledger.tokens_scored == 0
    assert plain.ledger.model_calls > 8 + 24
    assert plain.ledger.potential_calls >= 2 * 3 * 32


def test_the_same_key_gives_the_same_draws_and_traces_nothing_anew(plain):
    before = runs.traced
    same(run(), plain)
    again = run(key=jax.random.key(1), bias=np.asarray(0.2, np.float32))
    assert runs.traced == before
    assert not np.array_equal(again.values["text"].tokens, plain.values["text"].tokens)


def test_thinning_keeps_every_so_many_draws_of_the_same_chains(plain):
    thinned = run(replace(PLAIN, num_samples=8, thinning=3))
    jax.tree.map(np.testing.assert_array_equal, part(thinned, slice(None)), part(plain, slice(2, None, 3)))
    np.testing.assert_allclose(thinned.moves.accepted, plain.moves.accepted.reshape(3, 8, 3).mean(-1), rtol=1e-6)
    np.testing.assert_array_equal(thinned.moves.tokens, plain.moves.tokens.reshape(3, 8, 3).sum(-1))
    assert thinned.moves.thinning == 3


def test_other_chains_beside_it_do_not_change_a_chain():
    number = ppl.program(lambda: ppl.sample("x", dist.Normal(0.0, 1.0)))
    walks = [inference.MCMC(mcmc.Metropolis(mcmc.RandomWalk(x=1.0)), 50, 5, num_chains=n).run(KEY, number) for n in (3, 5)]
    few, many = (posterior.values["x"].reshape(-1, 50) for posterior in walks)
    np.testing.assert_allclose(many[:3], few, rtol=1e-6)
    assert len(np.unique(many[:, -1])) == 5


# --- stopping and going on --------------------------------------------------------------------------------------------


class Bar:
    """A progress bar that presses Ctrl-C after so many updates."""

    left = 0

    def __init__(self, **_):
        pass

    def update(self, _):
        Bar.left -= 1
        if Bar.left == 0:
            raise KeyboardInterrupt

    def close(self):
        pass


@pytest.fixture
def interrupted(monkeypatch):
    monkeypatch.setattr(driver, "SECONDS", 0.0)  # the host looks at every draw

    def after(updates):
        Bar.left = updates
        monkeypatch.setattr(driver, "tqdm", Bar)

    return after


@pytest.mark.parametrize("updates", [5, 8, 13])
def test_a_checkpoint_goes_on_as_if_uninterrupted(plain, interrupted, tmp_path, updates):
    checkpoint = inference.Checkpoint(tmp_path / "chains")
    interrupted(updates)
    if updates <= PLAIN.num_warmup:  # nothing to return yet
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=checkpoint)
    else:
        early = run(checkpoint=checkpoint)
        jax.tree.map(np.testing.assert_array_equal, part(early, slice(None)), part(plain, slice(0, updates - 8)))
    whole = run(checkpoint=checkpoint)
    same(whole, plain)
    assert replace(whole.ledger, seconds=0) == replace(plain.ledger, seconds=0)
    same(run(checkpoint=checkpoint), plain)  # the file of a finished run holds its end


def test_ctrl_c_keeps_the_draws_so_far_and_chains_go_on_from_there(plain, interrupted):
    interrupted(8 + 10)
    early = run()
    assert early.moves.accepted.shape == (3, 10)
    rest = run(replace(PLAIN, num_samples=14), resume=early)
    jax.tree.map(np.testing.assert_array_equal, part(rest, slice(None)), part(plain, slice(10, None)))


def test_resuming_a_posterior_is_a_longer_run(plain):
    first = run(replace(PLAIN, num_samples=10))
    rest = run(replace(PLAIN, num_samples=14), resume=first)
    jax.tree.map(np.testing.assert_array_equal, part(first, slice(None)), part(plain, slice(0, 10)))
    jax.tree.map(np.testing.assert_array_equal, part(rest, slice(None)), part(plain, slice(10, None)))
    assert first.ledger.tokens_generated + rest.ledger.tokens_generated == plain.ledger.tokens_generated
    again = run(replace(PLAIN, num_samples=14), resume=first)
    same(again, rest)  # the posterior that is resumed stays as it was


def test_what_belongs_to_another_run_is_refused(plain, tmp_path):
    path = tmp_path / "chains"
    run(replace(PLAIN, num_samples=1), checkpoint=inference.Checkpoint(path))
    for options, what in (
        ({"key": jax.random.key(7)}, "rng_key"),
        ({"bias": np.asarray(0.8, np.float32)}, "arrays"),
        ({"how": replace(PLAIN, num_warmup=9)}, "settings"),
    ):
        with pytest.raises(errors.RunCheckpointError, match=rf"belongs to another run \(its {what} differ\)"):
            run(checkpoint=inference.Checkpoint(path), **options)
        with pytest.raises(
            errors.RunCheckpointError, match=rf"resume: the posterior belongs to another run \(its {what} differ\)"
        ):
            run(resume=plain, **options)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(errors.RunCheckpointError, match="cannot be read as a checkpoint"):
        run(checkpoint=inference.Checkpoint(path))
    with pytest.raises(errors.SiteError, match=r"takes a posterior that `inference.MCMC` has returned"):
        run(resume=inference.ImportanceSampling(10).run(KEY, program, BIAS))
    with pytest.raises(errors.SiteError, match="give one of them"):
        run(resume=plain, checkpoint=inference.Checkpoint(path))


# --- first traces -----------------------------------------------------------------------------------------------------


@ppl.program
def locked():
    """Half of all values of `a` are possible; no value of `b` is, but 4."""
    a = ppl.sample("a", dist.Bernoulli(0.5))
    b = ppl.sample("b", dist.Normal(0.0, 1.0))
    ppl.condition("even", a == 0)
    ppl.condition("key 1.0", b == 4)


def test_start_values():
    one = inference.MCMC(mcmc.Metropolis(mcmc.RandomWalk(b=1.0)), num_samples=1, num_chains=4)
    posterior = one.run(KEY, locked, start={"b": 4.0})
    np.testing.assert_array_equal(posterior.values["b"], 4.0)
    np.testing.assert_array_equal(posterior.values["a"], 0)  # drawn until it was possible
    with pytest.raises(errors.AllParticlesDeadError, match=r"for 4 of 4 chains, in 1 forward runs.*at site 'even'"):
        one.run(KEY, locked, start={"a": 1, "b": 4.0})
    with pytest.raises(errors.SiteNameError, match="site 'c' does not exist"):
        one.run(KEY, locked, start={"c": 4.0})
    with pytest.raises(errors.SiteError, match=r"given a value of shape \(2,\)"):
        one.run(KEY, locked, start={"b": [4.0, 4.0]})
    with pytest.raises(errors.SiteError, match="site 'a' is given, and cannot start from another value"):
        one.run(KEY, locked.condition({"a": 0}), start={"a": 1})


def test_no_first_trace_names_the_site():
    one = inference.MCMC(mcmc.Metropolis(mcmc.RandomWalk(b=1.0)), num_samples=1, num_chains=4)
    with pytest.raises(errors.AllParticlesDeadError) as error:
        one.run(KEY, locked.condition({"a": 0}))
    assert "for 4 of 4 chains, in 100 forward runs of each: the last one has weight 0 at site 'key 1.0'. Give" in str(
        error.value
    )


def test_chains_that_never_move_are_told_with_numbers():
    stuck = inference.MCMC(mcmc.Metropolis(mcmc.RandomWalk(b=1.0)), num_samples=7, num_chains=2, thinning=3)
    told = r"2 of 2 chains never moved \(0, 1\): none of their proposals in 21 steps was accepted, for 0 tokens"
    with pytest.warns(UserWarning, match=told):
        stuck.run(KEY, locked, start={"a": 0, "b": 4.0})


# --- other targets ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tempered_targets_are_those_by_hand():
    """The exponents at the end of a ramp, by enumeration and by a chain."""
    ramp = mcmc.Tempered(sharpness=mcmc.Ramp(1.0, 2.5, 40, geometric=True), power=mcmc.Ramp(0.0, 0.4, 50))
    kernel = mcmc.ProposalProgram(
        lambda _: (ppl.sample("k", dist.Bernoulli(0.5)), ppl.generate("text", ppl.prompt(M3), max_tokens=2))
    )
    posterior = inference.MCMC(kernel, 2000, num_warmup=50, num_chains=4, target=ramp).run(KEY, program, BIAS)
    table = programs.measure(programs.paths(lambda path: density(path, 2.5, 0.4)))
    values = np.column_stack([posterior.values["k"], posterior.values["text"].tokens])
    for trace, p in table.items():
        holds = (values == trace).all(1)
        assert abs(holds.mean() - p / sum(table.values())) < 5 * posterior.error(holds) + 1e-3
    assert set(map(tuple, values.tolist())) <= set(table)


def test_ramps():
    even, constant_factor = mcmc.Ramp(0.5, 2.0, 10), mcmc.Ramp(0.5, 2.0, 10, geometric=True)
    for ramp, middle in ((even, 1.25), (constant_factor, 1.0)):
        found = [float(ramp.at(jnp.int32(i))) for i in (0, 5, 10, 99)]
        np.testing.assert_allclose(found, [0.5, middle, 2.0, 2.0], rtol=1e-6)
    with pytest.raises(errors.SiteError, match="the target changes up to step 10, but draws are kept from step 8 on"):
        run(replace(PLAIN, target=mcmc.Tempered(power=even)))
    for wrong in (lambda: mcmc.Tempered(sharpness=0.0), lambda: mcmc.Tempered(sharpness=mcmc.Ramp(1.0, -1.0, 5))):
        with pytest.raises(errors.SiteError, match="sharpness must be positive"):
            wrong()
    with pytest.raises(errors.SiteError, match="power must be 0 or more"):
        mcmc.Tempered(power=-0.1)
    with pytest.raises(errors.SiteError, match="steps must be at least 1"):
        mcmc.Ramp(0.0, 1.0, 0)
    with pytest.raises(errors.SiteError, match="between positive numbers"):
        mcmc.Ramp(0.0, 1.0, 5, geometric=True)


def test_estimated_densities_have_no_powers():
    @ppl.program
    def estimated():
        ppl.sample("x", dist.Categorical(logits=J))
        ppl.nested("inner", lambda: ppl.sample("y", dist.Normal(0.0, 1.0)), num_samples=2)()

    with pytest.raises(errors.SiteError, match=r"nested 'inner' only estimates its density.*leave out `target`"):
        inference.MCMC(mcmc.Regenerate(), 2, target=mcmc.Tempered(power=0.5)).run(KEY, estimated)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, not 0"),
        ({"num_warmup": -1}, "num_warmup must be a whole number of at least 0"),
        ({"num_chains": 1.5}, "num_chains must be a whole number"),
        ({"thinning": True}, "thinning must be a whole number"),
        ({"kernel": mcmc.Regenerate}, "expected a kernel, found type"),
    ],
)
def test_errors(options, message):
    with pytest.raises(errors.SiteError, match=message):
        inference.MCMC(**{"kernel": mcmc.Regenerate(), "num_samples": 2, **options})
