"""NumPyro's automatic guides and flows over a program's continuous sites."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from latentrace.ppl.choices import Choices, Keyed, Repeating, SiteRef
from latentrace.ppl.errors import SiteError
from latentrace.ppl.interpreter import first_state
from latentrace.ppl.program import as_program
from latentrace.ppl.run import arrays_of, given_arrays
from latentrace.ppl.staging import stage

from .implicit import flow
from .traces import interpreter

Array = jax.Array


class _Drawn(NamedTuple):
    drawn: Choices


class _Messages(Repeating, _Drawn):
    """Choices of a walk whose continuous values are sites of NumPyro; others are drawn."""

    __slots__ = ()

    def value(self, site: SiteRef, distribution: Any, number: Array) -> tuple[Any, Choices]:
        if distribution.support.is_discrete:
            return super().value(site, distribution, number)
        if site.path:
            raise SiteError(
                f"site {site.name!r} stands in a loop or plate, where NumPyro's automatic guides do not see it; make it one "
                "site of vectors, or write its guide"
            )
        return numpyro.sample(site.name, distribution), self


class _Flows(Messenger):
    """Draws NumPyro's auxiliary transformed variables by `flow`."""

    def process_message(self, msg: dict[str, Any]) -> None:
        of = msg.get("fn")
        if msg["type"] == "sample" and msg["infer"].get("is_auxiliary") and isinstance(of, dist.TransformedDistribution):
            msg["value"] = flow(msg["name"], of, auxiliary=True)
            msg["stop"] = True


class AutoGuide:
    """An automatic guide of NumPyro as a guide, or a part of one, of a program.

    It draws the program's continuous sites; where there are others, call it in a guide that draws them. Its parameters are
    unconstrained, a dictionary by NumPyro's names.

    Args:
        kind: `numpyro.infer.autoguide.AutoNormal`, `AutoMultivariateNormal`, `AutoIAFNormal`, `AutoBNAFNormal`, ...
        program: the model.
        args: of the model, for the shapes of its sites.
        rng_key: for the first parameters.
        options: of NumPyro's guide, such as `init_loc_fn=` or `num_flows=`.

    Raises `SiteError` for a continuous site in a loop or plate, and a model without one.

    >>> import jax, numpyro.distributions as dist
    >>> from numpyro.infer.autoguide import AutoNormal
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> @ppl.program
    ... def model(params):
    ...     scale = ppl.sample("scale", dist.Exponential(1.0))
    ...     ppl.observe("x", dist.Normal(0.0, scale), 2.0)
    >>> guide = vi.AutoGuide(AutoNormal, model, None, rng_key=jax.random.key(0))
    >>> sorted(guide.params)
    ['scale_auto_loc', 'scale_auto_scale']
    >>> vi.elbo(model, ppl.program(guide))(jax.random.key(0), guide.params).shape
    ()
    """

    def __init__(self, kind: Callable[..., Any], program: Any, *args: Any, rng_key: Array, **options: Any):
        self.__name__ = getattr(kind, "__name__", "guide")
        self.guide = kind(self._numpyro_model(as_program(program), args, rng_key), **options)
        with numpyro.handlers.block():
            found = trace(seed(self.guide, rng_key)).get_trace()
        sites = {name: site for name, site in found.items() if site["type"] == "param"}
        if not sites:
            raise SiteError(f"{self.__name__}: the program has no continuous site that is not given")
        self._bijections = {name: biject_to(site["kwargs"].get("constraint", constraints.real)) for name, site in sites.items()}
        flat = lambda name, value: jax.tree.map(lambda x: jnp.asarray(self._bijections[name].inv(x)), value)
        self.params = {name: flat(name, site["value"]) for name, site in sites.items()}
        """the first parameters"""

    def __call__(self, params: dict[str, Any], *_: Any) -> None:
        """Draw the sites; inside a program."""
        value = lambda name: jax.tree.map(self._bijections[name], params[name])
        if missing := [name for name in self._bijections if name not in params]:
            raise SiteError(f"{self.__name__}: no parameter {missing[0]!r}; start from the guide's `params`")
        with _Flows():
            substitute(self.guide, {name: value(name) for name in self._bijections})()

    def _numpyro_model(self, program: Any, args: tuple[Any, ...], rng_key: Array) -> Callable[[], None]:
        """The program as NumPyro sees it: its continuous sites, and all else as one factor."""
        staged = stage(program.fn, args)
        given, arrays = given_arrays(staged, program.given), arrays_of(staged)

        def model() -> None:
            state = first_state(staged, staged.models, _Messages(Keyed(rng_key, jnp.int32(0))), jnp.int32(0))
            run = interpreter(staged.skeleton(), arrays, state, given)
            run.walk(staged.jaxpr, [run.frame.put(x) for x in arrays.inputs])
            numpyro.factor("what the program pays", run.state.log_weight)

        return model
