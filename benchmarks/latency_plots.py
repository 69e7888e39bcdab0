"""The figures of latency prediction: errors, where the time goes, what the bounds cover, how drift is followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacevlm.errors import DataError
from pacevlm.evaluation.plots import STYLE, save_figure
from pacevlm.knobs import TIERS, Knobs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito, as in `pacevlm.evaluation.plots`.
TIER_COLOURS = {"low": "#E69F00", "medium": "#009E73", "high": "#0072B2"}
TIER_MARKERS = {"low": "v", "medium": "s", "high": "o"}
STAGE_COLOURS = {
    "read_ms": "#D55E00",
    "prepare_ms": "#B8A800",
    "stage1_ms": "#CC79A7",
    "vision_ms": "#E69F00",
    "first_block_ms": "#56B4E9",
    "prefill_ms": "#0072B2",
    "decode_ms": "#009E73",
    "overhead_ms": "#999999",
}
WITHIN, ABOVE, LINE, TEXT, SHADE = "#0072B2", "#D55E00", "#222222", "#222222", "#f4ebdb"
# The share of relative errors that a box plot's whiskers span, in per cent.
WHISKERS = (5.0, 95.0)
BAND = 0.95

Array = NDArray[np.float64]
LegendPlace = Literal["upper left", "lower right"]


def plot_predicted_measured(
    predicted_ms: ArrayLike, measured_ms: ArrayLike, tiers: Sequence[str], path_stem: str | Path
) -> tuple[Path, Path]:
    """Draw predicted against measured latency on logarithmic axes, coloured by tier, as PNG and SVG.

    A line marks equality and a band ±10 % around it. The samples must be held out from the fit.

    Args:
        predicted_ms, measured_ms: shape `(samples,)`, positive.
        tiers: one per sample.
        path_stem: path without ending, for example `runs/a/predictions`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: there are no samples, their numbers differ, a time is not positive or a tier is unknown.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    predicted, measured = _latencies(predicted_ms, measured_ms)
    if len(tiers) != len(predicted):
        raise DataError(f"{len(tiers)} tiers given for {len(predicted)} samples; give one per sample")
    unknown = sorted(set(tiers) - set(TIER_COLOURS))
    if unknown:
        raise DataError(f"the tiers {unknown} are unknown; use {', '.join(TIER_COLOURS)}")
    mape = 100 * float(np.mean(np.abs(predicted - measured) / measured))
    low, high = float(min(predicted.min(), measured.min())) / 1.12, float(max(predicted.max(), measured.max())) * 1.12
    ends = np.array([low, high])
    names = np.array(tiers, dtype=np.str_)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 5.6), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(ends, ends * 0.9, ends * 1.1, color="#dddddd", alpha=0.6, linewidth=0, label="±10 %")
        axes.plot(ends, ends, color=LINE, linewidth=1.0, label="predicted = measured", zorder=2)
        # The tiers overlap where images are small, so the most numerous one does not hide the others.
        for tier in sorted(set(tiers), key=lambda tier: (-int(np.sum(names == tier)), tier)):
            rows = names == tier
            axes.scatter(
                measured[rows],
                predicted[rows],
                s=20,
                marker=TIER_MARKERS[tier],
                color=TIER_COLOURS[tier],
                edgecolors="white",
                linewidths=0.4,
                alpha=0.85,
                label=f"{tier} (n = {rows.sum()})",
                zorder=3,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            _log_ticks(axis, low, high)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        axes.set_xlabel("measured latency (ms)")
        axes.set_ylabel("predicted latency (ms)")
        _title(axes, f"{len(measured)} held-out requests; mean absolute relative error {mape:.1f} %")
        handles, texts = axes.get_legend_handles_labels()
        order = sorted(range(len(texts)), key=lambda i: _tier_rank(texts[i].split(" ")[0]))
        _legend(axes, [handles[i] for i in order], [texts[i] for i in order], "upper left")
        return save_figure(figure, path_stem)


def plot_error_by_knob(knobs: Sequence[Knobs], errors: ArrayLike, path_stem: str | Path) -> tuple[Path, Path]:
    """Draw the signed relative error for each value of the three knobs as box plots, as PNG and SVG.

    Boxes are quartiles, whiskers span the 5th to the 95th percentile, dots are the samples beyond. Above 0 the
    prediction was too high.

    Args:
        knobs: one configuration per sample.
        errors: (predicted − measured) / measured, shape `(samples,)`.
        path_stem: path without ending, for example `runs/a/errors`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: there are no samples, their numbers differ or an error is not finite.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    (relative,) = _columns(errors=errors)
    if len(knobs) != len(relative):
        raise DataError(f"{len(knobs)} configurations given for {len(relative)} errors; give one per sample")
    with mpl.rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(10.5, 3.9), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, name in zip(panels, ("tier", "top_k", "num_blocks"), strict=True):
            chosen = [getattr(one, name) for one in knobs]
            values = sorted(set(chosen), key=lambda value: (_tier_rank(value), value))
            groups = [100 * relative[[value == other for other in chosen]] for value in values]
            axes.axhline(0.0, color=LINE, linewidth=1.0, zorder=1)
            axes.boxplot(
                groups,
                tick_labels=[f"{value}\nn = {len(group)}" for value, group in zip(values, groups, strict=True)],
                whis=WHISKERS,
                widths=0.55,
                patch_artist=True,
                boxprops={"facecolor": "#cfe3f1", "edgecolor": WITHIN, "linewidth": 1.0},
                medianprops={"color": WITHIN, "linewidth": 2.2},
                whiskerprops={"color": WITHIN, "linewidth": 1.0},
                capprops={"color": WITHIN, "linewidth": 1.0},
                flierprops={
                    "marker": "o",
                    "markersize": 2.5,
                    "markerfacecolor": "#888888",
                    "markeredgecolor": "none",
                    "alpha": 0.7,
                },
            )
            axes.tick_params(axis="x", labelsize=8.5)
            _title(axes, name)
        panels[0].set_ylabel("(predicted − measured) / measured (%)")
        figure.supxlabel(
            "box: quartiles; whiskers: 5th to 95th percentile; above 0: predicted too high", fontsize=9, color="#444444"
        )
        return save_figure(figure, path_stem)


def plot_stage_shares(stages_ms: Mapping[str, Mapping[str, float]], path_stem: str | Path) -> tuple[Path, Path]:
    """Draw the mean time of each stage as one stacked bar per configuration, as PNG and SVG.

    Args:
        stages_ms: by configuration, from top to bottom, the mean milliseconds of each stage, from left to right; the
            stages are those of `StagePrediction`, the same for all.
        path_stem: path without ending, for example `runs/a/stages`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: there are no configurations or stages, a stage is unknown, or a time is negative or not finite.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if not stages_ms or not all(stages_ms.values()):
        raise DataError("no stage times given, so there is nothing to plot")
    labels, names = list(stages_ms), list(next(iter(stages_ms.values())))
    unknown = sorted(set(names) - set(STAGE_COLOURS))
    if unknown:
        raise DataError(f"the stages {unknown} are unknown; use {', '.join(STAGE_COLOURS)}")
    for label, stages in stages_ms.items():
        if set(stages) != set(names):
            raise DataError(f"{label} has the stages {sorted(stages)}, but {labels[0]} has {sorted(names)}")
    table = np.array([[stages_ms[label][name] for name in names] for label in labels], dtype=np.float64)
    if not np.isfinite(table).all() or (table < 0).any() or not (table.sum(axis=1) > 0).all():
        raise DataError("stage times must be finite milliseconds from 0, and each configuration must take some time")
    totals = table.sum(axis=1)
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.0, 1.5 + 0.62 * len(labels)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(labels))
        for i, name in enumerate(names):
            colour = STAGE_COLOURS[name]
            axes.barh(
                range(len(labels)),
                table[:, i],
                left=left,
                height=0.64,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
                label=name.removesuffix("_ms").replace("_", " "),
            )
            for row, (width, start) in enumerate(zip(table[:, i], left, strict=True)):
                text = f"{width:.0f}" if width >= 10 else f"{width:.2g}"
                # Only where it has room, measured against the longest bar.
                if width >= (0.012 + 0.011 * len(text)) * totals.max():
                    axes.text(
                        start + width / 2,
                        row,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8.5,
                        color="white" if _is_dark(colour) else TEXT,
                    )
            left = left + table[:, i]
        for row, total in enumerate(totals):
            axes.text(
                total + 0.008 * totals.max(),
                row,
                f"{total:.0f} ms" if total >= 100 else f"{total:.3g} ms",
                va="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0.0, 1.1 * float(totals.max()))
        axes.set_xlabel("mean time (ms)")
        axes.tick_params(axis="y", length=0)
        figure.legend(fontsize=9, frameon=False, loc="outside upper left", ncols=len(names), columnspacing=1.2)
        return save_figure(figure, path_stem)


def plot_calibration(
    nominal: ArrayLike, empirical: ArrayLike, num_requests: int, path_stem: str | Path
) -> tuple[Path, Path]:
    """Draw the coverage that was asked for against the coverage that held, as PNG and SVG.

    The coverage must be that of held-out requests with the knobs that a policy picked. The band holds 95 % of what
    an exactly calibrated bound would give with so many independent requests (binomial quantiles).

    Args:
        nominal: 1 − alpha of each bound, strictly between 0 and 1, shape `(bounds,)`.
        empirical: share of requests within each bound, shape `(bounds,)`.
        num_requests: requests that the shares are of.
        path_stem: path without ending, for example `runs/a/calibration`.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: there are no bounds or requests, the shapes differ, or a coverage is outside its range.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from scipy.stats import binom

    asked, held = _columns(nominal=nominal, empirical=empirical)
    if num_requests < 1:
        raise DataError(f"num_requests is {num_requests!r}; coverage needs at least one request")
    if not ((asked > 0) & (asked < 1)).all() or not ((held >= 0) & (held <= 1)).all():
        raise DataError("nominal coverage must lie strictly between 0 and 1, empirical coverage from 0 to 1")
    order = np.argsort(asked, kind="stable")
    asked, held = 100 * asked[order], 100 * held[order]
    low = max(np.floor((min(asked[0], held.min()) - 2.0) / 5.0) * 5.0, 0.0)
    # A bound of 100 % always holds: the band closes there.
    levels = np.linspace(max(low, 0.1), 100.0, 3000)
    band = [
        100 * binom.ppf(tail, num_requests, levels / 100) / num_requests for tail in ((1 - BAND) / 2, (1 + BAND) / 2)
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 5.4), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(
            levels, *band, color="#dddddd", alpha=0.6, linewidth=0, label=f"{100 * BAND:.0f} % band of an exact bound"
        )
        axes.plot([low, 100], [low, 100], color=LINE, linewidth=1.0, label="empirical = nominal")
        axes.plot(
            asked, held, color=WITHIN, marker="o", markersize=5.5, linewidth=1.8, label="held-out requests", zorder=3
        )
        axes.set_xlim(low, 100.6)
        axes.set_ylim(low, 100.6)
        axes.set_aspect("equal")
        axes.set_xlabel("nominal coverage 1 − α (%)")
        axes.set_ylabel("empirical coverage (%)")
        _title(axes, f"upper bounds of the picked knobs, n = {num_requests}")
        # Below the diagonal: bounds that hold more often than asked are the commoner case.
        _legend(axes, *axes.get_legend_handles_labels(), "lower right")
        return save_figure(figure, path_stem)


def plot_drift(
    measured_over_budget: ArrayLike,
    correction: ArrayLike,
    cost: ArrayLike,
    contention: Sequence[tuple[int, int]],
    path_stem: str | Path,
    cost_label: str = "predicted cost (ms)",
) -> tuple[Path, Path]:
    """Draw how requests kept their budgets while the device's speed drifted, as PNG and SVG.

    Above, dots are measured latency over budget and the line is the correction factor that predictions were multiplied
    by; below, what the policy chose to spend. Shaded spans are requests that ran under contention.

    Args:
        measured_over_budget: shape `(requests,)`, positive, in the order of arrival.
        correction: shape `(requests,)`, positive.
        cost: predicted cost or chosen `num_blocks` of each request, shape `(requests,)`.
        contention: first request and request after the last of each span, counted from 0.
        path_stem: path without ending, for example `runs/a/drift`.
        cost_label: name of `cost`, with its unit.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: there are no requests, their numbers differ, a value is not finite or not positive, or a span lies
            outside the requests.
        StorageError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ratio, factor, spent = _columns(measured_over_budget=measured_over_budget, correction=correction, cost=cost)
    if (ratio <= 0).any() or (factor <= 0).any():
        raise DataError("measured_over_budget and correction must be positive")
    for first, end in contention:
        if not 0 <= first < end <= len(ratio):
            raise DataError(f"the contention span ({first}, {end}) must lie within the {len(ratio)} requests")
    place = np.arange(1, len(ratio) + 1)
    late = ratio > 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1.0))
        for axes in (above, below):
            for i, (first, end) in enumerate(contention):
                label = "contention" if i == 0 else None
                axes.axvspan(first + 0.5, end + 0.5, color=SHADE, linewidth=0, label=label, zorder=0)
        above.axhline(1.0, color=LINE, linewidth=1.0, linestyle="--", zorder=2)
        for rows, colour, text in ((~late, WITHIN, "within budget"), (late, ABOVE, "late")):
            above.scatter(
                place[rows],
                ratio[rows],
                s=13,
                color=colour,
                alpha=0.65,
                linewidths=0,
                label=f"{text} ({rows.sum()})",
                zorder=3,
            )
        above.plot(place, factor, color=LINE, linewidth=1.8, label="correction factor", zorder=4)
        above.set_ylabel("measured / budget;  correction")
        above.margins(y=0.06)
        below.scatter(place, spent, s=9, color="#009E73", alpha=0.4, linewidths=0, zorder=3)
        below.plot(place, _running_mean(spent, max(len(spent) // 25, 1)), color="#009E73", linewidth=1.8, zorder=4)
        below.set_ylabel(f"{cost_label}\n(line: running mean)")
        if bool((spent == np.round(spent)).all()):
            below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        below.margins(y=0.12)
        below.set_xlabel("request, in order of arrival")
        below.set_xlim(0.5, len(place) + 0.5)
        figure.align_ylabels((above, below))
        handles, texts = above.get_legend_handles_labels()
        figure.legend(
            handles, texts, fontsize=9, frameon=False, loc="outside upper left", ncols=len(texts), markerscale=1.8
        )
        return save_figure(figure, path_stem)


def _columns(**columns: ArrayLike) -> list[Array]:
    """The named values as one-dimensional arrays of one length; raises DataError if they are not, or not finite."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if any(array.size == 0 for array in arrays.values()):
        raise DataError(f"there is nothing to plot: the shapes are {shapes}")
    if any(array.ndim != 1 for array in arrays.values()) or len({array.shape for array in arrays.values()}) > 1:
        raise DataError(f"{shapes} must be one-dimensional and of one length")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise DataError(f"{name} holds values that are no finite numbers")
    return list(arrays.values())


def _latencies(predicted_ms: ArrayLike, measured_ms: ArrayLike) -> list[Array]:
    predicted, measured = _columns(predicted_ms=predicted_ms, measured_ms=measured_ms)
    if (predicted <= 0).any() or (measured <= 0).any():
        raise DataError("predicted_ms and measured_ms must be positive")
    return [predicted, measured]


def _tier_rank(value: Any) -> int:
    return TIERS.index(value) if value in TIERS else -1


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=TEXT)


def _legend(axes: Axes, handles: Sequence[Any], texts: Sequence[str], place: LegendPlace) -> None:
    """A legend inside the axes whose white ground keeps grid lines out of its text."""
    axes.legend(handles, texts, fontsize=9, loc=place, framealpha=0.9, facecolor="white", edgecolor="none")


def _is_dark(colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), [0.299, 0.587, 0.114])) < 0.5


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with a few plain numbers, however narrow it is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    candidates = [np.outer(decades, steps).ravel() for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))]
    candidates.append(np.array(MaxNLocator(5).tick_values(low, high)))
    inside = [ticks[(ticks >= low) & (ticks <= high)] for ticks in candidates]
    axis.set_major_locator(FixedLocator(next((ticks for ticks in inside if len(ticks) >= 4), inside[-1]).tolist()))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _running_mean(values: Array, window: int) -> Array:
    """Mean of up to `window` values before, and of the value itself, so that no change shows before it happens."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window - 1, 0)
    mean: Array = (sums[ends] - sums[starts]) / (ends - starts)
    return mean
