"""The figures of an evaluation: accuracy against latency, along budgets and prices, and the controller's knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pacevlm.errors import DataError
from pacevlm.evaluation.statistics import FloatArray
from pacevlm.evaluation.summary import sort_policies
from pacevlm.files import write_atomic
from pacevlm.knobs import TIERS, Knobs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design, 2008: told apart under the common kinds of colour blindness.
COLOURS = {
    "controller": "#0072B2",
    "predictor": "#56B4E9",
    "lookup_table": "#D55E00",
    "fixed": "#009E73",
    "full": "#222222",
    "cheapest": "#E69F00",
    "random": "#CC79A7",
    "oracle": "#555555",
}
OTHER_COLOURS = ("#B8A800", "#7F3C8D")
# Policies whose knobs do not depend on the budget: one point, not a line.
POINTS = {"full": "*", "cheapest": "s"}
MARKERS = {"controller": "o", "predictor": "P", "lookup_table": "D", "fixed": "^", "random": "v", "oracle": "x"}
STYLE: Any = {
    "svg.hashsalt": "pacevlm",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def plot_pareto(results: Mapping[str, Any], path_stem: str | Path) -> tuple[Path, Path]:
    """Draw accuracy against measured latency, one line per policy through its budgets, as PNG and SVG.

    The x axis is the mean measured latency in milliseconds; where some policy was not timed, it is the budget, for
    all policies, and says so. Bars are the accuracies' intervals.

    Args:
        results: as `build_results` gives them.
        path_stem: path without ending, for example `runs/a/pareto`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: the results hold no budgets.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    budgets = _budgets(results)
    names = sort_policies(budgets[0]["policies"])
    timed = all(budget["policies"][name]["latency_ms"]["mean"] is not None for budget in budgets for name in names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.0), layout="constrained")
        axes = figure.add_subplot()
        ends = {}
        for i, name in enumerate(names):
            rows = [budget["policies"][name] for budget in budgets]
            x = np.array(
                [row["latency_ms"]["mean"] if timed else b["budget_ms"] for b, row in zip(budgets, rows, strict=True)]
            )
            accuracy = 100 * np.array([[row["accuracy"][key] for key in ("mean", "low", "high")] for row in rows]).T
            if name in POINTS:
                # The same knobs at every budget: repeated timings of one thing, shown once.
                x, accuracy = x.mean(keepdims=True), accuracy.mean(axis=1, keepdims=True)
            ends[name] = _draw_policy(axes, name, i, x, accuracy)
        _label_ends(axes, ends)
        axes.set_xlabel(
            "mean measured latency (ms)" if timed else "budget (ms); latency was not measured for all policies"
        )
        axes.set_ylabel("accuracy (%)")
        dataset = results["dataset"]
        axes.set_title(
            f"{results['model']} on {dataset['name']}/{dataset['split']}, n = {dataset['n']}; bars: 95 % intervals",
            loc="left",
            fontsize=10.5,
            color="#222222",
        )
        return save_figure(figure, path_stem)


def plot_front(results: Mapping[str, Any], path_stem: str | Path) -> tuple[Path, Path]:
    """Draw accuracy against mean predicted latency, one line per policy along the prices of time, as PNG and SVG.

    Args:
        results: as `build_results` gives them.
        path_stem: path without ending, for example `runs/a/front`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: the results hold no fronts.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    fronts = results["fronts"]
    if not fronts:
        raise DataError("the results hold no fronts, so there is nothing to plot")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        ends = {}
        for i, name in enumerate(sort_policies(fronts["policies"])):
            points = fronts["policies"][name]
            accuracy = (
                100 * np.array([[point["accuracy"][key] for key in ("mean", "low", "high")] for point in points]).T
            )
            latency_ms = np.array([point["latency_ms"]["mean"] for point in points])
            # Labels stand at the right end, where there is no price.
            ends[name] = _draw_policy(axes, name, i, latency_ms[::-1], accuracy[:, ::-1])
        _label_ends(axes, ends)
        axes.set_xlabel("mean predicted latency (ms), the price of time rising from right to left")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(
            f"a budget that hardly binds ({fronts['budget_ms']:.4g} ms), n = {results['dataset']['n']}; "
            "bars: 95 % intervals",
            loc="left",
            fontsize=10.5,
            color="#222222",
        )
        return save_figure(figure, path_stem)


def plot_knobs(results: Mapping[str, Any], path_stem: str | Path, policy: str = "controller") -> tuple[Path, Path]:
    """Draw how often a policy chose each value of the three knobs, stacked per budget, as PNG and SVG.

    Args:
        results: as `build_results` gives them.
        path_stem: path without ending, for example `runs/a/knobs`.
        policy: whose knobs are shown.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: the results hold no budgets or not this policy.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    budgets = _budgets(results)
    if any(policy not in budget["policies"] for budget in budgets):
        raise DataError(f"the results hold no policy {policy!r}; they hold {', '.join(budgets[0]['policies'])}")
    counts = [
        {Knobs.parse(text): count for text, count in budget["policies"][policy]["knobs"].items()} for budget in budgets
    ]
    labels = [f"{budget['fraction']:g}\n{budget['budget_ms']:.4g} ms" for budget in budgets]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(10.5, 3.7), layout="constrained")
        for i, name in enumerate(("tier", "top_k", "num_blocks")):
            axes = figure.add_subplot(1, 3, i + 1)
            values = {getattr(knobs, name) for row in counts for knobs in row}
            ordered = sorted(values, key=lambda value: (TIERS.index(value) if value in TIERS else -1, value))
            table = np.array(
                [
                    [sum(n for knobs, n in row.items() if getattr(knobs, name) == value) for value in ordered]
                    for row in counts
                ],
                dtype=np.float64,
            )
            _stack(axes, labels, [str(value) for value in ordered], 100 * table / table.sum(axis=1, keepdims=True))
            axes.set_title(name, loc="left", fontsize=10.5)
            axes.set_xlabel("budget")
            if i == 0:
                axes.set_ylabel("requests (%)")
        return save_figure(figure, path_stem)


def _budgets(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    budgets: Sequence[Mapping[str, Any]] = results["budgets"]
    if not budgets:
        raise DataError("the results hold no budgets, so there is nothing to plot")
    return budgets


def _stack(axes: Axes, labels: list[str], names: list[str], shares: np.ndarray[Any, Any]) -> None:
    """Stacked bars, one per label, shares in per cent `(labels, names)`, darker for later names."""
    import matplotlib as mpl

    # The values of a knob are ordered, so one hue from light to dark, readable without colour vision.
    shades = mpl.colormaps["Blues"](np.linspace(0.2, 0.85, len(names)) if len(names) > 1 else [0.55])
    bottom = np.zeros(len(labels))
    for i, name in enumerate(names):
        bars = axes.bar(
            range(len(labels)), shares[:, i], bottom=bottom, width=0.78, color=shades[i], edgecolor="white", label=name
        )
        dark = float(np.dot(shades[i][:3], [0.299, 0.587, 0.114])) < 0.6
        for bar, share, base in zip(bars, shares[:, i], bottom, strict=True):
            if share >= 8:
                axes.text(
                    bar.get_x() + bar.get_width() / 2,
                    base + share / 2,
                    name,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "#222222",
                )
        bottom = bottom + shares[:, i]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(0, 100)
    handles, texts = axes.get_legend_handles_labels()
    # Reversed, so that the legend runs top to bottom as the bars do.
    axes.legend(
        handles[::-1], texts[::-1], fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderpad=0
    )


def _draw_policy(axes: Axes, name: str, place: int, x: FloatArray, accuracy: FloatArray) -> tuple[float, float, str]:
    """One policy's line through its points, with the accuracies' intervals; where it ends, and its colour.

    Args:
        place: of the policy among those drawn.
        x: `(points,)`.
        accuracy: means, lower and upper ends in per cent, `(3, points)`.
    """
    colour = COLOURS.get(name, OTHER_COLOURS[place % len(OTHER_COLOURS)])
    strong = name == "controller"
    axes.errorbar(
        x,
        accuracy[0],
        # A percentile interval may miss its own estimate by a hair; bars cannot be negative.
        yerr=np.maximum([accuracy[0] - accuracy[1], accuracy[2] - accuracy[0]], 0),
        color=colour,
        marker=POINTS.get(name, MARKERS.get(name, "P")),
        markersize=11 if name == "full" else 5.5,
        linewidth=2.4 if strong else 1.5,
        linestyle="--" if name == "oracle" else "-",
        elinewidth=1.0,
        capsize=2.5,
        alpha=1.0 if strong else 0.9,
        zorder=4 if strong else 3,
    )
    return float(x[-1]), float(accuracy[0, -1]), colour


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Name each line in a column right of the axes, at its height where there is room, with a thin leader."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.055
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = np.array([ends[name][1] for name in names])
    # Push labels up to keep the gap, then move every run of touching labels back to the middle of its lines.
    placed: list[tuple[float, int]] = []
    for height in heights:
        centre, size = float(height), 1
        while placed and centre - (size - 1) * gap / 2 < placed[-1][0] + (placed[-1][1] - 1) * gap / 2 + gap:
            other, other_size = placed.pop()
            centre = (centre * size + other * other_size) / (size + other_size)
            size += other_size
        placed.append((centre, size))
    positions = [centre + (i - (size - 1) / 2) * gap for centre, size in placed for i in range(size)]
    for name, position in zip(names, positions, strict=True):
        x, y, colour = ends[name]
        axes.annotate(
            name.replace("_", " "),
            xy=(x, y),
            xytext=(1.015, position),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=10,
            fontweight="bold" if name == "controller" else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.45, "shrinkB": 4},
            annotation_clip=False,
        )


def save_figure(figure: Figure, path_stem: str | Path) -> tuple[Path, Path]:
    """Write PNG and SVG without dates or versions, so that equal results give equal files.

    Args:
        path_stem: path without ending.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        StorageError: a file cannot be written.
    """
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        # The name handed out does not end in the format's, so the format is told.
        with write_atomic(f"{path_stem}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, dpi=160, metadata=metadata, facecolor="white")
    return Path(f"{path_stem}.png"), Path(f"{path_stem}.svg")
