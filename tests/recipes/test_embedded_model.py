"""The embedded model's training: labels, packing, growth and resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pacevlm.data.digits import SceneConfig, sample_scene
from pacevlm.models.molmoe import MolmoEForConditionalGeneration
from recipes.embedded_model.corpus import GEOMETRY, draw_sample
from recipes.embedded_model.labels import cell_labels
from recipes.embedded_model.language import (
    contributions,
    grow,
    load_balancing_loss,
    router_flatness_loss,
    spread_loss,
    strengthen,
    training_loss,
)
from recipes.embedded_model.sizes import embedded_config
from recipes.embedded_model.trainer import EASY, EmbeddedTrainer, Stage

STAGES = (
    Stage("tower", 2, 4, 1e-3, (1,), SceneConfig(canvases=((32, 32), (48, 48))), 0, warmup=1, freeze_tower=False),
    Stage("language", 2, 2, 1e-3, (2,), EASY, 1, warmup=1),
    Stage("deeper", 2, 2, 1e-3, (2,), EASY, 2, warmup=1, flatness_weight=0.1, scale_experts=2.0),
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedTrainer:
    return EmbeddedTrainer(tmp_path_factory.mktemp("embedded"), STAGES)


def test_every_digit_has_one_centre_in_the_global_crop_unless_two_share_a_cell() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = sample_scene(rng, "train", SceneConfig(max_digits=3, min_height_px=20))
        labels = cell_labels(scene.digits, scene.image.shape[:2], (2, 2), GEOMETRY)
        shown = int(labels.centre[0].sum())
        assert 1 <= shown <= len(scene.digits)
        assert set(labels.digit[0][labels.centre[0] == 1]) <= {digit.value + 1 for digit in scene.digits}
        assert (labels.digit[labels.centre == 1] > 0).all()
        assert ((labels.digit > 0) == (labels.colour > 0)).all()


def test_packed_questions_are_answered_as_if_each_was_alone(trainer: EmbeddedTrainer) -> None:
    torch.manual_seed(1)
    model = MolmoEForConditionalGeneration(embedded_config(trainer.vocab_size, 2)).eval()
    rng = np.random.default_rng(2)
    sample = draw_sample(rng, SceneConfig(min_digits=2), 2)
    assert len(sample.questions) >= 4

    def losses(chosen: list[int]) -> list[float]:
        questions = [sample.questions[i] for i in chosen]
        batch = trainer.packer.pack([type(sample)(sample.image, sample.labels, questions)])
        options = {"freeze_tower": True, "heads": None, "heads_after": 1, "heads_weight": 0.0, "balance_weight": 0.0}
        return [training_loss(model, batch, **options)[0].item()]  # type: ignore[arg-type]

    with torch.no_grad():
        together = losses([0, 0, 0])  # the same question three times costs what it costs once
        assert together == pytest.approx(losses([0]), abs=1e-5)
        first, last = losses([0]), losses([3])
        assert losses([0, 3])[0] == pytest.approx(losses([3, 0])[0], abs=1e-5)
        assert min(first[0], last[0]) <= losses([0, 3])[0] <= max(first[0], last[0])


def test_growth_shares_a_blocks_contribution_among_its_copies() -> None:
    torch.manual_seed(0)
    small = MolmoEForConditionalGeneration(embedded_config(300, 2))
    large = grow(small, 6)
    for index, block in enumerate(small.model.transformer.blocks):
        copies = [large.model.transformer.blocks[3 * index + copy] for copy in range(3)]
        total = sum(copy.attn.attn_out.weight for copy in copies)
        torch.testing.assert_close(total, block.attn.attn_out.weight)
        assert all(torch.equal(copy.mlp.gate.weight, block.mlp.gate.weight) for copy in copies)
    assert torch.equal(large.lm_head.weight, small.lm_head.weight)
    with pytest.raises(ValueError, match="multiple of 2"):
        grow(small, 5)


def test_strengthening_scales_what_blocks_add_and_nothing_else() -> None:
    model = MolmoEForConditionalGeneration(embedded_config(300, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strengthen(model, 2.0, 3.0)
    for name, value in model.state_dict().items():
        factor = 2.0 if name.endswith("attn_out.weight") else 3.0 if name.endswith("experts.down_proj") else 1.0
        torch.testing.assert_close(value, before[name] * factor)


def test_router_losses_are_least_for_even_routers() -> None:
    even, certain = torch.zeros(64, 8), torch.zeros(64, 8)
    certain[:, 0] = 50.0
    assert router_flatness_loss(even).item() == pytest.approx(0.0, abs=1e-6)
    assert router_flatness_loss(certain).item() == pytest.approx(1.0, abs=1e-6)
    spread = 50.0 * torch.eye(8).repeat(8, 1)
    assert load_balancing_loss(spread, 1).item() == pytest.approx(1.0, abs=1e-5)
    assert load_balancing_loss(certain, 1).item() == pytest.approx(8.0, abs=1e-4)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_resumed_training_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole = EmbeddedTrainer(tmp_path / "whole", STAGES).run().state_dict()
    interrupted = EmbeddedTrainer(tmp_path / "parts", STAGES, checkpoint_seconds=0.0)
    step, count = interrupted._step, iter(range(100))

    def stopping(*arguments: object) -> object:
        if next(count) == stop_at:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(interrupted, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = EmbeddedTrainer(tmp_path / "parts", STAGES).run().state_dict()
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_contributions_are_what_the_experts_add() -> None:
    torch.manual_seed(0)
    model = MolmoEForConditionalGeneration(embedded_config(300, 1))
    mixture = model.model.transformer.blocks[0].mlp
    x = torch.randn(1, 9, 96)
    each = contributions(mixture, x[0])
    assert each.shape == (9, 8, 96)
    torch.testing.assert_close(each.sum(1), mixture(x)[0][0])
    for top_k in (1, 4):  # best first, as a smaller top_k keeps them
        torch.testing.assert_close(each[:, :top_k].sum(1), mixture(x, top_k)[0][0])


def test_spread_is_least_for_equal_shares_at_right_angles() -> None:
    apart = torch.eye(8).repeat(3, 1, 1)
    assert spread_loss(apart).item() == pytest.approx(0.0, abs=1e-4)
    one_leads = torch.zeros(3, 8, 8)
    one_leads[:, 0] = torch.randn(3, 8)
    assert spread_loss(one_leads).item() == pytest.approx(np.log(8), abs=1e-3)
    same = torch.ones(3, 8, 8)
    assert spread_loss(same).item() == pytest.approx(np.log(8), abs=1e-3)
    none = torch.zeros(3, 8, 8, requires_grad=True)
    spread_loss(none).backward()
    assert none.grad is not None
    assert none.grad.isfinite().all()
