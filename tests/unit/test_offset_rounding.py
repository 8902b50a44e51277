"""A norm shift that the weights cancel: its rounding is far above the offset that is left of it."""

import torch

from megatron_geoscale.bounds.tensors import entry_bound, rounding_allowance
from megatron_geoscale.spectral.gram import gram
from megatron_geoscale.spectral.projections import fold_norm, input_norm_bound, offset_size

D, ROWS = 64, 64
U = 2.0**-8


def test_offset_size_is_the_sum_of_magnitudes():
    w = torch.tensor([[[1.0, -2.0], [3.0, 0.5]]])
    shift, b = torch.tensor([-1.0, 4.0]), torch.tensor([[0.25, -10.0]])
    assert offset_size(w, b, shift=shift) == max(1 + 8 + 0.25, 3 + 2 + 10)
    assert offset_size(w, None, shift=None) == 0


def test_a_cancelled_shift_breaks_the_relative_allowance_and_not_the_offset_error():
    torch.manual_seed(0)
    shift = 200.0 * torch.randn(D)
    w = torch.randn(1, ROWS, D)
    w = w - (w @ shift)[..., None] * shift / shift.square().sum()  # W shift = 0 to rounding
    w = w.to(torch.bfloat16)
    bias = -(w.double() @ shift.to(torch.bfloat16).double())  # what bfloat16 weights leave of it
    bias = bias.to(torch.bfloat16)
    gain = torch.ones(D)
    a, offset = fold_norm(w, bias, gain=gain, shift=shift.to(torch.bfloat16))
    bound = entry_bound(gram(a), offset, rotary_dim=0, input_norm=input_norm_bound(D)).item()
    worst = 0.0
    for row in range(ROWS):  # tokens aligned with each row, in both directions
        for sign in (-1.0, 1.0):
            token = sign * w[0, row].float()
            xhat = token / token.square().mean().sqrt()
            x = (xhat * gain + shift.to(torch.bfloat16).float()).to(torch.bfloat16)
            q = (x.float() @ w[0].float().T).to(torch.bfloat16) + bias[0]
            worst = max(worst, q.abs().max().item())
    allowance = rounding_allowance(D, unit_roundoff=U)
    size = offset_size(w, bias, shift=shift.to(torch.bfloat16)).item()
    assert worst > bound * allowance
    assert worst <= bound * allowance + 2**0.5 * (allowance - 1.0) * size
