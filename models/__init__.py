"""Language models: transformers in Hugging Face layout, Markov and hidden Markov models, and the shipped reasoner."""

from latentrace.models.adapters import LoRA, SoftPrompt
from latentrace.models.config import LayerOptions, TransformerConfig
from latentrace.models.errors import CheckpointError
from latentrace.models.hmm import HMMLM
from latentrace.models.hmm_fit import fit_hmm
from latentrace.models.loading import load, load_reward, save
from latentrace.models.markov import MarkovLM
from latentrace.models.reward import RewardModel
from latentrace.models.rotary import Rope
from latentrace.models.scoring import log_probs
from latentrace.models.sharding import make_mesh, shard
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import Transformer, TransformerLM

__all__ = [
    "HMMLM",
    "CheckpointError",
    "LayerOptions",
    "LoRA",
    "MarkovLM",
    "RewardModel",
    "Rope",
    "SoftPrompt",
    "Tokenizer",
    "Transformer",
    "TransformerConfig",
    "TransformerLM",
    "fit_hmm",
    "load",
    "load_reward",
    "log_probs",
    "make_mesh",
    "save",
    "shard",
]
