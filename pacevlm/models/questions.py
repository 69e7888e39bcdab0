"""Questions as families on transformers' tokenizers take them: checked, and tokenised around a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pacevlm.errors import QuestionError

MAX_CHARS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class SplitPrompt:
    """Token ids before and behind the image."""

    ids_before: list[int]
    ids_behind: list[int]

    @property
    def text_ids(self) -> list[int]:
        """Tokens of the question and of the words around it."""
        return self.ids_before + self.ids_behind

    @property
    def num_text_tokens(self) -> int:
        """Prompt tokens that are not image tokens."""
        return len(self.ids_before) + len(self.ids_behind)


def encode_text(tokenizer: Any, text: str, split_special_tokens: bool = False) -> list[int]:
    """Ids of a text and nothing around it; special tokens in it are words like others if they are split."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
    return list(encoded["input_ids"])


def encode_question(
    tokenizer: Any, question: str, max_positions: int, before: Sequence[int], between: Sequence[int], end: Sequence[int]
) -> SplitPrompt:
    """Check and tokenise a question, which cannot bring special tokens of its own; raises QuestionError.

    Args:
        before, between, end: ids in front of the image, between it and the question, and behind the question.
    """
    if not isinstance(question, str):
        raise QuestionError(f"a question must be text, not {type(question).__name__}")
    if not question.strip():
        raise QuestionError("the question is empty; ask something, for example 'Describe this image.'")
    if len(question) > MAX_CHARS_PER_TOKEN * max_positions:
        raise QuestionError(
            f"the question has {len(question):,} characters, far more than fit into {max_positions:,} "
            "positions; shorten it"
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise QuestionError(f"the question is not valid Unicode text: {error}") from error
    ids = encode_text(tokenizer, question, split_special_tokens=True)
    prompt = SplitPrompt(list(before), [*between, *ids, *end])
    if prompt.num_text_tokens >= max_positions:
        raise QuestionError(
            f"the prompt has {prompt.num_text_tokens:,} text tokens, but the model has {max_positions:,} "
            "positions; shorten the question"
        )
    return prompt
