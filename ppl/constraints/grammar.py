"""Grammars and JSON schemas as constraints, parsed by llguidance on the host.

Every way to spell an accepted text is allowed, not just the tokenizer's own, as with the other constraints: the text's
probability is that of its characters, summed over their spellings.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np

from ..language_model import LanguageModel
from .host import CallbackError, HostConstraint, host
from .tokens import ConstraintError

ANY_SPELLING = '%llguidance {"no_forcing": true}\n'
"""Without it, tokens of which the characters are forced would have to be the tokenizer's own."""


class GrammarParser:
    """llguidance's matcher as a `Parser`: forked, never changed."""

    def __init__(self, matcher: Any, vocab_size: int, eos_id: int):
        self.matcher, self.vocab_size, self.eos_id = matcher, vocab_size, eos_id

    def allowed(self) -> np.ndarray:
        """bool[V]"""
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self.matcher.is_error():
            if not self.matcher.get_error().startswith("NoExtension"):
                raise CallbackError(f"llguidance stopped: {first_line(self.matcher.get_error())}")
            bits[:] = 0  # the grammar goes on, but no token does
        return bits[: self.vocab_size].astype(bool)

    def after(self, token: int) -> "GrammarParser":
        fork = self.matcher.deep_copy()
        if not fork.consume_token(token):
            raise CallbackError(f"llguidance refused token {token}: {first_line(fork.get_error())}")
        return GrammarParser(fork, self.vocab_size, self.eos_id)

    def completed_by(self, tokens: list[int]) -> list[bool]:
        return [self.matcher.validate_tokens([token, self.eos_id]) == 2 for token in tokens]


def first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "no reason given"


class _Spellings:
    """A model's tokens as llguidance asks for them."""

    bos_token_id = None

    def __init__(self, lm: LanguageModel):
        self.eos_token_id, self.tokens = lm.eos_id, lm.token_bytes()
        self.special_token_ids = [i for i, spelling in enumerate(self.tokens) if not spelling]

    def __call__(self, text: bytes) -> list[int]:
        return []  # would be the tokenizer's own spelling, which nothing depends on


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConstraintError(
            "grammars are parsed by llguidance, which is not installed: pip install latentrace[grammars]"
        ) from None
    return llguidance


@lru_cache(maxsize=8)
def _tokenizer(lm: Any) -> Any:
    ll = _llguidance()
    return ll.LLTokenizer(ll.TokenizerWrapper(_Spellings(lm)), n_vocab=lm.vocab_size)


def grammar(lm: LanguageModel, source: str | Mapping[str, Any], *, time_limit: float = 60.0) -> HostConstraint:
    """The constraint that the whole text belongs to a grammar, by one host callback before each token.

    Where a regular expression will do, `regex` is much faster, and knows how many tokens are left; a grammar does not, so
    a text that is cut at `max_tokens` before it is complete has probability 0. Give it room: the last of
    `max_tokens` tokens has to complete the text, for which every allowed token is tried; where nearly all of a large
    vocabulary are, that costs more than the whole text before. `cost` of the constraint says what its callbacks have taken.

    Args:
        lm: whose tokens the text is made of.
        source: a context-free grammar in Lark's syntax, as llguidance reads it, that begins at `start`; or a JSON schema, as a
            mapping or as JSON text.
        time_limit: seconds after which one callback, for all particles, is given up.

    Raises `SiteError` where llguidance is not installed, the grammar is wrong, or this model's tokens cannot begin it. A
    parser that gives up while the text is written raises `CallbackError`, inside JAX's `JaxRuntimeError`.

        ppl.generate("answer", context, max_tokens=64, constraint=constraints.grammar(lm, {"type": "integer"}))
    """
    ll = _llguidance()
    if isinstance(source, str) and not source.lstrip().startswith("{"):
        text, kind = source, "grammar"
    else:
        text, kind = _schema(source), "JSON schema"
    description = f"{kind} {source!r}" if len(str(source)) <= 80 else f"{kind} {str(source)[:77]!r}..."
    tokenizer, compiled = _tokenizer(cast(Any, lm)), ll.LLMatcher.grammar_from_lark(ANY_SPELLING + text)
    if fault := ll.LLMatcher.validate_grammar(compiled, tokenizer):
        raise ConstraintError(f"{description}: {fault.strip()}")
    parser = GrammarParser(ll.LLMatcher(tokenizer, compiled, log_level=0), lm.vocab_size, lm.eos_id)
    if not parser.allowed().any():
        raise ConstraintError(f"{description}: no token of this model begins a text of it")
    return host(lm, parser, description, time_limit=time_limit)


def _schema(source: str | Mapping[str, Any]) -> str:
    """A Lark grammar of a JSON schema."""
    try:
        schema = json.loads(source) if isinstance(source, str) else source
        return f"start: %json {json.dumps(schema)}"
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"JSON schema {source!r} is no JSON: {error}") from None
