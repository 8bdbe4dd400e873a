"""What twists learn from: texts, the features that predict each token, what drew them, and what the target makes of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace import ppl
from latentrace.ppl.errors import SiteError
from latentrace.ppl.language_model import LanguageModel, empty_memory
from latentrace.ppl.proposals import LearnedTwist

from ..smc import SMC

Array = jax.Array
AT_ONCE = 32
"""texts whose logits are in memory together"""


class TwistExamples(NamedTuple):
    """N texts for each of some prompts: arrays with leading axes [B, N], or [N] for one prompt; data of `learning.fit`.

    A model p has the final potential phi: the target is sigma(x) = p(x) phi(x) / Z.
    """

    features: Array
    """float32[..., T, D]: the model's, those that predict each token"""
    tokens: Array
    """int32[..., T]: padded after the end"""
    length: Array
    """int32[...]: tokens of each text"""
    log_p: Array
    """float32[..., T], nats: of each token under the model; 0 after the end"""
    log_q: Array
    """float32[..., T], nats: of each token under what it was drawn from; 0 after the end"""
    log_phi: Array
    """float32[...], nats: log phi of each text; -inf where it is refused"""

    @property
    def inside(self) -> Array:
        """bool[..., T]: which tokens belong to the text."""
        return jnp.arange(self.tokens.shape[-1]) < self.length[..., None]

    @property
    def log_ratio(self) -> Array:
        """float32[..., T], nats: log p - log q of the text up to each token, that one included."""
        return jnp.cumsum(self.log_p - self.log_q, axis=-1)

    @property
    def log_weight(self) -> Array:
        """float32[...], nats: of each text as an independent draw, by importance sampling of the target, not normalised."""
        return self.log_ratio[..., -1] + self.log_phi


class Contrast(NamedTuple):
    """What tells the target from what a twist makes of it so far."""

    positives: TwistExamples
    """texts of the target"""
    log_weights: Array
    """float32[B, N], nats: their weights, normalised among the texts of a prompt where they are used"""
    negatives: TwistExamples
    """independent draws"""

    @classmethod
    def of(cls, examples: TwistExamples) -> "Contrast":
        """The same independent draws for both: as they are, and weighted by importance."""
        return cls(examples, examples.log_weight, examples)


@ppl.program
def write(lm: LanguageModel, prompt: Array, max_tokens: int, until: str | None, twist: LearnedTwist | None) -> ppl.Text:
    """One text after a prompt."""
    return ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=max_tokens, until=until, twist=twist)[0]


def draw_examples(
    rng_key: Array,
    lm: LanguageModel,
    prompts: Sequence[Any],
    log_phi: Callable[[int, ppl.Text], Any],
    *,
    num_texts: int,
    max_tokens: int,
    until: str | None = None,
    twist: LearnedTwist | None = None,
    at_once: int = 64,
    progress: bool | None = None,
) -> TwistExamples:
    """Independent texts after each of some prompts, from the model or from what a twist makes of it, token by token.

    Args:
        prompts: texts or token ids, B of them.
        log_phi: `log_phi(b, texts)` gives log phi, float[num_texts] in nats, of a `Text` with a leading axis of `num_texts`,
            written after prompt number b. Called on the host.
        num_texts: per prompt, N.
        max_tokens: tokens of the longest text, T.
        until: a string that ends a text, besides EOS.
        twist: draws are from q(x_t) in proportion to p(x_t) psi(x_1:t), the twist-induced proposal; by default from the model.
        at_once: prompts that are under way at a time.

    >>> import jax, numpy as np
    >>> from latentrace import models
    >>> lm = models.MarkovLM([0.0, 0.5, 1.0], [[0.0, 0.5, 1.0]] * 3, eos_id=0)
    >>> long = lambda b, texts: np.log(texts.length >= 3)
    >>> with np.errstate(divide="ignore"):
    ...     draw_examples(jax.random.key(0), lm, ["", ""], long, num_texts=5, max_tokens=4).features.shape
    (2, 5, 4, 3)
    """
    if not len(prompts):
        raise SiteError("draw_examples: `prompts` is empty; give at least one text or list of token ids")
    ids = [token_ids(lm, prompt) for prompt in prompts]
    problems = [(lm, prompt, max_tokens, until, twist) for prompt in _padded(ids, ppl.text.PAD)]
    found = SMC(num_texts, ess_threshold=0.0).run_many(rng_key, write, problems, at_once=at_once, progress=progress)
    if None in found:  # what `run_many` makes of an interrupt
        raise KeyboardInterrupt
    texts = [posterior.values["text"] for posterior in found]
    potentials = np.stack([_checked(log_phi(b, text), num_texts) for b, text in enumerate(texts)])
    tokens, length = (jnp.asarray(np.stack([getattr(text, name) for text in texts])) for name in ("tokens", "length"))
    return _examples(lm, twist, ids, tokens, length, potentials)


def examples_of(
    lm: LanguageModel, prompt: Any, texts: ppl.Text, log_phi: Any, twist: LearnedTwist | None = None
) -> TwistExamples:
    """Examples from texts that are there: those of a posterior, or that somebody wrote.

    `log_q` is that of the twist-induced proposal; without a twist, that of the model.

    Args:
        prompt: what precedes them: a text or token ids.
        texts: a `Text` with a leading axis of N.
        log_phi: float[N], nats.
    """
    potentials = _checked(log_phi, texts.length.shape[0])
    return _examples(lm, twist, [token_ids(lm, prompt)], jnp.asarray(texts.tokens), jnp.asarray(texts.length), potentials)


def _checked(log_phi: Any, num_texts: int) -> np.ndarray:
    """Potentials of the texts of one prompt."""
    log_phi = np.asarray(log_phi, np.float32)
    if log_phi.shape != (num_texts,):
        raise SiteError(f"log_phi must be float[{num_texts}], one for each text, found shape {list(log_phi.shape)}")
    if not (log_phi < np.inf).all():
        raise SiteError(f"log_phi must be nats, -inf where a text is refused; found {log_phi[~(log_phi < np.inf)][0]}")
    return log_phi


def _examples(
    lm: LanguageModel, twist: LearnedTwist | None, ids: list[np.ndarray], tokens: Array, length: Array, log_phi: np.ndarray
) -> TwistExamples:
    """Examples of texts [B, N, T] after B prompts; of one prompt also [N, T]."""
    context, begin = jnp.asarray(_padded(ids, 0)), jnp.array([len(row) for row in ids])
    features, log_p, log_q = _read(lm, twist, context, begin, tokens, length)
    return TwistExamples(features, tokens, length, log_p, log_q, jnp.asarray(log_phi))


@jax.jit
def _read(
    lm: LanguageModel, twist: LearnedTwist | None, context: Array, begin: Array, tokens: Array, length: Array
) -> tuple[Array, Array, Array]:
    """Features, log p and log q of texts [..., T] after contexts [B, P], `begin` [B] tokens long: one pass over each."""

    def one(text: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, tokens, length = text
        places = begin[number] + jnp.arange(tokens.shape[0])
        whole = jnp.pad(context[number], (0, tokens.shape[0])).at[places].set(tokens)
        features = lm.forward(whole, empty_memory())[0][places - 1].astype(jnp.float32)
        logits, inside = lm.unembed(features), jnp.arange(tokens.shape[0]) < length
        paid = lambda logits: jnp.where(inside, pick(jax.nn.log_softmax(logits), tokens), 0.0)
        log_q = paid(logits if twist is None else logits + jax.vmap(twist.log_potentials)(features))
        return features, paid(logits), log_q

    numbers = jnp.arange(length.size) // (length.size // len(begin))
    rows = numbers, tokens.reshape(-1, tokens.shape[-1]), length.reshape(-1)
    found = jax.lax.map(one, rows, batch_size=min(AT_ONCE, length.size))
    return jax.tree.map(lambda x: x.reshape(*length.shape, *x.shape[1:]), found)  # type: ignore[no-any-return]


def pick(x: Array, tokens: Array) -> Array:
    """Of [..., V] the entry of each token [...]."""
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def token_ids(lm: LanguageModel, prompt: Any) -> np.ndarray:
    """int32[P] of a text or of token ids; the start token where there are none."""
    if isinstance(prompt, str):
        prompt = [*([lm.start_id] if lm.adds_start else []), *lm.encode(prompt)] if prompt else []
    return np.asarray(prompt if len(prompt) else [lm.start_id], np.int32)


def _padded(rows: list[np.ndarray], value: int) -> Array:
    """int32[B, P]: token ids, padded to one length."""
    width = max(map(len, rows))
    return jnp.asarray(np.stack([np.pad(row, (0, width - len(row)), constant_values=value) for row in rows]))
