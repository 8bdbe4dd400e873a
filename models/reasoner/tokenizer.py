"""The reasoner's vocabulary: a whole number, an operator or a separator is one token, and text round-trips exactly."""

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from latentrace.models.reasoner.game24 import LARGEST_NUMBER

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
NEWLINE, SPACE, BAR, EQUALS = "\n", " ", " | ", "="
OPERATORS = "+-*/"
NUMBERS = tuple(str(number) for number in range(LARGEST_NUMBER + 1))
VOCABULARY = (UNKNOWN, START, END, NEWLINE, SPACE, BAR, EQUALS, *OPERATORS, *NUMBERS)
"""The text of each token, by id."""
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
"""The id of each token."""
VOCAB_SIZE = len(VOCABULARY)
START_ID, END_ID = TOKEN_ID[START], TOKEN_ID[END]

NUMBER_OF_TOKEN = np.array([int(t) if t.isdigit() else -1 for t in VOCABULARY], np.int32)
"""int32[V]: the number that a token writes, -1 for other tokens."""
OPERATOR_OF_TOKEN = np.array([OPERATORS.index(t) if t in tuple(OPERATORS) else -1 for t in VOCABULARY], np.int32)
"""int32[V]: the index in `OPERATORS` of a token, -1 for other tokens."""

_PIECES = r" \| |[0-9]+|[-+*/=]| |\n"


def build_tokenizer() -> Tokenizer:
    """The tokenizer; what it does not know (letters, numbers above 199) becomes <unk>, which no training text has."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, START_ID), (END, END_ID)]
    )
    tokenizer.add_special_tokens([UNKNOWN, START, END])
    return tokenizer
