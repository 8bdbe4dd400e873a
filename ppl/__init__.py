"""The language: sites, contexts and texts, programs and their staging, and the interpreter that inference builds on."""

from . import constraints, errors, proposals
from .language_model import Block, LanguageModel, Memory
from .program import Program, Trace, program
from .proposals import AllowedTokens, Constraint, LearnedTwist, TokenCheck
from .sites import bound, condition, deterministic, factor, lookahead, nested, observe, sample, scope, twist, vmap
from .text import Context, Text, extend, features, generate, prompt, score, tokens

__all__ = [
    "AllowedTokens",
    "Block",
    "Constraint",
    "Context",
    "LanguageModel",
    "LearnedTwist",
    "Memory",
    "Program",
    "Text",
    "TokenCheck",
    "Trace",
    "bound",
    "condition",
    "constraints",
    "deterministic",
    "errors",
    "extend",
    "factor",
    "features",
    "generate",
    "lookahead",
    "nested",
    "observe",
    "program",
    "prompt",
    "proposals",
    "sample",
    "scope",
    "score",
    "tokens",
    "twist",
    "vmap",
]
