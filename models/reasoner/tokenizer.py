"""The reasoner's vocabulary: a number, an operator, a word or a separator is one token, and text round-trips exactly."""

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from latentrace.models.reasoner.countdown import LARGEST_NUMBER
from latentrace.models.reasoner.word_problems import ANSWER, NAMES, THINGS, TOGETHER

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
NEWLINE, SPACE, BAR, EQUALS = "\n", " ", " | ", "="
OPERATORS = "+-*/"
NUMBERS = tuple(str(number) for number in range(LARGEST_NUMBER + 1))
_STORY = "has have more fewer than times as buys finds sells loses gives half of the and"
WORDS = tuple(f"How many do does {_STORY}".split())
VOCABULARY = (
    *(UNKNOWN, START, END, NEWLINE, SPACE, BAR, EQUALS, *OPERATORS, *NUMBERS),
    *(".", "?", ANSWER, TOGETHER, *NAMES),
    *(f" {word}" for word in (*NAMES, *THINGS, *WORDS)),
)
"""The text of each token, by id. A word takes the space before it along."""
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
"""The id of each token."""
VOCAB_SIZE = len(VOCABULARY)
START_ID, END_ID = TOKEN_ID[START], TOKEN_ID[END]

NUMBER_OF_TOKEN = np.array([int(t) if t.isdigit() else -1 for t in VOCABULARY], np.int32)
"""int32[V]: the number that a token writes, -1 for other tokens."""
OPERATOR_OF_TOKEN = np.array([OPERATORS.index(t) if t in tuple(OPERATORS) else -1 for t in VOCABULARY], np.int32)
"""int32[V]: the index in `OPERATORS` of a token, -1 for other tokens."""

_PIECES = r" \| |[0-9]+|[-+*/=]| ?[A-Za-z]+|[.?]| |\n"


def build_tokenizer() -> Tokenizer:
    """The tokenizer; what it does not know (other words, numbers above 199) becomes <unk>, which no training text has."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, START_ID), (END, END_ID)]
    )
    tokenizer.add_special_tokens([UNKNOWN, START, END])
    return tokenizer
