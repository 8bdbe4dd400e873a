"""Constraints that live on the device: regular expressions, words and automata, compiled once into tables over tokens."""

from .automata import ByteAutomaton
from .regex import RegexError, compile_regex
from .tokens import ConstraintError, TokenAutomaton, automaton, regex, words

__all__ = [
    "ByteAutomaton",
    "ConstraintError",
    "RegexError",
    "TokenAutomaton",
    "automaton",
    "compile_regex",
    "regex",
    "words",
]
