"""The staged, resumable training of the embedded model."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from pacevlm.data.digit_tasks import TASKS
from pacevlm.data.digits import CANVASES, SceneConfig
from pacevlm.data.elements import ELEMENT_FAMILIES
from pacevlm.files import append_jsonl, save_safetensors_atomic
from pacevlm.models.elastic import read_elastic_settings, write_elastic_settings
from pacevlm.models.molmoe import MolmoEConfig, MolmoEForConditionalGeneration
from pacevlm.models.molmoe.image_processing import MolmoEImageProcessor
from pacevlm.models.molmoe.processing import MolmoEProcessor
from pacevlm.models.molmoe.tokenization import IMAGE_TOKENS
from recipes.embedded_model.continuing import load_for_training
from recipes.embedded_model.corpus import Packer, build_embedded_tokenizer, draw_crops, draw_sample
from recipes.embedded_model.language import grow, strengthen, training_loss
from recipes.embedded_model.sizes import CROP_PX, EMBEDDED_MAX_CROPS, MARGINS, MAX_NEW_TOKENS, PATCH_PX, embedded_config
from recipes.embedded_model.tower import CellHeads, init_tower_as_convolution

SMALL_CANVASES = ((32, 32), (40, 32), (32, 40), (40, 40), (48, 48))
CROPS_EASY = SceneConfig(max_digits=2, min_height_px=14, canvases=SMALL_CANVASES)
CROPS = SceneConfig(max_digits=4, min_height_px=8, canvases=(*SMALL_CANVASES, (64, 48), (64, 64)))
EASY = SceneConfig(max_digits=2, min_height_px=16, canvases=CANVASES[:6])
FULL = SceneConfig()


@dataclass(frozen=True)
class Stage:
    """One stretch of training with fixed settings.

    Attributes:
        name: shown in the log.
        steps: optimiser steps.
        batch_size: images per step, over all processes.
        lr: peak learning rate; warms up over `warmup` steps and falls along a cosine to `final_lr`.
        max_crops: tiers drawn from, one per batch.
        scenes: ranges of the scenes.
        tasks: pairs of a task and the share of batches that are the task's; the others are of `scenes`.
        num_blocks: depth of the decoder, or 0 to train the vision half alone on dense labels.
        freeze_tower: keep the vision half as it is.
        heads_weight: weight of the dense labels on hidden states at a quarter of the depth.
        scale_attention, scale_experts: factors put on what every block adds to the residual stream before the stage
            begins, so that blocks and experts weigh against the embeddings and are missed when they are left out.
        balance_weight, flatness_weight: weights of the routers' two losses, averaged over blocks.
        spread_weight: weight of the loss that spreads what is known over experts, averaged over blocks.
    """

    name: str
    steps: int
    batch_size: int
    lr: float
    max_crops: tuple[int, ...]
    scenes: SceneConfig
    num_blocks: int
    final_lr: float = 0.0
    warmup: int = 50
    freeze_tower: bool = True
    heads_weight: float = 0.2
    balance_weight: float = 0.01
    flatness_weight: float = 0.0
    spread_weight: float = 0.0
    scale_attention: float = 1.0
    scale_experts: float = 1.0
    tasks: tuple[tuple[str, float], ...] = ()


STAGES = (
    Stage("tower-easy", 600, 256, 2e-3, (1,), CROPS_EASY, 0, final_lr=2e-3, freeze_tower=False),
    Stage("tower", 1200, 256, 2e-3, (1,), CROPS, 0, final_lr=1e-4, freeze_tower=False),
    Stage("language-4-easy", 500, 48, 2e-3, (2,), EASY, 4, final_lr=2e-3),
    Stage("language-4", 400, 48, 2e-3, (2, 6, 12), FULL, 4, final_lr=1.5e-3),
    Stage(
        "language-16", 800, 32, 1.5e-3, (2, 6, 12, 12), FULL, 16, final_lr=1e-4, heads_weight=0.0, flatness_weight=0.1
    ),
    Stage(
        "strengthened",
        350,
        32,
        1.5e-3,
        (2, 6, 12, 12),
        FULL,
        16,
        final_lr=5e-5,
        heads_weight=0.0,
        flatness_weight=0.1,
        scale_attention=2.5,
        scale_experts=5.0,
    ),
    Stage(
        "more-steps", 760, 32, 1.5e-3, (2, 6, 12, 12), FULL, 16, final_lr=3e-5, heads_weight=0.0, flatness_weight=0.1
    ),
)

# From a finished model on: facts first, then all tasks, beside as many scenes of all kinds as keep what was learned.
FURTHER_STAGES = (
    Stage(
        "knowledge",
        350,
        24,
        1e-3,
        (2, 6, 12, 12),
        FULL,
        16,
        final_lr=1e-3,
        heads_weight=0.0,
        flatness_weight=0.1,
        spread_weight=0.5,
        tasks=(("knowledge", 0.4), ("thought", 0.15), ("detail", 0.1)),
    ),
    Stage(
        "tasks",
        1150,
        24,
        1e-3,
        (2, 6, 12, 12),
        FULL,
        16,
        final_lr=2e-5,
        heads_weight=0.0,
        flatness_weight=0.1,
        spread_weight=1.5,
        tasks=(("knowledge", 0.25), ("thought", 0.2), ("detail", 0.1)),
    ),
)


@dataclass
class _State:
    model: MolmoEForConditionalGeneration
    cell_heads: CellHeads
    hidden_heads: CellHeads
    stage: int = 0
    step: int = 0
    optimizer_state: dict[str, torch.Tensor] = field(default_factory=dict)


class EmbeddedTrainer:
    """Runs `stages` one after the other; what it wrote is enough to go on exactly where it stopped.

    Every step draws its scenes from (seed, stage, step, rank), so a resumed run sees what an uninterrupted one would
    have. In a process group each process takes its share of the batch and gradients are averaged: on a CPU one
    thread per process is faster than several threads in one, because each operator is too small to be worth sharing.

    Args:
        run_dir: where checkpoints and `log.jsonl` go.
        stages: what to do.
        seed: seed of weights and scenes.
        checkpoint_seconds: least time between two checkpoints.
        continue_from: exported model to begin with; its vocabulary is extended. From nothing if None.
    """

    def __init__(
        self,
        run_dir: Path,
        stages: tuple[Stage, ...] = STAGES,
        seed: int = 0,
        checkpoint_seconds: float = 45.0,
        continue_from: Path | None = None,
    ) -> None:
        self.run_dir, self.stages, self.seed, self.checkpoint_seconds = run_dir, stages, seed, checkpoint_seconds
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        run_dir.mkdir(parents=True, exist_ok=True)
        self.should_stop = False
        start: MolmoEForConditionalGeneration | None = None
        if continue_from is None:
            tokenizer = build_embedded_tokenizer()
            image_processor = MolmoEImageProcessor(
                crop_size=CROP_PX, patch_size=PATCH_PX, margins=MARGINS, max_crops=EMBEDDED_MAX_CROPS["high"]
            )
            self.processor = MolmoEProcessor(image_processor, tokenizer, max_length=1024)
            self.vocab_size, self.first_new = len(tokenizer) - len(IMAGE_TOKENS), None
            self._knob_lists: dict[str, Any] = {}
        else:
            settings = read_elastic_settings(continue_from)
            self._knob_lists = {name: settings[name] for name in ("knob_space",) if name in settings}
            start, self.processor, self.first_new = load_for_training(continue_from)
            self.vocab_size = start.config.vocab_size
        self.packer = Packer(self.processor)
        self.checkpoint = run_dir / "checkpoint.safetensors"
        self.state = self._load() if self.checkpoint.exists() else self._new(start)
        # New words keep the output rows that they were drawn with: a fact is learned in the blocks, not in its name.
        self._held = self.state.model.lm_head.weight[self.first_new :].detach().clone() if start else None

    def _modules(self, num_blocks: int) -> _State:
        torch.manual_seed(self.seed)
        model = MolmoEForConditionalGeneration(embedded_config(self.vocab_size, max(num_blocks, 1)))
        width = model.config.d_model
        return _State(model, CellHeads(width), CellHeads(width, with_place=True))

    def _new(self, start: MolmoEForConditionalGeneration | None) -> _State:
        state = self._modules(self._depth(0))
        if start is not None:
            state.model = start
            return state
        init_tower_as_convolution(state.model.model.vision_backbone.image_vit)
        return state

    def _depth(self, stage: int) -> int:
        depths = [s.num_blocks for s in self.stages[stage:] if s.num_blocks] or [1]
        return depths[0]

    def _load(self) -> _State:
        with safe_open(str(self.checkpoint), "pt") as file:
            metadata = json.loads(file.metadata()["pacevlm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = self._modules(metadata["num_blocks"])
        for prefix, module in self._parts(state).items():
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state.stage, state.step = metadata["stage"], metadata["step"]
        state.optimizer_state = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
        return state

    @staticmethod
    def _parts(state: _State) -> dict[str, nn.Module]:
        return {"model.": state.model, "cell_heads.": state.cell_heads, "hidden_heads.": state.hidden_heads}

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        state = self.state
        tensors = {p + k: v for p, module in self._parts(state).items() for k, v in module.state_dict().items()}
        if optimizer is not None:
            for index, values in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()})
        metadata = {"stage": state.stage, "step": state.step, "num_blocks": state.model.config.n_layers}
        save_safetensors_atomic(
            {k: v.contiguous() for k, v in tensors.items()}, self.checkpoint, {"pacevlm": json.dumps(metadata)}
        )

    def _optimizer(self, stage: Stage) -> torch.optim.AdamW:
        state = self.state
        vision = list(state.model.model.vision_backbone.parameters())
        language = [*state.model.model.transformer.parameters(), *state.model.lm_head.parameters()]
        if stage.num_blocks == 0:
            parameters = vision + list(state.cell_heads.parameters())
        else:
            parameters = language + list(state.hidden_heads.parameters())
            if not stage.freeze_tower:
                parameters += vision
        decayed = [p for p in parameters if p.dim() >= 2]
        others = [p for p in parameters if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98), fused=True)
        if state.optimizer_state:
            restored: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in state.optimizer_state.items():
                _, index, key = name.split(".")
                restored.setdefault(int(index), {})[key] = value
            full = optimizer.state_dict()
            full["state"] = restored
            optimizer.load_state_dict(full)
            state.optimizer_state = {}
        return optimizer

    def _lr(self, stage: Stage, step: int) -> float:
        warm = min(1.0, (step + 1) / stage.warmup)
        fall = 0.5 * (1 + np.cos(np.pi * step / stage.steps))
        return warm * (stage.final_lr + (stage.lr - stage.final_lr) * float(fall))

    def _step(self, stage: Stage, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        state = self.state
        rng = np.random.default_rng([self.seed, state.stage, step, self.rank])
        # All processes take the same tier, or one would wait for the other.
        tier_rng = np.random.default_rng([self.seed, state.stage, step])
        max_crops = stage.max_crops[int(tier_rng.integers(len(stage.max_crops)))]
        share = stage.batch_size // self.world_size
        if stage.num_blocks == 0:
            images, image_masks, labels = draw_crops(rng, stage.scenes, share)
            features = state.model.model.vision_backbone(images, image_masks)
            return state.cell_heads.loss(features.flatten(0, 1), labels)
        scenes, as_number = stage.scenes, False
        if stage.tasks:
            # A whole batch shows one task: rows are padded to the longest, and tasks differ twofold in their length.
            ends = np.cumsum([part for _, part in stage.tasks])
            place = int(np.searchsorted(ends, tier_rng.random(), side="right"))
            if place < len(stage.tasks):
                task = TASKS[stage.tasks[place][0]]
                scenes, as_number = task.scenes, task.families == ELEMENT_FAMILIES
        samples = [draw_sample(rng, scenes, max_crops, as_number=as_number) for _ in range(share)]
        batch = self.packer.pack(samples)
        return training_loss(
            state.model,
            batch,
            freeze_tower=stage.freeze_tower,
            heads=state.hidden_heads,
            heads_after=max(1, stage.num_blocks // 4),
            heads_weight=stage.heads_weight,
            balance_weight=stage.balance_weight,
            flatness_weight=stage.flatness_weight,
            spread_weight=stage.spread_weight,
        )

    def run(self) -> MolmoEForConditionalGeneration:
        """Train from wherever the run directory is to the end of the last stage; returns the model.

        Raises:
            KeyboardInterrupt: `should_stop` was set, here or in another process; what was done is kept.
        """
        state = self.state
        while state.stage < len(self.stages):
            stage = self.stages[state.stage]
            if stage.num_blocks and stage.num_blocks != state.model.config.n_layers:
                state.model = grow(state.model, stage.num_blocks)
            if state.step == 0:
                strengthen(state.model, stage.scale_attention, stage.scale_experts)
            optimizer = self._optimizer(stage)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            averages: dict[str, float] = {}
            last_save = last_log = time.monotonic()
            last_logged = state.step
            while state.step < stage.steps:
                for group in optimizer.param_groups:
                    group["lr"] = self._lr(stage, state.step)
                loss, metrics = self._step(stage, state.step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                stop = self._average_gradients(parameters)
                metrics["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, 1.0))
                optimizer.step()
                if self._held is not None:
                    state.model.lm_head.weight.data[self.first_new :] = self._held
                state.step += 1
                for name, value in metrics.items():
                    if value == value:  # a batch without a family leaves no value
                        averages[name] = 0.9 * averages.get(name, value) + 0.1 * value
                now = time.monotonic()
                if self.rank == 0 and state.step % 25 == 0:
                    seconds = (now - last_log) / (state.step - last_logged)
                    last_log, last_logged = now, state.step
                    self._log(stage, averages, seconds)
                if self.rank == 0 and (stop or now - last_save > self.checkpoint_seconds):
                    self._save(optimizer)
                    last_save = now
                if stop:
                    raise KeyboardInterrupt
            state.stage, state.step = state.stage + 1, 0
            if self.rank == 0:
                self._save(None)
        return state.model

    def _average_gradients(self, parameters: list[nn.Parameter]) -> bool:
        """Share gradients among all processes, and whether one of them is to stop: then all do, after this step."""
        if self.world_size == 1:
            return self.should_stop
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([float(self.should_stop)])])
        dist.all_reduce(flat)
        stop = bool(flat[-1] > 0)
        flat = flat[:-1] / self.world_size
        for parameter, piece in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = piece.view_as(parameter)
        return stop

    def _log(self, stage: Stage, averages: dict[str, float], seconds: float) -> None:
        record: dict[str, Any] = {"stage": stage.name, "step": self.state.step, "seconds_per_step": round(seconds, 3)}
        record |= {name: round(value, 4) for name, value in averages.items()}
        append_jsonl(self.run_dir / "log.jsonl", record)
        later = sum(other.steps for other in self.stages[self.state.stage + 1 :])
        left = (stage.steps - self.state.step + later) * seconds
        shown = " ".join(f"{k.split('/')[-1]}={v:.3f}" for k, v in averages.items())
        print(
            f"{stage.name} {self.state.step}/{stage.steps} {seconds:.2f} s/step, {left / 60:.0f} min left: {shown}",
            flush=True,
        )

    def export(self, folder: Path) -> None:
        """Write model (float16), processor, tiers and knob lists to a model directory, replacing what is there.

        A block order has to be measured anew.
        """
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        weights = {name: value.half() for name, value in self.state.model.state_dict().items()}
        settings = self.state.model.config.to_dict()
        exported = MolmoEForConditionalGeneration(MolmoEConfig(**{**settings, "dtype": "float16"}))
        exported.save_pretrained(temporary, state_dict=weights)
        self.processor.save_pretrained(temporary)
        write_elastic_settings(
            temporary, vision_budgets=EMBEDDED_MAX_CROPS, max_new_tokens=MAX_NEW_TOKENS, **self._knob_lists
        )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
