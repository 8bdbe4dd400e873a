"""What a gradient step of a variational autoencoder costs: hand-written JAX, this library, and NumPyro's SVI, in one run.

    python tests/benchmarks/vae.py --batches 64 256 1024

Steps of the three are timed in turns, whole and compiled (value, gradient and update by Adam). Prints the median ratio to
hand-written JAX, and the temporary memory of the compiled step.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO

from latentrace import ppl
from latentrace.inference import vi

PIXELS, HIDDEN, LATENT = 784, 400, 20


def initial(rng_key: jax.Array) -> dict:
    sizes = {
        "e1": (PIXELS, HIDDEN),
        "mean": (HIDDEN, LATENT),
        "scale": (HIDDEN, LATENT),
        "d1": (LATENT, HIDDEN),
        "d2": (HIDDEN, PIXELS),
    }
    keys = jax.random.split(rng_key, len(sizes))
    return {name: (jax.random.normal(k, s) * s[0] ** -0.5, jnp.zeros(s[1])) for k, (name, s) in zip(keys, sizes.items())}


def affine(layer, x):
    return x @ layer[0] + layer[1]


def encode(params, x):
    hidden = jax.nn.softplus(affine(params["e1"], x))
    return affine(params["mean"], hidden), jnp.exp(affine(params["scale"], hidden))


def decode(params, z):
    return affine(params["d2"], jax.nn.softplus(affine(params["d1"], z)))


def by_hand(rng_key, params, x):
    """-ELBO per image, from JAX alone."""
    mean, scale = encode(params, x)
    noise = jax.random.normal(rng_key, mean.shape)
    z = mean + scale * noise
    logits = decode(params, z)
    log_x = (x * logits - jax.nn.softplus(logits)).sum()
    log_z = (-0.5 * z**2).sum()
    log_q = (-0.5 * noise**2 - jnp.log(scale)).sum()
    return -(log_x + log_z - log_q) / len(x)


@ppl.program
def model(params, x):
    z = ppl.sample("z", dist.Normal(0.0, 1.0).expand([len(x), LATENT]).to_event(2))
    ppl.observe("x", dist.Bernoulli(logits=decode(params, z)).to_event(2), x)


@ppl.program
def guide(params, x):
    mean, scale = encode(params, x)
    ppl.sample("z", dist.Normal(mean, scale).to_event(2))


ELBO = vi.elbo(model, guide)


def by_program(rng_key, params, x):
    return -ELBO(rng_key, params, x) / len(x)


def numpyro_model(x):
    params = {k: (numpyro.param(f"{k}/w"), numpyro.param(f"{k}/b")) for k in ("d1", "d2")}
    with numpyro.plate("images", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decode(params, z)).to_event(1), obs=x)


def numpyro_guide(x):
    params = {k: (numpyro.param(f"{k}/w"), numpyro.param(f"{k}/b")) for k in ("e1", "mean", "scale")}
    with numpyro.plate("images", len(x)):
        mean, scale = encode(params, x)
        numpyro.sample("z", dist.Normal(mean, scale).to_event(1))


def step_of(loss):
    optimizer = optax.adam(1e-3)

    def step(carry, rng_key, x):
        params, state = carry
        value, gradient = jax.value_and_grad(loss, argnums=1)(rng_key, params, x)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = lambda params: (params, optimizer.init(params))
    return start, jax.jit(step)


def numpyro_step():
    def start(params):
        flat = {f"{k}/{side}": x for k, pair in params.items() for side, x in zip("wb", pair)}
        svi = SVI(numpyro_model, numpyro_guide, numpyro.optim.optax_to_numpyro(optax.adam(1e-3)), Trace_ELBO())
        start.svi = svi
        return svi.init(jax.random.key(0), start.x, init_params=flat)

    def step(carry, rng_key, x):
        carry, loss = start.svi.update(carry._replace(rng_key=rng_key), x)
        return carry, loss / len(x)

    return start, jax.jit(step)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=40, help="of some steps each of the three, in turns")
    arguments = parser.parse_args(argv)
    print(f"{'batch':>6} {'':12}{'ms':>8}{'ratio':>8}{'MB':>8}{'loss':>9}")
    for batch in arguments.batches:
        x = jax.random.bernoulli(jax.random.key(1), 0.3, (batch, PIXELS)).astype(jnp.float32)
        params = initial(jax.random.key(0))
        ways = {"by hand": step_of(by_hand), "latentrace": step_of(by_program), "numpyro": numpyro_step()}
        ways["numpyro"][0].x = x
        compiled, carries, times, losses = {}, {}, {name: [] for name in ways}, {}
        for name, (start, step) in ways.items():
            carries[name] = start(params)
            compiled[name] = step.lower(carries[name], jax.random.key(0), x).compile()
        steps = max(2, 1024 // batch)
        keys = jax.random.split(jax.random.key(2), steps)
        for k in range(arguments.rounds):
            for name in np.random.default_rng(k).permutation(list(ways)):  # each follows each other as often
                began = time.perf_counter()
                for key in keys:
                    carries[name], losses[name] = compiled[name](carries[name], key, x)
                jax.block_until_ready((carries[name], losses[name]))
                times[name].append((time.perf_counter() - began) / steps)
        for name in ways:
            ratio = np.median(np.asarray(times[name]) / np.asarray(times["by hand"]))
            memory = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
            print(
                f"{batch:6} {name:12}{1e3 * np.median(times[name]):8.2f}{ratio:8.3f}{memory:8.2f}{losses[name]:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
