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
    ids = [token_ids(lm, prompt) for prompt in prompts]
    problems = [(lm, prompt, max_tokens, until, twist) for prompt in _padded(ids)]
    found = SMC(num_texts, ess_threshold=0.0).run_many(rng_key, write, problems, at_once=at_once, progress=progress)
    parts = []
    for b, posterior in enumerate(found):
        texts = posterior.values["text"]
        parts.append(examples_of(lm, ids[b], texts, log_phi(b, texts), twist, pad_to=max(map(len, ids))))
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)  # type: ignore[no-any-return]


def examples_of(
    lm: LanguageModel, prompt: Any, texts: ppl.Text, log_phi: Any, twist: LearnedTwist | None = None, *, pad_to: int = 0
) -> TwistExamples:
    """Examples from texts that are there: those of a posterior, or that somebody wrote.

    `log_q` is that of the twist-induced proposal; without a twist, that of the model.

    Args:
        prompt: what precedes them: a text or token ids.
        texts: a `Text` with a leading axis of N.
        log_phi: float[N], nats.
        pad_to: tokens that the prompt is padded to, so that prompts of several lengths share what is compiled.
    """
    ids = token_ids(lm, prompt)
    log_phi = np.asarray(log_phi, np.float32)
    if log_phi.shape != texts.length.shape:
        raise SiteError(f"log_phi must be float[{texts.length.shape[0]}], one for each text, found shape {list(log_phi.shape)}")
    if np.isnan(log_phi).any() or (log_phi == np.inf).any():
        raise SiteError(f"log_phi must be nats, -inf where a text is refused; found {log_phi[~(log_phi < np.inf)][0]}")
    context = jnp.zeros(max(pad_to, len(ids)), jnp.int32).at[: len(ids)].set(ids)
    tokens, length = jnp.asarray(texts.tokens), jnp.asarray(texts.length)
    features, log_p, log_q = _read(lm, twist, context, jnp.int32(len(ids)), tokens, length)
    return TwistExamples(features, tokens, length, log_p, log_q, jnp.asarray(log_phi))


@jax.jit
def _read(
    lm: LanguageModel, twist: LearnedTwist | None, context: Array, begin: Array, tokens: Array, length: Array
) -> tuple[Array, Array, Array]:
    """Features, log p and log q of texts [N, T] after the first `begin` tokens of a context: one pass over each."""

    def one(text: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        tokens, length = text
        places = begin + jnp.arange(tokens.shape[0])
        whole = jnp.pad(context, (0, tokens.shape[0])).at[places].set(tokens)
        features = lm.forward(whole, empty_memory())[0][places - 1].astype(jnp.float32)
        logits, inside = lm.unembed(features), jnp.arange(tokens.shape[0]) < length
        paid = lambda logits: jnp.where(inside, _pick(jax.nn.log_softmax(logits), tokens), 0.0)
        log_q = paid(logits if twist is None else logits + jax.vmap(twist.log_potentials)(features))
        return features, paid(logits), log_q

    return jax.lax.map(one, (tokens, length), batch_size=min(AT_ONCE, tokens.shape[0]))  # type: ignore[no-any-return]


def _pick(x: Array, tokens: Array) -> Array:
    """Of [..., V] the entry of each token [...]."""
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def token_ids(lm: LanguageModel, prompt: Any) -> np.ndarray:
    """int32[P] of a text or of token ids; the start token where there are none."""
    if isinstance(prompt, str):
        prompt = [*([lm.start_id] if lm.adds_start else []), *lm.encode(prompt)] if prompt else []
    return np.asarray(prompt if len(prompt) else [lm.start_id], np.int32)


def _padded(rows: list[np.ndarray]) -> Array:
    """int32[B, P]: prompts of one length, padded as `ppl.prompt` reads them."""
    width = max(map(len, rows))
    return jnp.asarray(np.stack([np.pad(row, (0, width - len(row)), constant_values=ppl.text.PAD) for row in rows]))
