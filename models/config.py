"""The shape and options of a decoder-only transformer, over all supported families."""

from dataclasses import dataclass, field
from typing import Literal

from latentrace.models.rotary import Rope


@dataclass(frozen=True)
class LayerOptions:
    """What may differ from layer to layer."""

    rope: Rope | None = field(default_factory=Rope)
    """Rotary positions; None leaves queries and keys as they are."""
    window: int | None = None
    """How many of the latest tokens, itself included, a token sees; None: all."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and constants of a `Transformer`. The defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    eos_id: int
    bos_id: int | None = None
    family: str = "llama"
    """`model_type` of the checkpoints that this model is read from and saved to."""
    layer_pattern: tuple[LayerOptions, ...] = (LayerOptions(),)
    """Options of the layers, repeated until there are `num_layers`."""
    learned_positions: int = 0
    """How many positions have a vector that is added to the embeddings; 0: positions are not learnt."""
    embedding_scale: float = 1.0
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """Added to the learnt scale of a norm."""
    norm_places: Literal["before", "after", "both"] = "before"
    """Where a block (attention or MLP) has norms: on its input, on its output, or on both."""
    parallel: bool = False
    """Whether attention and MLP read the same input; otherwise the MLP reads what attention has added."""
    qk_norm: Literal["head", "all"] | None = None
    """Norms of queries and keys: over each head, or over all heads together."""
    attention_scale: float | None = None
    """Factor of attention scores; None: head_dim ** -0.5."""
    divide_scale_by_layer: bool = False
    """Whether layer i's scores are also divided by i + 1."""
    attention_cap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    """Whether the MLP is activation(gate) * up; otherwise activation(up)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    """Whether the output head is the embedding matrix."""
    logit_cap: float | None = None
    """Logits z become cap * tanh(z / cap)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrices, cached keys and values, and operands of matrix products, whose results are float32."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key-value head serves the same number of query heads"
            )
        if any(options.rope and int(self.head_dim * options.rope.fraction) % 2 for options in self.layer_pattern):
            raise ValueError(f"head_dim={self.head_dim} has an odd number of rotary coordinates; they turn in pairs")

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads

    def layer(self, index: int) -> LayerOptions:
        """The options of one layer."""
        return self.layer_pattern[index % len(self.layer_pattern)]
