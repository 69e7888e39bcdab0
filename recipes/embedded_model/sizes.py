"""The sizes of the embedded model."""

from __future__ import annotations

from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig

EMBEDDED_MAX_CROPS = {"low": 2, "medium": 6, "high": 12}
CROP_PX = 32
PATCH_PX = 4
MARGINS = (2, 2)
MAX_VOCAB_SIZE = 384
MAX_NEW_TOKENS = 8


def embedded_config(vocab_size: int, num_blocks: int = 16) -> MolmoEConfig:
    """Configuration of the embedded model: MolmoE's architecture, 16 blocks, 16 experts with top-8, d_model 96.

    Args:
        vocab_size: entries of the tokenizer without the five image tokens.
        num_blocks: decoder blocks; fewer than 16 only while the model is being grown in training.
    """
    side = CROP_PX // PATCH_PX
    return MolmoEConfig(
        d_model=96,
        n_heads=4,
        n_layers=num_blocks,
        mlp_hidden_size=128,
        vocab_size=vocab_size,
        embedding_size=vocab_size + 8,
        additional_vocab_size=8,
        moe_num_experts=16,
        moe_top_k=8,
        max_position_embeddings=1024,
        initializer_range=0.1,  # about 1 / sqrt(d_model): 0.02 suits widths in the thousands
        vit_layers=[-1, -3],
        max_crops=EMBEDDED_MAX_CROPS["high"],
        overlap_margins=list(MARGINS),
        vision_backbone={
            "image_default_input_size": [CROP_PX, CROP_PX],
            "image_patch_size": PATCH_PX,
            "image_pos_patch_size": PATCH_PX,
            "image_emb_dim": 64,
            "image_num_heads": 4,
            "image_num_key_value_heads": 4,
            "image_head_dim": 16,
            "image_mlp_dim": 256,
            "image_num_layers": 4,
            "image_num_pos": side * side + 1,
        },
    )
