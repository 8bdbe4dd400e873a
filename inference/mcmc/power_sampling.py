"""Power sampling: texts from a language model's distribution raised to a power."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from latentrace import ppl
from latentrace.ppl.errors import SiteError
from latentrace.ppl.notes import Notes
from latentrace.ppl.walk import Walk

from ..chains import Draw, Info, Kernel, Target
from ..posterior import Posterior
from .cuts import Cuts
from .mcmc import MCMC
from .metropolis import accepts, choose
from .redraw import info_of_walks
from .regenerate import Regenerate
from .tempered import Tempered

Array = jax.Array


@dataclass(frozen=True)
class PowerSampling:
    """Texts from p^alpha, p being the model's probability of a text, by suffix moves (Karan and Du 2025).

    Each of `num_chains` texts is drawn at temperature 1 / alpha, and moved by `Regenerate` with that proposal: the last ones
    are the draws. For a program with more in it than one text, take `MCMC(Regenerate(), target=Tempered(sharpness=alpha))`.

    Args:
        alpha: the power, more than 0; 4 in the paper.
        num_moves: moves of each text; of each block with `compat`. 10 in the paper.
        num_chains: texts, which run side by side.
        cuts, tries: as in `Regenerate`.
        compat: None is exact: the target lies on a fixed horizon of `max_tokens`, and the acceptance counts where both texts
            could have been cut. "published" is the paper's code (aakaran/reasoning-with-sampling), so that its figures can be
            reproduced: the text grows block by block; a move may not outgrow the text's present length; the acceptance leaves
            out what the present text has past the end of the proposed one, and how many cuts each has. Its limit is not p^alpha
            where texts vary in length, and the posterior says that it is biased.
        blocks: of the published algorithm, 16 in the paper; they divide `max_tokens`.

    >>> import jax, jax.numpy as jnp
    >>> from latentrace import inference, models
    >>> lm = models.MarkovLM(jnp.array([0.0, 1.0, 0.5]), jnp.zeros((3, 3)), eos_id=0)
    >>> sampling = inference.mcmc.PowerSampling(alpha=4.0, num_moves=20, num_chains=8)
    >>> sampling.run(jax.random.key(0), lm, "", max_tokens=4).values["text"].tokens.shape
    (8, 4)
    """

    alpha: float = 4.0
    num_moves: int = 10
    num_chains: int = 32
    cuts: str | Cuts = "uniform"
    tries: int = 1
    compat: str | None = None
    blocks: int = 16

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise SiteError(f"PowerSampling: alpha must be positive, not {self.alpha}")
        if self.num_moves < 1:
            raise SiteError(f"PowerSampling: num_moves must be at least 1, not {self.num_moves}")
        if self.compat not in (None, "published"):
            raise SiteError(f"PowerSampling: compat must be None or 'published', not {self.compat!r}")
        if self.compat and (self.cuts != "uniform" or self.tries != 1):
            raise SiteError("PowerSampling: the published algorithm has uniform cuts and one try")

    def run(self, rng_key: Array, lm: Any, prompt: Any, *, max_tokens: int, progress: bool | None = None) -> Posterior:
        """Draw texts of at most `max_tokens` tokens after a prompt (a text or token ids): site "text", one for each chain."""
        if self.compat is None:
            kernel, target = Regenerate(self.cuts, self.tries), Tempered(sharpness=self.alpha)
            chains = MCMC(kernel, 1, self.num_moves - 1, self.num_chains, target=target)
            return chains.run(rng_key, _sharpened, lm, prompt, max_tokens, self.alpha, progress=progress)
        if max_tokens % self.blocks:
            raise SiteError(f"PowerSampling: {self.blocks} blocks do not divide max_tokens={max_tokens}")
        published = Published(self.alpha, max_tokens // self.blocks, self.num_moves)
        steps = self.blocks * (self.num_moves + 1) - 1
        chains = MCMC(published, 1, steps - 1, self.num_chains)
        found = chains.run(rng_key, _bounded, lm, prompt, max_tokens, self.alpha, progress=progress)
        return replace(found, values=_unbounded(found.values, max_tokens), returned=None, biased=True, chain_state=None)


@ppl.program
def _sharpened(lm: Any, prompt: Any, max_tokens: int, alpha: float) -> Any:
    """A text that is drawn at the temperature at which single tokens have the power `alpha`."""
    proposal = ppl.proposals.temperature(1 / alpha)
    return ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=max_tokens, proposal=proposal)[0]


# --- the published algorithm -----------------------------------------------------------------------------------------


@ppl.program
def _bounded(lm: Any, prompt: Any, max_tokens: int, alpha: float) -> Any:
    """The same, ended by force after `horizon` tokens: a text that is not ended has one more, EOS."""
    horizon = ppl.sample("horizon", dist.DiscreteUniform(1, max_tokens))
    end, proposal = Horizon(horizon, lm.vocab_size, lm.eos_id), ppl.proposals.temperature(1 / alpha)
    return ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=max_tokens + 1, constraint=end, proposal=proposal)[0]


@partial(jax.tree_util.register_dataclass, data_fields=["length"], meta_fields=["vocab_size", "eos_id"])
@dataclass(frozen=True)
class Horizon:
    """A constraint: nothing but EOS after `length` tokens."""

    length: Array
    vocab_size: int
    eos_id: int

    def start(self, max_tokens: int) -> Array:
        return jnp.int32(0)

    def mask(self, state: Array) -> Array:
        return (state < self.length) | (jnp.arange(self.vocab_size) == self.eos_id)

    def next(self, state: Array, token: Array) -> Array:
        return state + 1


class Growing(NamedTuple):
    """A text that grows block by block."""

    walk: Walk
    length: Array
    """int32[]: tokens, without an EOS by force"""
    finished: Array
    """bool[]: whether it had ended when its block was done"""

    @property
    def draw(self) -> Draw:
        return Draw(self.walk.values, self.walk.active, self.walk.returned)


@dataclass(frozen=True)
class Published(Kernel):
    """The moves of the published algorithm, `num_moves` for each block, and the step that adds the next block."""

    alpha: float
    block: int
    num_moves: int

    def start(self, target: Target, rng_key: Array, values: Any) -> tuple[Draw, Info]:
        return super().start(target, rng_key, {**values, "horizon": jnp.int32(self.block)})

    def init(self, target: Target, rng_key: Array, draw: Draw) -> Growing:
        tokens = draw.values["text"][0]
        target = self._bound(target, jnp.int32(self.block))
        walk, *_ = target.walk(rng_key, {"text": tokens}, {"text": jnp.ones(tokens.shape, bool)}, notes=Notes())
        return Growing(walk, self._length(walk, jnp.int32(self.block)), jnp.asarray(False))

    def step(self, target: Target, rng_key: Array, state: Growing) -> tuple[Growing, Info]:
        """One move, or the next block: then all is kept, and the text goes on."""
        cut_key, run_key, accept_key = jax.random.split(rng_key, 3)
        block, number = target.iteration // (self.num_moves + 1) + 1, target.iteration % (self.num_moves + 1)
        grows = number == self.num_moves
        finished = state.finished | (grows & (state.length < block * self.block))
        cut = jnp.where(grows, state.length, jax.random.randint(cut_key, (), 0, state.length))
        horizon = jnp.where(grows, (block + 1) * self.block, state.length)
        tokens, before = state.walk.values["text"][0], state.walk
        place = jnp.arange(tokens.shape[0])
        found, faults, counts = self._bound(target, horizon).walks(
            1, run_key, {"text": tokens}, {"text": place < cut}, before=before, notes=Notes()
        )
        after = found.value()
        length = self._length(after, horizon)
        redrawn = (place >= cut) & (place < length)  # of both: what the present text has past it does not count
        rise = self._log_w(after, redrawn) - self._log_w(before, redrawn)
        accept = ~finished & (grows | accepts(accept_key, rise))
        chosen = choose(accept, Growing(after, length, finished), state._replace(finished=finished))
        stats = {"cut": cut, "length": state.length, "new_tokens": counts.generated.sum()}
        return chosen, info_of_walks(faults, counts, accept, stats)

    def _bound(self, target: Target, horizon: Array) -> Target:
        return target._replace(given={**target.given, "horizon": horizon})

    def _length(self, walk: Walk, horizon: Array) -> Array:
        return jnp.minimum(walk.values["text"][1], horizon)

    def _log_w(self, walk: Walk, where: Array) -> Array:
        """log p^alpha / q of some tokens."""
        each = self.alpha * walk.values["text"][3] - walk.notes["text"].log_q
        return jnp.where(where, each, 0.0).sum()


def _unbounded(values: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Texts without the EOS by which they were ended."""
    text = values["text"]
    cut = np.asarray(text.length) > max_tokens
    return {
        "text": replace(
            text,
            tokens=np.asarray(text.tokens)[:, :max_tokens],
            length=np.minimum(text.length, max_tokens),
            ended=np.asarray(text.ended) & ~cut,
            log_probs=np.asarray(text.log_probs)[:, :max_tokens],
        )
    }
