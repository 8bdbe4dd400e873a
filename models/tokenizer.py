"""Tokenizers in Hugging Face's tokenizer.json format, with the exact bytes of every token."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from latentrace.models.chat import Message, render
from latentrace.models.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A tokenizer.json with the ids of the start and end tokens. Equal definitions compare equal, so that loading a
    model twice compiles nothing twice."""

    def __init__(self, definition: str, bos_id: int | None = None, eos_id: int | None = None, chat_template: str | None = None):
        self.definition = definition
        """The text of tokenizer.json."""
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.chat_template = chat_template
        """A jinja2 template of chats."""
        self._backend = tokenizers.Tokenizer.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.adds_start = bos_id is not None and self._backend.encode("a").ids[:1] == [bos_id]
        """Whether encoding a text with special tokens puts the start token first."""

    @classmethod
    def from_file(cls, path: str | Path, bos_id: int | None = None, eos_id: int | None = None) -> "Tokenizer":
        """Read a tokenizer.json."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), bos_id, eos_id)
        except Exception as error:  # the backend raises plain Exception
            raise CheckpointError(f"{path} is not a readable tokenizer.json: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_id={self.eos_id})"

    def __reduce__(self) -> Any:
        return Tokenizer, self._identity()

    def _identity(self) -> tuple[str, int | None, int | None, str | None]:
        return self.definition, self.bos_id, self.eos_id, self.chat_template

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Any) -> str:
        """The text of token ids; special tokens are left out."""
        return self._backend.decode(np.asarray(ids, np.int64).ravel().tolist(), skip_special_tokens=True)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of a chat, special tokens included, ready for `ppl.prompt`.

        `messages` are {"role": ..., "content": ...}; other keyword arguments are variables of the template (such as
        `tools` or `enable_thinking`). Raises `CheckpointError` where the model has no template, or it fails.

            context = ppl.prompt(lm, lm.tokenizer.chat([{"role": "user", "content": "What is 6 times 7?"}]))
        """
        if self.chat_template is None:
            raise CheckpointError(
                "this tokenizer has no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json. "
                "Use a chat model, or write the prompt as text"
            )
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        special = {key: "" if index is None else self.token_name(index) for key, index in named.items()}
        text = render(self.chat_template, messages, add_generation_prompt, **(special | variables))
        return self.encode(text)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its name, such as "</s>"."""
        return self._backend.token_to_id(token)

    def token_name(self, token_id: int) -> str | None:
        """The name of a token in the vocabulary, such as "</s>"."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self) -> list[bytes]:
        """The exact bytes that each token adds to a text, b"" for special tokens; length `vocab_size`.

        A tokenizer that marks word starts (U+2581) also drops one leading space of a whole text: that is a property of
        the first token of a text, not of the token, and is not reflected here.
        """
        to_bytes = self._byte_rule()
        added = self._backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = b"" if added[index].special else added[index].content.encode()
            else:
                table[index] = to_bytes(token)
        for special in (self.bos_id, self.eos_id):
            if special is not None:
                table[special] = b""
        return table

    def _byte_rule(self) -> Any:
        """The function from a vocabulary string to its bytes, found from the decoder."""
        kinds = set(_component_types(json.loads(self.definition).get("decoder")))
        if "ByteLevel" in kinds:
            alphabet = _byte_alphabet()
            return lambda token: bytes(alphabet[character] for character in token)
        if kinds & {"Metaspace", "Replace", "ByteFallback", "Fuse"}:
            return _marked_bytes
        raise ValueError(
            f"the exact bytes of tokens are known for byte-level and SentencePiece-like tokenizers; this one's decoder "
            f"is {sorted(kinds) or 'missing'}"
        )


def _component_types(component: dict | None) -> Iterator[str]:
    if component is not None:
        yield component["type"]
        for part in component.get("decoders", ()):
            yield from _component_types(part)


def _marked_bytes(token: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next free code point from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}
