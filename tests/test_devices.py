"""Memory that a process frees is there for its next request."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import resource, sys
import numpy as np
from pacevlm.models.elastic import ElasticModel
if sys.argv[1] == "with":
    ElasticModel.from_pretrained(sys.argv[2])
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(1 << 23, np.float64)[0]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_process_with_a_model_keeps_its_memory(tiny_elastic_dir: Path) -> None:
    num_faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, how, str(tiny_elastic_dir)],
                **{"capture_output": True, "text": True, "check": True, "env": {"PYTHONPATH": str(ROOT)}},
            ).stdout
        )
        for how in ("without", "with")
    ]
    # Five times 64 MiB are 81,920 pages of 4 KiB, or 160 huge ones.
    assert num_faults[1] < num_faults[0] / 10
