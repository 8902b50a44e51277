"""The figures of docs/MATH.md: `python docs/plots.py` writes docs/plots/*.png (under a minute, matplotlib needed).

Pairs i != j are sampled directly: tokens uniform on the sphere of radius sqrt(d), projected by W_Q and W_K with
orthonormal rows, so that M = W_Q^T W_K has r singular values equal to 1, the worst case of its rank. For i = j and tied
weights the logit is d times a Beta(r/2, (d-r)/2) variable and drawn as such. Seeds are fixed.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from megatron_geoscale.bounds import alpha
from megatron_geoscale.bounds.__main__ import DELTA, MODELS, Model
from megatron_geoscale.bounds.alpha import _log_tail

OUT = Path(__file__).parent / "plots"
TOKENS = 2048
"""Query tokens, and as many key tokens: 2^22 pairs a model."""
LOWEST = -19.0
"""Of log10 P."""
COLOURS = {"4.1": "#d95f02", "4.2": "#7570b3", "4.3": "#1b9e77", "4.5": "#e7298a", "sampled": "black"}


def project(model: Model, weights: torch.Tensor, seed: int) -> torch.Tensor:
    """W xhat for TOKENS tokens: weights [r, d] -> [TOKENS, r]."""
    x = torch.randn(TOKENS, model.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x @ weights.T * (math.sqrt(model.hidden_size) / x.norm(dim=-1, keepdim=True))


def weights(model: Model, seed: int) -> torch.Tensor:
    """[r, d] with orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(model.hidden_size, model.head_dim, generator=generator))[0].T


def survival(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(level, log10 of the share of `values` above it), at shares evenly spaced on a log scale, ten counts at least."""
    ordered = values.flatten().sort(descending=True).values
    ranks = torch.logspace(1, math.log10(len(ordered)), 60).round().long().clamp(max=len(ordered)).unique()
    return ordered[ranks - 1], (ranks / len(ordered)).log10()


def log10_gaussian(exponent: torch.Tensor) -> torch.Tensor:
    """log10 of min(1, 2 exp(-exponent))."""
    return ((math.log(2.0) - exponent) / math.log(10.0)).clamp(max=0.0)


def tails(axes: Axes, model: Model, *, deep: bool) -> None:
    """P(|xhat_i^T M xhat_j| > alpha d sigma) of one pair i != j, by 4.1, 4.2, 4.3 and sampled."""
    d, r = model.hidden_size, model.head_dim
    num_tokens = model.layers * model.heads * model.seq_length
    num_pairs = num_tokens * model.seq_length
    gamma = alpha.typicality_gamma(r, num_tokens=num_tokens, delta=DELTA)
    counts = {"num_pairs": num_pairs, "delta": DELTA}
    solved = {
        "4.1": alpha.rank_aware(d, r, num_tokens=num_tokens, **counts),
        "4.2": alpha.rank_agnostic(d, **counts),
        "4.3": alpha.exact_isotropic(d, r, **counts),
    }
    bottom = LOWEST if deep else -7.0
    right = 1.06 * solved["4.2"] if deep else 1.5 * math.sqrt(2.0 * gamma * r * 7.0 * math.log(10.0)) / d
    x = torch.linspace(right / 400, right, 400, dtype=torch.float64)
    curves = {
        "4.1": ("4.1 rank-aware, typical tokens", log10_gaussian(d**2 * x**2 / (2.0 * gamma * r))),
        "4.2": ("4.2 rank-agnostic", log10_gaussian(d * x**2 / 2.0)),
        "4.3": ("4.3 exact", torch.tensor([_log_tail(v, d, r) for v in x.tolist()]) / math.log(10.0)),
    }
    for key, (label, y) in curves.items():
        axes.plot(x, y, color=COLOURS[key], label=label, linewidth=1.8, zorder=4)
    q, k = (project(model, weights(model, seed), seed + 2) for seed in (0, 1))
    level, share = survival((q @ k.T).abs() / d)
    axes.plot(level, share, "o", color=COLOURS["sampled"], markersize=3.5, label="sampled, 4.2 million pairs")
    if deep:
        axes.axhline(math.log10(DELTA / num_pairs), color="grey", linestyle=":", linewidth=1)
        axes.text(right * 0.6, math.log10(DELTA / num_pairs) + 0.2, "delta / N", color="grey", fontsize=9)
        for key, value in solved.items():
            side = "right" if key == "4.2" else "left"
            style = {"rotation": 90, "ha": side, "va": "top", "fontsize": 9}
            axes.text(value, -2.2, f" {value:.4f} ", color=COLOURS[key], **style)
            axes.axvline(value, color=COLOURS[key], linestyle="--", linewidth=0.8)
    axes.set(xlim=(0.0, right), ylim=(bottom, 0.3), title=f"{model.name}: d = {d}, r = {r}, gamma = {gamma:.2f}")
    axes.grid(alpha=0.25)


def four_models(name: str, title: str, *, deep: bool) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True, constrained_layout=True)
    for axes, model in zip(grid.flat, MODELS, strict=True):
        tails(axes, model, deep=deep)
    for axes in grid[1]:
        axes.set_xlabel("alpha")
    for axes in grid[:, 0]:
        axes.set_ylabel("log10 P(|logit| > alpha c d sigma)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(OUT / name, dpi=100)
    plt.close(figure)


def tied_diagonal(name: str) -> None:
    """W_Q = W_K of GPT-2 XL's shape: logits with i = j against the alphas that do not cover them."""
    model = MODELS[0]
    d, r = model.hidden_size, model.head_dim
    num_tokens = model.layers * model.heads * model.seq_length
    counts = {"num_pairs": num_tokens * model.seq_length, "delta": DELTA}
    figure, axes = plt.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    torch.manual_seed(0)
    inside, outside = (torch.distributions.Gamma(n / 2, 0.5).sample((TOKENS**2,)) for n in (r, d - r))
    level, share = survival(inside / (inside + outside))
    axes.plot(level, share, "o", color=COLOURS["sampled"], markersize=3, label="i = j, W_Q = W_K, 4.2 million tokens")
    q, k = (project(model, weights(model, 0), seed) for seed in (2, 3))
    level, share = survival((q @ k.T).abs() / d)
    axes.plot(level, share, "x", color="grey", markersize=4, label="i != j, same weights, 4.2 million pairs")
    t = torch.linspace(0.0, 34.0, 300, dtype=torch.float64)
    bound = (r + 2.0 * math.sqrt(r) * t.sqrt() + 2.0 * t) / d
    axes.plot(bound, log10_gaussian(t), color=COLOURS["4.5"], linewidth=1.8, label="4.5, bound for i = j")
    norms = {"sigma": 1.0, "trace": float(r), "symmetric_frobenius": math.sqrt(r)}
    for key, label, value in (
        ("4.3", "alpha of 4.3", alpha.exact_isotropic(d, r, **counts)),
        ("4.1", "alpha of 4.1", alpha.rank_aware(d, r, num_tokens=num_tokens, **counts)),
        ("4.5", "alpha of 4.5", alpha.diagonal(d, num_tokens=num_tokens, delta=DELTA, **norms)),
    ):
        axes.axvline(value, color=COLOURS[key], linestyle="--", linewidth=1.0)
        axes.text(value, -11.8, f"{label}: {value:.4f} ", color=COLOURS[key], rotation=90, ha="right", fontsize=9)
    axes.axhline(math.log10(DELTA / num_tokens), color="grey", linestyle=":", linewidth=1)
    axes.text(0.001, math.log10(DELTA / num_tokens) + 0.15, "delta / tokens", color="grey", fontsize=9)
    axes.set(xlim=(0.0, 0.15), ylim=(-13.0, 0.3), xlabel="alpha", ylabel="log10 P(|logit| > alpha c d sigma)")
    axes.set_title(f"The diagonal under tied weights ({model.name}: d = {d}, r = {r})")
    axes.legend(loc="upper right", fontsize=9, framealpha=1.0)
    axes.grid(alpha=0.25)
    figure.savefig(OUT / name, dpi=100)
    plt.close(figure)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    four_models("tails.png", f"Tail of one logit, and where it meets delta / N (delta = {DELTA:g})", deep=True)
    four_models("tails_sampled.png", "Tail of one logit where it can be sampled", deep=False)
    tied_diagonal("diagonal.png")


if __name__ == "__main__":
    main()
