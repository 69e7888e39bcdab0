"""What a controller is worth: the tables of a study, made from its records alone.

Intervals resample questions; a question's values under several seeds, profiles and budgets stay together. How far
seeds and profiles stray is shown by their own means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pacevlm.errors import DataError
from pacevlm.evaluation.fronts import Front, summarise_fronts
from pacevlm.evaluation.statistics import FloatArray, Interval, bootstrap_mean, ratio_interval, resampled_means
from pacevlm.files import load_safetensors, load_safetensors_metadata, save_safetensors_atomic

CONTROLLER, REBASED, TABLE, PREDICTOR = "controller", "rebased", "lookup_table", "predictor"
KIND = "pacevlm study 1"


@dataclass(frozen=True, eq=False)
class StudyRecords:
    """What every policy did with the same questions under one profile and its replayed clock.

    Attributes:
        profile: name of the profile.
        seeds: training seeds; the policy of seed s is `controller s`, and `rebased s` is the reference profile's.
        fractions: budgets as fractions of the full latency.
        budgets_ms: the budgets, `(budgets,)`.
        prices: prices of time of the fronts.
        policies: names, in the order of the arrays.
        tasks: what each question is of, `(questions,)`.
        learnable: what headroom calls learnable on the training questions, points with their interval.
        ablations: names of controllers that were trained otherwise, each `NAME SEED` among the policies.
        accuracy, latency_ms: `(policies, budgets, questions)`; latencies are replayed.
        feasible: whether the guardrail admitted anything, `(budgets, questions)`.
        front_accuracy, front_ms: of the lookup table, the predictor and the controllers, `(2 + seeds, prices,
            questions)`.
        full_accuracy: with the full configuration, `(questions,)`.
        knob_accuracy: with one knob at its lowest value and the others full, `(3, questions)`.
    """

    profile: str
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    budgets_ms: tuple[float, ...]
    prices: tuple[float, ...]
    policies: tuple[str, ...]
    tasks: tuple[str, ...]
    learnable: Mapping[str, float]
    ablations: tuple[str, ...]
    accuracy: FloatArray
    latency_ms: FloatArray
    feasible: NDArray[np.bool_]
    front_accuracy: FloatArray
    front_ms: FloatArray
    full_accuracy: FloatArray
    knob_accuracy: FloatArray

    def of(self, name: str) -> int:
        """The place of a policy."""
        return self.policies.index(name)

    def controllers(self, name: str = CONTROLLER) -> list[int]:
        """The places of a kind of controller, one per seed."""
        return [place for place, policy in enumerate(self.policies) if policy.rpartition(" ")[0] == name]

    def gains(self, name: str = CONTROLLER) -> FloatArray:
        """A kind of controller less the lookup table, points, `(seeds, budgets, questions)`."""
        return np.asarray(100 * (self.accuracy[self.controllers(name)] - self.accuracy[self.of(TABLE)]))

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Write all, and what it was made with; raises StorageError."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        arrays = {name: torch.from_numpy(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        others = {name: value for name, value in values.items() if name not in arrays}
        about = {"kind": KIND, "header": json.dumps(header, sort_keys=True), "values": json.dumps(others)}
        save_safetensors_atomic(arrays, path, about)

    @classmethod
    def load(cls, path: Path, header: Mapping[str, Any] | None = None) -> StudyRecords | None:
        """Read records; None where there are none, or where they were made with something else.

        Raises:
            CheckpointError: the file is damaged.
            DataError: it holds something else.
        """
        if not path.exists():
            return None
        about = load_safetensors_metadata(path)
        if about.get("kind") != KIND:
            raise DataError(f"{path} does not hold the records of a study; remove it")
        if header is not None and about["header"] != json.dumps(header, sort_keys=True):
            return None
        values: dict[str, Any] = {name: tensor.numpy() for name, tensor in load_safetensors(path).items()}
        for name, value in json.loads(about["values"]).items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


def measure_worth(cells: Sequence[StudyRecords]) -> dict[str, Any]:
    """The tables of one traffic, ready for JSON; the first cell is of the reference profile.

    Accuracies, gains and costs are in points. `gain_points`, `gain_at` and `seed_gains` are of the reference profile,
    controllers less the lookup table, means over seeds and over the budgets.

    Args:
        cells: the records under each profile, of the same questions.
    """
    first = cells[0]
    gains, learnable = first.gains(), first.learnable["mean"]
    gain = _mean(gains.mean(axis=(0, 1)))
    return {
        "n": len(first.tasks),
        "seeds": list(first.seeds),
        "profiles": [cell.profile for cell in cells],
        "gain_points": gain.to_dict(),
        "gain_at": {
            f"{fraction:g}": _mean(gains[:, b].mean(axis=0)).to_dict() for b, fraction in enumerate(first.fractions)
        },
        "seed_gains": [_mean(of_seed.mean(axis=0)).to_dict() for of_seed in gains],
        "predictor_gains": {
            cell.profile: _mean(
                100 * (cell.accuracy[cell.of(PREDICTOR)] - cell.accuracy[cell.of(TABLE)]).mean(axis=0)
            ).to_dict()
            for cell in cells
        },
        "profile_gains": {cell.profile: _mean(cell.gains().mean(axis=(0, 1))).to_dict() for cell in cells},
        # Controllers of the reference profile, rebased to another, less those trained there.
        "rebased_less_trained": {
            cell.profile: _mean((cell.gains(REBASED) - cell.gains()).mean(axis=(0, 1))).to_dict() for cell in cells[1:]
        },
        "learnable_points": dict(first.learnable),
        "share_of_learnable": gain.mean / learnable if learnable > 0 else None,
        "latency_at_equal_accuracy": _equal_accuracy(first, slice(2, None)),
        "predictor_latency_at_equal_accuracy": _equal_accuracy(first, slice(1, 2)),
        "late": {f"{fraction:g}": _late(first, b) for b, fraction in enumerate(first.fractions)},
        "full_accuracy": _mean(100 * first.full_accuracy).to_dict(),
        "knob_costs": _knob_costs(first),
        "policies": {
            name: [_mean(100 * first.accuracy[first.of(name), b]).to_dict() for b in range(len(first.fractions))]
            for name in first.policies
            if " " not in name
        }
        | {CONTROLLER: [_mean(100 * row).to_dict() for row in first.accuracy[first.controllers()].mean(axis=0)]},
        "gains": {
            name: _mean(100 * (first.accuracy[first.of(name)] - first.accuracy[first.of(TABLE)]).mean(axis=0)).to_dict()
            for name in first.policies
            if " " not in name and name != TABLE
        },
        "ablations": {
            name: {
                "gain_points": _mean(first.gains(name).mean(axis=(0, 1))).to_dict(),
                "seed_gains": [_mean(of_seed.mean(axis=0)).to_dict() for of_seed in first.gains(name)],
                "less_whole": _mean((first.gains(name) - gains[: len(first.controllers(name))]).mean((0, 1))).to_dict(),
            }
            for name in first.ablations
        },
    }


def _mean(values: FloatArray) -> Interval:
    return bootstrap_mean(values, num_resamples=4000)


def _equal_accuracy(records: StudyRecords, places: slice) -> dict[str, Any]:
    """Mean latency of some fronts over the table's, a few points below full accuracy; seeds count as one front."""
    fronts = {
        CONTROLLER: Front(records.front_accuracy[places].mean(axis=0), records.front_ms[places].mean(axis=0)),
        TABLE: Front(records.front_accuracy[0], records.front_ms[0]),
    }
    found = summarise_fronts(fronts, records.full_accuracy, records.prices, budget_ms=records.budgets_ms[-1])
    return {str(row["points_below"]): row["ratio"][TABLE] for row in found["equal_accuracy"]}


def _late(records: StudyRecords, budget: int) -> dict[str, float]:
    """How often the controllers are late where anything fits, and how often nothing does; shares."""
    feasible = records.feasible[budget]
    late = (records.latency_ms[records.controllers(), budget] > records.budgets_ms[budget]).mean(axis=0) * feasible
    columns = np.stack([late, feasible], axis=1).astype(np.float64)
    share = ratio_interval(columns.mean(axis=0), resampled_means(columns, num_resamples=4000))
    nothing = {"mean": float("nan"), "low": float("nan"), "high": float("nan")} if share is None else share.to_dict()
    values: dict[str, Any] = {name: None if np.isnan(value) else value for name, value in nothing.items()}
    return values | {"infeasible": float(1 - feasible.mean())}


def _knob_costs(records: StudyRecords) -> dict[str, dict[str, float]]:
    """Points that each task loses with one knob at its lowest value and the others full."""
    tasks = np.array(records.tasks)
    return {
        str(task): {
            knob: float(100 * (records.full_accuracy - accuracy)[tasks == task].mean())
            for knob, accuracy in zip(("tier", "top_k", "num_blocks"), records.knob_accuracy, strict=True)
        }
        for task in np.unique(tasks)
    }


def format_worth(worth: Mapping[str, Any]) -> str:
    """The first figures of every traffic, as text."""
    lines = []
    for traffic, found in worth.items():
        if not isinstance(found, Mapping):
            continue
        share = found["share_of_learnable"]
        lines += [
            f"{traffic}: {found['n']} questions, seeds {', '.join(map(str, found['seeds']))}, replayed latencies",
            f"  controller less lookup table   {_points(found['gain_points'])} points"
            + "".join(f"; {name} {_points(gain)}" for name, gain in found["profile_gains"].items()),
            "  at each budget                 "
            + ", ".join(f"{fraction}: {gain['mean']:+.1f}" for fraction, gain in found["gain_at"].items()),
            "  predictor less lookup table    "
            + "; ".join(f"{name} {_points(gain)}" for name, gain in found["predictor_gains"].items()),
            *(
                f"  rebased to {name} less trained there: {_points(loss)} points"
                for name, loss in found["rebased_less_trained"].items()
            ),
            f"  learnable                      {_points(found['learnable_points'])} points"
            + ("" if share is None else f", of which {share:.2f} are reached"),
            "  others less lookup table       "
            + ", ".join(f"{name} {gain['mean']:+.1f}" for name, gain in found["gains"].items()),
            "  late where anything fits, %    "
            + ", ".join(
                f"{fraction}: " + ("-" if late["mean"] is None else f"{100 * late['mean']:.1f}")
                for fraction, late in found["late"].items()
            ),
            "  mean latency at equal accuracy "
            + ", ".join(
                f"{points} below: " + ("-" if ratio is None else f"{ratio['mean']:.2f}")
                for points, ratio in found["latency_at_equal_accuracy"].items()
            ),
        ]
        lines += [
            f"  {name:<30} {_points(row['gain_points'])} points; less the whole {_points(row['less_whole'])}"
            for name, row in found["ablations"].items()
        ]
    return "\n".join(lines) + "\n"


def _points(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
