"""MolmoE as a transformers model; importing this package registers it with the Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig
from pacevlm.models.molmoe.modeling_molmoe import MolmoEForConditionalGeneration, MolmoEModel
from pacevlm.models.molmoe.processing import MolmoEProcessor

AutoConfig.register(MolmoEConfig.model_type, MolmoEConfig, exist_ok=True)
AutoModel.register(MolmoEConfig, MolmoEModel, exist_ok=True)
AutoModelForCausalLM.register(MolmoEConfig, MolmoEForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MolmoEConfig, MolmoEForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MolmoEConfig, MolmoEProcessor, exist_ok=True)
# Checkpoints hold one tensor per expert; in memory the experts of a block are two fused tensors.
register_checkpoint_conversion_mapping(
    MolmoEConfig.model_type,
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)

__all__ = ["MolmoEConfig", "MolmoEForConditionalGeneration", "MolmoEModel", "MolmoEProcessor"]
