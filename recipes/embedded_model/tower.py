"""Supervised warm-up of the vision half: every pooled cell says which digit, in which colour and how tall it shows."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacevlm.models.molmoe.vision import VisionAttention, VisionTower
from recipes.embedded_model.labels import NUM_COLOUR_CLASSES, NUM_DIGIT_CLASSES


class CellHeads(nn.Module):
    """Linear heads on the connector's output; they are thrown away after training.

    Args:
        width: width of the features.
        with_place: also regress the cell's place in the image (for hidden states of the decoder).
    """

    def __init__(self, width: int, with_place: bool = False) -> None:
        super().__init__()
        self.sizes = [NUM_DIGIT_CLASSES, NUM_COLOUR_CLASSES, 1, 1, 2 if with_place else 0]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the heads' losses over cells `(cells, width)`, and accuracies over cells that show a digit."""
        digit, colour, centre, height, place = self.head(features).split(self.sizes, dim=-1)
        shown = labels["digit"] > 0
        weight = torch.where(shown, 1.0, 0.1)
        loss = (F.cross_entropy(digit, labels["digit"], reduction="none") * weight).sum() / weight.sum()
        loss = loss + (F.cross_entropy(colour, labels["colour"], reduction="none") * weight).sum() / weight.sum()
        loss = loss + F.binary_cross_entropy_with_logits(centre.squeeze(-1), labels["centre"])
        if shown.any():
            loss = loss + F.smooth_l1_loss(height.squeeze(-1)[shown], labels["log_height"][shown])
        if place.shape[-1]:
            loss = loss + 4 * F.mse_loss(place, torch.stack([labels["x"], labels["y"]], dim=-1))
        with torch.no_grad():
            right_digit = (digit.argmax(-1) == labels["digit"])[shown].float().mean().item()
            right_colour = (colour.argmax(-1) == labels["colour"])[shown].float().mean().item()
            right_centre = ((centre.squeeze(-1) > 0).float() == labels["centre"]).float().mean().item()
        metrics = {"cell_digit": right_digit, "cell_colour": right_colour, "cell_centre": right_centre}
        if place.shape[-1]:
            metrics["cell_x_error"] = (place.detach()[:, 0] - labels["x"]).abs().mean().item()
        return loss, metrics


@torch.no_grad()
def init_tower_as_convolution(tower: VisionTower, gain: float = 1.6) -> None:
    """Start a tower whose heads each look at one neighbouring patch, as a small convolution would.

    A ViT from scratch spends most of its time on finding out which patches are neighbours. Sixteen channels carry sine
    and cosine positions; queries are keys rotated by a head's offset, so that a head attends one patch away
    (structured initialisation; Zheng et al. 2024). Everything stays trainable.

    Args:
        tower: a tower with a square patch grid and heads of at least 16 channels.
        gain: scale of queries and keys; larger means sharper attention.
    """
    side = round((tower.positional_embedding.shape[0] - 1) ** 0.5)
    frequencies = torch.arange(1, 5) * math.pi / side
    axis = torch.arange(side)[:, None] * frequencies  # (side, 4)
    waves = torch.stack([axis.sin(), axis.cos()], dim=-1).flatten(1)  # (side, 8)
    grid = torch.cat([waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], dim=-1)  # x, then y
    tower.positional_embedding.normal_(std=0.02)
    tower.positional_embedding[1:, :16] = 1.4 * grid.reshape(side * side, 16)
    tower.patch_embedding.weight[:16] = 0
    offsets = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    offsets += [(2, 0), (-2, 0), (0, 2), (0, -2), (2, 2), (-2, -2), (2, -2), (-2, 2)]
    number = 0
    for block in tower.transformer.resblocks:
        attention = cast(VisionAttention, block.attention)
        head_dim = attention.wq.weight.shape[0] // attention.num_heads
        attention.wq.weight.normal_(std=0.02)
        attention.wk.weight.normal_(std=0.02)
        for head in range(attention.num_heads):
            dx, dy = offsets[number % len(offsets)]
            number += 1
            first = head * head_dim
            attention.wk.weight[first : first + 16, :16] = gain * torch.eye(16)
            for axis_index, shift in ((0, dx), (1, dy)):
                for i, frequency in enumerate(frequencies.tolist()):
                    c, s = math.cos(frequency * shift), math.sin(frequency * shift)
                    at = axis_index * 8 + 2 * i
                    rotation = torch.tensor([[c, s], [-s, c]])  # (sin, cos) at p to (sin, cos) at p + shift
                    attention.wq.weight[first + at : first + at + 2, at : at + 2] = gain * rotation
