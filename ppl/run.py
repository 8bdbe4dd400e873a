"""Running staged programs: one compiled call for all particles, kept for every program of the same structure."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .choices import WHOLE, Choices, Keyed, Retained
from .collectives import PARTICLES, PROBLEMS, index, over_particles
from .errors import (
    AllParticlesDeadError,
    BoundReachedError,
    ContextOverflowError,
    NonFiniteError,
    SiteError,
)
from .interpreter import Interpreter, first_state
from .lineage import Policy, remembering
from .sites import generate_p, sample_p
from .staging import Site, Staged, value_sites
from .state import Counts, Faults, Resamplings, Tempering
from .text import Text

Array = jax.Array


class Source(Protocol):
    """How a run's choices are made; hashable, since it is compiled in."""

    def choices(self, rng_key: Array, particle: Array, trace: Any) -> Choices:
        """The choices of particle number `particle` (int32[]); `trace` is what they repeat, empty where they do not."""
        ...


class KeyedSource(NamedTuple):
    """Pseudo-random draws."""

    def choices(self, rng_key: Array, particle: Array, trace: Any) -> Choices:
        return Keyed(rng_key, particle)


class RetainingSource(NamedTuple):
    """Pseudo-random draws, but particle 0 repeats a trace: a value for each random site."""

    def choices(self, rng_key: Array, particle: Array, trace: dict[str, Array]) -> Choices:
        return Retained(Keyed(rng_key, particle), trace, jnp.where(particle == 0, WHOLE, 0))


class Prefixes(NamedTuple):
    """Of traces, how much their particles repeat. Leading axes of particles."""

    values: dict[str, Array]
    """as in `Retained`"""
    cuts: Array
    """int32[N]"""


class RegeneratingSource(NamedTuple):
    """Each particle repeats a trace of its own up to a cut, and draws what follows."""

    def choices(self, rng_key: Array, particle: Array, trace: Prefixes) -> Choices:
        mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, particle, keepdims=False), trace)
        return Retained(Keyed(rng_key, particle), mine.values, mine.cuts)


class Settings(NamedTuple):
    """What a compiled run depends on besides the program; hashable."""

    num_particles: int
    source: Source = KeyedSource()
    policy: Policy | None = None
    progress: Any = None
    """a host function of one number, called as the run goes on"""
    generations: int = 0
    """how many of the latest resamplings to keep"""
    many: bool = False
    """whether several problems run side by side"""
    beside: tuple[str, ...] = ()
    """axes of more runs side by side, such as replicas of one chain"""
    steered: bool = False
    """whether twists have an effect though the run itself does not resample"""

    @property
    def axes(self) -> tuple[str, ...]:
        """The named axes that a particle lives in."""
        return (*([PROBLEMS] if self.many else []), *self.beside, PARTICLES)


class Output(NamedTuple):
    """What a run brings back; every field has a leading axis of particles."""

    returned: list[Array]
    values: dict[str, Any]
    active: dict[str, Array]
    log_weight: Array
    faults: Faults
    counts: Counts
    root: Array
    made: Array
    """int32: active random choices of each trace"""
    resamplings: Resamplings | None = None


class Arrays(NamedTuple):
    """What a staged program reads, as inputs of the compiled run."""

    inputs: list[Any]
    consts: list[Any]
    models: list[list[Any]]
    """leaves of each model"""


def arrays_of(staged: Staged) -> Arrays:
    return Arrays(staged.inputs, list(staged.consts.values()), [jax.tree.leaves(lm) for lm in staged.models])


def models_of(staged: Staged, arrays: Arrays) -> list[Any]:
    """A skeleton's models, with these arrays for weights."""
    return [tree.unflatten(leaves) for tree, leaves in zip(staged.trees, arrays.models)]


_compiled: OrderedDict[Any, Any] = OrderedDict()
MAX_COMPILED = 128
traced = 0
"""how many runs have been traced in this process; a second run of the same structure and shapes adds none"""


def compiled(key: Any, make: Callable[[], Any], donate: tuple[int, ...] = ()) -> Any:
    """The compiled `make()`, kept for every run of the same key; arguments of the numbers `donate` are used up by a call."""
    if key not in _compiled:
        _compiled[key] = jax.jit(make(), donate_argnums=donate)
        while len(_compiled) > MAX_COMPILED:
            _compiled.popitem(last=False)
    _compiled.move_to_end(key)
    return _compiled[key]


def given_arrays(staged: Staged, given: Mapping[str, Any]) -> dict[str, Array]:
    """Given values as arrays of their sites' shapes."""
    return {name: _given_array(staged.sites[name], staged, value) for name, value in given.items()}


def execute(staged: Staged, rng_key: Array, given: Mapping[str, Any], settings: Settings, first: int = 0) -> Output:
    """Run particles `first`, `first + 1`, ... of a program, compiled once per structure."""
    arrays = given_arrays(staged, given)
    run = compiled((staged.key(), settings, tuple(sorted(arrays))), lambda: runner(staged, settings))
    return run(rng_key, jnp.int32(first), arrays_of(staged), arrays, {})  # type: ignore[no-any-return]


def runner(staged: Staged, settings: Settings, tempering: Tempering | None = None) -> Any:
    """The function that runs a whole population: of the key, the first particle's number, `Arrays`, the arrays of given
    values, and what the source's choices repeat."""
    staged = staged.skeleton()

    def run(rng_key: Array, first: Array, arrays: Arrays, given: dict[str, Array], trace: Any) -> Output:
        global traced
        traced += 1
        consts = dict(zip(staged.consts, arrays.consts))
        models = models_of(staged, arrays)
        progress = None if settings.progress is None else lambda x: jax.debug.callback(settings.progress, x)

        def one_particle() -> Output:
            choices = settings.source.choices(rng_key, first + index(), trace)
            state = remembering(first_state(staged, models, choices), settings.generations)
            run = Interpreter(
                staged,
                consts,
                models,
                state,
                given=given,
                policy=settings.policy,
                progress=progress,
                axes=settings.axes,
                tempering=tempering,
            )
            run.steered |= settings.steered
            cells = run.walk(staged.jaxpr, [run.frame.put(x) for x in arrays.inputs])
            values = {name: run.frame.get(v) for name, (v, _) in run.records.items()}
            active = {name: run.frame.get(a) for name, (_, a) in run.records.items()}
            returned = [jnp.asarray(run.frame.get(c)) for c in cells]
            s = run.state
            root = first + s.root
            return Output(returned, values, active, s.log_weight, s.faults, s.counts, root, s.made, s.resamplings)

        return over_particles(one_particle, settings.num_particles)

    return run


def _given_array(site: Site, staged: Staged, value: Any) -> Array:
    """A given value as an array with the site's shape: token ids int32[*dims, max_tokens] for a text."""
    if site.kind == sample_p.name:
        assert site.out is not None
        expected = (*site.dims, *site.out[0])
        array = jnp.asarray(value)
        floats_for_ints = jnp.issubdtype(site.out[1], jnp.integer) and jnp.issubdtype(array.dtype, jnp.floating)
        if floats_for_ints and (isinstance(array, jax.core.Tracer) or (np.asarray(array) % 1 != 0).any()):
            raise SiteError(f"site {site.name!r}: given {array.dtype} values, expected {site.out[1]}")
        if array.shape != expected:
            raise SiteError(f"site {site.name!r}: given a value of shape {array.shape}, expected {expected}")
        return array
    lm = staged.models[site.model or 0]
    if isinstance(value, Text):
        value = value.tokens

    def pad(ids: Any) -> np.ndarray:
        try:
            ids = lm.encode(ids) if isinstance(ids, str) else list(ids)
        except (TypeError, ValueError) as error:
            raise SiteError(f"site {site.name!r}: given {ids!r}, expected a text or token ids ({error})") from error
        if len(ids) > site.max_tokens:
            raise SiteError(f"site {site.name!r}: given {len(ids)} tokens, more than its max_tokens of {site.max_tokens}")
        if outside := [int(i) for i in ids if not 0 <= i < lm.vocab_size]:
            raise SiteError(
                f"site {site.name!r}: given token id {outside[0]}, which is outside the vocabulary of {lm.vocab_size} tokens"
            )
        return np.asarray([*ids, *[lm.eos_id] * (site.max_tokens - len(ids))], np.int32)

    def nested(value: Any, dims: tuple[int, ...]) -> np.ndarray:
        if not dims:
            return pad(value)
        if isinstance(value, str) or len(value) != dims[0]:
            raise SiteError(f"site {site.name!r}: given {len(value)} values for a loop or plate of {dims[0]}")
        return np.stack([nested(v, dims[1:]) for v in value])

    if isinstance(value, jax.core.Tracer):
        return jnp.asarray(value, jnp.int32)
    return jnp.asarray(nested(value if isinstance(value, (str, list, tuple)) else np.asarray(value), site.dims))


def check_faults(staged: Staged, faults: Faults, log_weight: np.ndarray) -> None:
    """Raise what went wrong in a run of particles of these log-weights, naming the site."""
    names = {s.number: s.name for s in staged.sites.values()}
    site = lambda numbers: repr(names[int(np.max(numbers))])
    if (np.asarray(faults.non_finite) >= 0).any():
        raise NonFiniteError(
            f"site {site(faults.non_finite)}: its log-weight was NaN or +inf for "
            f"{(np.asarray(faults.non_finite) >= 0).sum()} of {log_weight.size} particles; return a finite number of nats, or "
            "-inf for what is impossible"
        )
    if (np.asarray(faults.overflow) >= 0).any():
        found = staged.sites[names[int(np.max(faults.overflow))]]
        held = {staged.models[m].max_length for m in (found.model or 0, found.draft) if m is not None}
        limit = " or ".join(map(str, sorted(held)))
        raise ContextOverflowError(
            f"site {found.name!r}: a context grew past the model's {limit} tokens; shorten the prompt or lower max_tokens"
        )
    if (np.asarray(faults.bound) >= 0).any():
        raise BoundReachedError(
            f"site {site(faults.bound)}: its while loop was still going after its bound in "
            f"{(np.asarray(faults.bound) >= 0).sum()} of {log_weight.size} particles; raise the bound, or declare "
            "`ppl.bound(max_steps, truncate=True)` to make the cut part of the program"
        )
    if (log_weight == -np.inf).all():
        last = int(np.argmax(np.asarray(faults.died_at)))
        name = names.get(int(np.asarray(faults.died)[last]), "?")
        raise AllParticlesDeadError(
            f"all {log_weight.size} particles have weight 0; the last one died at site {name!r}. Use more particles, steer "
            "them there sooner with a `twist` or a `constraint`, or check that the condition can be met"
        )


def label_values(staged: Staged, values: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded arrays as a user sees them: generated ones are `Text`s."""
    labelled = {}
    for site in value_sites(staged):
        if site.name in values:
            value = values[site.name]
            text = site.kind == generate_p.name
            labelled[site.name] = Text(*value, staged.models[site.model or 0]) if text else value  # type: ignore[call-arg]
    return labelled
