"""The rank_aware bounds: against dense float64, by Monte Carlo on the sphere, and on the heads made to break them."""

import math

import pytest
import torch

from megatron_geoscale.bounds import alpha
from megatron_geoscale.bounds.isotropic import (
    diagonal_bound,
    isotropic_constants,
    rank_aware_logit_bound,
)
from megatron_geoscale.bounds.logits import certified_logit_bound
from megatron_geoscale.bounds.tensors import entry_bound, vector_norm_bound
from megatron_geoscale.spectral.gram import gram
from megatron_geoscale.spectral.moments import Moments, cross_gram
from megatron_geoscale.spectral.projections import Projections
from tests.unit.test_isotropic_attack import most_failures, orthonormal_rows, rotate, sphere

DELTA, RUNS, LENGTH = 0.3, 40, 256
KINDS = ("random", "tied", "negated", "low-rank", "cancelling", "zero", "huge", "tiny")


def head(kind, d, r, seed=0):
    """(A, B) [1, r, d] float64."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, r, d, generator=g, dtype=torch.float64)
    orthonormal = orthonormal_rows(r, d, g).double()
    a, b = {
        "random": (a, b),
        "tied": (orthonormal, orthonormal),
        "negated": (orthonormal, -orthonormal),
        "low-rank": (a[:, :1] * b[:1], b),
        "cancelling": (a[:2].repeat(r // 2, 1), torch.cat([b[: r // 2], -b[: r // 2]])),
        "zero": (a, 0 * b),
        "huge": (1e30 * a, 1e30 * b),
        "tiny": (1e-30 * a, 1e-30 * b),
    }[kind]
    return a[None], b[None]


def bounds_of(a, b, *, a_bias=None, b_bias=None, rotary_dim=0, delta=DELTA, length=LENGTH, scale=1.0):
    """(certified, rank_aware, constants) for one head and one sequence."""
    _, r, d = a.shape
    moments = Moments.of(Projections(a, a_bias, b, b_bias, b, b_bias), with_cross=True)
    options = {"softmax_scale": scale, "input_norm": math.sqrt(d)}
    certified = certified_logit_bound(moments, rotary_dim=rotary_dim, interleaved=True, **options)
    constants = isotropic_constants(d, r, num_pairs=length**2, num_tokens=length, delta=delta)
    bound = rank_aware_logit_bound(moments, certified=certified, constants=constants, hidden_size=d, **options)
    return certified, bound, constants


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagonal_bound_is_that_of_the_dense_matrix(kind):
    d, r = 96, 8
    a, b = head(kind, d, r)
    m = a[0].T @ b[0]
    sigma = float(torch.linalg.matrix_norm(m, 2))
    _, _, constants = bounds_of(a, b)
    moments = Moments.of(Projections(a, None, b, None, b, None), with_cross=True)
    log = constants.diagonal_log
    bound = float(diagonal_bound(moments, diagonal_log=log, input_norm=math.sqrt(d), hidden_size=d))
    if sigma <= 1e-6 * float(a.norm() * b.norm()):
        assert 0 <= bound <= 1e-6 * d * float(a.norm() * b.norm())
        return
    symmetric = float(torch.linalg.matrix_norm(0.5 * (m + m.T)))
    dense = alpha.diagonal(
        d, sigma=sigma, trace=float(m.trace()), symmetric_frobenius=symmetric, num_tokens=LENGTH, delta=DELTA / 2
    )
    assert bound == pytest.approx(dense * d * sigma, rel=1e-6) and bound >= dense * d * sigma * (1 - 1e-12)


def test_heads_are_bounded_one_by_one_and_share_key_groups():
    a, b = torch.randn(2, 6, 8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = b[:3]
    _, together, _ = bounds_of(a, b, rotary_dim=4)
    alone = [bounds_of(a[h : h + 1], b[h // 2 : h // 2 + 1], rotary_dim=4)[1] for h in range(6)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-12)
    assert torch.equal(cross_gram(a, b)[4], b[2] @ a[4].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary_dim", [0, 8])
def test_never_above_the_certified_bound_and_bias_terms_stay_whole(kind, rotary_dim):
    d, r = 512, 8
    a, b = head(kind, d, r)
    (_, certified), bound, _ = bounds_of(a, b, rotary_dim=rotary_dim, delta=1e-6, scale=0.5)
    assert torch.isfinite(bound).all() and (bound >= 0).all() and (bound <= certified).all()
    bias = 3.0 * torch.ones(1, r, dtype=torch.float64) * a.abs().max()
    (_, certified_bias), with_bias, _ = bounds_of(
        a, b, a_bias=bias, b_bias=bias, rotary_dim=rotary_dim, delta=1e-6, scale=0.5
    )
    assert float(with_bias - bound) == pytest.approx(float(certified_bias - certified), rel=1e-9)


def test_it_gains_most_of_what_alpha_promises_on_an_ordinary_head():
    d, r = 2048, 64
    a, b = head("random", d, r)
    (_, certified), bound, constants = bounds_of(a, b, delta=1e-6, length=4096)
    assert float(bound / certified) == pytest.approx(constants.alpha, rel=1e-6) and constants.alpha < 0.07


def test_delta_is_split_in_quarters():
    """Each argument gives its event a probability of delta / 4: those of `diagonal` and lemma 3 are spent by half."""
    d, r, n, delta = 1024, 64, 4096, 1e-4
    constants = isotropic_constants(d, r, num_pairs=n * n, num_tokens=n, delta=delta)
    assert 2 * n * math.exp(-constants.diagonal_log) == pytest.approx(delta / 4)
    assert 2 * (3 * n * r) * math.exp(-(constants.entry_norm**2) / 2) == pytest.approx(delta / 4)
    gamma = constants.length_norm**2 / r
    assert 3 * n * math.exp(-(r / 2) * (gamma - 1 - math.log(gamma))) == pytest.approx(delta / 4)
    assert constants.alpha == alpha.rank_aware(d, r, num_pairs=n * n, num_tokens=n, delta=delta / 4)
    small = isotropic_constants(4, 2, num_pairs=1e12, num_tokens=1e6, delta=1e-9)
    assert small.entry_norm == small.length_norm == 2.0 and small.alpha == 1.0  # the worst case is the cap


@pytest.mark.parametrize("kind", ["random", "tied", "negated", "low-rank"])
@pytest.mark.parametrize("rotary", [False, True])
def test_union_of_all_events_fails_no_more_often_than_delta(kind, rotary):
    """Logits with i = j and i != j, entries and lengths of whole sequences, 2.6 million pairs a case."""
    d, r = 256, 32
    a, b = head(kind, d, r)
    _, bound, constants = bounds_of(a, b, rotary_dim=r if rotary else 0)
    rotary_options = {"rotary_dim": r if rotary else 0, "interleaved": True}
    entries = [
        float(entry_bound(gram(w), None, input_norm=constants.entry_norm, **rotary_options)) for w in (a, b)
    ]
    lengths = [float(vector_norm_bound(gram(w), None, input_norm=constants.length_norm)) for w in (a, b)]
    g = torch.Generator().manual_seed(1)
    failures, broken_without_diagonal, largest = 0, 0, 0.0
    off_diagonal = constants.alpha * d * float(torch.linalg.matrix_norm(a[0].T @ b[0], 2))
    for _ in range(RUNS):
        x = sphere(LENGTH, d, g).double()
        q, k = x @ a[0].T, x @ b[0].T
        if rotary:
            q, k = rotate(q).double(), rotate(k).double()
        logits = (q @ k.T).abs()
        failed = bool(logits.max() > bound)
        for vectors, entry, length in zip((q, k), entries, lengths):
            failed |= bool(vectors.abs().max() > entry) or bool(vectors.norm(dim=-1).max() > length)
        failures += failed
        largest = max(largest, float(logits.max() / bound))
        broken_without_diagonal += bool(logits.max() > off_diagonal)
    assert failures <= most_failures(DELTA)
    if kind in ("tied", "negated") and not rotary:
        assert broken_without_diagonal == RUNS  # alpha of i != j alone is no bound for tied weights
        assert largest > 0.6


def test_shapes_that_do_not_fit_are_named():
    a, b = head("random", 32, 8)
    with pytest.raises(ValueError, match="n_kv"):
        Moments.of(Projections(a, None, b[:, :4], None, b, None))
    with pytest.raises(ValueError, match="with_cross"):
        diagonal_bound(Moments.of(Projections(a, None, b, None, b, None)), diagonal_log=1, input_norm=1, hidden_size=32)
