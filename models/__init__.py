"""Language models: transformers in Hugging Face layout, Markov and hidden Markov models, and the shipped reasoner."""

from latentrace.models.errors import CheckpointError
from latentrace.models.hmm import HMMLM
from latentrace.models.loading import load, save
from latentrace.models.markov import MarkovLM
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import Transformer, TransformerConfig, TransformerLM

__all__ = [
    "HMMLM",
    "CheckpointError",
    "MarkovLM",
    "Tokenizer",
    "Transformer",
    "TransformerConfig",
    "TransformerLM",
    "load",
    "save",
]
