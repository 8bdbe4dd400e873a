"""Constraints of texts.

Regular expressions, words and automata live on the device, compiled once into tables over tokens; a hidden Markov model may
steer them. Grammars, and parsers and checks of your own, are asked on the host.
"""

from .automata import ByteAutomaton
from .check import Check, check
from .grammar import grammar
from .hmm import HMM, Lookahead, count_texts, lookahead, most_probable
from .host import CallbackError, HostConstraint, Parser, host
from .regex import RegexError, compile_regex
from .tokens import ConstraintError, TokenAutomaton, WeightedAutomaton, automaton, regex, weighted, words

__all__ = [
    "HMM",
    "ByteAutomaton",
    "CallbackError",
    "Check",
    "ConstraintError",
    "HostConstraint",
    "Lookahead",
    "Parser",
    "RegexError",
    "TokenAutomaton",
    "WeightedAutomaton",
    "automaton",
    "check",
    "compile_regex",
    "count_texts",
    "grammar",
    "host",
    "lookahead",
    "most_probable",
    "regex",
    "weighted",
    "words",
]
