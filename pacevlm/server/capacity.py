"""How many devices hold so many requests a second to their deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pacevlm.checks import MAX_COUNT, MAX_SEED, check_path, check_real, check_whole
from pacevlm.errors import ConfigError
from pacevlm.knobs import check_budget_ms
from pacevlm.server.config import PolicyName

if TYPE_CHECKING:
    from pacevlm.server.simulation import Tally, Traffic


@dataclass(frozen=True)
class CapacityConfig:
    """What is to be held, by how many devices.

    Attributes:
        run_dir: folder of an evaluated run.
        requests_per_s: mean of a Poisson stream of requests like the run's test questions.
        budgets_ms: milliseconds from a request's arrival until its answer; each is as frequent as the others.
        kept: share of all requests that are to be answered in time.
        policy: what chooses the knobs, as for `pacevlm serve`.
        max_devices: most that are tried.
        num_requests: simulated for each number of devices.
        seed: of all that is drawn.

    Raises:
        ConfigError: a value is outside its range.
    """

    requests_per_s: float
    budgets_ms: tuple[float, ...]
    run_dir: Path = Path("runs/quickstart")
    kept: float = 0.99
    policy: PolicyName = "bundle"
    max_devices: int = 64
    num_requests: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        check_path("run_dir", self.run_dir)
        check_real(self, 0, 1e5, "requests_per_s", above=True)
        if not self.budgets_ms:
            raise ConfigError("budgets_ms names none; give one or more numbers of milliseconds")
        object.__setattr__(self, "budgets_ms", tuple(check_budget_ms(budget_ms) for budget_ms in self.budgets_ms))
        check_real(self, 0, 1, "kept", above=True)
        check_whole(self, 1, 1000, "max_devices")
        check_whole(self, 1, MAX_COUNT, "num_requests")
        check_whole(self, 0, MAX_SEED, "seed")


def plan_capacity(traffic: Traffic, config: CapacityConfig) -> list[Tally]:
    """What becomes of the load with one device, two and so on, until enough is kept or there are no more."""
    from pacevlm.server.simulation import Load, simulate

    tallies: list[Tally] = []
    while len(tallies) < config.max_devices and not (tallies and tallies[-1].kept_share >= config.kept):
        load = Load(
            config.requests_per_s,
            config.budgets_ms,
            config.policy,
            len(tallies) + 1,
            config.num_requests,
            config.seed,
        )
        tallies.append(simulate(traffic, load))
    return tallies


def format_capacity(tallies: Sequence[Tally], config: CapacityConfig) -> str:
    """A table, one line for each number of devices, and what it comes to."""
    lines = ["devices   in time   refused   late of accepted   accuracy   right in time/s   busy"]
    for number, tally in enumerate(tallies, start=1):
        lines.append(
            f"{number:7}   {tally.kept_share:6.1%}   {1 - tally.accepted / tally.offered:6.1%}   "
            f"{tally.late_share:15.1%}   {tally.accuracy:8.1%}   {tally.goodput_per_s:15.2f}   {tally.busy:4.0%}"
        )
    budgets = ", ".join(f"{budget_ms:g}" for budget_ms in config.budgets_ms)
    aim = f"{config.kept:.4g} of {config.requests_per_s:g} requests a second within {budgets} ms"
    if tallies[-1].kept_share >= config.kept:
        number = len(tallies)
        lines.append(f"\n{number} device{'s answer' if number > 1 else ' answers'} {aim}.")
    else:
        lines.append(f"\n{len(tallies)} devices do not answer {aim}; the budget may be too small for any number.")
    return "\n".join(lines) + "\n"
