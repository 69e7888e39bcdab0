"""Training forward of the embedded model: packed questions, dense auxiliary labels, load balancing, growth in depth."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevlm.data.elements import ELEMENT_FAMILIES
from pacevlm.models.experts import route, run_experts
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.blocks import MolmoEBlock, MolmoEMoE, rope_tables
from recipes.embedded_model.corpus import PackedBatch
from recipes.embedded_model.tower import CellHeads


def decoder_blocks(model: MolmoEForConditionalGeneration) -> list[MolmoEBlock]:
    """The decoder's blocks, in order."""
    return [cast(MolmoEBlock, block) for block in model.model.transformer.blocks]


def load_balancing_loss(router_logits: Tensor, top_k: int) -> Tensor:
    """Switch-style balance of one block's experts: 1 when tokens spread evenly (Fedus et al. 2022, section 2.2).

    Args:
        router_logits: `(tokens, experts)`.
        top_k: experts per token.
    """
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    share = torch.bincount(chosen.reshape(-1), minlength=probabilities.shape[1]) / chosen.numel()
    return probabilities.shape[1] * (share * probabilities.mean(0)).sum()


def router_flatness_loss(router_logits: Tensor) -> Tensor:
    """How far tokens' router probabilities are from even: 0 when all experts weigh the same, 1 when one has all.

    A small model left alone puts nearly all weight on one expert, and the other seven could be dropped for free.
    Published mixtures of experts spread their weights; this term makes the small one do so.

    Args:
        router_logits: `(tokens, experts)`.
    """
    log_probabilities = torch.log_softmax(router_logits.float(), dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    return 1 - entropy / math.log(router_logits.shape[-1])


def contributions(mixture: MolmoEMoE, x: Tensor) -> Tensor:
    """What each chosen expert adds to the stream, best first: `(tokens, d_model)` to `(tokens, top_k, d_model)`."""
    flat = mixture.ff_norm(x)
    weights, experts = route(mixture.gate(flat), mixture.top_k, x.dtype)
    matrices = mixture.experts.gate_up_proj, mixture.experts.down_proj
    places = range(mixture.top_k)
    each = [run_experts(flat, weights[:, i : i + 1], experts[:, i : i + 1], *matrices) for i in places]
    return torch.stack(each, dim=1)


def spread_loss(each: Tensor) -> Tensor:
    """How unevenly experts carry their sum, and how much they say the same: 0 for equal shares at right angles.

    Even router weights do not keep a small model from putting most of what it knows into the leading experts: half of
    them gave a sum with a cosine of 0.95 to the whole. Experts that know different things are missed.

    Args:
        each: `(tokens, top_k, d_model)`, what each expert adds.
    """
    total = each.sum(1, keepdim=True)
    size = total.pow(2).sum((1, 2)) + 1e-6
    share = (each * total).sum(-1) / size.unsqueeze(-1)
    uneven = (each.shape[1] * share.pow(2).sum(-1)).clamp(min=1.0).log()
    alike = (size / (each.pow(2).sum((1, 2)) + 1e-6)).clamp(min=1.0).log()
    return (uneven + alike).mean()


# Questions that need several steps, or a fact, are rarer and slower to learn.
FAMILY_WEIGHTS = {"product": 3.0, "sum": 2.5, "difference": 2.0, "right_of": 2.0, "read": 1.5}
FAMILY_WEIGHTS |= dict.fromkeys(ELEMENT_FAMILIES, 3.0)


def training_loss(
    model: MolmoEForConditionalGeneration,
    batch: PackedBatch,
    *,
    freeze_tower: bool,
    heads: CellHeads | None,
    heads_after: int,
    heads_weight: float,
    balance_weight: float,
    flatness_weight: float = 0.0,
    spread_weight: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Answer cross-entropy plus the auxiliary terms of one packed batch.

    Args:
        model: the model being trained.
        batch: packed questions.
        freeze_tower: run the vision half without gradients.
        heads: dense heads on the hidden state at image cells, or None.
        heads_after: number of blocks below those heads.
        heads_weight: weight of the heads' loss.
        balance_weight: weight of the load-balancing loss, averaged over blocks.
        flatness_weight: weight of the router-flatness loss, averaged over blocks.
        spread_weight: weight of the loss that spreads what is known over experts, where answers are made, averaged over
            blocks.

    Returns:
        loss and metrics: `loss/*`, and `exact/<family>`, the share of questions with every token right when the
        earlier tokens are given.
    """
    inner = model.model
    with torch.set_grad_enabled(not freeze_tower and torch.is_grad_enabled()):
        features = inner.vision_backbone(batch.images, batch.image_masks)
    used = features.flatten(0, 1)[batch.cell_rows]
    rows, tokens = batch.input_ids.shape
    x = inner.transformer.wte(batch.input_ids)
    x = x.reshape(rows * tokens, -1).index_add(0, batch.cell_places, used).view(rows, tokens, -1)
    rope = rope_tables(batch.position_ids, model.config.head_dim_, model.config.rope_theta)
    balance, flatness, spread = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
    labelled = (batch.labels >= 0).view(-1)
    metrics: dict[str, float] = {}
    total = x.new_zeros(())
    for block in decoder_blocks(model):
        x = x + block.attn.attend(*block.attn.project(x, rope), batch.mask)
        if spread_weight:
            spread = spread + spread_loss(contributions(block.mlp, x.reshape(rows * tokens, -1)[labelled]))
        mixed, router_logits = block.mlp(x)
        x = x + mixed
        if balance_weight:
            balance = balance + load_balancing_loss(router_logits.flatten(0, 1), model.config.moe_top_k)
        if flatness_weight:
            flatness = flatness + router_flatness_loss(router_logits.flatten(0, 1))
        if heads is not None and heads_weight and block.index + 1 == heads_after:
            cells = x.reshape(rows * tokens, -1)[batch.cell_places]
            dense_loss, dense_metrics = heads.loss(F.rms_norm(cells, cells.shape[-1:]), batch.cell_labels)
            total = total + heads_weight * dense_loss
            metrics["loss/dense"] = float(dense_loss.detach())
            metrics.update(dense_metrics)
    hidden = inner.transformer.ln_f(x.reshape(rows * tokens, -1)[labelled])
    logits = model.lm_head(hidden)
    target = batch.labels.view(-1)[labelled]
    question = batch.question.view(-1)[labelled]
    by_question = torch.tensor([FAMILY_WEIGHTS.get(family, 1.0) for family in batch.families])
    weight = by_question[question]
    answer_loss = (F.cross_entropy(logits.float(), target, reduction="none") * weight).sum() / weight.sum()
    depth = len(inner.transformer.blocks)
    routing = balance_weight * balance + flatness_weight * flatness + spread_weight * spread
    total = total + answer_loss + routing / depth
    metrics["loss/answer"] = float(answer_loss.detach())
    if balance_weight:
        metrics["loss/balance"] = float(balance.detach()) / depth
    if flatness_weight:
        metrics["loss/flatness"] = float(flatness.detach()) / depth
    if spread_weight:
        metrics["loss/spread"] = float(spread.detach()) / depth
    wrong = (logits.argmax(-1) != target).float()
    errors = torch.zeros(len(batch.families)).index_add(0, question, wrong)
    by_family: dict[str, list[float]] = defaultdict(list)
    for family, count in zip(batch.families, errors.tolist(), strict=True):
        by_family[family].append(float(count == 0))
    metrics.update({f"exact/{family}": sum(v) / len(v) for family, v in by_family.items()})
    metrics["exact"] = sum(sum(v) / len(v) for v in by_family.values()) / len(by_family)
    return total, metrics


@torch.no_grad()
def grow(model: MolmoEForConditionalGeneration, num_blocks: int) -> MolmoEForConditionalGeneration:
    """A deeper model in which every block became several copies that share its residual contribution.

    Each copy's output projections are divided by the number of copies, so that together they do roughly what the one
    block did (stacking; Gong et al. 2019, with shared contributions so that no copy is idle).

    Raises:
        ValueError: `num_blocks` is not a multiple of the present depth.
    """
    present = model.config.n_layers
    if num_blocks % present:
        raise ValueError(f"a model of {present} blocks grows to a multiple of {present}, not to {num_blocks}")
    copies = num_blocks // present
    settings = model.config.to_dict()
    settings["n_layers"] = num_blocks
    deeper = MolmoEForConditionalGeneration(MolmoEConfig(**settings))
    source = model.state_dict()
    prefix = "model.transformer.blocks."
    state = {name: value for name, value in source.items() if not name.startswith(prefix)}
    for name, value in source.items():
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            scale = 1 / copies if rest in ("attn.attn_out.weight", "mlp.experts.down_proj") else 1.0
            for copy in range(copies):
                state[f"{prefix}{int(index) * copies + copy}.{rest}"] = value * scale
    deeper.load_state_dict(state)
    return deeper


@torch.no_grad()
def strengthen(model: MolmoEForConditionalGeneration, attention: float, experts: float) -> None:
    """Multiply what every block adds to the residual stream: attention's and the experts' output projections."""
    for block in decoder_blocks(model):
        block.attn.attn_out.weight.mul_(attention)
        block.mlp.experts.down_proj.mul_(experts)
