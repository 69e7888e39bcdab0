"""A toy family that does everything otherwise than MolmoE does, and the plain forward pass that laws compare with.

Grouped queries with a scale of their own; three-axis positions; image features added behind several blocks; experts
renormalised over the kept ones, beside a shared expert; scaled embeddings; patches instead of crops; two end tokens.
With `num_experts` 1 it is dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pacevlm.errors import ImageError, QuestionError
from pacevlm.models.adapter import Adapter, EmbeddedPrompt, Rope
from pacevlm.models.registry import register_family
from pacevlm.types import VisionSizes

BOS, ENDS, IMAGE, VOCABULARY = 256, (257, 258), 259, 260
PATCH, AXES = 4, 3


@dataclass(frozen=True)
class ToyPrompt:
    text_ids: list[int]

    @property
    def num_text_tokens(self) -> int:
        return 1 + len(self.text_ids)


@dataclass(frozen=True)
class ToyPrepared:
    patches: Tensor
    grid: tuple[int, int]
    prompt: ToyPrompt
    vision_sizes: VisionSizes

    @property
    def input_ids(self) -> Tensor:
        return torch.tensor([BOS, *[IMAGE] * len(self.patches), *self.prompt.text_ids])


class ToyAdapter(Adapter[ToyPrompt, ToyPrepared]):
    default_vision_budgets = MappingProxyType({"low": 4, "medium": 9, "high": 16})
    position_axes = AXES

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.num_blocks, self.d_model = config["num_blocks"], config["d_model"]
        self.num_experts, self.trained_top_k = config["num_experts"], config["top_k"]
        self.heads, self.kv_heads, self.head_dim = config["heads"], config["kv_heads"], config["head_dim"]
        self.depths = tuple(config["depths"])
        self.max_positions, self.end_token_ids = 256, frozenset(ENDS)
        self.device, self.dtype = weights["embedding"].device, weights["embedding"].dtype
        self.cache_bytes_per_token = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def encode_question(self, question: str, has_image: bool = True) -> ToyPrompt:
        try:
            ids = list(question.encode()) if isinstance(question, str) and question.strip() else []
        except UnicodeEncodeError:
            ids = []
        if not 0 < len(ids) <= 200:
            raise QuestionError(f"the question has {len(ids)} bytes; it must have 1 to 200")
        return ToyPrompt(ids)

    def decode(self, token_ids: Any) -> str:
        return bytes(i for i in token_ids if i < BOS).decode(errors="replace").strip()

    def _grid(self, height: int, width: int, vision_budget: int) -> tuple[int, int]:
        if max(height, width) > 200 * min(height, width):
            raise ImageError(f"a picture of {height}x{width} px is too long")
        sides = ((height, width), (width, height))
        rows, columns = (
            max(1, min(vision_budget, int(math.sqrt(vision_budget * side / other)), -(-side // PATCH)))
            for side, other in sides
        )
        return rows, columns

    def vision_sizes(self, height: int, width: int, vision_budget: int) -> VisionSizes:
        rows, columns = self._grid(height, width, vision_budget)
        count = rows * columns
        return VisionSizes(count, count, count * count)

    def prepare(self, image: Image.Image | None, prompt: ToyPrompt, vision_budget: int) -> ToyPrepared:
        if image is None:
            return ToyPrepared(torch.zeros(0, 48), (0, 0), prompt, VisionSizes(0, 0))
        rows, columns = self._grid(image.height, image.width, vision_budget)
        pixels = torch.from_numpy(np.array(image.resize((columns * PATCH, rows * PATCH)), np.float32)) / 127.5 - 1.0
        patches = (
            pixels.unflatten(0, (rows, PATCH)).unflatten(2, (columns, PATCH)).permute(0, 2, 1, 3, 4).reshape(-1, 48)
        )
        return ToyPrepared(
            patches, (rows, columns), prompt, self.vision_sizes(image.height, image.width, vision_budget)
        )

    def encode_vision(self, requests: Any) -> list[Tensor]:
        """One entry per depth, `(depths + 1, patches, d_model)`: in front of the first block, and behind some."""
        patches = torch.cat([r.patches for r in requests]).to(self.device, self.dtype)
        features = torch.tanh(torch.einsum("np,dpe->dne", patches, self.weights["vision"]))
        return list(features.split([len(r.patches) for r in requests], dim=1))

    def embed(self, request: ToyPrepared, features: Tensor | None) -> EmbeddedPrompt:
        count, (rows, columns) = len(request.patches), request.grid
        words = self.embed_tokens(request.input_ids.to(self.device))
        if features is None:
            places = torch.arange(len(words), device=self.device)[:, None].expand(-1, AXES)
            return EmbeddedPrompt(words, places, len(words))
        hidden = torch.cat([words[:1], features[0], words[1 + count :]])
        added = {}
        for depth, feature in zip(self.depths, features[1:], strict=True):
            added[depth] = torch.zeros_like(hidden).index_copy(
                0, torch.arange(1, 1 + count, device=self.device), feature
            )
        places = torch.cartesian_prod(torch.ones(1), 1.0 + torch.arange(rows), 1.0 + torch.arange(columns)).long()
        after = 1 + max(rows, columns)
        text = torch.arange(after, after + len(hidden) - 1 - count)[:, None].expand(-1, AXES)
        positions = torch.cat([torch.zeros(1, AXES, dtype=torch.long), places, text]).to(self.device)
        return EmbeddedPrompt(hidden, positions, after + len(text), added)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weights["embedding"]) * math.sqrt(self.d_model)

    def rope(self, positions: Tensor) -> Rope:
        axis_of = torch.arange(self.head_dim // 2, device=positions.device) % AXES
        angles = positions[..., axis_of].float() / 50.0 ** (
            torch.arange(self.head_dim // 2, device=positions.device) / 4
        )
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weights[name].float(), 1e-6).to(x.dtype)

    def project(self, block: int, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        qkv = F.linear(self._norm(f"{block}.norm", x), self.weights[f"{block}.qkv"])
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)

        def rotate(t: Tensor) -> Tensor:
            first, second = t.float().chunk(2, dim=-1)
            return (t.float() * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]).to(t.dtype)

        return rotate(q), rotate(k), v

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=0.7, enable_gqa=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), self.weights[f"{block}.out"])

    def mix_experts(self, block: int, x: Tensor, top_k: int | Tensor) -> Tensor:
        normed, ranks = self._norm(f"{block}.ffn_norm", x), torch.arange(self.num_experts, device=x.device)
        every = torch.einsum("rtd,edf->rtef", normed, self.weights[f"{block}.up"])
        every = torch.einsum("rtef,efd->rted", F.silu(every), self.weights[f"{block}.down"])
        probabilities, order = F.linear(normed, self.weights[f"{block}.router"]).softmax(-1).sort(-1, descending=True)
        kept = ranks < (top_k[:, None, None] if isinstance(top_k, Tensor) else top_k)
        kept_weights = torch.where(kept, probabilities, 0.0)
        weights = torch.zeros_like(probabilities).scatter(-1, order, kept_weights / kept_weights.sum(-1, keepdim=True))
        shared = F.linear(
            F.silu(F.linear(normed, self.weights[f"{block}.shared_up"])), self.weights[f"{block}.shared_down"]
        )
        return torch.einsum("rte,rted->rtd", weights.to(x.dtype), every) + shared

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self._norm("final_norm", x), self.weights["head"])


def save_toy(folder: Path, kind: str = "toy", seed: int = 0, **elastic: Any) -> Path:
    """Write a random checkpoint of the toy family, `toy` or `dense`; returns the folder."""
    experts = 6 if kind == "toy" else 1
    config = {"model_type": kind, "num_blocks": 6, "d_model": 24, "num_experts": experts, "top_k": (experts + 1) // 2}
    config |= {"heads": 4, "kv_heads": 2, "head_dim": 8, "depths": [0, 2, 3], "ffn_dim": 12}
    width, ffn, generator = config["d_model"], config["ffn_dim"], torch.Generator().manual_seed(seed)
    shapes = {"embedding": (VOCABULARY, width), "head": (VOCABULARY, width), "final_norm": (width,)}
    shapes["vision"] = (4, 3 * PATCH * PATCH, width)
    for block in range(config["num_blocks"]):
        shapes |= {f"{block}.norm": (width,), f"{block}.ffn_norm": (width,), f"{block}.router": (experts, width)}
        shapes |= {f"{block}.qkv": (8 * 8, width), f"{block}.out": (width, 4 * 8)}
        shapes |= {f"{block}.up": (experts, width, ffn), f"{block}.down": (experts, ffn, width)}
        shapes |= {f"{block}.shared_up": (ffn, width), f"{block}.shared_down": (width, ffn)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    # A dense model says nothing of top_k: the knob has one value by itself.
    space = {
        "tiers": ["low", "medium", "high"],
        "top_ks": [1, 2, 3] if experts > 1 else [1],
        "num_blocks": [3, 4, 5, 6],
    }
    (folder / "elastic.json").write_text(
        json.dumps({"removal": [4, 2, 3], "max_new_tokens": 6, "knob_space": space, **elastic})
    )
    return folder


def load_toy(folder: Path, device: torch.device, dtype: torch.dtype) -> ToyAdapter:
    """What the registry calls."""
    weights = load_file(folder / "model.safetensors")
    return ToyAdapter(
        json.loads((folder / "config.json").read_text()), {n: w.to(device, dtype) for n, w in weights.items()}
    )


def naive_experts(adapter: ToyAdapter, block: int, x: Tensor, top_k: int) -> Tensor:
    """One token after the other, one expert after the other; `x` is `(tokens, d_model)`."""
    w, out = adapter.weights, []
    for token in x:
        y = token / (token.square().mean() + 1e-6).sqrt() * w[f"{block}.ffn_norm"]
        best = (w[f"{block}.router"] @ y).softmax(-1).topk(top_k)
        mixed = w[f"{block}.shared_down"] @ F.silu(w[f"{block}.shared_up"] @ y)
        for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            mixed = mixed + weight * (F.silu(y @ w[f"{block}.up"][expert]) @ w[f"{block}.down"][expert])
        out.append(mixed)
    return torch.stack(out)


@torch.no_grad()
def plain_pass(
    adapter: ToyAdapter, prompt: EmbeddedPrompt, behind: Tensor, removed: Collection[int], top_ks: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """The stream behind every block that runs, and all logits: one pass, nothing elastic, loops spelled out.

    Args:
        behind: embeddings that follow the prompt, `(more, d_model)`.
        removed: blocks that are left out.
        top_ks: experts per token, one number per block of the checkpoint.
    """
    w, x, states = adapter.weights, torch.cat([prompt.hidden, behind]), []
    more = torch.arange(len(behind), device=x.device)[:, None].expand(-1, AXES) + prompt.next_position
    positions = torch.cat([prompt.positions, more])

    def turn(vector: Tensor, position: Tensor) -> Tensor:
        turned = vector.clone()
        for pair in range(4):
            angle = position[pair % AXES] / 50.0 ** (pair / 4)
            a, b = vector[pair], vector[pair + 4]
            turned[pair], turned[pair + 4] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return turned

    for block in range(adapter.num_blocks):
        if block not in removed:
            y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{block}.norm"]
            qkv, heads = (y @ w[f"{block}.qkv"].T).view(len(x), 8, 8), []
            for head in range(4):
                q = torch.stack([turn(qkv[t, head], positions[t]) for t in range(len(x))])
                k = torch.stack([turn(qkv[t, 4 + head // 2], positions[t]) for t in range(len(x))])
                scores = 0.7 * q @ k.T + torch.full((len(x), len(x)), -torch.inf, device=x.device).triu(1)
                heads.append(scores.softmax(-1) @ qkv[:, 6 + head // 2])
            x = x + torch.cat(heads, dim=-1) @ w[f"{block}.out"].T
            x = x + naive_experts(adapter, block, x, top_ks[block])
        if block in prompt.added:
            x = x + F.pad(prompt.added[block], (0, 0, 0, len(behind)))
        if block not in removed:
            states.append(x)
    final = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["final_norm"]
    return states, final @ w["head"].T


for name in ("toy", "dense"):
    register_family(name, load_toy)
