"""Word problems of which the answer alone is known: what leads to it is a latent text.

The programs below share their arguments, so that any two of them are a model and a guide of each other; `item` is one row of
`arrays`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentrace import ppl
from latentrace.models.reasoner import word_problems
from latentrace.models.reasoner.tokenizer import ANSWER, START_ID, TOKEN_ID
from latentrace.ppl.language_model import LanguageModel

ANSWER_ID = TOKEN_ID[ANSWER]
LINE = 8
"""Tokens of a step such as "Ann 12+5=17" and its newline."""
THOUGHT_TOKENS = word_problems.MOST_STEPS * LINE + 1
"""Most tokens of what precedes an answer, the word before it included."""
ANSWER_TOKENS = 4
"""A space, a number, a newline, the end."""


def arrays(lm: LanguageModel, problems: Sequence[tuple[str, word_problems.Solution]]) -> dict[str, np.ndarray]:
    """Token ids of problems and their solutions, int32[N, ...], unused places being -1.

    "prompt" of a problem; "hinted", the same and its answer; "answer", as it follows the word before it.
    """
    sizes = {"prompt": word_problems.PROMPT_TOKENS, "hinted": word_problems.PROMPT_TOKENS + 8, "answer": ANSWER_TOKENS}
    found = {name: np.full((len(problems), size), -1, np.int32) for name, size in sizes.items()}
    for i, (question, solution) in enumerate(problems):
        prompt = [START_ID, *lm.encode(word_problems.format_prompt(question))]
        answer = lm.encode(f" {solution.answer}\n")
        rows = {"prompt": prompt, "hinted": [*prompt, ANSWER_ID, *answer], "answer": [*answer, lm.eos_id]}
        for name, ids in rows.items():
            found[name][i, : len(ids)] = ids
    return found


def _thought(context: ppl.Context) -> ppl.Context:
    """Steps up to the word that comes before an answer."""
    return ppl.generate("thought", context, max_tokens=THOUGHT_TOKENS, until=[ANSWER_ID])[1]


@ppl.program
def answered(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A latent thought, and the answer, which is observed."""
    ppl.score("answer", _thought(ppl.prompt(lm, item["prompt"])), item["answer"])


@ppl.program
def thinking(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A thought, whatever follows from it."""
    _thought(ppl.prompt(lm, item["prompt"]))


@ppl.program
def hinted(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A thought by a model that has read the answer: a guide for `answered`."""
    _thought(ppl.prompt(guide_lm, item["hinted"]))


@ppl.program
def answering(lm: LanguageModel, guide_lm: LanguageModel, item: dict[str, Any]) -> None:
    """A thought and an answer, both by the model."""
    ppl.generate("answer", _thought(ppl.prompt(lm, item["prompt"])), max_tokens=ANSWER_TOKENS)
