"""The loss and the advantages equal TRL's own, computed by TRL's own code on the same tensors.

A rollout is one decision, so to TRL it is a completion of one token, whose log-probability is the joint one.
"""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from joint_policy import two_stage_log_probs
from torch import Tensor, nn

from pacevlm.training.grpo import (
    GRPOConfig,
    group_advantages,
    grpo_loss,
    joint_log_prob,
    leave_one_out,
    sample_actions,
)

BATCH, GROUP, TIERS, PAIRS = 6, 8, 3, 25


@pytest.fixture(scope="module")
def trainer_class():
    """TRL's trainer class, or a skip that says why there is none."""
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        pytest.skip(f"trl cannot be imported: {error}")
    for name in ("_compute_loss", "_generate_and_score_completions"):
        if not inspect.isfunction(getattr(GRPOTrainer, name, None)):
            pytest.skip(f"this release of trl has no GRPOTrainer.{name}")
    return GRPOTrainer


class Model(nn.Module):
    """What TRL asks of a model outside its forward pass: whether it trains, and whether it checkpoints."""

    is_gradient_checkpointing = False


def make_trainer(trainer_class, *, loss_type="grpo", scale_rewards="group", config=None, generate=None):
    """A trainer with the attributes that TRL's loss and advantage code read, and no model, data or processes."""
    config = config or GRPOConfig(group_size=GROUP)
    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(
        model=Model(),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            sync_gradients=True,
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
            reduce=lambda value, reduction: value,
        ),
        args=SimpleNamespace(
            delta=None,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=BATCH * GROUP,
        ),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list), "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
        current_gradient_accumulation_steps=1,
        num_iterations=1,
        num_generations=GROUP,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        beta=config.beta,
        loss_type=loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        max_completion_length=1,
        entropy_coef=config.entropy_coef,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        use_adaptive_entropy=False,
        scale_rewards=scale_rewards,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["accuracy"],
        environment_factories=None,
        environments=None,
        tools=[],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        log_multimodal=False,
        _is_vlm=False,
    )
    return trainer


def trl_loss(trainer_class, logp_new, logp_old, advantages, config, *, loss_type, entropy, ref_logp=None):
    """TRL's loss and metrics for rollouts of shape (batch, group)."""
    trainer = make_trainer(trainer_class, loss_type=loss_type, config=config)
    rollouts = logp_new.numel()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        logp_new.reshape(-1, 1),
        entropy.reshape(-1, 1),
        None,
    )
    token = torch.ones(rollouts, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": token,
        "prompt_mask": token,
        "completion_ids": token,
        "completion_mask": token,
        "advantages": advantages.reshape(-1),
        "old_per_token_logps": logp_old.reshape(-1, 1),
        "num_items_in_batch": torch.tensor(rollouts),
    }
    if ref_logp is not None:
        inputs["ref_per_token_logps"] = ref_logp.reshape(-1, 1)
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def trl_advantages(trainer_class, rewards: Tensor, scale: str) -> tuple[Tensor, dict[str, float]]:
    """TRL's advantages and reward metrics for rewards of shape (batch, group)."""
    trainer = make_trainer(trainer_class, scale_rewards=scale)
    rollouts = rewards.numel()
    ids = [[1]] * rollouts
    trainer._generate = lambda prompts: (ids, ids, None, ["knobs"] * rollouts, None, {}, None, None)
    trainer._calculate_rewards = lambda *args: rewards.reshape(-1, 1)
    output = trainer._generate_and_score_completions([{"prompt": "question"}] * rollouts)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return output["advantages"].reshape(rewards.shape), metrics


def rollouts(seed: int) -> dict[str, Tensor]:
    """Rollouts of a masked two-stage policy that has since moved far enough for both clips to bite."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(BATCH, TIERS, PAIRS, generator=generator) < 0.6
    mask[:, 0, 0] = True
    tier_logits = torch.randn(BATCH, TIERS, generator=generator, dtype=torch.float64)
    stage2_logits = torch.randn(BATCH, TIERS, PAIRS, generator=generator, dtype=torch.float64)
    rows = torch.arange(BATCH).unsqueeze(1)

    def moved(scale: float) -> tuple[Tensor, Tensor]:
        first, second = (torch.randn(part.shape, generator=generator) for part in (tier_logits, stage2_logits))
        return two_stage_log_probs(tier_logits + scale * first, stage2_logits + scale * second, mask)

    old, new, ref = moved(0.0), moved(0.3), moved(0.6)
    tier = sample_actions(old[0].unsqueeze(1).expand(BATCH, GROUP, TIERS), generator)
    pair = sample_actions(old[1][rows, tier], generator)

    def log_prob(log_pi1: Tensor, log_pi2: Tensor) -> Tensor:
        return joint_log_prob(log_pi1.unsqueeze(1).expand(BATCH, GROUP, TIERS), tier, log_pi2[rows, tier], pair)

    return {
        "old": log_prob(*old),
        "new": log_prob(*new),
        "ref": log_prob(*ref),
        "rewards": torch.rand(BATCH, GROUP, generator=generator, dtype=torch.float64),
        "entropy": 1 + torch.rand(BATCH, GROUP, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(("beta", "entropy_coef"), [(0.0, 0.0), (0.04, 0.0), (0.0, 0.02), (0.04, 0.02)])
@pytest.mark.parametrize("clip", [(0.2, 0.28), (0.1, 0.1)])
def test_loss_gradient_and_metrics_are_trls(trainer_class, loss_type, beta, entropy_coef, clip):
    data = rollouts(0)
    config = GRPOConfig(
        group_size=GROUP,
        clip_low=clip[0],
        clip_high=clip[1],
        beta=beta,
        entropy_coef=entropy_coef,
        scale_rewards="none",
    )
    advantages, keep = group_advantages(data["rewards"], config)
    assert keep.all()

    theirs = [data["new"].clone().requires_grad_(), data["entropy"].clone().requires_grad_()]
    expected, expected_metrics = trl_loss(
        trainer_class,
        theirs[0],
        data["old"],
        advantages,
        config,
        loss_type=loss_type,
        entropy=theirs[1],
        ref_logp=data["ref"],
    )
    ours = [data["new"].clone().requires_grad_(), data["entropy"].clone().requires_grad_()]
    # TRL estimates the KL from each sampled token; the loss takes any estimate, so it is given the same one.
    difference = data["ref"] - ours[0]
    kl = (difference.exp() - difference - 1) if beta else None
    loss, metrics = grpo_loss(ours[0], data["old"], advantages, keep, config, entropy=ours[1], kl=kl)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-12, atol=1e-14)
    if entropy_coef:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-12, atol=1e-14)
    names = {"entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} | (
        {"kl"} if beta else set()
    )
    for name in names:
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-6), name
    assert metrics["clip_ratio/low_mean"] > 0  # both clips were put to the test
    assert metrics["clip_ratio/high_mean"] > 0


def test_groups_left_out_change_nothing_that_trl_computes(trainer_class):
    # TRL keeps groups of equal rewards, with advantage 0; here they are left out. The loss must be the same.
    data = rollouts(1)
    data["rewards"][::2] = 0.25
    config = GRPOConfig(group_size=GROUP, scale_rewards="none")
    advantages, keep = group_advantages(data["rewards"], config)
    assert keep.tolist() == [False, True] * (BATCH // 2)
    inputs = (data["new"], data["old"], advantages)
    expected, _ = trl_loss(trainer_class, *inputs, config, loss_type="grpo", entropy=data["entropy"])
    loss, metrics = grpo_loss(*inputs, keep, config, rewards=data["rewards"])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    _, expected_metrics = trl_advantages(trainer_class, data["rewards"], "group")
    for name in ("reward", "reward_std", "frac_reward_zero_std"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-6), name


@pytest.mark.parametrize("scale", ["none", "group"])
def test_advantages_are_trls_times_group_over_group_minus_one(trainer_class, scale):
    rewards = rollouts(2)["rewards"]
    theirs, _ = trl_advantages(trainer_class, rewards, scale)
    ours, _ = group_advantages(rewards, GRPOConfig(group_size=GROUP, scale_rewards=scale))
    # TRL rounds the factor of its standard deviation, group / (group - 1), to single precision.
    tolerance = 1e-7 if scale == "group" else 1e-12
    torch.testing.assert_close(ours, theirs * GROUP / (GROUP - 1), rtol=tolerance, atol=1e-12)
    if scale == "none":
        torch.testing.assert_close(leave_one_out(rewards), theirs * GROUP / (GROUP - 1), rtol=1e-10, atol=1e-12)


def test_batch_scaling_is_trls_when_all_groups_have_one_mean(trainer_class):
    # TRL divides by the deviation of the rewards, this by that of the centred rewards: without differences between
    # the groups' means they are the same, and the factor group / (group - 1) cancels.
    rewards = rollouts(3)["rewards"]
    rewards = rewards - rewards.mean(1, keepdim=True) + 0.5
    config = GRPOConfig(group_size=GROUP, scale_rewards="batch")
    theirs, _ = trl_advantages(trainer_class, rewards, "batch")
    ours, _ = group_advantages(rewards, config)
    # The constant added to the deviation, 1e-4, is the only difference.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0.0)
    # With differences they part: the difficulty of the examples does not shrink the advantages here.
    uneven = rewards + torch.linspace(-2, 2, BATCH, dtype=torch.float64).unsqueeze(1)
    assert trl_advantages(trainer_class, uneven, "batch")[0].abs().mean() < 0.5 * theirs.abs().mean()
    torch.testing.assert_close(group_advantages(uneven, config).advantages, ours)
