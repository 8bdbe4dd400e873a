"""Contexts and texts: how a program prompts, generates from and reads a language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from .errors import SiteError
from .language_model import LanguageModel, feature_size
from .proposals import AllowedTokens, Constraint, Draft, LearnedTwist, Proposal, TokenCheck, checks_tokens, has_potentials
from .sites import (
    extend_p,
    features_p,
    generate_p,
    hoist,
    least_padding,
    model_number,
    prompt_p,
    score_p,
    site_name,
    tokens_p,
)
from .until import stop_table

Array = jax.Array
PAD = -1
"""Marks the unused end of given token ids."""


@partial(jax.tree_util.register_dataclass, data_fields=["handle"], meta_fields=["lm"])
@dataclass(frozen=True)
class Context:
    """A language model's context: a handle to tokens and caches that the interpreter owns.

    Contexts are values: they may be carried through loops, chosen by `jnp.where` on handles or `lax.select`, kept in
    lists; generating from one leaves it as it was (a fork).
    """

    handle: Array
    """int32[]"""
    lm: LanguageModel
    """The model, static."""


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "length", "ended", "log_probs"], meta_fields=["lm"])
@dataclass(frozen=True)
class Text:
    """A generated text. Leading axes, such as particles and loop steps, may stand before those named here."""

    tokens: Array
    """int32[max_tokens]: token ids, padded with the model's EOS."""
    length: Array
    """int32[]: number of tokens, EOS or the stop string included."""
    ended: Array
    """bool[]: whether EOS or `until` ended it; False where it was cut at `max_tokens`."""
    log_probs: Array
    """float32[max_tokens]: log probability of each token under the model, in nats; 0 after the end."""
    lm: LanguageModel = field(repr=False)
    """The model, static."""

    def __getitem__(self, index: Any) -> "Text":
        """The texts at an index of the leading axes."""
        return jax.tree.map(lambda x: x[index], self)

    def decode(self) -> Any:
        """The text as a string, or nested lists of strings over the leading axes. Not for use inside a program.

        Tokens are spelled exactly, so that texts which follow each other may be joined; EOS is left out.
        """
        letters = spellings(cast(Any, self.lm))
        spell = lambda ids: b"".join(letters[i] for i in ids if i != self.lm.eos_id).decode(errors="replace")
        return self._map(np.asarray(self.tokens), np.asarray(self.length), spell)

    def ids(self) -> Any:
        """Token ids up to the end as a tuple, or nested lists of tuples over the leading axes. Not for use inside a program."""
        return self._map(np.asarray(self.tokens), np.asarray(self.length), tuple)

    def _map(self, tokens: np.ndarray, lengths: np.ndarray, fn: Callable[[list[int]], Any]) -> Any:
        if lengths.ndim == 0:
            return fn(tokens[: int(lengths)].tolist())
        return [self._map(t, n, fn) for t, n in zip(tokens, lengths)]


@lru_cache(maxsize=32)
def spellings(lm: Any) -> list[bytes]:
    """The bytes of every token of a model."""
    return lm.token_bytes()


BUCKETS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def bucket(length: int) -> int:
    """The padded length of given tokens: prompts of one bucket share a compiled program."""
    return next((b for b in BUCKETS if b >= length), -(-length // 8192) * 8192)


def given_tokens(
    lm: LanguageModel, text: Any, site: str, *, start: bool = False, pad_to: int = 0, scored: bool = False
) -> Array:
    """int32[bucket] of given text or ids, padded with PAD. Traced ids are taken as they are."""
    if isinstance(text, str):
        text = [*([lm.start_id] if start and lm.adds_start else []), *lm.encode(text)] if text else []
    if isinstance(text, Text):
        inside = jnp.arange(text.tokens.shape[-1]) < text.length
        return jnp.where(inside, text.tokens, PAD)
    if isinstance(text, jax.Array):
        if text.ndim != 1 or not jnp.issubdtype(text.dtype, jnp.integer):
            raise SiteError(f"{site}: token ids must be int[T], found {text.dtype}{list(text.shape)}")
        return text.astype(jnp.int32)
    ids = np.asarray(text if len(text) else np.zeros(0), dtype=np.int64)
    if ids.ndim != 1:
        raise SiteError(f"{site}: expected a text or a list of token ids, found shape {ids.shape}")
    read_only = 0 if scored else getattr(lm, "num_embeddings", 0)  # tokens that the model reads and never writes
    limit = max(lm.vocab_size, lm.start_id + 1, read_only)
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        wrong = ids[(ids < 0) | (ids >= limit)][0]
        raise SiteError(f"{site}: token id {wrong} is outside the vocabulary of {lm.vocab_size} tokens")
    if len(ids) > lm.max_length:
        raise SiteError(
            f"{site}: {len(ids)} tokens do not fit the model's context of {lm.max_length}; shorten the text or use a model "
            "with a longer context"
        )
    padded = np.full(bucket(max(len(ids), pad_to, least_padding())), PAD, np.int32)
    padded[: len(ids)] = ids
    return jnp.asarray(padded)


def prompt(lm: LanguageModel, text: str | Sequence[int] | Array = "", *, pad_to: int = 0) -> Context:
    """A new context that holds `text` (or token ids, taken as they are); an empty one holds the model's start token.

    The prompt's length is padded to one of a few buckets; another prompt of the same bucket compiles nothing. `pad_to` puts
    all prompts of up to so many tokens into one bucket.
    """
    site_name("prompt")
    if not isinstance(lm, LanguageModel):
        raise SiteError(f"prompt: expected a LanguageModel, found {type(lm).__name__}; load one with `models.load`")
    tokens = given_tokens(lm, text, "prompt", start=True, pad_to=pad_to)
    return Context(prompt_p.bind(tokens, model=model_number(lm), name="prompt()")[0], lm)


def extend(context: Context, text: str | Sequence[int] | Array | Text) -> Context:
    """The context followed by given text (prompt pieces, tool results), which has no density.

    A finished context that is extended goes on: its EOS stays in it as a token.
    """
    site_name("extend")
    tokens = given_tokens(context.lm, text, "extend")
    return Context(extend_p.bind(context.handle, tokens, model=model_number(context.lm), name="extend()")[0], context.lm)


def score(name: str, context: Context, text: str | Sequence[int] | Array | Text) -> Context:
    """The context followed by *observed* text: the log-weight grows by log p(text given context).

    Nothing can follow the end of a finished context: there a non-empty text has probability 0.
    """
    full = site_name(name)
    tokens = given_tokens(context.lm, text, f"site {full!r}", scored=True)
    return Context(score_p.bind(context.handle, tokens, model=model_number(context.lm), name=full)[0], context.lm)


def tokens(context: Context, last: int) -> tuple[Array, Array]:
    """The last tokens of a context: int32[last], oldest first, padded with the model's EOS at the front, and how many of
    them are real (int32[])."""
    site_name("tokens")
    if last < 1:
        raise SiteError(f"tokens: `last` must be at least 1, not {last}")
    return tuple(tokens_p.bind(context.handle, last=last, model=model_number(context.lm), name="tokens()"))  # type: ignore[return-value]


def features(context: Context) -> Array:
    """The model's features float32[D] at the context's last token: what `lm.unembed` reads to predict the next one.

    A head on them, such as a process reward, costs no pass of its own: the model reads the last token now, in place of when
    the text goes on.

        line, context = ppl.generate("line", context, until="\\n", max_tokens=16)
        ppl.twist("promise", jax.nn.log_sigmoid(weights @ ppl.features(context)))
    """
    site_name("features")
    size = feature_size(context.lm)
    return features_p.bind(context.handle, size=size, model=model_number(context.lm), name="features()")[0]  # type: ignore[no-any-return]


def generate(
    name: str,
    context: Context,
    *,
    max_tokens: int,
    until: str | int | Sequence[str] | Sequence[int] | None = None,
    constraint: Constraint | TokenCheck | Array | np.ndarray | None = None,
    proposal: Proposal | Draft | None = None,
    twist: Callable[[Text], Any] | LearnedTwist | None = None,
) -> tuple[Text, Context]:
    """A random text from the model, and the context that it leads to.

    The text ends with EOS, with the token that completes `until`, or at `max_tokens`. Its density is that of the tokens
    up to and including the end. After a finished context it is empty, with probability 1.

    Args:
        max_tokens: most tokens of the text, at least 1.
        until: stop strings (they may span tokens) or stop token ids.
        constraint: bool[V] of allowed tokens, or a `Constraint` such as those of `latentrace.ppl.constraints` (regular
            expressions, words, automata): the text is conditioned on being allowed. One that is too costly to ask about
            every token is a `TokenCheck`, such as `constraints.check`.
        proposal: what to draw tokens from, a function of logits float32[V] (see `latentrace.ppl.proposals`), or
            `proposals.draft(context)`: another context.
        twist: a function of the `Text` so far that gives a log potential (nats) after each token; steers SMC inside the
            text as `ppl.twist` does between sites, and is taken back at the end. Or a `LearnedTwist`, which says so of each
            possible next token, and is drawn from too.

    Raises `SiteError` for parts of a wrong kind or shape, and for a draft with another vocabulary.
    """
    full = site_name(name)
    lm = context.lm
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, (int, np.integer)) or max_tokens < 1:
        raise SiteError(f"site {full!r}: max_tokens must be a whole number of at least 1, found {max_tokens!r}")
    constraint = _checked_constraint(full, lm, int(max_tokens), constraint)
    table = stop_table(lm, until, full)
    draft = _checked_draft(full, lm, proposal) if isinstance(proposal, (Draft, Context)) else None
    proposal_jaxpr, proposal_operands = _stage_proposal(full, lm, proposal if draft is None else draft.then)
    head = _checked_head(full, lm, twist) if has_potentials(twist) else None
    twist_jaxpr, twist_operands = _stage_twist(full, lm, int(max_tokens), twist if head is None else None)
    operands: dict[str, list[Any]] = {
        "until": [] if table is None else [jnp.asarray(table)],
        "constraint": jax.tree.leaves(constraint),
        "proposal": proposal_operands,
        "draft": [] if draft is None else [draft.context.handle],
        "twist": twist_operands,
        "head": jax.tree.leaves(head),
    }
    out = generate_p.bind(
        context.handle,
        *(x for group in operands.values() for x in group),
        name=full,
        model=model_number(lm),
        max_tokens=int(max_tokens),
        counts=tuple((part, len(group)) for part, group in operands.items()),
        constraint=jax.tree.structure(constraint),
        proposal=proposal_jaxpr,
        draft=None if draft is None else model_number(draft.context.lm),
        twist=twist_jaxpr,
        head=jax.tree.structure(head),
    )
    return Text(*out[:4], lm), Context(out[4], lm)  # type: ignore[call-arg]


def _checked_constraint(name: str, lm: LanguageModel, max_tokens: int, constraint: Any) -> Any:
    """A constraint that has all methods; errors come before anything is compiled or decoded."""
    if constraint is None:
        return None
    if not hasattr(constraint, "mask") and not checks_tokens(constraint):
        constraint = _allowed(name, lm, constraint)
    _check_leaves(name, "constraint", constraint)
    try:
        start = jax.eval_shape(lambda: constraint.start(max_tokens))
    except SiteError as error:
        raise SiteError(f"site {name!r}: {error}") from None
    if checks_tokens(constraint):
        found = jax.eval_shape(constraint.allows, start, jax.ShapeDtypeStruct((), jnp.int32))
        if jnp.shape(found) != () or found.dtype != jnp.bool_:
            raise SiteError(
                f"site {name!r}: the constraint's `allows` must say of one token whether it is allowed, bool[]; found "
                f"{found.dtype}{list(found.shape)}"
            )
    return constraint


def _allowed(name: str, lm: LanguageModel, constraint: Any) -> AllowedTokens:
    wanted = f"site {name!r}: a constraint is bool[{lm.vocab_size}] or has the methods of `ppl.Constraint` or `ppl.TokenCheck`"
    try:
        allowed = jnp.asarray(constraint)
    except TypeError:
        raise SiteError(f"{wanted}; found {type(constraint).__name__}") from None
    if allowed.shape != (lm.vocab_size,) or allowed.dtype != jnp.bool_:
        raise SiteError(f"{wanted}; found {allowed.dtype}{list(allowed.shape)}")
    return AllowedTokens(allowed)


def _check_leaves(name: str, what: str, tree: Any) -> None:
    """What a compiled program reads has to be made of arrays."""
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            raise SiteError(
                f"site {name!r}: the {what} must be a pytree of arrays, found {type(leaf).__name__} in it; make its class one "
                "by `jax.tree_util.register_dataclass`, or a NamedTuple"
            )


def _checked_draft(name: str, lm: LanguageModel, proposal: Draft | Context) -> Draft:
    """A draft whose tokens mean what the model's mean."""
    if not isinstance(proposal, Draft) or not isinstance(proposal.context, Context):
        found = proposal.context if isinstance(proposal, Draft) else proposal
        raise SiteError(f"site {name!r}: a draft is `ppl.proposals.draft(context)`, found {type(found).__name__} in its place")
    other = proposal.context.lm
    if other is lm:
        return proposal
    vocabularies = [(x.vocab_size, x.eos_id) for x in (lm, other)]
    if vocabularies[0] != vocabularies[1]:
        (v, eos), (w, other_eos) = vocabularies
        raise SiteError(
            f"site {name!r}: a draft must have the model's vocabulary of {v} tokens with EOS {eos}; found one of {w} with EOS "
            f"{other_eos}"
        )
    try:
        pairs = list(zip(*(spellings(cast(Any, x)) for x in (lm, other))))
    except ValueError:  # models that know token ids but no text
        return proposal
    if (different := next((i for i, (a, b) in enumerate(pairs) if a != b), None)) is not None:
        a, b = pairs[different]
        raise SiteError(f"site {name!r}: a draft must have the model's vocabulary; token {different} is {b!r}, not {a!r}")
    return proposal


def _checked_head(name: str, lm: LanguageModel, head: Any) -> LearnedTwist:
    """A twist that reads the model's features."""
    _check_leaves(name, "twist", head)
    size = feature_size(lm)
    try:
        found = jax.eval_shape(head.log_potentials, jax.ShapeDtypeStruct((size,), jnp.float32))
    except TypeError as error:
        raise SiteError(f"site {name!r}: the twist does not take the model's features float32[{size}]: {error}") from error
    if jnp.shape(found) != (lm.vocab_size,):
        raise SiteError(
            f"site {name!r}: the twist's `log_potentials` must have one entry for each of {lm.vocab_size} tokens, found shape "
            f"{list(jnp.shape(found))}"
        )
    return head  # type: ignore[no-any-return]


def _stage_proposal(name: str, lm: LanguageModel, proposal: Any) -> tuple[Any, list[Any]]:
    if proposal is None:
        return None, []
    if not callable(proposal):
        raise SiteError(
            f"site {name!r}: a proposal is a function of logits or `ppl.proposals.draft(context)`, found "
            f"{type(proposal).__name__}"
        )
    logits = jax.ShapeDtypeStruct((lm.vocab_size,), jnp.float32)
    jaxpr, operands, _ = hoist(proposal, logits, what=f"the proposal of site {name!r}")
    if [a.shape for a in jaxpr.out_avals] != [(lm.vocab_size,)]:
        shapes = [a.shape for a in jaxpr.out_avals]
        raise SiteError(f"site {name!r}: the proposal must return logits of shape [{lm.vocab_size}], found {shapes}")
    return jaxpr, operands


def _stage_twist(name: str, lm: LanguageModel, max_tokens: int, twist: Any) -> tuple[Any, list[Any]]:
    if twist is None:
        return None, []
    if not callable(twist):
        raise SiteError(
            f"site {name!r}: a twist is a function of the `Text` so far or has `log_potentials`, found {type(twist).__name__}"
        )
    s: Any = jax.ShapeDtypeStruct
    text = Text(s((max_tokens,), jnp.int32), s((), jnp.int32), s((), jnp.bool_), s((max_tokens,), jnp.float32), lm)

    def log_psi(text: Text) -> Array:
        value = twist(text)
        if jnp.shape(value) != ():
            raise SiteError(f"site {name!r}: the twist must return a scalar log potential, found shape {jnp.shape(value)}")
        return jnp.asarray(value, jnp.float32)

    jaxpr, consts, _ = hoist(log_psi, text, what=f"the twist of site {name!r}")
    return jaxpr, consts
