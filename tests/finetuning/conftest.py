"""A tokenizer small enough to read: what the tests of datasets and jobs train on."""

import pytest

BOS, EOS, TURN = 1, 2, 3
FIRST_LETTER = 10


class LetterTokenizer:
    """One token a letter, "a" is 10. A chat is, for each message, TURN, its letters and, after the assistant, EOS."""

    eos_token_id = EOS

    def encode(self, text, add_special_tokens):
        return [BOS] * add_special_tokens + [FIRST_LETTER + ord(letter) - ord("a") for letter in text]

    def apply_chat_template(self, messages, add_generation_prompt):
        return self.assistant_mask(messages, [True] * len(messages))[0]

    def assistant_mask(self, messages, learned):
        if messages[0]["role"] == "tool":
            raise ValueError("the chat template refuses these messages")
        ids, mask = [], []
        for message, wanted in zip(messages, learned, strict=True):
            spoken = message["role"] == "assistant"
            letters = self.encode(message["content"], add_special_tokens=False) + [EOS] * spoken
            ids += [TURN, *letters]
            mask += [0] + [int(spoken and wanted)] * len(letters)
        return ids, mask


@pytest.fixture
def tokenizer():
    return LetterTokenizer()
