"""Every file of settings that the project ships can be used, and says what its page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pacevlm.knobs import KnobSpace
from pacevlm.pipeline.run_config import RunConfig, read_run_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_file_of_settings_can_be_used(path: Path) -> None:
    config = read_run_file(path).on_top_of(RunConfig())
    assert config.run_dir.resolve() == ROOT / "runs" / path.stem
    assert any(f"configs/{path.name}" in page.read_text() for page in (ROOT / "docs").glob("*.md"))
    # What is swept is what there is to learn from, so that training meets no question whose answers are unknown.
    assert config.lookup.num_examples == config.data.num_train


def test_molmoe_has_the_knobs_that_suit_it() -> None:
    (path,) = (path for path in CONFIGS if path.stem == "molmoe-1b-h100")
    model = read_run_file(path).on_top_of(RunConfig()).model
    assert KnobSpace(model.tiers, model.top_ks, model.num_blocks) == KnobSpace()
    assert (model.dtype, model.device) == ("bfloat16", "cuda")
