"""Countdown and the Game of 24: reach a target from a few numbers, in written steps that an exact verifier checks."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentrace import ppl
from latentrace.models.reasoner import verifier
from latentrace.models.reasoner.countdown import check_puzzle, expression, format_prompt, parse_trace
from latentrace.models.reasoner.process_reward import ProcessReward


@ppl.program
def countdown(
    lm: ppl.LanguageModel,
    puzzle: Any,
    reward: ProcessReward | None = None,
    checks: Literal["steps", "end", "none"] = "steps",
) -> tuple[ppl.Text, jax.Array]:
    """Reduction steps such as `10-4=6 | 6 6 8`, each with right arithmetic, the last of which leaves the target.

    Returns the lines and the numbers that remain, int32[K] and -1, which are all -1 after a wrong step.

    `puzzle` is a text such as "4 6 8 10" (make 24) or "4 6 8 10=32". With `checks` of "steps" a wrong step kills a
    particle at once, with "end" the verifier sees whole traces only. There a process reward steers in between and cancels.
    With "none" it takes the verifier's place: the posterior is the model's, times the process reward of every line.
    """
    numbers, target = check_puzzle(puzzle)
    goal = jnp.array([target])  # an array is an input of the compiled program, where a number would be part of it
    context = ppl.prompt(lm, format_prompt(numbers, target))

    def step(state: Any, _: None) -> tuple[Any, ppl.Text]:
        context, remaining = state
        line, context = ppl.generate("step", context, until="\n", max_tokens=verifier.step_length(len(numbers)))
        right, remaining = verifier.step_is_valid(remaining, line.tokens, line.length)
        if checks == "steps":
            ppl.condition("right step", right)
        if reward is not None:
            judge = ppl.factor if checks == "none" else ppl.twist
            judge("promise", reward.log_prob(ppl.features(context)))
        return (context, remaining), line

    start = (context, verifier.puzzle_state(numbers))
    (_, remaining), lines = jax.lax.scan(step, start, length=len(numbers) - 1)
    if checks != "none":
        ppl.condition("makes the target", verifier.is_solved(remaining, goal[0]))
    return lines, remaining


def expression_of(values: Mapping[str, Any]) -> str:
    """The solution that a trace of `countdown` wrote, as one expression: for `posterior.marginal(expression_of)`."""
    return expression(parse_trace("".join(values["step"].decode())))
