#!/usr/bin/env python3
"""Write a checkpoint of MolmoE-1B's sizes with random weights, for timing where the real one cannot be had.

Latencies are the real model's: they depend on shapes, not on what the weights say. Answers mean nothing, and have
`--max-new-tokens` tokens each, because no random model ends its answer. Written file by file, so that little memory is
needed, in the published layout or in that of the training repository.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from pacevlm.files import save_safetensors_atomic
from pacevlm.models.elastic import write_elastic_settings
from pacevlm.models.folder import INDEX_FILE
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor
from pacevlm.models.molmoe.layouts import PUBLISHED, TRAINING, molmoe_layouts
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.tokenization import build_tokenizer

TEXTS = ["Which number is the largest? 407", "How many red digits are there?", "What is written on the sign?"]
SHARD_BYTES = 2 * 10**9
POOL_SIZE = 1 << 24


def random_processor() -> MolmoEProcessor:
    """The published crops, and a small tokenizer whose special tokens lie as MolmoE's do."""
    return MolmoEProcessor(MolmoEImageProcessor(), build_tokenizer(TEXTS * 20, 400))


def write_random_checkpoint(
    folder: Path,
    num_blocks: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = PUBLISHED,
    *,
    device: str = "cpu",
    seed: int = 0,
    max_new_tokens: int = 16,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a MolmoE of MolmoE-1B's widths, its processor and `elastic.json`; returns the bytes of its weights.

    Weights of matrices are normal, and those of norms 1. They are pieces of one pool of numbers, because drawing seven
    billion takes minutes.
    """
    config = MolmoEConfig(n_layers=num_blocks, architectures=["OLMoForCausalLM"], torch_dtype="float32")
    with torch.device("meta"):
        model = MolmoEForConditionalGeneration(config)
    shapes = {name: place.shape for name, place in molmoe_layouts(model)[layout].items()}
    num_bytes = {name: dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and num_bytes[name] + sum(num_bytes[other] for other in shards[-1]) > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    generator, weight_map = torch.Generator(device).manual_seed(seed), {}
    pool = torch.empty(POOL_SIZE, device=device).normal_(0.0, config.initializer_range, generator=generator).to(dtype)
    pool = torch.cat([pool, pool])  # so that a piece may begin anywhere
    folder.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(shards, 1):
        tensors = {}
        for name in names:
            weight = torch.empty(shapes[name], dtype=dtype, device=device)
            if weight.dim() > 1:
                for piece in weight.view(-1).split(POOL_SIZE):
                    start = int(torch.randint(POOL_SIZE, (), device=device, generator=generator))
                    piece.copy_(pool[start : start + len(piece)])
            else:
                weight.fill_(0.0 if name.endswith(("bias", "embedding")) else 1.0)
            tensors[name] = weight
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_safetensors_atomic(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(num_bytes.values())
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    random_processor().save_pretrained(folder)
    removal = list(range(num_blocks - 2, 1, -1))  # nothing was measured: the last blocks go first
    write_elastic_settings(folder, max_new_tokens=max_new_tokens, removal=removal)
    return total


def main() -> None:
    """Make, write, say how large and how long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-blocks", type=int, default=16, help="16 is the real size, 14.4 GB in bfloat16")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layout", default=PUBLISHED, choices=(PUBLISHED, TRAINING))
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    num_bytes = write_random_checkpoint(
        arguments.folder,
        arguments.num_blocks,
        getattr(torch, arguments.dtype),
        arguments.layout,
        device=arguments.device,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(f"{num_bytes / 1e9:.2f} GB in {arguments.folder}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
