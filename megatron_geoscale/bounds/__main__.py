"""`python -m megatron_geoscale.bounds`: gamma and every alpha of THEORY 4 for four models, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from megatron_geoscale.bounds import alpha
from megatron_geoscale.spectral.gram import gram, gram_norm, trace


@dataclass(frozen=True)
class Model:
    """What alpha depends on: shapes, and over how many heads and tokens a guarantee is shared."""

    name: str
    layers: int
    heads: int
    """Query heads of a layer."""
    hidden_size: int
    head_dim: int
    seq_length: int


MODELS = (
    Model("GPT-2 XL", 48, 25, 1600, 64, 1024),
    Model("Mistral-7B", 32, 32, 4096, 128, 4096),
    Model("Llama-2-13B", 40, 40, 5120, 128, 4096),
    Model("Llama-2-70B", 80, 64, 8192, 128, 4096),
)
DELTA = 1e-6
REFERENCE = "W_Q and W_K with independent standard normal entries, torch seed 0"
_COLUMN = 13
_ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("layers", ("layers",), "d"),
    ("query heads", ("heads",), "d"),
    ("hidden size d", ("hidden_size",), "d"),
    ("head dim r", ("head_dim",), "d"),
    ("sequence length L", ("seq_length",), "d"),
    ("gamma", ("gamma",), ".3f"),
    ("d / (gamma r)", ("exponent_ratio",), ".1f"),
    ("alpha for i != j", (), ""),
    ("  4.1 rank-aware", ("alpha", "rank_aware"), ".4f"),
    ("  4.2 rank-agnostic", ("alpha", "rank_agnostic"), ".4f"),
    ("  4.3 exact isotropic", ("alpha", "exact_isotropic"), ".4f"),
    ("  4.4 stable-rank-aware, reference head", ("alpha", "stable_rank_aware"), ".4f"),
    ("alpha for i = j", (), ""),
    ("  4.5 diagonal, reference head", ("alpha", "diagonal"), ".4f"),
    ("  4.5 diagonal, worst head of rank r", ("alpha", "diagonal_worst"), ".4f"),
    ("alpha for all pairs, reference head", (), ""),
    ("  max(4.1, 4.5)", ("combined", "rank_aware"), ".4f"),
    ("  max(4.2, 4.5)", ("combined", "rank_agnostic"), ".4f"),
    ("  max(4.3, 4.5)", ("combined", "exact_isotropic"), ".4f"),
    ("  max(4.4, 4.5)", ("combined", "stable_rank_aware"), ".4f"),
    ("reference head, relative to sigma", (), ""),
    ("  ||M||_F", ("reference", "frobenius"), ".3f"),
    ("  Schatten-4", ("reference", "schatten4"), ".3f"),
    ("  tr M", ("reference", "trace"), ".3f"),
    ("  ||(M + M^T)/2||_F", ("reference", "symmetric_frobenius"), ".3f"),
)


def reference_spectrum(hidden_size: int, head_dim: int) -> dict[str, float]:
    """Norms of M = A^T B for the reference head, divided by its sigma: what 4.4 and 4.5 need besides the shape.

    A, B [head_dim, hidden_size] have independent standard normal entries from a fixed seed. No alpha depends on the
    magnitude of M. Computed from head_dim x head_dim products (THEORY 2.2 and 4.5).
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, head_dim, hidden_size, generator=generator, dtype=torch.float64).unbind()
    product = gram(a) @ gram(b)  # tr P^m is the sum of s^(2m) over the singular values s of M
    cross = b @ a.mT  # C = B A^T: tr C = tr M and tr C^2 = tr M^2
    sigma = gram_norm(a, b).item()
    squared_frobenius = trace(product).item()
    return {
        "frobenius": math.sqrt(squared_frobenius) / sigma,
        "schatten4": trace(product @ product).item() ** 0.25 / sigma,
        "trace": trace(cross).item() / sigma,
        "symmetric_frobenius": math.sqrt(0.5 * (squared_frobenius + trace(cross @ cross).item())) / sigma,
    }


def alphas(model: Model, *, delta: float) -> dict[str, Any]:
    """gamma, d/(gamma r), and every alpha of THEORY 4 for one sequence through `model`; ValueError as `bounds.alpha`.

    "combined" is the maximum of each alpha for i != j and the reference head's for i = j, as THEORY 4.5 demands.
    """
    d, r = model.hidden_size, model.head_dim
    num_tokens = model.layers * model.heads * model.seq_length
    num_pairs = num_tokens * model.seq_length
    reference = reference_spectrum(d, r)
    gamma = alpha.typicality_gamma(r, num_tokens=num_tokens, delta=delta)
    off_diagonal = {
        "rank_aware": alpha.rank_aware(d, r, num_pairs=num_pairs, num_tokens=num_tokens, delta=delta),
        "rank_agnostic": alpha.rank_agnostic(d, num_pairs=num_pairs, delta=delta),
        "exact_isotropic": alpha.exact_isotropic(d, r, num_pairs=num_pairs, delta=delta),
        "stable_rank_aware": alpha.stable_rank_aware(
            d,
            sigma=1.0,
            frobenius=reference["frobenius"],
            schatten4=reference["schatten4"],
            num_pairs=num_pairs,
            num_tokens=num_tokens,
            delta=delta,
        ),
    }
    diagonal = alpha.diagonal(
        d,
        sigma=1.0,
        trace=reference["trace"],
        symmetric_frobenius=reference["symmetric_frobenius"],
        num_tokens=num_tokens,
        delta=delta,
    )
    # |tr M| <= r sigma and ||M_s||_F <= sqrt(r) sigma, both attained by tied weights of r equal singular values.
    worst = alpha.diagonal(
        d, sigma=1.0, trace=float(r), symmetric_frobenius=math.sqrt(r), num_tokens=num_tokens, delta=delta
    )
    return {
        **asdict(model),
        "gamma": gamma,
        "exponent_ratio": d / (gamma * r),
        "alpha": {**off_diagonal, "diagonal": diagonal, "diagonal_worst": worst},
        "combined": {name: max(value, diagonal) for name, value in off_diagonal.items()},
        "reference": reference,
    }


def format_table(rows: Sequence[dict[str, Any]], *, delta: float) -> str:
    """The table that the command prints: one column a model, `rows` as `alphas` returns them."""
    lines = [
        f"|xhat_i^T M xhat_j| <= alpha d sigma for all pairs, heads and layers of one sequence, delta = {delta:g}:",
        "for isotropic tokens only, see docs/MATH.md, section 4.",
        f"Reference head: {REFERENCE}.",
        "",
        f"{'':40}" + "".join(f"{row['name']:>{_COLUMN}}" for row in rows),
    ]
    for label, path, form in _ROWS:
        cells = ""
        for row in rows if path else ():
            value: Any = row
            for key in path:
                value = value[key]
            cells += f"{value:>{_COLUMN}{form}}"
        lines.append(f"{label:40}{cells}".rstrip())
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake in `arguments` ends in one sentence and exit code 2."""
    parser = _Parser(prog="python -m megatron_geoscale.bounds", description=__doc__)
    parser.add_argument("--delta", type=float, default=DELTA, help="failure probability of each alpha (%(default)g)")
    parser.add_argument("--seq-length", type=int, help="sequence length of all models instead of each one's own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    flags = parser.parse_args(arguments)
    if flags.seq_length is not None and flags.seq_length < 1:
        parser.error(f"--seq-length must be at least 1, got {flags.seq_length}")
    if not 0.0 < flags.delta < 1.0:
        parser.error(f"--delta must be a probability between 0 and 1, exclusive, got {flags.delta:g}")
    models = [Model(**{**asdict(m), "seq_length": flags.seq_length or m.seq_length}) for m in MODELS]
    rows = [alphas(model, delta=flags.delta) for model in models]
    if flags.json:
        json.dump({"delta": flags.delta, "reference_head": REFERENCE, "models": rows}, sys.stdout, indent=2)
        print()
    else:
        print(format_table(rows, delta=flags.delta))


if __name__ == "__main__":
    main()
