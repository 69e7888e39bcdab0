"""Supervised warm-up of the vision half: every pooled cell says which digit, in which colour and how tall it shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacevlm.training.embedded.labels import NUM_COLOUR_CLASSES, NUM_DIGIT_CLASSES


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
            metrics["cell_x_error"] = float((place[:, 0] - labels["x"]).abs().mean())
        return loss, metrics
