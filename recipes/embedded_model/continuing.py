"""Going on from a finished embedded model: words are added to its vocabulary, and nothing that it knows is moved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from pacevlm.data.elements import ELEMENTS, NAME_QUESTION, SYMBOL_QUESTION
from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.tokenization import EOS_TOKEN, IMAGE_TOKENS, PAD_TOKEN
from recipes.embedded_model.sizes import embedded_config

# Old rows of the output head have a standard deviation of 0.32. Rows this small are only right for a hidden state that
# points at them, and the sum of what two digits say does not: somebody has to know the fact.
NEW_OUTPUT_STD = 0.12
NEW_EMBEDDING_STD = 0.08


def new_words() -> list[str]:
    """What the questions about elements and their answers are made of, each with the space in front of it."""
    asked = " ".join((NAME_QUESTION, SYMBOL_QUESTION)).replace("?", "").split()
    words = [*asked, *(element.name for element in ELEMENTS), *(element.symbol for element in ELEMENTS)]
    return [f" {word}" for word in dict.fromkeys(words)]


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> PreTrainedTokenizerFast:
    """The same tokenizer in which each of these words is one token; every other token keeps its id.

    Words get ids behind those of the image tokens, in the order given, unless they are tokens already. The special
    tokens take their places in the vocabulary proper, since added tokens could not stand in front of it.
    """
    old = json.loads(tokenizer.backend_tokenizer.to_str())
    model = old["model"]
    for entry in old["added_tokens"]:
        model["vocab"].setdefault(entry["content"], entry["id"])
    pieces = [tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(word) for word in words]
    for (piece, _), *others in pieces:
        if others:
            raise ValueError(f"{piece!r} is only a part of a word; the tokenizer splits words before it looks them up")
        model["vocab"].setdefault(piece, len(model["vocab"]))
    # A word of the vocabulary is taken whole; merges that lead to it are not needed.
    model["ignore_merges"] = True
    extended = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=Tokenizer.from_str(json.dumps(old)),
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    extended.add_tokens([AddedToken(token, special=True, normalized=False) for token in (EOS_TOKEN, *IMAGE_TOKENS)])
    return extended


def extend_model(
    model: MolmoEForConditionalGeneration, num_old: int, num_tokens: int, seed: int = 0
) -> MolmoEForConditionalGeneration:
    """A model with more text tokens; old rows of embeddings and head are copied, new ones drawn small.

    The extra rows that MolmoE keeps in a matrix of their own follow behind the new tokens; no token reads them.

    Args:
        model: what is extended; not changed.
        num_old: ids that its tokenizer knows, the special ones included.
        num_tokens: ids that the extended tokenizer knows.
        seed: seed of the new rows.
    """
    if num_tokens == num_old:
        return model
    larger = MolmoEForConditionalGeneration(embedded_config(num_tokens, model.config.n_layers))
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, std in (("model.transformer.wte.embedding", NEW_EMBEDDING_STD), ("lm_head.weight", NEW_OUTPUT_STD)):
        rows = std * torch.randn(larger.state_dict()[name].shape, generator=generator)
        rows[:num_old] = state[name][:num_old]
        state[name] = rows
    larger.load_state_dict(state)
    return larger


def load_for_training(folder: Path) -> tuple[MolmoEForConditionalGeneration, MolmoEProcessor, int]:
    """An exported model and its processor, both extended by `new_words`, and the first id that is new."""
    model = MolmoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = MolmoEProcessor.from_pretrained(folder)
    num_old = len(processor.tokenizer)
    tokenizer = extend_tokenizer(processor.tokenizer, new_words())
    extended = MolmoEProcessor(processor.image_processor, tokenizer, max_length=processor.max_length)
    return extend_model(model, num_old, len(tokenizer)).train(), extended, num_old
