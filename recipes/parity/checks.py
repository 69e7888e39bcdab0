"""Comparing tensors with reference tensors: tolerances, checks, and how a list of checks is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tolerance:
    """An element passes if its error is at most `atol + rtol * |reference|`."""

    atol: float
    rtol: float = 0.0

    def __str__(self) -> str:
        if self.atol == self.rtol == 0.0:
            return "exact"
        return f"{self.atol:g}" + (f" + {self.rtol:g}*|ref|" if self.rtol else "")


@dataclass(frozen=True, slots=True)
class Check:
    """One compared tensor.

    Attributes:
        case: name of the case.
        tensor: what was compared.
        max_abs_error: largest error; infinite if shapes differ, a value is not a number or a refusal was expected.
        tolerance: what was allowed.
        share: largest error as a share of what was allowed at its place; above 1 is a miss.
    """

    case: str
    tensor: str
    max_abs_error: float
    tolerance: Tolerance
    share: float

    @property
    def passed(self) -> bool:
        """Whether every element was within the tolerance."""
        return self.share <= 1.0


def compare(case: str, tensor: str, ours: Tensor, reference: Tensor, tolerance: Tolerance) -> Check:
    """Compare two tensors element by element; other shapes are a miss."""
    ours, reference = ours.detach().double(), reference.double()
    if ours.shape != reference.shape:
        return Check(case, tensor, math.inf, tolerance, math.inf)
    if not ours.numel():
        return Check(case, tensor, 0.0, tolerance, 0.0)
    error = (ours - reference).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    share = torch.where(error == 0, 0.0, error / (tolerance.atol + tolerance.rtol * reference.abs()))
    return Check(case, tensor, float(error.max()), tolerance, float(share.nan_to_num(nan=math.inf).max()))


def table(checks: Sequence[Check]) -> str:
    """An aligned table, one line per case and tensor."""
    rows = [("case", "tensor", "max abs error", "tolerance", "ok")]
    for check in checks:
        verdict = "ok" if check.passed else "MISS"
        rows.append((check.case, check.tensor, f"{check.max_abs_error:.2e}", str(check.tolerance), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(checks: Sequence[Check]) -> dict[str, Any]:
    """Counts and the check nearest to, or furthest beyond, its tolerance; ready for JSON."""
    worst = max(checks, key=lambda check: check.share)
    return {
        "cases": len({check.case for check in checks}),
        "checks": len(checks),
        "failed": sum(not check.passed for check in checks),
        "worst": {
            "case": worst.case,
            "tensor": worst.tensor,
            # JSON has no infinity.
            "max_abs_error": worst.max_abs_error if math.isfinite(worst.max_abs_error) else None,
            "atol": worst.tolerance.atol,
            "rtol": worst.tolerance.rtol,
            "ok": worst.passed,
        },
    }
