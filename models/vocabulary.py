"""What the table models (Markov, hidden Markov) share: a vocabulary of strings, and being a pytree."""

from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.language_model import Array, empty_memory

T = TypeVar("T", bound="TableModel")


class TableModel:
    """Text from an optional `vocabulary` of strings; the start token is the virtual token `vocab_size`."""

    vocab_size: int
    eos_id: int
    vocabulary: tuple[str, ...] | None
    adds_start: ClassVar[bool] = False
    max_length: ClassVar[int] = 2**31 - 1

    @property
    def start_id(self) -> int:
        return self.vocab_size

    def _strings(self) -> tuple[str, ...]:
        if self.vocabulary is None:
            raise ValueError(
                f"this {type(self).__name__} has no vocabulary, so it knows token ids but no text; "
                f"pass vocabulary=({self.vocab_size} strings) when making it"
            )
        return self.vocabulary

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: at each place the longest matching string of the vocabulary, never the end token."""
        strings = self._strings()
        ids = {string: i for i, string in enumerate(strings) if string and i != self.eos_id}
        longest_first = sorted(ids, key=len, reverse=True)
        tokens, place = [], 0
        while place < len(text):
            match = next((string for string in longest_first if text.startswith(string, place)), None)
            if match is None:
                raise ValueError(f"no token of the vocabulary begins {text[place : place + 20]!r} (place {place})")
            tokens.append(ids[match])
            place += len(match)
        return tokens

    def decode(self, ids: Any) -> str:
        """The text of token ids; start and end tokens are left out."""
        strings = self._strings()
        return "".join(strings[i] for i in np.asarray(ids, int).ravel() if i not in (self.eos_id, self.start_id))

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each token, b"" for the end token; length V."""
        return [b"" if i == self.eos_id else string.encode() for i, string in enumerate(self._strings())]

    def logits(self, tokens: Any) -> Array:
        """Logits float32[T, V] of a whole sequence int[T]; row t predicts token t + 1."""
        return _logits(self, jnp.asarray(tokens, jnp.int32))

    def _check(self, **expected: tuple[int, ...]) -> None:
        """The arrays' shapes, the end token and the vocabulary fit together."""
        for name, shape in expected.items():
            found = np.shape(getattr(self, name))
            if found != shape:
                raise ValueError(f"{type(self).__name__}: {name} has shape {found}, expected {shape} logits")
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"{type(self).__name__}: eos_id is {self.eos_id}, expected 0 to {self.vocab_size - 1}")
        if self.vocabulary is None:
            return
        if len(self.vocabulary) != self.vocab_size:
            raise ValueError(f"vocabulary has {len(self.vocabulary)} strings for {self.vocab_size} tokens")
        repeated = sorted({string for string in self.vocabulary if self.vocabulary.count(string) > 1})
        if repeated:
            raise ValueError(f"vocabulary repeats {repeated[0]!r}; each token needs its own string")


def register_table_model(cls: type[T]) -> type[T]:
    """Make a dataclass a pytree: "static" fields are structure, the others leaves.

    Unlike `jax.tree_util.register_dataclass` this rebuilds without the constructor, whose checks would reject the
    batched or abstract leaves that transformations put in.
    """
    static = [f.name for f in fields(cls) if f.metadata.get("static")]  # type: ignore[arg-type]
    leaves = [f.name for f in fields(cls) if not f.metadata.get("static")]  # type: ignore[arg-type]

    def flatten(model: T) -> tuple[list, tuple]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(model, name)) for name in leaves]
        return keyed, tuple(getattr(model, name) for name in static)

    def unflatten(structure: tuple, values: Any) -> T:
        model = object.__new__(cls)
        for name, value in [*zip(static, structure), *zip(leaves, values)]:
            object.__setattr__(model, name, value)
        return model

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@jax.jit
def _logits(lm: Any, tokens: Array) -> Array:
    features, _ = lm.forward(tokens, empty_memory())
    return lm.unembed(features)
