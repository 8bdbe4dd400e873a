"""The Game of 24: reach 24 from four numbers, reasoning in three written steps that an exact verifier checks."""

from collections.abc import Mapping
from typing import Any

import jax

from latentrace import ppl
from latentrace.models.reasoner import game24, verifier


@ppl.program
def game_of_24(lm: ppl.LanguageModel, puzzle: str) -> tuple[ppl.Text, jax.Array]:
    """Three reduction steps such as `10-4=6 | 6 6 8`, each with right arithmetic, the last of which leaves 24.

    A wrong step kills a particle at once, so SMC spends its tokens on those that are still right.
    """
    numbers = game24.check_puzzle(puzzle)
    context = ppl.prompt(lm, game24.format_prompt(numbers))

    def step(state: Any, _: None) -> tuple[Any, ppl.Text]:
        context, remaining = state
        line, context = ppl.generate("step", context, until="\n", max_tokens=max(verifier.STEP_LENGTHS))
        right, remaining = verifier.step_is_valid(remaining, line.tokens, line.length)
        ppl.condition("right step", right)
        return (context, remaining), line

    start = (context, verifier.puzzle_state(numbers))
    (_, remaining), lines = jax.lax.scan(step, start, length=3)
    ppl.condition("makes 24", verifier.is_solved(remaining))
    return lines, remaining


def expression_of(values: Mapping[str, Any]) -> str:
    """The solution that a trace of `game_of_24` wrote, as one expression: for `posterior.marginal(expression_of)`."""
    return game24.expression(game24.parse_trace("".join(values["step"].decode())))
