"""Constraints that live on the device: regular expressions, words and automata, compiled once into tables over tokens."""

from .automata import ByteAutomaton
from .hmm import HMM, Lookahead, count_texts, lookahead, most_probable
from .regex import RegexError, compile_regex
from .tokens import ConstraintError, TokenAutomaton, WeightedAutomaton, automaton, regex, weighted, words

__all__ = [
    "HMM",
    "ByteAutomaton",
    "ConstraintError",
    "Lookahead",
    "RegexError",
    "TokenAutomaton",
    "WeightedAutomaton",
    "automaton",
    "compile_regex",
    "count_texts",
    "lookahead",
    "most_probable",
    "regex",
    "weighted",
    "words",
]
