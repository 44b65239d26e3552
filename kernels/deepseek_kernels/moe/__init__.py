"""Around the experts: the router's choice, one row per assignment before them, one sum per received row after them
(V3 report sections 2.1.2 and 3.2.2).

Legend: N tokens, E experts, K experts per token, R received rows, D hidden, P expert-sorted rows, each expert's share
padded to a multiple of 128 (``formats.Groups``), A assignments: expert-sorted rows without padding.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import Rows
from deepseek_kernels.moe.order import Order, order
from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_axes, check_dtype, check_shape

__all__ = ["Order", "expand", "expand_rows", "gate", "gate_backward", "order", "reduce"]
_BACKENDS = ("reference", "triton", "torch")


def _fake_expand(x_RD: Tensor, padded_to_row_P: Tensor) -> Tensor:
    return x_RD.new_empty(len(padded_to_row_P), x_RD.shape[1])


_expand = define(
    __name__, "expand(Tensor x, Tensor padded_to_row, *, str backend) -> Tensor", _fake_expand, _BACKENDS
)


def expand(x_RD: Tensor, padded_to_row_P: Tensor, *, backend: str) -> Tensor:
    """Row p is ``x[padded_to_row[p]]``, zeros where that is -1: [P, D], BF16 or FP32. ``padded_to_row``: int32,
    not checked to be below R, which would wait for the device. The backward is ``reduce`` of the gradient, with the
    same ``Order``."""
    check_axes("expand", "x", x_RD, "R, D")
    _check_index("expand", "padded_to_row", padded_to_row_P, "P")
    return _expand(x_RD, padded_to_row_P, backend=backend)


def _fake_expand_rows(
    values_RD: Tensor, scales_GR: Tensor, padded_to_row_P: Tensor, pow2: bool
) -> tuple[Tensor, Tensor]:
    count = len(padded_to_row_P)
    return values_RD.new_empty(count, values_RD.shape[1]), scales_GR.new_empty(len(scales_GR), count)


_expand_rows = define(
    __name__,
    "expand_rows(Tensor values, Tensor scales, Tensor padded_to_row, bool pow2, *, str backend)"
    " -> (Tensor, Tensor)",
    _fake_expand_rows,
    _BACKENDS,
)


def expand_rows(rows: Rows, padded_to_row_P: Tensor, *, pow2: bool, backend: str) -> Rows:
    """``expand`` of quantised rows. Padding rows are what quantising zeros gives; ``pow2``: as ``rows`` was made."""
    _check_index("expand_rows", "padded_to_row", padded_to_row_P, "P")
    values, scales = _expand_rows(rows.values, rows.scales, padded_to_row_P, pow2, backend=backend)
    return Rows(values, scales, rows.width)


def _fake_reduce(y_PD: Tensor, row_to_padded_RK: Tensor) -> Tensor:
    return y_PD.new_empty(len(row_to_padded_RK), y_PD.shape[1])


_reduce = define(
    __name__, "reduce(Tensor y, Tensor row_to_padded, *, str backend) -> Tensor", _fake_reduce, _BACKENDS
)


def reduce(y_PD: Tensor, row_to_padded_RK: Tensor, *, backend: str) -> Tensor:
    """Row r is the sum over k of ``y[row_to_padded[r, k]]``, -1: nothing: [R, D]. Added in FP32 in the order of k and
    rounded once: the same bits every time. ``row_to_padded``: int32, not checked to be below P. The backward is
    ``expand`` of the gradient."""
    check_axes("reduce", "y", y_PD, "P, D")
    _check_index("reduce", "row_to_padded", row_to_padded_RK, "R, K")
    return _reduce(y_PD, row_to_padded_RK, backend=backend)


def _fake_gate(
    scores_NE: Tensor, bias_E: Tensor, groups: int, groups_kept: int, top_k: int, routed_scale: float
) -> tuple[Tensor, Tensor]:
    shape = len(scores_NE), top_k
    return scores_NE.new_empty(shape, dtype=torch.int64), scores_NE.new_empty(shape)


_gate = define(
    __name__,
    "gate(Tensor scores, Tensor bias, int groups, int groups_kept, int top_k, float routed_scale, *, str backend)"
    " -> (Tensor, Tensor)",
    _fake_gate,
    _BACKENDS,
)


def gate(
    scores_NE: Tensor,
    bias_E: Tensor,
    groups: int,
    groups_kept: int,
    top_k: int,
    routed_scale: float,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Expert ids [N, K] (int64), best first, and their weights [N, K] (FP32), from sigmoid scores (FP32).

    Experts are compared by score + bias. Each of ``groups`` counts the sum of its best K / groups_kept; the experts of
    the best ``groups_kept`` can be chosen. Of equals the lowest index wins (``torch``: any). The
    weights are the chosen scores without bias over their sum (at least 1e-20), times ``routed_scale``.

    NaN compares as -inf, so the ids are always different and in range, and a token with a NaN anywhere has weights that
    are all NaN. Raises ValueError where the numbers do not fit one another.
    """
    check_axes("gate", "scores", scores_NE, "N, E")
    check_shape("gate", "bias", bias_E, (scores_NE.shape[1],), "scores", scores_NE.shape)
    experts = scores_NE.shape[1]
    if groups < 1 or experts % groups or not 1 <= groups_kept <= groups:
        raise ValueError(f"{experts} experts cannot be {groups} equal groups of which {groups_kept} are kept")
    if not 1 <= top_k <= experts // groups * groups_kept:
        raise ValueError(f"{groups_kept} groups of {experts // groups} experts do not have {top_k} to choose")
    if groups_kept < groups and top_k < groups_kept:
        raise ValueError(f"top_k {top_k} below groups_kept {groups_kept}: a group would count nothing")
    return _gate(scores_NE, bias_E, groups, groups_kept, top_k, routed_scale, backend=backend)


def _fake_gate_backward(
    d_weights_NK: Tensor, scores_NE: Tensor, ids_NK: Tensor, routed_scale: float
) -> Tensor:
    return scores_NE.new_empty(scores_NE.shape)


_gate_backward = define(
    __name__,
    "gate_backward(Tensor d_weights, Tensor scores, Tensor ids, float routed_scale, *, str backend) -> Tensor",
    _fake_gate_backward,
    _BACKENDS,
)


def gate_backward(
    d_weights_NK: Tensor, scores_NE: Tensor, ids_NK: Tensor, routed_scale: float, *, backend: str
) -> Tensor:
    """The gradient of ``gate``'s scores from that of its weights, FP32 [N, E]: with t the sum of the chosen scores,
    d_s_k = routed_scale / t (d_w_k - sum_j d_w_j s_j / t); zero for experts that were not chosen.
    ``ids``: int64, not checked to be below E."""
    check_axes("gate_backward", "scores", scores_NE, "N, E")
    check_axes("gate_backward", "ids", ids_NK, "N, K")
    check_dtype("gate_backward", "ids", ids_NK.dtype, torch.int64)
    check_shape("gate_backward", "ids", ids_NK, (len(scores_NE), ids_NK.shape[1]), "scores", scores_NE.shape)
    check_shape("gate_backward", "d_weights", d_weights_NK, ids_NK.shape, "ids", ids_NK.shape)
    return _gate_backward(d_weights_NK, scores_NE, ids_NK, routed_scale, backend=backend)


def _check_index(function: str, name: str, index: Tensor, legend: str) -> None:
    check_axes(function, name, index, legend)
    check_dtype(function, name, index.dtype, torch.int32)
