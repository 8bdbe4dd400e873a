"""A word problem, solved several times: the solutions have to agree, which sharpens the answer's distribution."""

import jax
import jax.numpy as jnp

from latentrace import ppl
from latentrace.models.reasoner import verifier
from latentrace.models.reasoner.word_problems import PROMPT_TOKENS, format_prompt

from .step_by_step import think


@ppl.program
def self_check(lm: ppl.LanguageModel, question: str, solutions: int = 2) -> jax.Array:
    """The answer, int32[]: where the model's own answers have probability p, this posterior is p^solutions, normalised.

    Majority voting is the mode of the same p; here agreement is a condition, so that the posterior says how sure it is.
    """
    context = ppl.prompt(lm, format_prompt(question), pad_to=PROMPT_TOKENS)
    answers = []
    for number in range(solutions):  # each solution forks the same prompt
        with ppl.scope(f"solution {number + 1}"):
            end, _ = think(context)
            answers.append(end.answer)
            ppl.condition("agrees", (end.answer != verifier.NO_ANSWER) & (end.answer == answers[0]))
    return ppl.deterministic("answer", jnp.asarray(answers[0]))
