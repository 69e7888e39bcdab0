"""Models, tokenizers and image processors of transformers' own classes from a folder, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from pacevlm.errors import CheckpointError
from pacevlm.models.weights import Layout, Place, check_weights


def model_without_weights(folder: Path, model_class: Any, name: str) -> Any:
    """The model that a folder's `config.json` describes, on the device `meta`; raises CheckpointError."""
    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:
        # A damaged config.json makes almost anything: TypeError, ZeroDivisionError, AttributeError, OSError ...
        raise CheckpointError(f"{folder / 'config.json'} describes no {name} model: {error}") from error


def plain_layout(model: Any) -> dict[str, Place]:
    """All weights and stored buffers by their names in memory; what is tied to another one is stored once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = model.state_dict(keep_vars=True)
    return {name: Place(tensor.detach()) for name, tensor in state.items() if name not in tied}


def read_model(folder: Path, model_class: Any, dtype: torch.dtype, name: str, layouts: Mapping[str, Layout]) -> Any:
    """The model with its weights, unless they are not those of the layouts; raises CheckpointError."""
    check_weights(folder, layouts)
    # Through transformers, which also computes what no file holds, such as rotary frequencies.
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder} does not hold a loadable {name} checkpoint: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()


def read_processors(folder: Path, image_processor_class: Any) -> tuple[Any, Any]:
    """Tokenizer and image processor; runs no code from the folder; raises CheckpointError.

    Args:
        image_processor_class: by name, because what the Auto class chooses, and so the pixels, depends on whether
            torchvision is installed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer, image_processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # A malformed tokenizer file raises a bare Exception, the other files OSError or ValueError.
        raise CheckpointError(f"the tokenizer or image processor in {folder} cannot be used: {error}") from error


def check_image_processor(folder: Path, image_processor: Any, **taken: Any) -> None:
    """Raise CheckpointError unless an image processor has the attributes that the model takes."""
    for name, wanted in taken.items():
        given = getattr(image_processor, name, None)
        if given != wanted:
            raise CheckpointError(
                f"the image processor in {folder} works with {name} {given}, but the model takes {wanted}; was a file "
                "swapped?"
            )


def check_tokenizer(folder: Path, tokenizer: Any, special: Sequence[str], image_id: int, vocabulary: int) -> None:
    """Raise CheckpointError unless a tokenizer knows the special tokens, the last of which is the image's."""
    ids = tokenizer.convert_tokens_to_ids(list(special))
    if ids != [i for i, t in zip(ids, special, strict=True) if tokenizer.convert_ids_to_tokens(i) == t]:
        raise CheckpointError(f"the tokenizer in {folder} lacks one of {tuple(special)}; was a file swapped?")
    if ids[-1] != image_id or len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and {special[-1]} as {ids[-1]}, but the model has "
            f"{vocabulary} and {image_id}; was a file swapped?"
        )


def end_tokens(model: Any, config: Any) -> frozenset[int]:
    """Ids that end an answer, as the folder's generation settings say, or else the model's."""
    ends = model.generation_config.eos_token_id
    ends = config.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list) else [ends])
