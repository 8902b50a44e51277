"""The one configuration object, and the flags that make it.

`GeoScaleConfig` is frozen: a run has one, every rank builds the same one from the same command line, and what a
recipe means is readable in `RECIPES` below rather than spread over the code. The flags are `--geoscale-*`; everything
that Megatron already has a flag for keeps Megatron's name.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

GEOMETRIC_RECIPES = ("certified", "rank_aware", "calibrated", "paper")
"""Recipes whose scales come from the weights."""
BASELINE_RECIPES = ("delayed", "current")
"""Recipes whose scales come from the tensors: past ones (delayed) or this one (current). THEORY 7."""
RECIPES = (*GEOMETRIC_RECIPES, *BASELINE_RECIPES, "none")
"""`none`: attention is not cast at all, the reference that the others are compared with."""
ESTIMATORS = ("gram", "power")
GRANULARITIES = ("head", "layer")
ATTENTION_BACKENDS = ("auto", "emulated", "te")
LOGITS_DTYPES = ("fp32", "fp8")
OVERFLOWS = ("saturate", "nan")
BACKWARDS = ("bound", "delayed", "bf16")


@dataclass(frozen=True)
class GeoScaleConfig:
    """What the scaler does. Every field has a flag of the same name, `--geoscale-<field>`.

    Raises ValueError, in one sentence that names the flag, for a value outside its range.
    """

    recipe: str = "certified"
    """`certified`: worst case, holds for every input. `rank_aware`: for isotropic tokens, up to a small probability.
    `calibrated`: `certified` in a burn-in, then tighter by what it saw. `paper`: power iteration and rank-aware alpha
    (arXiv:2602.18851), followed by a calibrated one where logits are cast. `delayed`, `current`: the baselines. `none`:
    attention without FP8."""
    estimator: str | None = None
    """How sigma is computed, `gram` (exact) or `power` (one warm step a refresh); None takes the recipe's own."""
    granularity: str = "head"
    """`head`: the largest head's norm. `layer`: the norm of the sum over heads, which bounds no head (THEORY 2)."""
    margin: float = 1.0
    """eta of THEORY 5, in (0, 1]: the share of the FP8 range that a bound may fill. What rounding in the layer's own
    arithmetic can add to a bound is allowed for apart from it (`bounds.tensors.rounding_allowance`)."""
    failure_probability: float = 1e-6
    """delta of THEORY 4, in (0, 1): read by `rank_aware` and `paper`."""
    burn_in_steps: int = 100
    """T_b of THEORY 6: training steps observed before alpha is set; read by `calibrated` and `paper`."""
    calibration_factor: float = 1.5
    """kappa of THEORY 6, above 1: room above the largest share of a bound that the burn-in saw. A stationary run that
    is 10,000 times as long reaches 1.2 times that with Gaussian tails, 1.5 times with exponential ones."""
    alpha_floor: float = 0.01
    """Least alpha that a calibration may set, in (0, 1]: a burn-in on unusual data tightens no bound beyond it."""
    refresh_interval: int = 1
    """Applied optimizer steps between two refreshes. Above 1 the scales belong to older weights."""
    split_over_data_parallel: bool = False
    """Each data-parallel rank bounds its share of its stage's layers only; the refresh's one all-reduce gathers them.
    Then a weight that differs between replicas shows in the table only if the replica that reads it has it."""
    backward: str | None = None
    """How the backward pass casts under a recipe with scales from the weights (THEORY 5.1). `bound`: dO by its own
    amax, dS and dQ, dK, dV by bounds made from dO's norms before the pass runs. `delayed`: by their history, as
    Transformer Engine. `bf16`: not at all, in the precision of the model, as TE with NVTE_FP8_DPA_BWD=0; under any
    recipe. None is `bound`, and under the baselines their own rule."""
    attention: str = "auto"
    """`emulated`: FP8 attention in plain torch. `te`: Transformer Engine's kernels. `auto`: what this machine has."""
    logits_dtype: str = "fp32"
    """`fp8` stores the logits themselves in E4M3 under their predicted scale, the paper's setting (emulated only)."""
    overflow: str = "saturate"
    """What a cast makes of a value beyond the largest (emulated only): the largest itself, as Transformer Engine's
    kernels and torch's e4m3fn cast since 2.12; or, `nan`, IEEE rounding: NaN in E4M3 and infinity in E5M2."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("recipe", RECIPES),
            ("granularity", GRANULARITIES),
            ("attention", ATTENTION_BACKENDS),
            ("logits_dtype", LOGITS_DTYPES),
            ("overflow", OVERFLOWS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{_flag(name)} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.estimator is None:
            object.__setattr__(self, "estimator", "power" if self.recipe == "paper" else "gram")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"{_flag('estimator')} must be one of {', '.join(ESTIMATORS)}, not {self.estimator!r}")
        if self.backward is None and self.is_geometric:
            object.__setattr__(self, "backward", "bound")
        if self.backward not in (*BACKWARDS, None):
            raise ValueError(f"{_flag('backward')} must be one of {', '.join(BACKWARDS)}, not {self.backward!r}")
        if self.backward in ("bound", "delayed") and not self.is_geometric:
            raise ValueError(f"{_flag('backward')} {self.backward} needs a recipe with scales from the weights, which "
                             f"--geoscale-recipe {self.recipe} is not")
        if not 0.0 < self.margin <= 1.0:
            raise ValueError(f"{_flag('margin')} must lie in (0, 1], not {self.margin}")
        if not 0.0 < self.failure_probability < 1.0:
            raise ValueError(f"{_flag('failure_probability')} must lie in (0, 1), not {self.failure_probability}")
        if self.burn_in_steps < 1:
            raise ValueError(f"{_flag('burn_in_steps')} must be 1 or more, not {self.burn_in_steps}")
        if not 1.0 < self.calibration_factor < math.inf:
            raise ValueError(f"{_flag('calibration_factor')} must be above 1 and finite, not {self.calibration_factor}")
        if not 0.0 < self.alpha_floor <= 1.0:
            raise ValueError(f"{_flag('alpha_floor')} must lie in (0, 1], not {self.alpha_floor}")
        if self.refresh_interval < 1:
            raise ValueError(f"{_flag('refresh_interval')} must be 1 or more, not {self.refresh_interval}")

    @property
    def is_geometric(self) -> bool:
        """Whether the scales come from the weights."""
        return self.recipe in GEOMETRIC_RECIPES

    @property
    def calibrated_slots(self) -> tuple[str, ...]:
        """Slots whose bound gets an alpha from a burn-in (THEORY 6): only such as are cast can be observed."""
        logits = ("logits",) if self.logits_dtype == "fp8" else ()
        return {"calibrated": ("qkv", *logits, "o"), "paper": logits}.get(self.recipe, ())


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
                       metavar="DELTA", help="of the isotropic bounds of rank_aware and paper (default: 1e-6)")
    group.add_argument("--geoscale-burn-in-steps", type=int, default=default.burn_in_steps, metavar="N",
                       help="training steps that calibrated (and paper, for fp8 logits) observes before it sets alpha "
                       "(default: 100)")
    group.add_argument("--geoscale-calibration-factor", type=float, default=default.calibration_factor,
                       metavar="KAPPA", help="alpha is KAPPA times the largest share of a bound seen (default: 1.5)")
    group.add_argument("--geoscale-alpha-floor", type=float, default=default.alpha_floor, metavar="ALPHA",
                       help="least alpha that a calibration may set (default: 0.01)")
    group.add_argument("--geoscale-refresh-interval", type=int, default=default.refresh_interval, metavar="N",
                       help="applied optimizer steps between refreshes; above 1 even certified scales can be outrun "
                       "by the weights (default: 1)")
    group.add_argument("--geoscale-split-over-data-parallel", action="store_true",
                       help="each data-parallel rank bounds its share of the layers, and all get all bounds")
    group.add_argument("--geoscale-backward", default=None, metavar="{bound,delayed,bf16}",
                       help="scales of the backward casts: bounds made from this step's dO, an amax history as in "
                       "Transformer Engine, or no casts (default: bound, which never saturates and loses nothing to "
                       "delayed, docs/ABLATIONS.md; under the recipes delayed and current, their own)")
    group.add_argument("--geoscale-attention", default=default.attention, metavar="{auto,emulated,te}",
                       help="what computes FP8 attention (default: auto)")
    group.add_argument("--geoscale-logits-dtype", default=default.logits_dtype, metavar="{fp32,fp8}",
                       help="fp8 stores the logits in E4M3 too, the paper's setting (default: fp32)")
    group.add_argument("--geoscale-overflow", default=default.overflow, metavar="{saturate,nan}",
                       help="what an emulated cast makes of values beyond the largest (default: saturate)")
    return parser


def geoscale_config_from_args(args: argparse.Namespace) -> GeoScaleConfig:
    """The config that parsed `--geoscale-*` flags ask for. Raises ValueError as `GeoScaleConfig` does."""
    return GeoScaleConfig(
        recipe=args.geoscale_recipe,
        estimator=args.geoscale_estimator,
        granularity=args.geoscale_granularity,
        margin=args.geoscale_margin,
        failure_probability=args.geoscale_failure_probability,
        burn_in_steps=args.geoscale_burn_in_steps,
        calibration_factor=args.geoscale_calibration_factor,
        alpha_floor=args.geoscale_alpha_floor,
        refresh_interval=args.geoscale_refresh_interval,
        split_over_data_parallel=args.geoscale_split_over_data_parallel,
        backward=args.geoscale_backward,
        attention=args.geoscale_attention,
        logits_dtype=args.geoscale_logits_dtype,
        overflow=args.geoscale_overflow,
    )
