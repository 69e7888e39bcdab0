#!/usr/bin/env python3
"""Write a checkpoint of MolmoE-1B's sizes with random weights, for timing where the real one cannot be had.

Latencies are the real model's: they depend on shapes, not on what the weights say. Answers mean nothing, and have
`--max-new-tokens` tokens each, because no random model ends its answer. The layout is the published one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from pacevlm.models.elastic import write_elastic_settings
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.tokenization import build_tokenizer

TEXTS = ["Which number is the largest? 407", "How many red digits are there?", "What is written on the sign?"]


@torch.no_grad()
def random_model(num_blocks: int, device: str, dtype: torch.dtype, seed: int = 0) -> MolmoEForConditionalGeneration:
    """A MolmoE of MolmoE-1B's widths; weights of matrices are normal, and those of norms 1."""
    config = MolmoEConfig(n_layers=num_blocks)
    with torch.device("meta"):
        model = MolmoEForConditionalGeneration(config)
    model = torch.nn.Module.to_empty(model.to(dtype), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, config.initializer_range, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith(("bias", "embedding")) else 1.0)
    return model


def random_processor() -> MolmoEProcessor:
    """The published crops, and a small tokenizer whose special tokens lie as MolmoE's do."""
    return MolmoEProcessor(MolmoEImageProcessor(), build_tokenizer(TEXTS * 20, 400))


def main() -> None:
    """Make, write, say how large and how long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-blocks", type=int, default=16, help="16 is the real size, 14.4 GB in bfloat16")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    model = random_model(arguments.num_blocks, arguments.device, getattr(torch, arguments.dtype), arguments.seed)
    model.save_pretrained(arguments.folder, max_shard_size="4GB")
    random_processor().save_pretrained(arguments.folder)
    removal = list(range(arguments.num_blocks - 2, 1, -1))  # nothing was measured: the last blocks go first
    write_elastic_settings(arguments.folder, max_new_tokens=arguments.max_new_tokens, removal=removal)
    num_bytes = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    print(f"{num_bytes / 1e9:.2f} GB in {arguments.folder}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
