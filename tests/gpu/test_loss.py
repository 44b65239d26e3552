"""Cross-entropy: every backend against float64, at bounds that follow from its roundings."""

import pytest
import torch
from torch import Tensor

from deepseek_kernels.loss import IGNORED, cross_entropy_
from tests.gpu.setting import DEVICE, backends, randn, size

ALL = backends("reference", "triton")
# The interpreter's numpy says so.
no_numbers = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
SHAPES = [(size(2048, 3), size(129280, 40001)), (5, 1000), (1, 16384), (2, 1), (0, 100)]


def exact(logits_NV: Tensor, labels_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = logits_NV.double().requires_grad_()
    loss_N = torch.nn.functional.cross_entropy(wide, labels_N, reduction="none")
    (d_NV,) = torch.autograd.grad(loss_N.sum() * scale, wide)
    return loss_N.detach(), d_NV


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_loss_and_gradient(rows: int, size: int, on_device: bool, dtype: torch.dtype, backend: str) -> None:
    """An exponential of -d has a relative error of some 2 d + 8 times 2^-24 (its argument and factor are rounded, the
    hardware's is good to 2^-22), a sum of V of them no more than its terms and 64 roundings. The loss adds the error of
    a difference of logits and a logarithm."""
    logits, labels = randn(rows, size, dtype=dtype) * 4, torch.randint(0, size, (rows,), device=DEVICE)
    logits[:, -1] = 9.0  # the end of the row counts
    labels[rows // 2 :] = size - 1
    scale = 0.37
    loss, d = exact(logits, labels, scale)
    ours = logits.clone()
    given = torch.tensor(scale, device=DEVICE) if on_device else scale
    found = cross_entropy_(ours, labels, given, backend=backend)
    assert found.dtype == torch.float32
    assert ours.dtype == dtype
    apart = float(logits.double().max() - logits.double().min()) if rows else 0.0
    relative = (2 * apart + 8 + 64) * 2.0**-24
    assert bool(((found - loss).abs() <= relative + 4 * 2.0**-24 * (loss + apart)).all())
    label = torch.nn.functional.one_hot(labels, size) * scale
    rounded = d.abs() * torch.finfo(dtype).eps
    allowed = 2 * relative * (d + label) + 2.0**-23 * label + rounded
    assert bool(((ours - d).abs() <= allowed).all())


@pytest.mark.parametrize("backend", ALL)
def test_a_row_that_is_ignored_does_not_count(backend: str) -> None:
    logits, labels = randn(4, 300, dtype=torch.bfloat16), torch.tensor([5, IGNORED, 7, IGNORED])
    logits[3, 2] = torch.nan
    labels = labels.to(DEVICE)
    loss, d = exact(logits[::2], labels[::2], 1.0)
    found = cross_entropy_(logits, labels, 1.0, backend=backend)
    assert found[1::2].tolist() == [0.0, 0.0]
    assert not logits[1::2].any()
    assert torch.allclose(found[::2].double(), loss, rtol=1e-6, atol=0.0)
    assert torch.allclose(logits[::2].double(), d, rtol=2.0**-8, atol=1e-6)


@no_numbers
@pytest.mark.parametrize("backend", ALL)
def test_large_logits_do_not_overflow(backend: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -torch.inf]], device=DEVICE)
    found = cross_entropy_(logits, torch.tensor([0, 1], device=DEVICE), 1.0, backend=backend)
    assert torch.allclose(found.cpu(), torch.tensor([0.0, 0.6931472]))
    assert torch.allclose(logits.cpu(), torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.5, 0.0]]))


@no_numbers
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype, backend: str) -> None:
    """A NaN, +Inf, no finite logit, and labels that are no column; the row between them is untouched."""
    logits = randn(7, 300, dtype=dtype)
    logits[0, 299], logits[1, 17], logits[2] = torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([5, 5, 5, 5, 300, -1, 10**12], device=DEVICE)
    found = cross_entropy_(logits, labels, 1.0, backend=backend)
    wrong = torch.tensor([True, True, True, False, True, True, True], device=DEVICE)
    assert torch.equal(found.isnan(), wrong)
    assert torch.equal(logits.isnan(), wrong.unsqueeze(-1).expand_as(logits))


@pytest.mark.parametrize("backend", ALL)
def test_the_projection_of_the_documentation(backend: str) -> None:
    """Some rows at a time, in one buffer of BF16: the gradients are those of the whole."""
    x, weight = randn(12, 16, dtype=torch.bfloat16), randn(50, 16, dtype=torch.bfloat16)
    labels = torch.randint(0, 50, (12,), device=DEVICE)
    logits, dx = x.new_empty(12, 50), torch.empty_like(x)
    for rows in (slice(0, 8), slice(8, 12)):
        torch.mm(x[rows], weight.t(), out=logits[rows])
        cross_entropy_(logits[rows], labels[rows], 1 / 12, backend=backend)
        torch.mm(logits[rows], weight, out=dx[rows])
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(wide_x @ wide_weight.t(), labels).backward()
    assert wide_x.grad is not None
    assert wide_weight.grad is not None
    # BF16 logits of up to 16 are off by up to 2^-5, and so are the probabilities, relatively
    assert float((dx.double() - wide_x.grad).norm() / wide_x.grad.norm()) < 2.0**-5
    d_weight = logits.double().t() @ x.double()
    assert float((d_weight - wide_weight.grad).norm() / wide_weight.grad.norm()) < 2.0**-5


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = randn(4, 10), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy_(logits[:, :5], labels, 1.0, backend="reference")
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy_(logits, labels[:3], 1.0, backend="reference")


@pytest.mark.parametrize("backend", ALL)
def test_the_op_is_what_its_schema_and_fake_say(backend: str) -> None:
    arguments = randn(4, 10), torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.ones((), device=DEVICE)
    torch.library.opcheck(
        torch.ops.deepseek_kernels.cross_entropy_.default,
        arguments,
        {"backend": backend},
        test_utils=("test_schema", "test_faketensor"),
    )
