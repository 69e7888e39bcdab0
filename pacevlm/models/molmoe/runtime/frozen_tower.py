"""The vision tower without its modules: the same computation on its weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.models.molmoe.vision import VisionTower, quick_gelu, saturate

_Affine = tuple[Tensor, Tensor]


def _affine(module: Any) -> _Affine:
    return module.weight.detach(), module.bias.detach()


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights and biases of one residual block."""

    attention_norm: _Affine
    qkv: _Affine
    out: _Affine
    ffn_norm: _Affine
    up: _Affine
    down: _Affine

    @classmethod
    def from_module(cls, block: Any) -> _Layer:
        attention, feed_forward = block.attention, block.feed_forward
        parts = attention.wq, attention.wk, attention.wv
        weights, biases = zip(*(_affine(part) for part in parts), strict=True)
        qkv = torch.cat(weights), torch.cat(biases)
        for part, weight, bias in zip(parts, *(joined.chunk(3) for joined in qkv), strict=True):
            part.weight.data, part.bias.data = weight, bias  # or they would be in memory twice
        return cls(
            attention_norm=_affine(block.attention_norm),
            qkv=qkv,
            out=_affine(attention.wo),
            ffn_norm=_affine(block.ffn_norm),
            up=_affine(feed_forward.w1),
            down=_affine(feed_forward.w2),
        )


class FrozenTower:
    """What `VisionTower` computes, for weights that are neither trained nor moved any more.

    For a few crops the tower is bound by calls on a CPU and by launches on a GPU. Queries, keys and values come from
    one product, whose weights the modules see parts of from then on; all other weights share the modules' memory.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.class_embedding = tower.class_embedding.detach()
        self.positional_embedding = tower.positional_embedding.detach()
        self.patch_embedding = tower.patch_embedding.weight.detach()
        self.pre_ln, self.eps = _affine(tower.pre_ln), tower.pre_ln.eps
        blocks: list[Any] = list(tower.transformer.resblocks)
        self.chosen = tower.layers
        self.layers = [_Layer.from_module(block) for block in blocks[: max(tower.layers) + 1]]
        self.num_heads: int = blocks[0].attention.num_heads

    def __call__(self, patches: Tensor) -> Tensor:
        """See `VisionTower.forward`."""
        width = self.class_embedding.shape[:1]
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([cls, F.linear(patches, self.patch_embedding)], dim=1) + self.positional_embedding
        x = F.layer_norm(x, width, *self.pre_ln, self.eps)
        outputs: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            qkv = F.linear(F.layer_norm(x, width, *layer.attention_norm, self.eps), *layer.qkv)
            # (3, crops, heads, patches, head_dim). `VisionTower` attends in float32. So do sums and softmax here, but
            # half precision rounds the shares before they multiply values, which is seven times as fast on a GPU.
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = saturate(x + F.linear(mixed, *layer.out))
            hidden = F.linear(F.layer_norm(x, width, *layer.ffn_norm, self.eps), *layer.up)
            x = saturate(x + F.linear(quick_gelu(hidden), *layer.down))
            if index in self.chosen:
                outputs[index] = x
        return torch.cat([outputs[index] for index in self.chosen], dim=-1)[:, 1:]
