"""MolmoE for transformers: OLMoE decoder, CLIP vision tower, original checkpoint names, fused experts in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from pacevlm.errors import KnobError
from pacevlm.models.molmoe.blocks import MolmoEBlock, MolmoERMSNorm, rope_tables
from pacevlm.models.molmoe.configuration_molmoe import MolmoEConfig
from pacevlm.models.molmoe.vision import VisionBackbone


class MolmoEEmbedding(nn.Module):
    """Token embeddings: the base matrix and the extra rows, looked up as if concatenated."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(config.num_embeddings, config.d_model))
        self.new_embedding = nn.Parameter(torch.zeros(config.additional_vocab_size, config.d_model))

    def forward(self, input_ids: Tensor) -> Tensor:
        """`(batch, tokens)` to `(batch, tokens, d_model)`; negative ids (padding) read row 0."""
        ids = input_ids.clamp(min=0)
        base = self.embedding.shape[0]
        if self.new_embedding.shape[0] == 0:
            return F.embedding(ids, self.embedding)
        # Two lookups instead of concatenating the matrices, which would copy the whole table at every step.
        extra = ids >= base
        out = F.embedding(ids.clamp(max=base - 1), self.embedding)
        return torch.where(extra.unsqueeze(-1), F.embedding((ids - base).clamp(min=0), self.new_embedding), out)


class MolmoETransformer(nn.Module):
    """Embedding, blocks and final norm, under the checkpoint's names."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__()
        self.wte = MolmoEEmbedding(config)
        self.blocks = nn.ModuleList(MolmoEBlock(config, i) for i in range(config.n_layers))
        self.ln_f = MolmoERMSNorm(config.d_model, config.layer_norm_eps)


class MolmoEPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the MolmoE classes."""

    config_class = MolmoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    # The base class declares these as plain attributes.
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["MolmoEBlock", "_ResidualBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        # transformers marks loaded parameters, and its init functions leave those alone; plain calls would not.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, MolmoERMSNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        else:
            # Bare parameters: embeddings, fused experts, class and position vectors.
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)


class MolmoEModel(MolmoEPreTrainedModel):
    """MolmoE without its output head."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__(config)
        self.transformer = MolmoETransformer(config)
        self.vision_backbone = VisionBackbone(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer.wte

    def past_length(self, cache: Cache | None, removed_blocks: Collection[int] = ()) -> int:
        """Tokens in a cache; removed blocks have no entries, so the first one that runs is asked."""
        running = (index for index in range(self.config.n_layers) if index not in removed_blocks)
        return 0 if cache is None else int(cache.get_seq_length(next(running, 0)))

    def image_features(self, images: Tensor, image_masks: Tensor) -> Tensor:
        """Features of a batch of crops: `(batch, crops, patches, pixels)` to `(batch, crops, cells, d_model)`."""
        batch, crops = images.shape[:2]
        features: Tensor = self.vision_backbone(images.flatten(0, 1), image_masks.flatten(0, 1))
        return features.view(batch, crops, *features.shape[1:])

    def embed(self, input_ids: Tensor, features: Tensor | None = None, image_input_idx: Tensor | None = None) -> Tensor:
        """Token embeddings with the image features added at their places.

        Args:
            input_ids: `(batch, tokens)`.
            features: `(batch, crops, cells, d_model)`.
            image_input_idx: `(batch, crops, cells)`, position of each cell in its row; negative means unused.

        Returns:
            `(batch, tokens, d_model)`.

        Raises:
            ValueError: features come without their places, or a place lies behind the last token.
        """
        x: Tensor = self.transformer.wte(input_ids)
        if features is None:
            return x
        if image_input_idx is None:
            raise ValueError("an image was given without image_input_idx; give all that the processor returns")
        batch, tokens, width = x.shape
        if image_input_idx.numel() and int(image_input_idx.max()) >= tokens:
            raise ValueError(f"image_input_idx has a place beyond the {tokens} tokens of input_ids")
        row = torch.arange(batch, device=x.device).view(-1, 1, 1) * tokens
        used = image_input_idx >= 0
        place = (image_input_idx.long() + row)[used]
        return x.reshape(-1, width).index_add(0, place, features[used].to(x.dtype)).view(batch, tokens, width)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        image_features: Tensor | None = None,
        subsegment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        top_k_per_block: Sequence[int | Tensor] | None = None,
        removed_blocks: Collection[int] = (),
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder on text and, on the first call of a generation, an image.

        Args:
            input_ids: `(batch, tokens)`; -1 is padding.
            attention_mask: `(batch, past + tokens)`, 1 for real tokens; or `(batch, 1, tokens, past + tokens)`, true
                where a token (third dimension) may look (fourth).
            position_ids: `(batch, tokens)`; counted over real tokens if None.
            inputs_embeds: `(batch, tokens, d_model)` instead of ids.
            images, image_masks, image_input_idx: what the processor returns, `(batch, crops, ...)`.
            image_features: `(batch, crops, cells, d_model)` already computed, instead of `images`.
            subsegment_ids: `(batch, tokens)`; token i sees j <= i only where seg[i] <= seg[j] (packed questions).
            top_k_per_block: experts per token, one entry per block of the checkpoint: a number, or one per row
                `(batch,)`.
            removed_blocks: blocks that are skipped; the same ones in every call of a generation.

        Raises:
            ValueError: inputs are missing or contradict each other.
            KnobError: a top_k or a removed block is not one that the model has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        self._check_knobs(top_k_per_block, removed_blocks)
        past = self.past_length(past_key_values, removed_blocks)
        if inputs_embeds is None:
            assert input_ids is not None
            if images is not None and image_features is None and past == 0:
                if image_masks is None:
                    raise ValueError("images were given without image_masks; give all that the processor returns")
                image_features = self.image_features(images, image_masks)
            inputs_embeds = self.embed(input_ids, image_features if past == 0 else None, image_input_idx)
            if attention_mask is None and past == 0:
                attention_mask = (input_ids != -1).long()
        elif past == 0 and (images is not None or image_features is not None):
            raise ValueError("an image needs input_ids; inputs_embeds must hold its features already (see embed)")
        x = inputs_embeds
        batch, tokens, _ = x.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + tokens, dtype=torch.long, device=x.device)
        if position_ids is None:
            if subsegment_ids is not None or attention_mask.dim() != 2:
                raise ValueError("position_ids are required with subsegment_ids or a four-dimensional mask")
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        if attention_mask.dim() == 4:
            mask = attention_mask.bool()
        else:
            keys = torch.arange(past + tokens, device=x.device)
            mask = keys[None, :] <= keys[past:, None]
            mask = mask[None, None] & attention_mask[:, None, None, :].bool()
            if subsegment_ids is not None:
                mask = mask & (subsegment_ids[:, None, :, None] <= subsegment_ids[:, None, None, :])
            # Padding rows may see nothing; let them see themselves, so that softmax stays finite. Nobody reads them.
            mask = mask | (keys[None, :] == keys[past:, None])
        rope = rope_tables(position_ids, self.config.head_dim_, self.config.rope_theta)
        hidden_states, router_logits = [x], []
        for index, block in enumerate(self.transformer.blocks):
            if index in removed_blocks:
                continue
            top_k = None if top_k_per_block is None else top_k_per_block[index]
            x, logits = block(x, rope, mask, past_key_values if use_cache else None, top_k)
            if output_hidden_states:
                hidden_states.append(x)
            if output_router_logits:
                router_logits.append(logits)
        return MoeModelOutputWithPast(
            last_hidden_state=self.transformer.ln_f(x),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )

    def _check_knobs(self, top_k_per_block: Sequence[int | Tensor] | None, removed_blocks: Collection[int]) -> None:
        blocks, experts = self.config.n_layers, self.config.moe_num_experts
        unknown = sorted(block for block in removed_blocks if not 0 <= block < blocks)
        if unknown:
            raise KnobError(f"removed_blocks holds {unknown}, but the model has the blocks 0..{blocks - 1}")
        if top_k_per_block is None:
            return
        if len(top_k_per_block) != blocks:
            raise KnobError(f"top_k_per_block has {len(top_k_per_block)} entries; give one for each of {blocks} blocks")
        for top_k in top_k_per_block:
            # One per row is checked by its extremes, which costs a synchronisation that the dispatch needs anyway.
            low, high = (int(top_k.min()), int(top_k.max())) if isinstance(top_k, Tensor) else (top_k, top_k)
            if not 1 <= low <= high <= experts:
                raise KnobError(f"top_k {low if low < 1 else high} asked for; the model can run 1..{experts} experts")


class MolmoEForConditionalGeneration(MolmoEPreTrainedModel, GenerationMixin):
    """MolmoE with its output head; answers questions about one image."""

    def __init__(self, config: MolmoEConfig) -> None:
        super().__init__(config)
        self.model: MolmoEModel = MolmoEModel(config)
        self.lm_head: nn.Linear = nn.Linear(config.d_model, config.num_embeddings, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        image_features: Tensor | None = None,
        subsegment_ids: Tensor | None = None,
        top_k_per_block: Sequence[int | Tensor] | None = None,
        removed_blocks: Collection[int] = (),
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits `(batch, tokens, embedding_size)`, and the mean cross-entropy if `labels` are given (-100: ignored).

        Other arguments are those of `MolmoEModel.forward`; `generate` accepts the ones that are spelled out here.

        Args:
            logits_to_keep: how many positions from the end get logits, or which ones; 0 means all. With 1 and an
                attention_mask it is each row's last real token, wherever the padding is.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            images=images,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            image_features=image_features,
            subsegment_ids=subsegment_ids,
            top_k_per_block=top_k_per_block,
            removed_blocks=removed_blocks,
            **kwargs,
        )
        hidden = cast(Tensor, out.last_hidden_state)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep == 1 and attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -hidden.shape[1] :]
            last = (mask * torch.arange(hidden.shape[1], device=mask.device)).argmax(1)
            hidden = hidden.gather(1, last.to(hidden.device)[:, None, None].expand(-1, 1, hidden.shape[2]))
        else:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one step of `generate`: the image in the first step only, and positions counted from the mask."""
        inputs = cast(dict[str, Any], GenerationMixin.prepare_inputs_for_generation(cast(Any, self), *args, **kwargs))
        # What transformers carries along goes on from the last column, which is padding where rows are padded behind.
        inputs.pop("position_ids", None)
        if self.model.past_length(inputs.get("past_key_values"), kwargs.get("removed_blocks", ())):
            for name in ("images", "image_masks", "image_input_idx", "image_features"):
                inputs.pop(name, None)
        return inputs
