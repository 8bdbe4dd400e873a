"""A word problem with a plan: first decide how many steps it takes, then solve it in exactly so many."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from latentrace import ppl
from latentrace.models.reasoner import verifier
from latentrace.models.reasoner.word_problems import FEWEST_STEPS, MOST_STEPS, PROMPT_TOKENS, format_prompt


@ppl.program
def plan_then_solve(lm: ppl.LanguageModel, question: str, log_prior: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The number of steps and the answer, int32[] each.

    `log_prior` float32[5] weighs plans of two to six steps (default: all alike). A line that answers too early, or does
    not answer where the plan ends, contradicts the plan.
    """
    kinds = MOST_STEPS - FEWEST_STEPS + 1
    plan = ppl.sample("plan", dist.Categorical(logits=jnp.zeros(kinds) if log_prior is None else log_prior))
    steps = plan + FEWEST_STEPS

    def line(state: tuple[ppl.Context, jax.Array], t: jax.Array) -> tuple[tuple[ppl.Context, jax.Array], None]:
        context, answer = state
        text, context = ppl.generate("line", context, until="\n", max_tokens=verifier.LINE_LENGTH)
        found = verifier.answer_of(text.tokens, text.length)
        ppl.condition("as planned", ((found != verifier.NO_ANSWER) == (t == steps)) | (t > steps))
        return (context, jnp.where(t == steps, found, answer)), None

    start = (ppl.prompt(lm, format_prompt(question), pad_to=PROMPT_TOKENS), jnp.int32(verifier.NO_ANSWER))
    (_, answer), _ = jax.lax.scan(line, start, jnp.arange(MOST_STEPS + 2))
    return ppl.deterministic("steps", steps), ppl.deterministic("answer", answer)
