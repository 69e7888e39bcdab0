"""Configuration of MolmoE with the field names of the published checkpoint's config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pacevlm.errors import ConfigError

VISION_DEFAULTS: dict[str, Any] = {
    "image_model_type": "openai",
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_pos_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_key_value_heads": 16,
    "image_num_layers": 23,
    "image_head_dim": 64,
    "image_mlp_dim": 4096,
    "image_mlp_activations": "quick_gelu",
    "image_num_pos": 577,
    "image_norm_eps": 1e-5,
}

# What MolmoE is; other members of the family set some of these otherwise, and share the model type.
FIXED: dict[str, Any] = {
    "image_pooling_2d": "attention-meanq",
    "image_projector": "mlp",
    "image_padding_embed": "pad_and_partial_pad",
    "weight_tying": False,
    "norm_after": False,
    "attention_layer_norm": True,
    "rope_impl": "llama",
    "clip_qkv": None,
    "block_type": "moe",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "qkv_bias": False,
    "include_bias": False,
    "moe_interleave": False,
    "moe_shared_expert": False,
    "normalize_input_embeds": False,
    "scale_logits": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_cls_feature": False,
}
FIXED_VISION: dict[str, Any] = {"image_model_type": "openai", "image_mlp_activations": "quick_gelu"}


def _whole_numbers(name: str, values: object) -> list[int]:
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise ConfigError(f"{name} is {values!r}; it must be a list of whole numbers")
    return list(values)


class MolmoEConfig(PretrainedConfig):
    """Sizes and rules of a MolmoE model; the defaults are MolmoE-1B-0924.

    Field names are those of the published `config.json`, so that it loads and saves unchanged; the names that
    transformers expects (`hidden_size`, `num_hidden_layers`, ...) are aliases. Fields that do not matter at inference
    are kept as given.

    Raises:
        ConfigError: a field asks for a variant of Molmo that MolmoE does not have, or sizes contradict each other.
    """

    model_type = "molmo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (the base class declares it so)
    attribute_map = {  # noqa: RUF012  (the base class declares it so)
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_experts": "moe_num_experts",
        "num_local_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
        "rms_norm_eps": "layer_norm_eps",
    }

    def __init__(
        self,
        d_model: int = 2048,
        n_heads: int = 16,
        n_kv_heads: int | None = None,
        n_layers: int = 16,
        mlp_ratio: float = 1,
        mlp_hidden_size: int | None = None,
        vocab_size: int = 50280,
        embedding_size: int | None = 50304,
        additional_vocab_size: int = 128,
        rope_theta: float = 10000.0,
        layer_norm_eps: float = 1e-5,
        moe_num_experts: int = 64,
        moe_top_k: int = 8,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        vision_backbone: dict[str, Any] | None = None,
        vit_layers: tuple[int, ...] | list[int] = (-2, -9),
        image_pooling_2d: str = "attention-meanq",
        image_pooling_h: int = 2,
        image_pooling_w: int = 2,
        image_projector: str = "mlp",
        image_padding_embed: str = "pad_and_partial_pad",
        max_crops: int = 12,
        overlap_margins: tuple[int, int] | list[int] = (4, 4),
        padding_crop_rule: str = "all",
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        weight_tying: bool = False,
        norm_after: bool = False,
        attention_layer_norm: bool = True,
        rope_impl: str = "llama",
        clip_qkv: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_backbone, (dict, type(None))):
            raise ConfigError(f"vision_backbone is {vision_backbone!r}; it must hold the tower's settings by name")
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.n_layers = n_layers
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_hidden_size
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.additional_vocab_size = additional_vocab_size
        self.rope_theta = rope_theta
        self.layer_norm_eps = layer_norm_eps
        self.moe_num_experts = moe_num_experts
        self.moe_top_k = moe_top_k
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.vision_backbone = {**VISION_DEFAULTS, **(vision_backbone or {})}
        self.vit_layers = _whole_numbers("vit_layers", vit_layers)
        self.image_pooling_2d = str(image_pooling_2d).replace("_", "-")
        self.image_pooling_h = image_pooling_h
        self.image_pooling_w = image_pooling_w
        self.image_projector = image_projector
        self.image_padding_embed = image_padding_embed
        self.max_crops = max_crops
        self.overlap_margins = _whole_numbers("overlap_margins", overlap_margins)
        self.padding_crop_rule = padding_crop_rule
        self.use_cache = use_cache
        self.weight_tying = weight_tying
        self.norm_after = norm_after
        self.attention_layer_norm = attention_layer_norm
        self.rope_impl = rope_impl
        self.clip_qkv = clip_qkv
        self._check_variant({**kwargs, **vars(self)})
        self._check_sizes()
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    def _check_variant(self, given: dict[str, Any]) -> None:
        wanted = [(FIXED, given, ""), (FIXED_VISION, self.vision_backbone, "vision_backbone.")]
        for fixed, values, place in wanted:
            for name, value in fixed.items():
                if values.get(name, value) != value:
                    raise ConfigError(
                        f"{place}{name} is {values[name]!r}; MolmoE has {value!r}, other variants are not supported"
                    )
        if self.padding_crop_rule not in ("all", "any"):
            raise ConfigError(f"padding_crop_rule is {self.padding_crop_rule!r}; use 'all' or 'any'")

    def _check_sizes(self) -> None:
        vision = self.vision_backbone
        whole = {
            name: getattr(self, name)
            for name in ("d_model", "n_heads", "n_layers", "vocab_size", "moe_num_experts", "moe_top_k", "max_crops")
        }
        whole |= {"image_pooling_h": self.image_pooling_h, "image_pooling_w": self.image_pooling_w}
        whole |= {
            f"vision_backbone.{name}": vision[name] for name in VISION_DEFAULTS if type(VISION_DEFAULTS[name]) is int
        }
        whole |= {"n_kv_heads": self.num_key_value_heads, "embedding_size": self.num_embeddings}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ConfigError(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads}")
        if self.n_heads % self.num_key_value_heads:
            raise ConfigError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.moe_top_k > self.moe_num_experts:
            raise ConfigError(
                f"moe_top_k is {self.moe_top_k}; it must be 1..{self.moe_num_experts}, the number of experts"
            )
        if self.expert_dim < 1:
            raise ConfigError(
                f"mlp_ratio {self.mlp_ratio} or mlp_hidden_size {self.mlp_hidden_size} leaves no inner width"
            )
        layers = vision["image_num_layers"]
        if not self.vit_layers or any(not -layers <= layer < layers for layer in self.vit_layers):
            raise ConfigError(f"vit_layers {self.vit_layers} must index the {layers} layers of the vision tower")
        if vision["image_num_key_value_heads"] != vision["image_num_heads"]:
            raise ConfigError(
                f"image_num_key_value_heads is {vision['image_num_key_value_heads']}; the vision tower has one per "
                f"query head, {vision['image_num_heads']}"
            )
        sides = _whole_numbers("vision_backbone.image_default_input_size", vision["image_default_input_size"])
        height, patch = sides[0] if sides else 0, vision["image_patch_size"]
        if sides != [height, height] or height < 1 or height % patch:
            raise ConfigError(f"crops of {sides} px must be square and their side a multiple of the patch size {patch}")
        expected = self.patches_per_side**2 + 1
        if vision["image_num_pos"] != expected:
            raise ConfigError(
                f"image_num_pos is {vision['image_num_pos']}; crops of {height} px in patches of {patch} px need "
                f"{expected}"
            )

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads; `n_kv_heads` null means one per query head."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def head_dim_(self) -> int:
        """Width of one attention head."""
        return int(self.d_model // self.n_heads)

    @property
    def expert_dim(self) -> int:
        """Inner width of an expert and of the image projector: half of the MLP's hidden size."""
        hidden = self.mlp_hidden_size if self.mlp_hidden_size is not None else self.mlp_ratio * self.d_model
        return int(hidden) // 2

    @property
    def num_embeddings(self) -> int:
        """Rows of the base embedding and of the output head."""
        return self.embedding_size if self.embedding_size is not None else self.vocab_size

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return int(self.vision_backbone["image_default_input_size"][0] // self.vision_backbone["image_patch_size"])
