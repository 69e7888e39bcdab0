"""The whole idea on a toy: learn by GRPO which configuration to run for *this* request and *this* latency budget.

    python examples/grpo_minimal.py        (needs torch only; well under a minute on one core)

A request has two needs: how much *detail* its picture holds and how much *thought* its question takes. Three knobs
spend the budget: the vision tier on detail, experts per token (top_k) and blocks (num_blocks) on thought. One static
setting per budget must split it the same way for everybody; a policy that sees the request can split it to fit.

Two stages, as in the real system: stage 1 picks the tier before the picture is encoded, so it sees the budget and the
question; the question hints at both needs (with noise). Stage 2 picks the pair (top_k, num_blocks) after the first
block and sees the needs and the tier. What cannot arrive in time is masked, hence never sampled.
"""

import time

import torch
from torch import Tensor, nn

TIERS = torch.tensor([0.15, 0.5, 1.0])  # share of the vision tokens
TOP_KS = torch.tensor([4.0, 5.0, 6.0, 7.0, 8.0])
NUM_BLOCKS = torch.tensor([12.0, 13.0, 14.0, 15.0, 16.0])
BUDGETS_MS = torch.tensor([60.0, 70.0, 80.0, 90.0, 100.0])
NUM_PAIRS = len(TOP_KS) * len(NUM_BLOCKS)

GROUP = 16  # rollouts per (request, budget)
BATCH = 64  # (request, budget) pairs per step
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
PASSES = 2  # updates per batch of rollouts; from the second on the ratio differs from 1 and the clip matters
ENTROPY = 0.2  # falls to 0: less of it, and stage 1 drops a tier before it learns for whom the tier is right


# The toy model: what a configuration costs and how often it is right. All tables are (..., tiers, pairs). ------------


def latency_table_ms() -> Tensor:
    """Expected latency of every configuration: vision, then blocks that cost more with more tokens and experts."""
    tier, top_k, num_blocks = (axis.flatten() for axis in torch.meshgrid(TIERS, TOP_KS, NUM_BLOCKS, indexing="ij"))
    latency = 10 + 30 * tier + num_blocks * (0.6 + 0.35 * top_k) * (0.6 + 0.9 * tier)
    return latency.reshape(len(TIERS), NUM_PAIRS)


LATENCY_MS = latency_table_ms()
UPPER_BOUND_MS = 1.05 * LATENCY_MS  # the measured latency stays below it: noise is at most 5 %


def sample_needs(n: int) -> Tensor:
    """Needs (detail, thought) of n requests, uniform in [0, 1]: (n, 2)."""
    return torch.rand(n, 2)


def accuracy_table(needs: Tensor) -> Tensor:
    """Probability of a right answer with every configuration, (n, tiers, pairs)."""
    detail, thought = needs[:, 0, None, None], needs[:, 1, None, None]
    pixels = TIERS[:, None].sqrt()
    compute = ((TOP_KS[:, None] - 4) / 4 + (NUM_BLOCKS - 12) / 4).flatten() / 2
    sees = torch.sigmoid(8 * (pixels - detail + 0.15))
    solves = torch.sigmoid(8 * (compute - thought + 0.2))
    return sees * solves


# The policy ----------------------------------------------------------------------------------------------------------


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, -torch.inf).log_softmax(-1)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, len(TIERS)))
        self.stage2 = nn.Sequential(nn.Linear(3 + len(TIERS), 64), nn.Tanh())
        self.top_k, self.num_blocks = nn.Linear(64, len(TOP_KS)), nn.Linear(64, len(NUM_BLOCKS))

    def forward(self, hint: Tensor, needs: Tensor, budget_ms: Tensor) -> tuple[Tensor, Tensor]:
        """log π₁(tier), (n, tiers), and log π₂(pair | tier) for every tier, (n, tiers, pairs)."""
        n = len(needs)
        # Centred inputs of unit size: else what is best on average is learned long before what is best for whom.
        budget, hint, needs = (budget_ms[:, None] - 80) / 15, (hint - 0.5) * 3.5, (needs - 0.5) * 3.5
        feasible = budget_ms[:, None, None] >= UPPER_BOUND_MS
        some = feasible.any(-1)  # a tier is allowed if any of its pairs fits
        log_pi1 = masked_log_softmax(self.stage1(torch.cat([budget, hint], -1)), some)
        seen = torch.cat([budget, needs], -1)[:, None].expand(-1, len(TIERS), -1)
        hidden = self.stage2(torch.cat([seen, torch.eye(len(TIERS)).expand(n, -1, -1)], -1))
        # One softmax over all pairs: separate ones per knob could not express which *combinations* fit.
        logits = (self.top_k(hidden)[..., :, None] + self.num_blocks(hidden)[..., None, :]).flatten(-2)
        return log_pi1, masked_log_softmax(logits, feasible | ~some[..., None])


# Training ------------------------------------------------------------------------------------------------------------


def sample_requests(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hints (n, 2), needs (n, 2) and budgets (n,) in milliseconds."""
    needs = sample_needs(n)
    return needs + 0.1 * torch.randn(n, 2), needs, BUDGETS_MS[torch.randint(len(BUDGETS_MS), (n,))]


def entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp(min=-50)).sum(-1)


def train(policy: Policy, steps: int, *, report_every: int = 0) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    rows = torch.arange(BATCH)[:, None]
    for step in range(1, steps + 1):
        request = sample_requests(BATCH)
        needs, budget_ms = request[1], request[2]

        # 1. Roll out: G sampled configurations per request, each answered once, right (1) or wrong (0).
        with torch.no_grad():
            log_pi1, log_pi2 = policy(*request)
            tier = torch.multinomial(log_pi1.exp(), GROUP, replacement=True)
            pair = torch.multinomial(log_pi2[rows, tier].exp().flatten(0, 1), 1).reshape(BATCH, GROUP)
            logp_old = log_pi1[rows, tier] + log_pi2[rows, tier, pair]
            reward = (torch.rand(BATCH, GROUP) < accuracy_table(needs)[rows, tier, pair]).float()
            latency_ms = LATENCY_MS[tier, pair] * (1 + 0.05 * (2 * torch.rand(BATCH, GROUP) - 1))
            violations = (latency_ms > budget_ms[:, None]).float().mean()

        # 2. Advantage: better or worse than the *other* rollouts of the same request, in units of the batch.
        others = (reward.sum(1, keepdim=True) - reward) / (GROUP - 1)
        advantage = reward - others
        equal = reward.std(1) < 1e-6  # nothing to learn from
        advantage = advantage / (advantage.std() + 1e-4)

        # 3. Update: raise what did better, but not further than the clip allows.
        for _ in range(PASSES):
            log_pi1, log_pi2 = policy(*request)
            ratio = (log_pi1[rows, tier] + log_pi2[rows, tier, pair] - logp_old).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
            bonus = entropy(log_pi1) + (log_pi1.exp() * entropy(log_pi2)).sum(-1)
            weight = ENTROPY * (1 - step / steps)
            loss = -(surrogate.mean(1) + weight * bonus)[~equal].sum() / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        if report_every and step % report_every == 0:
            print(
                f"step {step:5d}  reward {reward.mean():.3f}  violations {violations:.3f}  "
                f"entropy {bonus.mean():.2f}  equal groups {equal.float().mean():.2f}",
                flush=True,
            )


# Evaluation: expected accuracy per budget of the policy and of what it should lie between ----------------------------


@torch.no_grad()
def evaluate(policy: Policy, n: int = 2000) -> dict[str, list[float]]:
    """Expected accuracy per budget; the static choice is made on other requests than it is scored on."""
    seen = accuracy_table(sample_needs(n)).mean(0)  # for choosing the static configurations
    needs = sample_needs(n)
    hint, accuracy = needs + 0.1 * torch.randn(n, 2), accuracy_table(needs).flatten(1)
    result: dict[str, list[float]] = {"random": [], "best static": [], "learned": [], "oracle": []}
    for budget_ms in BUDGETS_MS:
        feasible = (budget_ms >= UPPER_BOUND_MS).flatten()
        log_pi1, log_pi2 = policy(hint, needs, budget_ms.expand(n))
        tier = log_pi1.argmax(-1)
        pair = log_pi2[torch.arange(n), tier].argmax(-1)
        static = seen.flatten().masked_fill(~feasible, -1).argmax()
        result["random"].append(accuracy[:, feasible].mean().item())
        result["best static"].append(accuracy[:, static].mean().item())
        result["learned"].append(accuracy[torch.arange(n), tier * NUM_PAIRS + pair].mean().item())
        result["oracle"].append(accuracy[:, feasible].max(1).values.mean().item())
    return result


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.process_time()
    policy = Policy()
    train(policy, 1200, report_every=150)
    print(f"\naccuracy within the budget      ({time.process_time() - start:.0f} s of CPU time for training)")
    print("budget in ms   " + "".join(f"{budget:8.0f}" for budget in BUDGETS_MS.tolist()) + "    mean")
    for name, values in evaluate(policy).items():
        print(f"{name:15}" + "".join(f"{value:8.3f}" for value in values) + f"{sum(values) / len(values):8.3f}")


if __name__ == "__main__":
    main()
