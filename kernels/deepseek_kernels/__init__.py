"""Kernels of the FP8 training step: functions on tensors, each with a plain-torch reference, a Triton kernel, and what
vendors have where that is better. Knows nothing of ``deepseek_train``; needs torch, and triton for its own kernels.

Conventions, all of them:

- A family of ops is a folder. Its ``__init__`` holds the public functions with their documentation, ``reference.py``
  the plain-torch twins (the CPU backend and the oracle), ``triton_impl.py``, ``torch_impl.py``, ``cuda_impl.py``,
  ``ext_impl.py`` the others, ``gate_cases.py`` what the compiler gate holds the Triton kernels to.
- Every public function takes ``backend``, a name. Nothing is chosen inside and nothing is swapped: a backend that is
  not there raises ``BackendUnavailable``. ``choice.choose`` picks one for each family, once, for the caller to print.
- Autograd is one floor up: ops are plain functions with a registered fake, so that ``torch.compile`` sees through.
- Formats are those of ``formats.py``; the contraction axis is always the last, contiguous one ("NT").

Experts' products of tokens that are quantised once, each in two of three experts:

    >>> import torch
    >>> from deepseek_kernels import gemm, moe, quant
    >>> from deepseek_kernels.formats import Groups
    >>> tokens, weights, ids = torch.randn(5, 256), torch.randn(3, 64, 256), torch.tensor([[0, 2]] * 5)
    >>> rows = quant.quantise_rows(tokens, pow2=True, backend="reference")
    >>> blocks = quant.quantise_blocks(weights, pow2=False, backend="reference")
    >>> groups = Groups.of((5, 0, 5))  # rows of each expert
    >>> order = moe.order(ids.flatten().argsort(stable=True), num_rows=5, top_k=2, groups=groups)
    >>> sorted_rows = moe.expand_rows(rows, order.padded_to_row_P, pow2=True, backend="reference")
    >>> y = gemm.grouped_gemm(sorted_rows, blocks, groups, dtype=torch.bfloat16, backend="reference")
    >>> moe.reduce(y, order.row_to_padded_RK, backend="reference").shape
    torch.Size([5, 64])
"""
