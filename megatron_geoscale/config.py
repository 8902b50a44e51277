"""The one configuration object, and the flags that make it.

`GeoScaleConfig` is frozen: a run has one, every rank builds the same one from the same command line, and what a
recipe means is readable in `RECIPES` below rather than spread over the code. The flags are `--geoscale-*`; everything
that Megatron already has a flag for keeps Megatron's name.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GEOMETRIC_RECIPES = ("certified", "paper")
"""Recipes whose scales come from the weights."""
BASELINE_RECIPES = ("delayed", "current")
"""Recipes whose scales come from the tensors: past ones (delayed) or this one (current). THEORY 7."""
RECIPES = (*GEOMETRIC_RECIPES, *BASELINE_RECIPES, "none")
"""`none`: attention is not cast at all, the reference that the others are compared with."""
ESTIMATORS = ("gram", "power")
GRANULARITIES = ("head", "layer")
ATTENTION_BACKENDS = ("auto", "emulated", "te")
LOGITS_DTYPES = ("fp32", "fp8")


@dataclass(frozen=True)
class GeoScaleConfig:
    """What the scaler does. Every field has a flag of the same name, `--geoscale-<field>`.

    Raises ValueError, in one sentence that names the flag, for a value outside its range.
    """

    recipe: str = "certified"
    """`certified`: worst case, holds for every input. `paper`: power iteration and rank-aware alpha (arXiv:2602.18851).
    `delayed`, `current`: the baselines. `none`: attention without FP8."""
    estimator: str | None = None
    """How sigma is computed, `gram` (exact) or `power` (one warm step a refresh); None takes the recipe's own."""
    granularity: str = "head"
    """`head`: the largest head's norm. `layer`: the norm of the sum over heads, which bounds no head (THEORY 2)."""
    margin: float = 1.0
    """eta of THEORY 5, in (0, 1]: the share of the FP8 range that a bound may fill. What rounding in the layer's own
    arithmetic can add to a bound is allowed for apart from it (`bounds.tensors.rounding_allowance`)."""
    failure_probability: float = 1e-6
    """delta of THEORY 4, in (0, 1): read by `paper` only."""
    refresh_interval: int = 1
    """Applied optimizer steps between two refreshes. Above 1 the scales belong to older weights."""
    attention: str = "auto"
    """`emulated`: FP8 attention in plain torch. `te`: Transformer Engine's kernels. `auto`: what this machine has."""
    logits_dtype: str = "fp32"
    """`fp8` stores the logits themselves in E4M3 under their predicted scale, the paper's setting (emulated only)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("recipe", RECIPES),
            ("granularity", GRANULARITIES),
            ("attention", ATTENTION_BACKENDS),
            ("logits_dtype", LOGITS_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{_flag(name)} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.estimator is None:
            object.__setattr__(self, "estimator", "power" if self.recipe == "paper" else "gram")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"{_flag('estimator')} must be one of {', '.join(ESTIMATORS)}, not {self.estimator!r}")
        if not 0.0 < self.margin <= 1.0:
            raise ValueError(f"{_flag('margin')} must lie in (0, 1], not {self.margin}")
        if not 0.0 < self.failure_probability < 1.0:
            raise ValueError(f"{_flag('failure_probability')} must lie in (0, 1), not {self.failure_probability}")
        if self.refresh_interval < 1:
            raise ValueError(f"{_flag('refresh_interval')} must be 1 or more, not {self.refresh_interval}")

    @property
    def is_geometric(self) -> bool:
        """Whether the scales come from the weights."""
        return self.recipe in GEOMETRIC_RECIPES


def _flag(name: str) -> str:
    return "--geoscale-" + name.replace("_", "-")


def add_geoscale_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--geoscale-*` flags that `GeoScaleConfig` reads; returns the parser."""
    group = parser.add_argument_group("geoscale", "FP8 attention scaled from the weights")
    default = GeoScaleConfig()
    group.add_argument("--geoscale-recipe", default=default.recipe, metavar="{" + ",".join(RECIPES) + "}",
                       help="where the FP8 scales of attention come from (default: certified)")
    group.add_argument("--geoscale-estimator", default=None, metavar="{gram,power}",
                       help="how sigma is computed (default: power for paper, else gram)")
    group.add_argument("--geoscale-granularity", default=default.granularity, metavar="{head,layer}",
                       help="largest head's norm, or the norm of the sum over heads (default: head)")
    group.add_argument("--geoscale-margin", type=float, default=default.margin, metavar="ETA",
                       help="share of the FP8 range that a bound may fill (default: 1.0)")
    group.add_argument("--geoscale-failure-probability", type=float, default=default.failure_probability,
                       metavar="DELTA", help="of the isotropic bound of the paper recipe (default: 1e-6)")
    group.add_argument("--geoscale-refresh-interval", type=int, default=default.refresh_interval, metavar="N",
                       help="applied optimizer steps between refreshes; above 1 even certified scales can be outrun "
                       "by the weights (default: 1)")
    group.add_argument("--geoscale-attention", default=default.attention, metavar="{auto,emulated,te}",
                       help="what computes FP8 attention (default: auto)")
    group.add_argument("--geoscale-logits-dtype", default=default.logits_dtype, metavar="{fp32,fp8}",
                       help="fp8 stores the logits in E4M3 too, the paper's setting (default: fp32)")
    return parser


def geoscale_config_from_args(args: argparse.Namespace) -> GeoScaleConfig:
    """The config that parsed `--geoscale-*` flags ask for. Raises ValueError as `GeoScaleConfig` does."""
    return GeoScaleConfig(
        recipe=args.geoscale_recipe,
        estimator=args.geoscale_estimator,
        granularity=args.geoscale_granularity,
        margin=args.geoscale_margin,
        failure_probability=args.geoscale_failure_probability,
        refresh_interval=args.geoscale_refresh_interval,
        attention=args.geoscale_attention,
        logits_dtype=args.geoscale_logits_dtype,
    )
