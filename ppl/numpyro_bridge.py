"""NumPyro models as programs: a handler at the bottom of NumPyro's stack turns its messages into sites."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.primitives as numpyro_primitives
from numpyro.distributions.distribution import ExpandedDistribution, MaskedDistribution, Unit

from . import sites
from .errors import SiteError


def is_factor(dist: Any) -> bool:
    """Whether a distribution is that of `numpyro.factor`, which plates expand and masks cover."""
    while isinstance(dist, (ExpandedDistribution, MaskedDistribution)):
        dist = dist.base_dist
    return isinstance(dist, Unit)


class Bridge(numpyro_primitives.Messenger):
    """Receives every NumPyro message after the model's own handlers have shaped it."""

    def process_message(self, msg: dict[str, Any]) -> None:
        rule = getattr(self, "_" + msg["type"], None)
        if rule is not None and not (msg["type"] != "sample" and msg["value"] is not None):
            rule(msg)

    def _sample(self, msg: dict[str, Any]) -> None:
        name, dist, scale = msg["name"], msg["fn"], msg["scale"]
        if is_factor(dist):
            log_factor = jnp.sum(dist.log_prob(msg["value"]))
            sites.factor(name, log_factor if scale is None else scale * log_factor)
            return
        if shape := msg["kwargs"].get("sample_shape"):
            dist = dist.expand_by(shape)
        if msg["is_observed"]:
            sites.bind_observe(name, dist, msg["value"], scale)
        elif msg["value"] is None:
            msg["value"] = sites.bind_sample(name, dist, scale, bool(msg["infer"].get("is_auxiliary")))

    def _deterministic(self, msg: dict[str, Any]) -> None:
        pass  # always carries its value: see postprocess_message

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "deterministic":
            sites.deterministic(msg["name"], msg["value"])

    def _param(self, msg: dict[str, Any]) -> None:
        initial = msg["args"][0] if msg["args"] else None
        if initial is None or callable(initial):
            raise SiteError(f"param {msg['name']!r} has no initial value; give one, or substitute a fitted value")
        msg["value"] = initial

    def _plate(self, msg: dict[str, Any]) -> None:
        size, subsample_size = msg["args"]
        raise SiteError(
            f"plate {msg['name']!r} subsamples {subsample_size} of {size}: its random indices would be no part of the trace; "
            "use the whole plate"
        )

    def _prng_key(self, msg: dict[str, Any]) -> None:
        raise SiteError("numpyro.prng_key() draws randomness that no trace would record; use a `numpyro.sample` site")

    def _control_flow(self, msg: dict[str, Any]) -> None:
        from numpyro.contrib.control_flow.cond import cond_wrapper
        from numpyro.contrib.control_flow.scan import scan_wrapper

        no_sites = numpyro_primitives.Messenger()
        no_sites.trace = {}  # type: ignore[attr-defined]
        if msg["fn"] is cond_wrapper:
            pred, true_fun, false_fun, operand = msg["args"]
            msg["value"] = jax.lax.cond(pred, true_fun, false_fun, operand), no_sites
        elif msg["fn"] is scan_wrapper:
            f, init, xs, length, reverse = msg["args"]
            if msg["kwargs"].get("history", 1) > 1:
                raise SiteError("numpyro's scan with history > 1 serves enumeration there; use history=1")
            carry, ys = jax.lax.scan(f, init, xs, length=length, reverse=reverse)
            msg["value"] = (length, None, carry), (no_sites, ys)
        else:
            raise SiteError(f"numpyro control flow {msg['fn'].__name__!r} is not supported; use jax.lax")


@contextlib.contextmanager
def intercept() -> Iterator[None]:
    """Make sites of NumPyro's primitives inside."""
    stack = numpyro_primitives._PYRO_STACK
    bridge = Bridge()
    stack.insert(0, bridge)
    try:
        yield
    finally:
        stack.remove(bridge)
