"""A word problem, answered at once: what the model says when it may not think."""

import jax
import jax.numpy as jnp

from latentrace import ppl
from latentrace.models.reasoner import verifier
from latentrace.models.reasoner.word_problems import ANSWER, format_prompt


@ppl.program
def direct_answer(lm: ppl.LanguageModel, question: str) -> jax.Array:
    """The answer, int32[]. The start of its line is put into the model's mouth, so it has no density; the number has."""
    lead = f"{ANSWER} "
    context = ppl.extend(ppl.prompt(lm, format_prompt(question)), lead)
    number, _ = ppl.generate("number", context, until="\n", max_tokens=2)
    given = jnp.asarray(lm.encode(lead), jnp.int32)
    answer = verifier.answer_of(jnp.concatenate([given, number.tokens]), given.size + number.length)
    ppl.condition("answers", answer != verifier.NO_ANSWER)
    return ppl.deterministic("answer", answer)
