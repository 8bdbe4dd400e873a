"""Model programs to use as they are or to copy."""

from .game24 import expression_of, game_of_24

__all__ = ["expression_of", "game_of_24"]
