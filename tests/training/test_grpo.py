import itertools
import math

import pytest
import torch
from joint_policy import joint_entropy, joint_kl, two_stage_log_probs
from torch import Tensor

from pacevlm.errors import ConfigError, DataError, KnobError
from pacevlm.training.grpo import (
    GRPOConfig,
    entropy,
    group_advantages,
    grpo_loss,
    joint_log_prob,
    kl_divergence,
    leave_one_out,
    masked_log_softmax,
    sample_actions,
    sampled_entropy,
    sampled_kl,
)

TIERS, PAIRS = 3, 25


class TablePolicy:
    """A two-stage policy that is a table of logits per context, under a joint mask."""

    def __init__(self, contexts: int, tiers: int, pairs: int, generator: torch.Generator, mask: Tensor) -> None:
        options = {"generator": generator, "dtype": torch.float64}
        self.tier_logits = torch.randn(contexts, tiers, **options).requires_grad_()
        self.stage2_logits = torch.randn(contexts, tiers, pairs, **options).requires_grad_()
        self.mask = mask

    @property
    def parameters(self) -> list[Tensor]:
        return [self.tier_logits, self.stage2_logits]

    def log_probs(self) -> tuple[Tensor, Tensor]:
        return two_stage_log_probs(self.tier_logits, self.stage2_logits, self.mask)

    def joint(self) -> Tensor:
        """Log-probability of every configuration, (contexts, tiers, pairs)."""
        log_pi1, log_pi2 = self.log_probs()
        return log_pi1.unsqueeze(-1) + log_pi2

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, self.parameters)])

    def exact_gradient(self, table: Tensor) -> Tensor:
        """Ascent direction of the expected value of `table`, averaged over contexts, by enumeration."""
        return self.gradient((self.joint().exp() * table).sum() / len(table))


def random_mask(contexts: int, tiers: int, pairs: int, generator: torch.Generator) -> Tensor:
    """A joint mask that no product of per-knob masks gives; in context 0 the last tier is ruled out altogether."""
    mask = torch.rand(contexts, tiers, pairs, generator=generator) < 0.6
    mask[:, 0, 0] = True
    mask[0, -1] = False
    return mask


# Distributions


def test_masked_actions_have_no_probability_and_no_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.5
    mask[:, 4] = True
    logits[~mask] = torch.tensor([math.nan, math.inf, 1e30]).repeat(20)[: int((~mask).sum())]
    logits.requires_grad_()
    log_probs = masked_log_softmax(logits, mask)
    probs = log_probs.exp()
    assert torch.isneginf(log_probs[~mask]).all()
    assert (probs[~mask] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(6))
    (log_probs[:, 4].sum() + entropy(log_probs).sum() + (probs**2).sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any()


def test_masked_log_softmax_equals_softmax_over_the_allowed_actions():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator)
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(masked_log_softmax(logits, mask)[mask], logits[mask].log_softmax(-1))
    assert masked_log_softmax(logits.bfloat16(), mask).dtype == torch.float32


def test_a_row_without_actions_is_an_error():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(KnobError, match="1 rows"):
        masked_log_softmax(torch.zeros(2, 2), mask)
    with pytest.raises(DataError, match="boolean"):
        masked_log_softmax(torch.zeros(2, 2), mask.float())
    with pytest.raises(DataError, match="broadcast"):
        masked_log_softmax(torch.zeros(2, 3), mask)


def test_masked_knobs_are_never_sampled_and_the_others_at_their_rate():
    generator = torch.Generator().manual_seed(2)
    mask = random_mask(2, TIERS, PAIRS, generator)
    policy = TablePolicy(2, TIERS, PAIRS, generator, mask)
    draws = 40_000
    with torch.no_grad():
        log_pi1, log_pi2 = policy.log_probs()
        tier = sample_actions(log_pi1.unsqueeze(1).expand(2, draws, TIERS), generator)
        pair = sample_actions(log_pi2[torch.arange(2).unsqueeze(1), tier], generator)
        counts = torch.zeros(2, TIERS * PAIRS, dtype=torch.float64)
        counts.scatter_add_(1, tier * PAIRS + pair, torch.ones(2, draws, dtype=torch.float64))
        probs = policy.joint().exp().flatten(1)
    assert (counts[~mask.flatten(1)] == 0).all()
    deviation = (counts - draws * probs) / (draws * probs * (1 - probs)).sqrt().clamp(min=1.0)
    assert deviation.abs().max() < 5


def test_two_stage_probabilities_sum_to_one_over_the_allowed_configurations():
    generator = torch.Generator().manual_seed(3)
    mask = random_mask(4, TIERS, PAIRS, generator)
    policy = TablePolicy(4, TIERS, PAIRS, generator, mask)
    probs = policy.joint().exp()
    torch.testing.assert_close(probs.sum((1, 2)), torch.ones(4, dtype=torch.float64))
    assert (probs[~mask] == 0).all()
    with pytest.raises(KnobError):
        two_stage_log_probs(policy.tier_logits, policy.stage2_logits, torch.zeros_like(mask))


# Entropy and KL


def test_joint_entropy_and_kl_equal_a_sum_over_all_configurations():
    generator = torch.Generator().manual_seed(4)
    mask = random_mask(4, TIERS, PAIRS, generator)
    policy, reference = (TablePolicy(4, TIERS, PAIRS, generator, mask) for _ in range(2))
    log_p, log_q = policy.joint().flatten(1), reference.joint().flatten(1)
    flat = mask.flatten(1)
    safe_p, safe_q = log_p.masked_fill(~flat, 0.0), log_q.masked_fill(~flat, 0.0)
    torch.testing.assert_close(joint_entropy(*policy.log_probs()), -(log_p.exp() * safe_p).sum(1))
    kl = joint_kl(*policy.log_probs(), *reference.log_probs())
    torch.testing.assert_close(kl, (log_p.exp() * (safe_p - safe_q)).sum(1))
    assert (kl > 0).all()
    assert (joint_kl(*policy.log_probs(), *policy.log_probs()) == 0).all()
    gradient = policy.gradient(kl.sum() + joint_entropy(*policy.log_probs()).sum())
    assert torch.isfinite(gradient).all()


def test_kl_refuses_masks_that_differ():
    wide = masked_log_softmax(torch.zeros(3), torch.tensor([True, True, False]))
    narrow = masked_log_softmax(torch.zeros(3), torch.tensor([True, False, False]))
    with pytest.raises(DataError, match="mask both"):
        kl_divergence(wide, narrow)
    torch.testing.assert_close(kl_divergence(narrow, wide), torch.tensor(2.0).log())


@pytest.mark.parametrize("quantity", ["entropy", "kl"])
def test_sampled_estimates_are_unbiased_in_value_and_gradient(quantity):
    # One rollout per tier, weighted by the probability that the sampling policy drew it: the exact expectation.
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(1, TIERS, 4, dtype=torch.bool)
    policy, sampler, reference = (TablePolicy(1, TIERS, 4, generator, mask) for _ in range(3))
    old = sampler.log_probs()[0].detach()
    log_pi1, log_pi2 = policy.log_probs()
    ratio = (log_pi1 - old).exp()
    if quantity == "entropy":
        exact, estimate = joint_entropy(log_pi1, log_pi2), sampled_entropy(log_pi1, log_pi2, ratio)
    else:
        ref = reference.log_probs()
        exact, estimate = joint_kl(log_pi1, log_pi2, *ref), sampled_kl(log_pi1, log_pi2, *ref, ratio)
    expected = (old.exp() * estimate).sum(1)
    torch.testing.assert_close(expected, exact)
    torch.testing.assert_close(
        policy.gradient(expected.sum()), policy.gradient(joint_value(quantity, policy, reference))
    )


def joint_value(quantity: str, policy: TablePolicy, reference: TablePolicy) -> Tensor:
    if quantity == "entropy":
        return joint_entropy(*policy.log_probs()).sum()
    return joint_kl(*policy.log_probs(), *reference.log_probs()).sum()


# Advantages


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    generator = torch.Generator().manual_seed(6)
    values = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    result = leave_one_out(values)
    for row, column in itertools.product(range(3), range(5)):
        others = [values[row, other] for other in range(5) if other != column]
        torch.testing.assert_close(result[row, column], values[row, column] - sum(others) / 4)
    torch.testing.assert_close(result, (values - values.mean(1, keepdim=True)) * 5 / 4)


def test_scaling_of_advantages():
    generator = torch.Generator().manual_seed(7)
    rewards = torch.rand(4, 6, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [0.1], [2.0], [0.5]])
    centred = leave_one_out(rewards)

    def advantages(scale):
        return group_advantages(rewards, GRPOConfig(group_size=6, scale_rewards=scale, scale_eps=0.0)).advantages

    torch.testing.assert_close(advantages("none"), centred)
    torch.testing.assert_close(advantages("batch"), centred / centred.std())
    torch.testing.assert_close(advantages("group"), centred / rewards.std(1, keepdim=True))


def test_a_baseline_of_the_whole_batch_is_the_mean_of_it():
    generator = torch.Generator().manual_seed(9)
    rewards = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    rewards[0] = 1.0  # all equal, and above the others
    costs = (torch.rand(3, 4, generator=generator) < 0.5).double()
    config = GRPOConfig(group_size=4, baseline="batch", scale_rewards="none")
    advantages, keep = group_advantages(rewards, config, costs=costs, multiplier=2.0)
    assert keep.all()
    torch.testing.assert_close(advantages, rewards - rewards.mean() - 2.0 * (costs - costs.mean()))


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_cost_is_centred_apart_from_the_scaled_reward(scale):
    generator = torch.Generator().manual_seed(8)
    rewards = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    costs = (torch.rand(5, 4, generator=generator) < 0.5).double()
    config = GRPOConfig(group_size=4, scale_rewards=scale)
    alone = group_advantages(rewards, config).advantages
    for multiplier in (0.0, 0.7, 30.0):  # what accuracy weighs does not shrink as the multiplier grows
        both = group_advantages(rewards, config, costs=costs, multiplier=multiplier).advantages
        torch.testing.assert_close(both - alone, -multiplier * leave_one_out(costs))


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_groups_without_a_signal_are_left_out_and_counted(scale):
    config = GRPOConfig(group_size=4, scale_rewards=scale, entropy_coef=0.5, beta=0.5)
    rewards = torch.tensor(
        [[0.0, 1.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [0.3, 0.3 + 5e-7, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1]],
        dtype=torch.float64,
    )
    costs = torch.tensor([[0.0] * 4, [0.0] * 4, [1.0] * 4, [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    advantages, keep = group_advantages(rewards, config, costs=costs, multiplier=2.0)
    assert keep.tolist() == [True, False, False, True]  # the last differs in its costs
    assert (advantages[~keep] == 0).all()
    torch.testing.assert_close(advantages[3], -2.0 * leave_one_out(costs)[3])
    logp, extra = (torch.full((4, 4), -1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, metrics = grpo_loss(logp, logp.detach(), advantages, keep, config, entropy=extra, kl=2 * extra)
    loss.backward()
    assert metrics["frac_reward_zero_std"] == 0.5
    # No surrogate, but the regularisers stay: they are what revives a policy that has become certain.
    assert (logp.grad[~keep] == 0).all()
    assert (extra.grad[~keep] != 0).all()
    for gradient in (logp.grad, extra.grad):
        assert (gradient[keep] != 0).all()


def test_a_batch_without_any_signal_gives_a_zero_loss():
    config = GRPOConfig(group_size=3)
    rewards = torch.full((2, 3), 0.7)
    logp = torch.zeros(2, 3, requires_grad=True)
    loss, metrics = grpo_loss(logp, logp.detach(), *group_advantages(rewards, config), config, rewards=rewards)
    loss.backward()
    assert loss.item() == 0.0
    assert (logp.grad == 0).all()
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["reward"] == pytest.approx(0.7)
    assert metrics["reward_std"] == pytest.approx(0.0, abs=1e-7)


# Loss


def test_clipping_is_asymmetric_and_stops_the_gradient_on_its_side_only():
    config = GRPOConfig(group_size=2)
    ratios = torch.tensor([[0.7, 0.7], [0.85, 1.2], [1.4, 1.4]], dtype=torch.float64)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    logp_new = ratios.log().requires_grad_()
    keep = torch.ones(3, dtype=torch.bool)
    loss, metrics = grpo_loss(logp_new, torch.zeros_like(ratios), signs, keep, config)
    loss.backward()
    stopped = torch.tensor([[False, True], [False, False], [True, False]])
    assert torch.equal(logp_new.grad == 0, stopped)
    expected = -torch.tensor([0.7, -0.8, -0.85, 1.2, 1.28, -1.4], dtype=torch.float64).mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 / 6)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 6)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(2 / 6)


def test_first_pass_has_ratio_exactly_one_under_masks():
    generator = torch.Generator().manual_seed(9)
    batch, group = 8, 6
    mask = random_mask(batch, TIERS, PAIRS, generator)
    tier_logits = torch.randn(batch, TIERS, generator=generator, requires_grad=True)
    pair_logits = torch.randn(batch, TIERS, PAIRS, generator=generator, requires_grad=True)

    def log_prob(tier, pair):
        log_pi1, log_pi2 = two_stage_log_probs(tier_logits, pair_logits, mask)
        own = log_pi2[torch.arange(batch).unsqueeze(1), tier]
        return joint_log_prob(log_pi1.unsqueeze(1).expand(batch, group, TIERS), tier, own, pair)

    with torch.no_grad():
        log_pi1, log_pi2 = two_stage_log_probs(tier_logits, pair_logits, mask)
        tier = sample_actions(log_pi1.unsqueeze(1).expand(batch, group, TIERS), generator)
        pair = sample_actions(log_pi2[torch.arange(batch).unsqueeze(1), tier], generator)
        logp_old = log_prob(tier, pair)
    logp_new = log_prob(tier, pair)
    assert ((logp_new - logp_old).exp() == 1.0).all()
    config = GRPOConfig(group_size=group)
    rewards = torch.rand(batch, group, generator=generator)
    advantages, keep = group_advantages(rewards, config)
    loss, metrics = grpo_loss(logp_new, logp_old, advantages, keep, config)
    assert metrics["clip_ratio/region_mean"] == 0.0
    torch.testing.assert_close(loss.detach(), -advantages.mean())
    loss.backward()
    for parameter in (tier_logits, pair_logits):
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).any()
    assert (tier_logits.grad[~mask.any(-1)] == 0).all()


def test_masked_knobs_get_no_gradient():
    generator = torch.Generator().manual_seed(10)
    mask = random_mask(3, TIERS, PAIRS, generator)
    policy = TablePolicy(3, TIERS, PAIRS, generator, mask)
    config = GRPOConfig(group_size=32, entropy_coef=0.1, beta=0.1)
    loss = bandit_loss(policy, torch.arange(3), torch.rand(3, TIERS, PAIRS, generator=generator), config, generator)
    loss.backward()
    assert torch.isfinite(policy.stage2_logits.grad).all()
    assert (policy.stage2_logits.grad[~mask] == 0).all()
    assert (policy.tier_logits.grad[~mask.any(-1)] == 0).all()
    assert (policy.stage2_logits.grad[mask] != 0).any()


# The gradient is the exact one


def bandit_loss(
    policy: TablePolicy, contexts: Tensor, table: Tensor, config: GRPOConfig, generator: torch.Generator
) -> Tensor:
    """The loss of one batch of groups, sampled and computed the way training does it."""
    batch, group = len(contexts), config.group_size
    log_pi1, log_pi2 = policy.log_probs()
    first = log_pi1[contexts].unsqueeze(1).expand(batch, group, -1)
    tier = sample_actions(first.detach(), generator)
    second = log_pi2[contexts.unsqueeze(1), tier]
    pair = sample_actions(second.detach(), generator)
    rewards = (torch.rand(batch, group, generator=generator) < table[contexts.unsqueeze(1), tier, pair]).double()
    logp = joint_log_prob(first, tier, second, pair)
    advantages, keep = group_advantages(rewards, config)
    regularisers = {}
    if config.entropy_coef or config.beta:
        regularisers["entropy"] = sampled_entropy(log_pi1[contexts], second)
        uniform = two_stage_log_probs(*(torch.zeros_like(part) for part in policy.parameters), policy.mask)
        own = uniform[1][contexts.unsqueeze(1), tier]
        regularisers["kl"] = sampled_kl(log_pi1[contexts], second, uniform[0][contexts], own)
    return grpo_loss(logp, logp.detach(), advantages, keep, config, **regularisers)[0]


@pytest.mark.parametrize("scale", ["none", "batch"])
def test_mean_gradient_over_sampled_groups_is_the_enumerated_one(scale):
    generator = torch.Generator().manual_seed(11)
    contexts = 4
    mask = random_mask(contexts, TIERS, PAIRS, generator)
    policy = TablePolicy(contexts, TIERS, PAIRS, generator, mask)
    # Easy and hard contexts, so that groups differ in spread and some have none.
    difficulty = torch.tensor([0.05, 0.3, 0.7, 0.97]).reshape(-1, 1, 1)
    table = (difficulty + 0.6 * (torch.rand(contexts, TIERS, PAIRS, generator=generator) - 0.5)).clamp(0, 1)
    config = GRPOConfig(scale_rewards=scale)
    order = torch.arange(contexts).repeat(1500)
    total = torch.zeros(contexts * TIERS * (PAIRS + 1), dtype=torch.float64)
    batches = 6
    for _ in range(batches):
        total -= policy.gradient(bandit_loss(policy, order, table, config, generator))
    exact = policy.exact_gradient(table.double())
    assert torch.cosine_similarity(total, exact, dim=0) > 0.999
    if scale == "none":
        assert (total / batches).norm() == pytest.approx(exact.norm().item(), rel=0.05)


def enumerate_groups(probs: Tensor, group: int):
    """Every group of `group` draws from `probs`, with its probability."""
    for actions in itertools.product(range(len(probs)), repeat=group):
        index = torch.tensor(actions)
        yield index, probs[index].prod()


def tiny_policy(contexts: int) -> TablePolicy:
    """Two tiers with two pairs, one of four configurations masked: three joint actions."""
    generator = torch.Generator().manual_seed(12)
    mask = torch.tensor([[True, True], [True, False]]).expand(contexts, 2, 2)
    return TablePolicy(contexts, 2, 2, generator, mask)


def expected_gradient(
    policy: TablePolicy, rewards: Tensor, config: GRPOConfig, costs: Tensor | None = None, multiplier: float = 0.0
) -> Tensor:
    """Exact expectation of the ascent direction: all batches of one group per context, weighted by probability."""
    contexts, group = len(rewards), config.group_size
    joint = policy.joint()[policy.mask].reshape(contexts, -1)
    probs = joint.detach().exp()
    objective = torch.zeros((), dtype=torch.float64)
    for groups in itertools.product(*(list(enumerate_groups(probs[context], group)) for context in range(contexts))):
        index = torch.stack([actions for actions, _ in groups])
        weight = math.prod(float(probability) for _, probability in groups)
        sampled_costs = None if costs is None else costs.gather(1, index)
        advantages, keep = group_advantages(
            rewards.gather(1, index), config, costs=sampled_costs, multiplier=multiplier
        )
        logp = joint.gather(1, index)
        objective = objective - weight * grpo_loss(logp, logp.detach(), advantages, keep, config)[0]
    return policy.gradient(objective)


def exact_gradient(policy: TablePolicy, values: Tensor) -> Tensor:
    joint = policy.joint()[policy.mask].reshape(len(values), -1)
    return policy.gradient((joint.exp() * values).sum() / len(values))


@pytest.mark.parametrize(("contexts", "group"), [(1, 2), (1, 3), (2, 2)])
def test_expectation_over_all_groups_is_exactly_the_policy_gradient(contexts, group):
    # With two contexts some batches hold a group that is left out: that must not bias the other's weight.
    policy = tiny_policy(contexts)
    rewards = torch.tensor([[0.0, 1.0, 0.4], [1.0, 1.0, 0.2]], dtype=torch.float64)[:contexts]
    config = GRPOConfig(group_size=group, scale_rewards="none")
    expected, exact = expected_gradient(policy, rewards, config), exact_gradient(policy, rewards)
    assert exact.norm() > 1e-2
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)


def test_expectation_with_costs_is_the_gradient_of_the_lagrangian():
    policy = tiny_policy(2)
    rewards = torch.tensor([[0.0, 1.0, 0.4], [0.5, 0.5, 0.5]], dtype=torch.float64)
    costs = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    config = GRPOConfig(group_size=2, scale_rewards="none")
    expected = expected_gradient(policy, rewards, config, costs, multiplier=1.7)
    torch.testing.assert_close(expected, exact_gradient(policy, rewards - 1.7 * costs), rtol=0, atol=1e-12)


def test_group_scaling_is_biased_which_the_enumeration_shows():
    policy = tiny_policy(2)
    # Rewards of different spread: dividing by the group's own deviation makes a hair's difference count in full.
    rewards = torch.tensor([[0.0, 1.0, 0.98], [0.5, 0.51, 0.5]], dtype=torch.float64)
    exact = exact_gradient(policy, rewards)
    cosine = {
        scale: torch.cosine_similarity(
            expected_gradient(policy, rewards, GRPOConfig(group_size=3, scale_rewards=scale)), exact, dim=0
        ).item()
        for scale in ("none", "group")
    }
    assert cosine["none"] == pytest.approx(1.0, abs=1e-12)
    assert cosine["group"] < 0.95


# Errors


@pytest.mark.parametrize(
    "values",
    [
        {"group_size": 1},
        {"clip_low": 1.0},
        {"clip_high": 0.0},
        {"beta": -0.1},
        {"entropy_coef": math.nan},
        {"scale_rewards": "std"},
        {"baseline": "mean"},
        {"equal_within": -1.0},
    ],
)
def test_settings_are_checked(values):
    with pytest.raises(ConfigError):
        GRPOConfig(**values)


def test_advantages_refuse_bad_input():
    config = GRPOConfig(group_size=4)
    rewards = torch.rand(2, 4, generator=torch.Generator().manual_seed(13))
    with pytest.raises(DataError, match=r"expected \(batch, 4\)"):
        group_advantages(rewards[:, :3], config)
    with pytest.raises(DataError, match="costs have shape"):
        group_advantages(rewards, config, costs=rewards[:1])
    with pytest.raises(DataError, match="finite"):
        group_advantages(rewards.index_fill(1, torch.tensor([0]), math.nan), config)
    with pytest.raises(DataError, match="multiplier"):
        group_advantages(rewards, config, costs=rewards, multiplier=-1.0)


def test_loss_refuses_bad_input():
    logp = torch.full((2, 4), -1.0)
    keep = torch.ones(2, dtype=torch.bool)
    config = GRPOConfig(group_size=4)
    with pytest.raises(DataError, match="logp_old has shape"):
        grpo_loss(logp, logp[:, :3], logp, keep, config)
    with pytest.raises(DataError, match="keep"):
        grpo_loss(logp, logp, logp, keep.float(), config)
    with pytest.raises(DataError, match="masked action"):
        grpo_loss(logp, logp.index_fill(1, torch.tensor([0]), -math.inf), logp, keep, config)
    with pytest.raises(DataError, match="entropy has shape"):
        grpo_loss(logp, logp, logp, keep, config, entropy=torch.ones(4))
    with pytest.raises(ConfigError, match="entropy"):
        grpo_loss(logp, logp, logp, keep, GRPOConfig(entropy_coef=0.1))
    with pytest.raises(ConfigError, match="kl"):
        grpo_loss(logp, logp, logp, keep, GRPOConfig(beta=0.1))
