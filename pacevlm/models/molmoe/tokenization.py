"""A small byte-level BPE tokenizer with MolmoE's special tokens, for models that are built and trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pacevlm.errors import ConfigError

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|padding|>"
UNUSED_TOKEN = "<|unused|>"
IM_START_TOKEN = "<im_start>"
IM_END_TOKEN = "<im_end>"
IM_PATCH_TOKEN = "<im_patch>"
IM_COL_TOKEN = "<im_col>"
IMAGE_TOKEN = "<|image|>"
IMAGE_TOKENS = (IM_START_TOKEN, IM_END_TOKEN, IM_PATCH_TOKEN, IM_COL_TOKEN, IMAGE_TOKEN)

MIN_VOCAB_SIZE = 256 + 3
"""Every byte, and the unused, padding and end-of-text tokens."""


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose special tokens lie as MolmoE's do.

    Id 0 is unused, id 1 pads, then come the 256 bytes and the merges; `<|endoftext|>` is the last id of the base
    vocabulary and the image tokens follow directly. Text is normalised to NFC, gets no prefix space, and each digit
    is a token, alone or with the space in front of it. Any text can be encoded. The same texts always give the same
    tokenizer.

    Args:
        texts: what the merges are learned from.
        vocab_size: most entries of the base vocabulary, image tokens not counted; few or short texts give fewer.

    Raises:
        ConfigError: `vocab_size` has no room for all bytes.
    """
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size is {vocab_size!r}; it must be a whole number of at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A digit is one token, together with the space in front of it: " 4 7" has two tokens, " 47" too.
            pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,  # the end-of-text token comes behind the merges
        special_tokens=[UNUSED_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (EOS_TOKEN, *IMAGE_TOKENS)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
