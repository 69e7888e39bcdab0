"""Which names MolmoE's tensors have in checkpoints, and where each goes in the fused parameters."""

from __future__ import annotations

from torch import Tensor

from pacevlm.models.molmoe.modeling_molmoe import MolmoEForConditionalGeneration
from pacevlm.models.weights import Place

PUBLISHED, TRAINING = "published", "training"

# Parts of a block's names: as published, and as the training repository (allenai/molmo) has them.
_BLOCK_PARTS = {".attn.": ".", ".mlp.ff_norm.": ".ff_norm.", ".mlp.gate.": ".ffn.router.layer."}


def molmoe_layouts(model: MolmoEForConditionalGeneration) -> dict[str, dict[str, Place]]:
    """The places of all tensors in the layouts that MolmoE is found in, for the parameters that the model has now.

    Published, on the Hugging Face hub, each expert has three matrices. The training repository has three tensors for
    all experts of a block, one below the other, and the last of them transposed.
    """
    published: dict[str, Place] = {}
    training: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        block, is_expert, part = name.partition(".mlp.experts.")
        if not is_expert:
            published[name], training[_training_name(name)] = Place(weight), Place(weight)
            continue
        for stored, fused, target in _expert_parts(part, weight):
            for expert, matrix in enumerate(target):
                published[f"{block}.mlp.experts.{expert}.{stored}.weight"] = Place(matrix)
            rows = target.transpose(1, 2) if fused == "w2" else target
            shape = (rows.shape[0] * rows.shape[1], rows.shape[2])
            training[f"{_training_name(block)}.ffn.experts.mlp.{fused}"] = Place(rows, shape)
    return {PUBLISHED: published, TRAINING: training}


def _training_name(name: str) -> str:
    if name == "lm_head.weight":
        return "transformer.ff_out.weight"
    if name.startswith("model.transformer.blocks."):
        for published, training in _BLOCK_PARTS.items():
            name = name.replace(published, training)
    return name.removeprefix("model.")


def _expert_parts(part: str, weight: Tensor) -> list[tuple[str, str, Tensor]]:
    """Published name, name in training, and share of a fused parameter `(experts, rows, columns)`."""
    if part == "down_proj":
        return [("down_proj", "w2", weight)]
    gate, up = weight.chunk(2, dim=1)
    return [("gate_proj", "w1", gate), ("up_proj", "v1", up)]
