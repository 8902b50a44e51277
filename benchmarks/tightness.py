"""How tight the certified bounds are: `python benchmarks/tightness.py [--json PATH]`, bound over attained maximum.

Layers of random weights in the shapes of several model families are bounded as a refresh bounds them and attacked by
gradient ascent over tokens and distances (`_attack`); what the attack finds is evaluated by the layer's own forward
pass. docs/BENCHMARKS.md says what the weights are and how to read the table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _attack import Side, attack_entries, attack_logits, rotate
from _measure import machine_line, number, parser, progress, set_up, table, write_json
from torch import Tensor

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.bounds.rotary import certified_gram_norm, rotary_norm_bound
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.layer_bounds import bound_heads
from megatron_geoscale.spectral import Moments, Projections, fold_norm
from megatron_geoscale.spectral.gram import norm_of_grams, per_query_head

CONTENTS = ("random", "decaying", "mismatched")


@dataclass(frozen=True)
class Family:
    """What of a model's attention the bounds depend on, at a reduced size."""

    name: str
    heads_per_group: int
    layer_norm: bool = False
    bias: bool = False
    rope: bool = True
    qk_norm: bool = False


FAMILIES = (
    Family("plain: RMSNorm", 1, rope=False),
    Family("GPT-2: LayerNorm, biases", 1, layer_norm=True, bias=True, rope=False),
    Family("Llama: RMSNorm, RoPE, GQA 8:1", 8),
    Family("Mistral: RMSNorm, RoPE, GQA 4:1", 4),
    Family("Qwen2: RMSNorm, RoPE, GQA 4:1, QKV biases", 4, bias=True),
    Family("Qwen3: RMSNorm, RoPE, GQA 4:1, QK-norm", 4, qk_norm=True),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, default=512, help="hidden size (default: 512)")
    options.add_argument("--head-dim", type=int, default=64, help="head dimension (default: 64)")
    options.add_argument("--heads", type=int, default=8, help="query heads, a multiple of 8 (default: 8)")
    options.add_argument("--length", type=int, default=4096, help="positions under RoPE (default: 4096)")
    options.add_argument("--starts", type=int, default=512, help="tokens and distances to ascend from (default: 512)")
    options.add_argument("--steps", type=int, default=50, help="of each ascent; ten times as many for the best")
    options.add_argument("--positions", type=int, default=256, help="at which entries are attacked (default: 256)")
    return options.parse_args(argv)


class Layer:
    """One layer of a family: random weights, forward pass, bounds, and the sides that the attack ascends on."""

    def __init__(self, family: Family, content: str, options: argparse.Namespace, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.family, self.d, self.d_h = family, options.hidden, options.head_dim
        self.n_q, self.n_kv = options.heads, options.heads // family.heads_per_group
        self.rotary_dim = self.d_h if family.rope else 0
        rows_q, rows_k = _row_sizes(content, self.d_h, draw)
        directions = torch.arange(1, self.d + 1, dtype=torch.float64) ** (-0.5 if content == "decaying" else 0.0)
        std = 0.02
        counts = (self.n_q, self.n_kv, self.n_kv)
        sizes = (rows_q, rows_k, torch.ones_like(rows_k))
        self.weights = [
            std * rows * draw(n, self.d_h, self.d) * directions for n, rows in zip(counts, sizes, strict=True)
        ]
        self.gain = 1 + 0.1 * draw(self.d)
        self.shift = 0.1 * draw(self.d) if family.layer_norm else None
        self.biases = [0.1 * draw(n, self.d_h) if family.bias else None for n in counts]
        self.head_norms = None
        if family.qk_norm:
            self.head_norms = HeadNorm(1 + 0.3 * draw(self.d_h)), HeadNorm(1 + 0.3 * draw(self.d_h))

    def forward(self, which: int, h: Tensor, position: Tensor, heads: Tensor) -> Tensor:
        """Q, K or V (`which` 0, 1, 2) of `heads`, each of its own token of the residual stream: [n, d] -> [n, d_h]."""
        x = h - h.mean(-1, keepdim=True) if self.family.layer_norm else h
        x = x / x.square().mean(-1, keepdim=True).sqrt() * self.gain
        x = x if self.shift is None else x + self.shift
        bias = self.biases[which]
        out = (self.weights[which][heads] @ x[..., None])[..., 0]
        out = out if bias is None else out + bias[heads]
        if which == 2:
            return out
        if self.head_norms is not None:
            out = out / out.square().mean(-1, keepdim=True).sqrt() * self.head_norms[which].gain
        return rotate(out, position, self.rotary_dim)

    def side(self, which: int, heads: Tensor) -> Side:
        """What the attack ascends on: the folded projection or, behind QK-norm, the norm's own sphere."""
        if self.head_norms is not None and which < 2:
            diagonal = torch.diag(self.head_norms[which].gain).expand(len(heads), -1, -1)
            return Side(diagonal, diagonal.new_zeros(len(heads), self.d_h), self.d_h**0.5)
        weight, bias = self.weights[which][heads], self.biases[which]
        offset = weight.new_zeros(len(heads), self.d_h) if bias is None else bias[heads]
        offset = offset if self.shift is None else offset + weight @ self.shift
        return Side(weight * self.gain, offset, self.d**0.5, centred=self.family.layer_norm)

    def hidden_state(self, which: int, x: Tensor, heads: Tensor) -> Tensor:
        """Tokens whose norm, as the side counts it, is x: [n, ...] -> [n, d]."""
        if self.head_norms is None or which == 2:
            return x
        return (torch.linalg.pinv(self.weights[which][heads] * self.gain) @ x[..., None])[..., 0]

    def bounds(self) -> tuple[dict[str, Tensor], Tensor]:
        """The refresh's columns of bounds, and the balanced bound of ||A^T R B|| over that of D = I, [n_q]."""
        folded: list[Any] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            folded += fold_norm(weight, bias, gain=self.gain, shift=self.shift)
        p = Projections(*folded)
        moments = Moments.of(p)
        geometry = AttentionGeometry(
            hidden_size=self.d, num_heads=self.n_q, num_groups=self.n_kv, head_dim=self.d_h,
            softmax_scale=self.d_h**-0.5, max_sequence_length=4096, rotary_dim=self.rotary_dim,
        )
        norms = None
        if self.head_norms is not None:
            norms = HeadNorm(self.head_norms[0].gain[None]), HeadNorm(self.head_norms[1].gain[None])
        sigma = norm_of_grams(moments.q, moments.k)
        bounds = bound_heads(geometry, moments, sigma, norms, GeoScaleConfig(), num_layers=1)
        plain = certified_gram_norm(moments.q) * per_query_head(certified_gram_norm(moments.k), moments.q)
        return bounds, rotary_norm_bound(p.q, p.k, rotary_dim=self.rotary_dim) / plain


def _row_sizes(content: str, d_h: int, draw: Any) -> tuple[Tensor, Tensor]:
    """Sizes of the rows of W_Q and W_K, [d_h, 1], alike on both rows of a half-split pair; docs/BENCHMARKS.md."""
    place = torch.linspace(0, 1, d_h // 2, dtype=torch.float64)  # 0: the fastest rotation, 1: the slowest
    logs = torch.zeros_like(place), torch.zeros_like(place)
    if content == "decaying":
        logs = 2 * (place - 1) + 0.5 * draw(d_h // 2), 2 * (place - 1) + 0.5 * draw(d_h // 2)
    elif content == "mismatched":
        logs = -6 * place, -6 * place.flip(0)
    query, key = (log.exp().repeat(2)[:, None] for log in logs)
    return query, key


def measure(family: Family, content: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: bound over attained maximum of logits and of entries, per head; balanced over D = I under RoPE."""
    layer = Layer(family, content, options, seed=FAMILIES.index(family) * len(CONTENTS) + CONTENTS.index(content))
    bounds, balanced = layer.bounds()
    heads, groups = torch.arange(layer.n_q), torch.arange(layer.n_kv)
    keys = heads // family.heads_per_group
    x, y, distance = attack_logits(
        layer.side(0, heads), layer.side(1, keys), rotary_dim=layer.rotary_dim, length=options.length,
        starts=options.starts, steps=options.steps, generator=torch.Generator().manual_seed(0),
    )
    q = layer.forward(0, layer.hidden_state(0, x, heads), distance, heads)
    k = layer.forward(1, layer.hidden_state(1, y, keys), torch.zeros_like(distance), keys)
    attained = {"logits": (q * k).sum(-1).abs() * layer.d_h**-0.5}
    for which, (name, own) in enumerate((("q", heads), ("k", groups), ("v", groups))):
        x, position = attack_entries(
            layer.side(which, own), rotary_dim=layer.rotary_dim if which < 2 else 0, length=options.length,
            positions=options.positions,
        )
        attained[name] = layer.forward(which, layer.hidden_state(which, x, own), position, own).abs().amax(-1)
    columns = {"logits": "logit_bound", "q": "amax_q", "k": "amax_k", "v": "amax_v"}
    row: dict[str, Any] = {"family": family.name, "content": content}
    for name, column in columns.items():
        row[name] = _summary(bounds[column].expand_as(attained[name]) / attained[name])
    if family.rope and not family.qk_norm:
        row["balanced_over_plain"] = _summary(balanced)
    return row


def _summary(ratios: Tensor) -> dict[str, float]:
    return {"least": ratios.min().item(), "median": ratios.median().item(), "worst": ratios.max().item()}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    about = set_up(options.threads)
    rows = []
    for family in FAMILIES:
        for content in CONTENTS if family.rope and not family.qk_norm else CONTENTS[:2]:
            progress(f"{family.name}, {content}")
            rows.append(measure(family, content, options))
    columns = ("family", "content", " logits", " Q", " K", " V", " balanced over D = I")
    cells = []
    for row in rows:
        pairs = (row.get(name) for name in ("logits", "q", "k", "v", "balanced_over_plain"))
        ratios = ("" if pair is None else f"{number(pair['median'])} ({number(pair['worst'])})" for pair in pairs)
        cells.append((row["family"], row["content"], *ratios))
    print(f"{machine_line(about)}\nHidden size {options.hidden}, {options.heads} heads of {options.head_dim}.\n")
    print(table("tightness", columns, cells))
    write_json(options.json, about, {"rows": rows})


if __name__ == "__main__":
    main()
