"""Attention in plain torch, one head at a time: the matrix of weights of all of them would be large.

Legend: see the package; S time again, of keys.
"""

import torch
from torch import Tensor


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _hidden(document_starts_BT: Tensor | None, t: int, device: torch.device) -> Tensor:
    """[T, S] or [B, T, S]: whether a query does not see a key."""
    at_T = torch.arange(t, device=device)
    hidden = at_T > at_T[:, None]
    if document_starts_BT is None:
        return hidden
    return hidden | (at_T < document_starts_BT[:, :, None])


def _logits(q_BTQ: Tensor, k_BSQ: Tensor, scale: float, hidden: Tensor) -> Tensor:
    return (_exact(q_BTQ) @ _exact(k_BSQ).mT * scale).masked_fill(hidden, -torch.inf)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None, nope: int
) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    hidden = _hidden(document_starts, t, q.device)
    out = q.new_empty(b, t, h, v.shape[3])
    lse = q.new_empty(b, h, t, dtype=torch.promote_types(q.dtype, torch.float32))
    for head in range(h):
        logits_BTS = _logits(q[:, :, head], k[:, :, head], scale, hidden)
        lse[:, head] = logits_BTS.logsumexp(-1)
        out[:, :, head] = (logits_BTS.softmax(-1) @ _exact(v[:, :, head])).to(q.dtype)
    return out, lse


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    document_starts: Tensor | None,
    nope: int,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(document_starts, q.shape[1], q.device)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for head in range(q.shape[2]):
        d_BTV, q_BTQ, k_BSQ, v_BSV, out_BTV = (_exact(x[:, :, head]) for x in (d_out, q, k, v, out))
        p_BTS = (_logits(q_BTQ, k_BSQ, scale, hidden) - lse[:, head, :, None]).exp()
        delta_BT1 = (out_BTV * d_BTV).sum(-1, keepdim=True)
        ds_BTS = p_BTS * (d_BTV @ v_BSV.mT - delta_BT1) * scale
        dq[:, :, head] = (ds_BTS @ k_BSQ).to(q.dtype)
        dk[:, :, head] = (ds_BTS.mT @ q_BTQ).to(k.dtype)
        dv[:, :, head] = (p_BTS.mT @ d_BTV).to(v.dtype)
    return dq, dk, dv
