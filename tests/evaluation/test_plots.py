import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pacevlm.errors import DataError
from pacevlm.evaluation.plots import plot_front, plot_knobs, plot_pareto


@pytest.mark.parametrize("plot", [plot_pareto, plot_knobs, plot_front])
def test_figures_are_drawn_and_equal_results_give_equal_files(
    plot: Any, results: dict[str, Any], tmp_path: Path
) -> None:
    png, svg = plot(results, tmp_path / "a" / "figure")
    again_png, again_svg = plot(copy.deepcopy(results), tmp_path / "b" / "figure")
    assert (png.name, svg.name) == ("figure.png", "figure.svg")
    assert png.read_bytes() == again_png.read_bytes()
    assert svg.read_bytes() == again_svg.read_bytes()
    with Image.open(png) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert "</svg>" in svg.read_text()
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_figures_follow_the_results(results: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(results)
    controller = changed["budgets"][1]["policies"]["controller"]
    controller["accuracy"]["mean"] -= 0.1
    controller["knobs"] = {"low/4/12": 200}
    changed["fronts"]["policies"]["controller"][1]["accuracy"]["mean"] -= 0.1
    for plot in (plot_pareto, plot_knobs, plot_front):
        before, after = plot(results, tmp_path / "before")[0], plot(changed, tmp_path / "after")[0]
        assert before.read_bytes() != after.read_bytes()


def test_pareto_without_measured_latency_falls_back_to_the_budget(results: dict[str, Any], tmp_path: Path) -> None:
    untimed = copy.deepcopy(results)
    untimed["budgets"][0]["policies"]["fixed"]["latency_ms"] = dict.fromkeys(("mean", "p50", "p95", "p99"))
    assert plot_pareto(untimed, tmp_path / "pareto")[0].stat().st_size > 0


def test_missing_policies_and_budgets_are_named(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no policy 'learned'"):
        plot_knobs(results, tmp_path / "knobs", policy="learned")
    for plot in (plot_pareto, plot_knobs):
        with pytest.raises(DataError, match="no budgets"):
            plot({**results, "budgets": []}, tmp_path / "figure")
    with pytest.raises(DataError, match="no fronts"):
        plot_front({**results, "fronts": None}, tmp_path / "figure")
