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
"""
