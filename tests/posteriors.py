"""Four posteriors of posteriordb as NumPyro models, and its reference draws of them."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "posteriordb"


def ark(lagged, y):
    """Autoregression: `lagged` are the K values before each y, latest first."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([lagged.shape[1]]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y)


def eight_schools(y, sigma):
    theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0).expand([len(y)]))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta = numpyro.deterministic("theta", theta_trans * tau + mu)
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def hidden_markov(y):
    """Two states, summed over by the forward algorithm; the first one's weights are 1."""
    theta = jnp.stack([numpyro.sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)])
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    numpyro.factor("prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    log_theta, emitted = jnp.log(theta), dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(forward, log_p):
        return jax.nn.logsumexp(forward[:, None] + log_theta, axis=0) + log_p, None

    numpyro.factor("y", jax.nn.logsumexp(jax.lax.scan(step, emitted[0], emitted[1:])[0]))


def mixture(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    log_p = jnp.log(jnp.stack([theta, 1 - theta])) + dist.Normal(mu, sigma).log_prob(y[:, None])
    numpyro.factor("y", jax.nn.logsumexp(log_p, axis=1).sum())


class Reference(NamedTuple):
    """A posterior."""

    model: Callable[..., None]
    args: tuple[np.ndarray, ...]
    draws: dict[str, np.ndarray]
    """float64[10 chains, 1000 draws] by the names of Stan's parameters, such as mu[1]"""


def read(folder: Path, name: str) -> Any:
    with zipfile.ZipFile(folder / f"{name}.json.zip") as archive:
        return json.loads(archive.read(f"{name}.json"))


def reference(name: str, folder: Path = SHARED) -> Reference:
    """One of arK, eight_schools, hmm_example and low_dim_gauss_mix."""
    data = {k: np.asarray(v, np.float32) if isinstance(v, list) else v for k, v in read(folder / "data", name).items()}
    posterior = f"{name}-{name}" + ("_noncentered" if name == "eight_schools" else "")
    chains = read(folder / "draws", posterior)
    draws = {key: np.array([chain[key] for chain in chains]) for key in chains[0]}
    y = data["y"]
    match name:
        case "arK":
            lagged = np.stack([y[data["K"] - k : len(y) - k] for k in range(1, data["K"] + 1)], axis=1)
            return Reference(ark, (lagged, y[data["K"] :]), draws)
        case "eight_schools":
            return Reference(eight_schools, (y, data["sigma"]), draws)
        case "hmm_example":
            return Reference(hidden_markov, (y,), draws)
        case _:
            return Reference(mixture, (y,), draws)


NAMES = ("arK", "eight_schools", "hmm_example", "low_dim_gauss_mix")


def columns(values: dict[str, np.ndarray], names: Any) -> dict[str, np.ndarray]:
    """Draws [..., *shape] of the model's sites under the names of Stan's parameters."""
    found = {}
    for name in names:
        site, _, index = name.removesuffix("]").partition("[")
        value = np.asarray(values[site])
        found[name] = value[..., int(index) - 1] if index else value
    return found
