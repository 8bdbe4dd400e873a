"""A word problem, reasoned step by step: one written line after another, then the answer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latentrace import ppl
from latentrace.models.reasoner import verifier
from latentrace.models.reasoner.process_reward import ProcessReward
from latentrace.models.reasoner.word_problems import MOST_STEPS, PROMPT_TOKENS, format_prompt

Array = jax.Array


class Reasoning(NamedTuple):
    """Where a chain of thought stands."""

    context: ppl.Context
    answer: Array
    """int32[]: what it has answered, `verifier.NO_ANSWER` so far"""
    log_reward: Array
    """float32[]: log of the process reward after the last line, nats"""


def think(context: ppl.Context, reward: ProcessReward | None = None) -> tuple[Reasoning, ppl.Text]:
    """Lines after a prompt until one of them answers; each line may be judged by a process reward, which steers."""

    def line(state: Reasoning, _: None) -> tuple[Reasoning, ppl.Text]:
        text, context = ppl.generate("line", state.context, until="\n", max_tokens=verifier.LINE_LENGTH)
        thinking, log_reward = state.answer == verifier.NO_ANSWER, state.log_reward
        if reward is not None:
            log_reward = jnp.where(thinking, reward.log_prob(ppl.features(context)), log_reward)
            ppl.twist("promise", log_reward)
        answer = jnp.where(thinking, verifier.answer_of(text.tokens, text.length), state.answer)
        return Reasoning(context, answer, log_reward), text

    start = Reasoning(context, jnp.int32(verifier.NO_ANSWER), jnp.float32(0))
    return jax.lax.scan(line, start, length=MOST_STEPS + 2)  # the last line holds the end token


@ppl.program
def step_by_step(lm: ppl.LanguageModel, question: str, reward: ProcessReward | None = None) -> Array:
    """The answer, int32[], -1 where the model gives none: its posterior is the model's, times the process reward of the whole
    chain if there is one."""
    end, _ = think(ppl.prompt(lm, format_prompt(question), pad_to=PROMPT_TOKENS), reward)
    if reward is not None:
        ppl.factor("reward", end.log_reward)
    return ppl.deterministic("answer", end.answer)
