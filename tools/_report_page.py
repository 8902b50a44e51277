"""The page of tools/report.py: a summary, four plots, the steps in which values saturated, and the layers.

Everything is in the one string: matplotlib draws SVG, which is pasted into the HTML. The same log gives the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from _report_records import RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 1500
"""Of a curve, and columns of a heat map: longer runs are drawn in bins of steps."""
MAX_EVENTS = 100
"""Steps that the table of saturation lists; the plot shows all."""
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0; color: #4a5568; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem; margin: 1rem 0; }
dl div { background: #f3f5f8; border-radius: .4rem; padding: .5rem .8rem; }
dt { font-size: .8rem; color: #4a5568; } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #e2e8f0; }
"""


def page(run: RunRecords, title: str) -> str:
    """The whole HTML document."""
    title = html.escape(title)
    body = [f"<h1>{title}</h1>", _summary(run), *_notes(run), *_plots(run), *_events(run), *_layers(run)]
    # Nothing is loaded, whatever a title or a digest in the log might contain.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _summary(run: RunRecords) -> str:
    known = run.loss[np.isfinite(run.loss)]
    items = [
        ("iterations", f"{run.iteration[0]:,} to {run.iteration[-1]:,}"),
        ("last loss", f"{known[-1]:.4f}" if len(known) else "none"),
        ("saturated values", _count(run.saturated)),
        ("steps that saturated", f"{np.count_nonzero(run.saturated > 0):,}"),
        ("tokens per second, median", _median(run.tokens_per_second, ",.0f")),
        ("refresh, median", _median(run.refresh_ms, ".2f", " ms")),
        ("refresh / step, median", _median(100.0 * run.refresh_ms / run.step_ms, ".2f", " %")),
        ("last digest", html.escape(str(run.digest)) if run.digest else "none"),
    ]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items) + "</dl>"


def _count(values: np.ndarray) -> str:
    return "not counted" if np.isnan(values).all() else f"{int(np.nansum(values)):,}"


def _median(values: np.ndarray, form: str, unit: str = "") -> str:
    finite = values[np.isfinite(values)]
    return format(float(np.median(finite)), form) + unit if len(finite) else "none"


def _notes(run: RunRecords) -> list[str]:
    notes = []
    if run.num_repeated:
        notes.append(f"{run.num_repeated:,} iterations were logged again after a resume; the later ones are shown.")
    if run.truncated:
        notes.append("The last line of the log is half written and left out.")
    bad = np.count_nonzero(~np.isfinite(run.loss))
    if bad:
        notes.append(f"{bad:,} iterations have no finite loss.")
    return [f"<p>{note}</p>" for note in notes]


def _plots(run: RunRecords) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    bins = _bins(len(run.iteration))
    parts = []
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "axes.grid": True, "grid.alpha": 0.3}
    with matplotlib.rc_context(style):
        if np.isfinite(run.loss).any():
            text = "The last batch of each iteration; the band is the range in a bin of steps."
            parts.append(_section("Loss", text, _curve(run, run.loss, bins)))
        if np.isfinite(run.saturated).any():
            text = (
                "Values of Q, K, V, P, O and of their gradients whose magnitude times scale exceeds the FP8 maximum, "
                f"summed over layers and ranks: {_by_slot(run)}"
            )
            parts.append(_section("Saturated values", text, _curve(run, run.saturated, bins, count=True)))
        if np.nan_to_num(run.refresh_ms).any():  # recipes without a refresh log zeros
            text = "Milliseconds to compute the scales from the weights, before the step."
            parts.append(_section("Refresh", text, _curve(run, run.refresh_ms, bins)))
        if run.utilization.shape[1] and not np.isnan(run.utilization).all():
            text = (
                "The share of the FP8 range in use, of the slots that are bounded (Q, K, V, O, and logits where they "
                "are cast); red: above the maximum, saturated."
            )
            parts.append(_section("Utilization by layer", text, _heat_map(run, bins)))
    return parts


def _curve(run: RunRecords, values: np.ndarray, bins: Sequence[np.ndarray], *, count: bool = False) -> Figure:
    """Mean and range of each bin; of a `count` the largest step, on a logarithmic axis that has a zero."""
    figure, axes = _axes(2.6)
    steps = [run.iteration[chunk[0]] for chunk in bins]
    low, middle, high = _reduced(values, bins)
    if count:
        axes.set_yscale("symlog")
    else:
        axes.fill_between(steps, low, high, alpha=0.25, linewidth=0)
    axes.plot(steps, high if count else middle, linewidth=1.2, marker="." if len(steps) < 50 else "")
    if count:
        axes.set_ylim(bottom=0.0)
    return figure


def _heat_map(run: RunRecords, bins: Sequence[np.ndarray]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    image = np.stack([_max(run.utilization[chunk]) for chunk in bins], axis=1)
    figure, axes = _axes(min(9.0, 1.8 + 0.16 * len(image)))
    colors = colormaps["viridis"].with_extremes(over="red", bad="lightgrey", under="white")
    edges = [*(run.iteration[chunk[0]] for chunk in bins), run.iteration[-1] + 1]
    rows = np.arange(len(image) + 1) + 0.5
    mesh = axes.pcolormesh(edges, rows, image, norm=LogNorm(2.0**-10, 1.0), cmap=colors, rasterized=True)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_ylabel("layer")
    figure.colorbar(mesh, ax=axes, extend="both", label="max |x| · scale / FP8 max")
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    axes.set_xlabel("iteration")
    return figure, axes


def _section(heading: str, text: str, figure: Figure) -> str:
    from matplotlib import pyplot

    svg = _svg(figure, heading)
    pyplot.close(figure)
    return f"<h2>{heading}</h2><p>{text}</p>{svg}"


def _svg(figure: Figure, label: str) -> str:
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # else the bytes depend on clock and version
    figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # The ids of two plots must not meet in one page.
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _bins(num_steps: int) -> Sequence[np.ndarray]:
    return np.array_split(np.arange(num_steps), min(num_steps, MAX_POINTS))


def _reduced(values: np.ndarray, bins: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Least, mean and largest finite value of each bin; NaN where there is none."""
    columns = []
    for chunk in bins:
        finite = values[chunk][np.isfinite(values[chunk])]
        columns.append((finite.min(), finite.mean(), finite.max()) if len(finite) else (np.nan,) * 3)
    return tuple(np.asarray(columns).T)


def _max(values: np.ndarray) -> np.ndarray:
    """Largest of each column; NaN only where all are."""
    return np.where(np.isnan(values).all(axis=0), np.nan, np.where(np.isnan(values), -np.inf, values).max(axis=0))


def _by_slot(run: RunRecords) -> str:
    return ", ".join(f"{html.escape(slot)} {count:,}" for slot, count in run.saturated_by_slot.items()) + "."


def _events(run: RunRecords) -> list[str]:
    where = np.flatnonzero(run.saturated > 0)
    if not len(where):
        return []
    rows = []
    for index in where[:MAX_EVENTS]:
        layers = np.flatnonzero(run.layer_saturated[index] > 0) + 1
        shown = ", ".join(map(str, layers[:8])) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
        rows.append((f"{run.iteration[index]:,}", f"{run.saturated[index]:,.0f}", shown))
    more = f"<p>The first {MAX_EVENTS} of {len(where):,} steps.</p>" if len(where) > MAX_EVENTS else ""
    return ["<h2>Steps that saturated</h2>" + more + _table(("iteration", "values", "layers"), rows)]


def _layers(run: RunRecords) -> list[str]:
    if not run.utilization.shape[1]:
        return []
    largest, saturated = _max(run.utilization), run.layer_saturated.sum(axis=0, dtype=np.float64)
    rows = [(str(row + 1), f"{largest[row]:.4f}", f"{saturated[row]:,.0f}") for row in range(len(largest))]
    return ["<h2>Layers</h2>" + _table(("layer", "largest utilization", "saturated values"), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
