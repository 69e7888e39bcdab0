"""Vision half of MolmoE: the CLIP tower over crops, 2x2 attention pooling and the gated projector."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig


def _attend_float32(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    # The tower's and the pooling's attention is computed in float32 whatever the weights' dtype (`float32_attention`).
    def heads(x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (num_heads, -1))
        return split.transpose(1, 2).float()

    out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def saturate(x: Tensor) -> Tensor:
    """In float16, the largest number in place of what is beyond it; other dtypes have room and stay as they are.

    One infinite number becomes NaN in the next norm or activation, and attention spreads it over the whole picture.
    Sums of residual blocks and products of the gated projector are what grows; users of mlx-vlm saw it in Molmo2.
    """
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU (Hendrycks and Gimpel 2016)."""
    x = saturate(x)
    return x * torch.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    """Multi-head attention with biases, in float32.

    Args:
        input_dim: width of queries, keys and values as given.
        num_heads: heads.
        head_dim: width of a head.
        output_dim: width of the result.
    """

    def __init__(self, input_dim: int, num_heads: int, head_dim: int, output_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wq = nn.Linear(input_dim, num_heads * head_dim)
        self.wk = nn.Linear(input_dim, num_heads * head_dim)
        self.wv = nn.Linear(input_dim, num_heads * head_dim)
        self.wo = nn.Linear(num_heads * head_dim, output_dim)

    def forward(self, query: Tensor, key_value: Tensor) -> Tensor:
        """`(batch, queries, input_dim)` and `(batch, keys, input_dim)` to `(batch, queries, output_dim)`."""
        mixed = _attend_float32(self.wq(query), self.wk(key_value), self.wv(key_value), self.num_heads)
        return saturate(self.wo(mixed))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(quick_gelu(self.w1(x)))
        return out


class _ResidualBlock(nn.Module):
    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        v = config.vision_backbone
        width = v["image_emb_dim"]
        self.attention_norm = nn.LayerNorm(width, eps=v["image_norm_eps"])
        self.attention = VisionAttention(width, v["image_num_heads"], v["image_head_dim"], width)
        self.ffn_norm = nn.LayerNorm(width, eps=v["image_norm_eps"])
        self.feed_forward = _FeedForward(width, v["image_mlp_dim"])

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = saturate(x + self.attention(h, h))
        return saturate(x + self.feed_forward(self.ffn_norm(x)))


class _ResidualBlocks(nn.Module):
    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            _ResidualBlock(config) for _ in range(config.vision_backbone["image_num_layers"])
        )


class VisionTower(nn.Module):
    """CLIP ViT without its last block and post-norm, fed with patches that are already cut and flattened."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        v = config.vision_backbone
        width = v["image_emb_dim"]
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(v["image_num_pos"], width))
        self.patch_embedding = nn.Linear(v["image_patch_size"] ** 2 * 3, width, bias=False)
        self.pre_ln = nn.LayerNorm(width, eps=v["image_norm_eps"])
        self.transformer = _ResidualBlocks(config)
        depth = v["image_num_layers"]
        self.layers = [layer % depth for layer in config.vit_layers]

    def forward(self, patches: Tensor) -> Tensor:
        """Concatenated features of the chosen layers, class token dropped.

        Args:
            patches: `(crops, patches, patch_px * patch_px * 3)`.

        Returns:
            `(crops, patches, width * levels)`; blocks above the highest chosen layer are not computed.
        """
        x = self.patch_embedding(patches)
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = self.pre_ln(torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype))
        outputs: dict[int, Tensor] = {}
        for index in range(max(self.layers) + 1):
            x = self.transformer.resblocks[index](x)
            if index in self.layers:
                outputs[index] = x
        return torch.cat([outputs[layer] for layer in self.layers], dim=-1)[:, 1:]


class _Projector(nn.Module):
    def __init__(self, width: int, hidden: int, output_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, output_dim, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return saturate(self.w2(saturate(F.silu(saturate(self.w1(x))) * saturate(self.w3(x)))))


class VisionBackbone(nn.Module):
    """Tower, padding embeddings, 2x2 pooling with the window's mean as query, and projector."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        v = config.vision_backbone
        features = v["image_emb_dim"] * len(config.vit_layers)
        self.image_vit = VisionTower(config)
        self.pad_embed = nn.Parameter(torch.zeros(2, features))
        self.image_pooling_2d = VisionAttention(features, v["image_num_heads"], v["image_head_dim"], v["image_emb_dim"])
        self.image_projector = _Projector(v["image_emb_dim"], config.expert_dim, config.d_model)
        self.patches_per_side = config.patches_per_side
        self.pool = (config.image_pooling_h, config.image_pooling_w)
        self.padding_crop_rule = config.padding_crop_rule

    def vit_features(self, images: Tensor, tower: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Tower features with padding crops set to zero: `(crops, patches, pixels)` to `(crops, patches, features)`.

        Another tower of the same weights may take the place of its own.
        """
        minus_one = images == -1
        padding = minus_one.all(dim=(1, 2)) if self.padding_crop_rule == "all" else minus_one.any(dim=2).any(dim=1)
        features: Tensor = (tower or self.image_vit)(images.to(self.pad_embed.dtype))
        return features * (~padding).to(features.dtype)[:, None, None]

    def forward(self, images: Tensor, image_masks: Tensor, tower: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """One feature vector per pooled cell.

        Args:
            images: `(crops, patches, patch_px * patch_px * 3)`; a crop of -1 only is padding.
            image_masks: `(crops, patches)`, share of each patch that shows the image; -1 counts as partial.
            tower: takes the place of `image_vit`, see `vit_features`.

        Returns:
            `(crops, cells, d_model)`, cells row by row.
        """
        features = self.vit_features(images, tower)
        none = (image_masks == 0).to(features.dtype).unsqueeze(-1)
        partial = ((image_masks < 1) & (image_masks != 0)).to(features.dtype).unsqueeze(-1)
        features = saturate(features + none * self.pad_embed[0] + partial * self.pad_embed[1])
        crops, side, (pool_h, pool_w) = features.shape[0], self.patches_per_side, self.pool
        grid = features.view(crops, side, side, -1)
        grid = F.pad(grid, (0, 0, 0, -side % pool_w, 0, -side % pool_h))
        rows, cols = grid.shape[1] // pool_h, grid.shape[2] // pool_w
        windows = grid.view(crops, rows, pool_h, cols, pool_w, -1).permute(0, 1, 3, 2, 4, 5)
        windows = windows.reshape(crops * rows * cols, pool_h * pool_w, -1)
        pooled = self.image_pooling_2d(windows.mean(dim=1, keepdim=True), windows)
        out: Tensor = self.image_projector(pooled.view(crops, rows * cols, -1))
        return out
