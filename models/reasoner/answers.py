"""Word problems of which the answer alone is known: what leads to it is a latent text.

The programs below share their arguments, so that any two of them are a model and a guide of each other; `item` is one row of
`arrays`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentrace import ppl
from latentrace.models.reasoner import word_problems
from latentrace.models.reasoner.countdown import LARGEST_NUMBER
from latentrace.models.reasoner.tokenizer import ANSWER, START_ID, TOKEN_ID
from latentrace.ppl.language_model import LanguageModel

ANSWER_ID = TOKEN_ID[ANSWER]
LINE = 8
"""Tokens of a step such as "Ann 12+5=17" and its newline."""
THOUGHT_TOKENS = word_problems.MOST_STEPS * LINE + 1
"""Most tokens of what precedes an answer, the word before it included."""
ANSWER_TOKENS = 4
"""A space, a number, a newline, the end."""
MISPRINTS = 0.1
"""share of given answers that are any number, whatever the thought"""
LOG_RIGHT, LOG_MISPRINT = np.log1p(-MISPRINTS), np.log(MISPRINTS / (LARGEST_NUMBER + 1))
"""nats: that an answer is as it follows from a thought; that it is a certain misprint"""


def arrays(lm: LanguageModel, problems: Sequence[tuple[str, word_problems.Solution]]) -> dict[str, np.ndarray]:
    """Token ids of problems and their solutions, int32[N, ...], unused places being -1.

    "prompt" of a problem; "answer", as it follows the word before it.
    """
    sizes = {"prompt": word_problems.PROMPT_TOKENS, "answer": ANSWER_TOKENS}
    found = {name: np.full((len(problems), size), -1, np.int32) for name, size in sizes.items()}
    for i, (question, solution) in enumerate(problems):
        prompt = [START_ID, *lm.encode(word_problems.format_prompt(question))]
        answer = lm.encode(f" {solution.answer}\n")
        rows = {"prompt": prompt, "answer": [*answer, lm.eos_id]}
        for name, ids in rows.items():
            found[name][i, : len(ids)] = ids
    return found


def _thought(context: ppl.Context) -> ppl.Context:
    """Steps up to the word that comes before an answer."""
    return ppl.generate("thought", context, max_tokens=THOUGHT_TOKENS, until=[ANSWER_ID])[1]


@ppl.program
def answered(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A latent thought, and the answer, which is observed; a few answers are misprinted.

    Without misprints the posterior of a problem would rest on the least unlikely of wrong thoughts wherever none is right.
    """
    context = ppl.extend(_thought(ppl.prompt(lm, item["prompt"])), item["answer"][:1])
    log_right = jax.nn.log_softmax(lm.unembed(ppl.features(context)[None])[0])[item["answer"][1]]
    ppl.factor("answer", jnp.logaddexp(LOG_RIGHT + log_right, LOG_MISPRINT))


@ppl.program
def thinking(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A thought, whatever follows from it."""
    _thought(ppl.prompt(lm, item["prompt"]))


@ppl.program
def hinted(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A thought by a model that has read the answer, a number after the question: a guide for `answered`."""
    prompt, number = item["prompt"], item["answer"][1:3]  # and the end of the line, where the prompt has its own
    _thought(ppl.prompt(guide_lm, jax.lax.dynamic_update_slice(prompt, number, ((prompt >= 0).sum() - 1,))))


@ppl.program
def answering(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A thought and an answer, both by the model."""
    ppl.generate("answer", _thought(ppl.prompt(lm, item["prompt"])), max_tokens=ANSWER_TOKENS)
