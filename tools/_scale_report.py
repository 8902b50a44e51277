"""What inspect_scales.py shows: two tables, the warnings, and the heat map."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_geoscale.checkpoints.attention_weights import AttentionSource
from megatron_geoscale.checkpoints.inspection import LayerReport
from megatron_geoscale.config import GeoScaleConfig

WIDTH = 160
"""Of the tables where there is no terminal."""
LEGEND = (
    "sigma: the largest head's ||A^T B||, with its stable rank. sigma bound: rotation-safe; RoPE: its share of "
    "||A|| ||B||, the bound without balancing. logit, Q, K, V, O: bounds of any entry. used: share of E4M3's 448 that "
    "a typical entry of Q, K, V takes, its root mean square for isotropic tokens times the scale."
)


def print_tables(source: AttentionSource, config: GeoScaleConfig, reports: Sequence[LayerReport]) -> None:
    """The layers, their heads, and what is wrong with them."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    about = f"{source.name}: recipe {config.recipe}, estimator {config.estimator}, granularity {config.granularity}"
    console.print(about, style="bold")
    console.print(_layers(reports))
    console.print(LEGEND, style="dim")
    console.print("\nsigma of each head, from head 0 on, with its stable rank in brackets", style="bold")
    console.print(_heads(reports))
    for report in reports:
        for warning in report.warnings:
            console.print(f"warning: {warning}", style="bold yellow")


def _layers(reports: Sequence[LayerReport]) -> Table:
    table = Table()
    for column in ("layer", "sigma", "head", "stable rank", "sigma bound", "RoPE", "logit", "Q", "K", "V", "O",
                   "scale qkv", "scale logits", "scale o", "used Q / K / V, %"):
        table.add_column(column, justify="right")
    for report in reports:
        head = max(range(len(report.sigma)), key=report.sigma.__getitem__)
        bounds = [_number(report.bounds[name]) for name in ("logit_bound", "amax_q", "amax_k", "amax_v", "amax_o")]
        scales = [_number(report.scales[slot]) for slot in ("qkv", "logits", "o")]
        used = " / ".join(_number(None if u is None else 100 * u, ".2g") for u in report.utilization.values())
        table.add_row(
            str(report.number), _number(report.bounds["sigma"]), str(head), _number(report.stable_rank[head], ".1f"),
            _number(report.bounds["sigma_bound"]), _number(report.rotary_tightness, ".2f"), *bounds, *scales, used,
        )
    return table


def _heads(reports: Sequence[LayerReport]) -> Table:
    table = Table()
    table.add_column("layer", justify="right")
    table.add_column("heads", overflow="fold")
    for report in reports:
        heads = zip(report.sigma, report.stable_rank)
        cells = [f"{sigma:.3g}\N{NO-BREAK SPACE}({_number(rank, '.1f')})" for sigma, rank in heads]
        table.add_row(str(report.number), "  ".join(cells))
    return table


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def check_plot(path: Path) -> None:
    """Raise ValueError now if `plot` could not be written later."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot {path} must end in .png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: its directory does not exist")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'megatron-geoscale[plot]'")


def plot(reports: Sequence[LayerReport], title: str) -> bytes:
    """A PNG: sigma of every head (down) and layer (across), logarithmic colours; zeros stay blank."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    heads = max(len(report.sigma) for report in reports)
    sigma = np.full((heads, len(reports)), np.nan)
    for column, report in enumerate(reports):
        sigma[: len(report.sigma), column] = report.sigma
    shown = np.ma.masked_where(~(sigma > 0), sigma)
    size = (max(5.0, 2.0 + 0.15 * len(reports)), max(3.5, 1.5 + 0.12 * heads))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(shown, aspect="auto", norm=LogNorm() if shown.count() else None, interpolation="nearest",
                        extent=(0.5, len(reports) + 0.5, heads - 0.5, -0.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="layer", ylabel="query head")
    figure.colorbar(image, ax=axes, label="sigma, the norm of the query-key interaction")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()
