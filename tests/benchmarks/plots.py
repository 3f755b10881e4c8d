"""How are the results plotted? As memory against workers, bars for each model, and load times against modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.figures import Figure, Results, Summary
from benchmarks.report import measured, slug

BARS = (figures.PEAK, figures.PUBLISH_RATIO, figures.FIRST_LOAD, figures.FORWARD, figures.CALL, figures.ROWS)
WIDE = 30  # bars that differ by a larger factor have a logarithmic scale
COLORS = ("#0b5fa5", "#56a0d3", "#d1495b", "#edae49", "#66605a", "#3b8c6e", "#9b72aa")


def draw(results: Results, folder: Path) -> list[Path]:
    """Write all plots for which the results have figures.

    Returns:
        The PNG files, which the page shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for model in measured(results):
        written.append(_write(_memory(results, model), folder / f"memory-{slug(model)}"))
        written.append(_write(_bars(results, model), folder / f"bars-{slug(model)}"))
    if "scale" in results["settings"]["measures"]:
        written.append(_write(_scale(results), folder / "scale"))
    return [path for path in written if path is not None]


def _memory(results: Results, model: str) -> Any:
    counts = figures.worker_counts(results)
    told = _lines(results, counts, lambda count, system: _summary(results, model, system, figures.memory_at(count)))
    if len(counts) < 2 or not told:
        return None
    return _line_plot(told, results, f"{_title(results, model)}: memory", "workers", "memory over the model's bytes")


def _scale(results: Results) -> Any:
    family = figures.family(results)
    modules = {results["models"][model]["modules"]: model for model in family}
    told = _lines(
        results, list(modules), lambda count, system: _summary(results, modules[count], system, figures.FIRST_LOAD)
    )
    if len(modules) < 2 or not told:
        return None
    return _line_plot(told, results, "First load of Llamas of growing depth", "modules", "ms", logarithmic=True)


def _bars(results: Results, model: str) -> Any:
    largest = [figures.memory_at(count) for count in figures.worker_counts(results)[-1:]]
    memory = [figure for figure in (_at_four(results), *largest) if figure][:1]
    told = [(figure, found) for figure in (*memory, *BARS) if (found := _by_system(results, model, figure))]
    if not told:
        return None
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 0.9 + 2.1 * ((len(told) + 2) // 3)), layout="constrained")
    canvas.suptitle(_title(results, model))
    for number, (figure, found) in enumerate(told, 1):
        _panel(canvas.add_subplot((len(told) + 2) // 3, 3, number), results, figure, found)
    return canvas


def _at_four(results: Results) -> Figure | None:
    return figures.memory_at(4) if 4 in figures.worker_counts(results) else None


def _panel(axes: Any, results: Results, figure: Figure, found: dict[str, Summary]) -> None:
    titles = [results["systems"][system] for system in found]
    middles = [summary.median for summary in found.values()]
    spread = [
        [summary.median - summary.low for summary in found.values()],
        [summary.high - summary.median for summary in found.values()],
    ]
    axes.barh(titles, middles, xerr=spread, color=[_color(results, system) for system in found])
    for position, (middle, summary) in enumerate(zip(middles, found.values(), strict=True)):
        axes.text(summary.high, position, " " + Summary.of([middle]).text(figure.unit), va="center", fontsize=7)
    prefix = "memory over the model's bytes, " if figure.title.endswith(("worker", "workers")) else ""
    axes.set_title(prefix + figure.title, fontsize=8)
    if max(middles) > WIDE * min(middles) > 0:
        axes.set_xscale("log")
        axes.set_xlim(left=min(middles) / 3)
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _line_plot(
    told: dict[str, dict[int, Summary]], results: Results, title: str, x: str, y: str, *, logarithmic: bool = False
) -> Any:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8.5, 4.2), layout="constrained")
    axes = canvas.add_subplot()
    ticks = sorted({point for points in told.values() for point in points})
    for place, (system, points) in enumerate(told.items()):  # the first line is on top; lines below it are wider
        middles = [summary.median for summary in points.values()]
        low = [summary.median - summary.low for summary in points.values()]
        high = [summary.high - summary.median for summary in points.values()]
        style = {"color": _color(results, system), "label": results["systems"][system], "marker": "o", "capsize": 2}
        width: dict[str, Any] = {
            "markersize": 6 + 1.5 * place,
            "linewidth": 1.5 + 0.6 * place,
            "zorder": 3 - 0.1 * place,
        }
        axes.errorbar(list(points), middles, yerr=[low, high], **style, **width)
    axes.set(title=title, xlabel=x, ylabel=y)
    if logarithmic:  # on both axes: lines that are proportional to `x` are straight and parallel
        axes.loglog()
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks([], minor=True)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right upper", fontsize=8, frameon=False)
    return canvas


def _lines(
    results: Results, points: list[int], read: Callable[[int, str], Summary | None]
) -> dict[str, dict[int, Summary]]:
    lines = {}
    for system in results["systems"]:
        line = {point: found for point in points if (found := read(point, system)) is not None}
        if line:
            lines[system] = line
    return lines


def _by_system(results: Results, model: str, figure: Figure) -> dict[str, Summary]:
    found = ((system, _summary(results, model, system, figure)) for system in results["systems"])
    return {system: summary for system, summary in found if summary is not None}


def _summary(results: Results, model: str, system: str, figure: Figure) -> Summary | None:
    return figures.summary(results, model, system, figure)


def _title(results: Results, model: str) -> str:
    return str(results["models"][model]["title"])


def _color(results: Results, system: str) -> str:
    return COLORS[list(results["systems"]).index(system) % len(COLORS)]


def _write(canvas: Any, path: Path) -> Path | None:
    if canvas is None:
        return None
    written = path.with_suffix(".png")
    canvas.savefig(written, dpi=130)
    return written
