"""Infill: Metropolis-Hastings moves that redraw a few choices in the middle of a trace, and repeat what follows."""

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.errors import SiteError
from latentrace.ppl.walk import Walk

from ..chains import Target
from .cuts import Cuts, rule
from .redraw import Place, Places, Redraw

Array = jax.Array

WHOLE = 2**30
"""tokens: of every text"""


class Infill(Redraw):
    """A kernel that redraws a few choices and repeats all others, those that follow included, where the new trace has them.

    A choice is taken by the rule of cuts: a value is redrawn by itself, a token of a text together with those after it in the
    text, `span` in all. They are drawn from the program's proposals in order, given what is before them; what follows is then
    as likely as the program says, and what the new trace lacks is drawn (a text that became longer) or dropped (shorter).
    The acceptance is that of `Redraw`; with span 1 it is single-site Metropolis-Hastings (Wingate, Stuhlmueller and Goodman
    2011), with a long one a move of a whole block.

    A move costs a pass through the model for each token from the first redrawn one on, repeated ones included.

    Args:
        sites: the random sites to move; all of them where none is named.
        span: tokens of a text to redraw.
        cuts: as in `Regenerate`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from latentrace import inference, models, ppl
    >>> lm = models.MarkovLM(jnp.zeros(3), jnp.zeros((3, 3)), eos_id=0)
    >>> @ppl.program
    ... def text():
    ...     text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=6)
    ...     ppl.factor("twos", 1.0 * (text.tokens == 2).sum())
    >>> kernel = inference.mcmc.Infill("text", span=2)
    >>> inference.MCMC(kernel, num_samples=20, num_chains=4).run(jax.random.key(0), text).values["text"].tokens.shape
    (80, 6)
    """

    def __init__(self, *sites: str, span: int = 1, cuts: str | Cuts = "uniform", power: float = 1.0):
        if isinstance(span, bool) or not isinstance(span, (int, np.integer)) or span < 1:
            raise SiteError(f"{type(self).__name__}: span must be a whole number of tokens, at least 1, not {span!r}")
        if not power > 0:
            raise SiteError(f"{type(self).__name__}: power must be positive, not {power}")
        rule(cuts, type(self).__name__)
        self.only, self.span, self.cuts, self.power, self.tries = sites, int(span), cuts, power, 1

    @property
    def sites(self) -> tuple[str, ...]:
        return self.only

    @property
    def rule(self) -> Cuts:
        return rule(self.cuts, "Infill")

    def movable(self, target: Target) -> list[str]:
        return [name for name in target.random if not self.only or name in self.only]

    def kept(self, target: Target, walk: Walk, place: Place) -> dict[str, Array]:
        inside, start = walk.inside(target.random), 0
        kept = dict(inside)
        for name in self.movable(target):
            mask = inside[name]
            length = mask.shape[-1] if mask.ndim > walk.active[name].ndim else 1
            here, first = jnp.arange(mask.size).reshape(mask.shape), place.at - start
            redrawn = (here // length == first // length) & (here >= first) & (here < first + self.span)
            kept[name] = mask & ~redrawn
            start += mask.size
        return kept

    def alike(self, places: Places, place: Place) -> Array:
        return jnp.arange(places.weights.shape[0]) == place.at

    def _fields(self) -> tuple[object, ...]:
        return type(self), self.only, self.span, self.cuts, self.power

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Infill) and self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def __repr__(self) -> str:
        parts = [*map(repr, self.only), f"span={self.span}", f"cuts={self.cuts!r}"]
        return f"Infill({', '.join(parts)})"


class SingleSite(Infill):
    """A kernel that redraws one value, or one whole text, and repeats all others: `Infill` of a whole site.

    >>> from latentrace.inference.mcmc import SingleSite
    >>> SingleSite("strategy").sites
    ('strategy',)
    """

    def __init__(self, *sites: str, power: float = 1.0):
        super().__init__(*sites, span=WHOLE, cuts="sites", power=power)

    def __repr__(self) -> str:
        return f"SingleSite({', '.join(map(repr, self.only))})"
