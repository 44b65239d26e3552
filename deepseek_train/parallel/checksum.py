"""The bits of a tensor as one number, made where the tensor is: what replicas compare instead of weights."""

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements looked at in one go: their 64-bit products are all that a checksum needs of memory
INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


def checksum(tensor: Tensor) -> Tensor:
    """A scalar, int64, on the tensor's device: the sum of the elements' bit patterns, each times an odd number that
    grows with its place, modulo 2^64.

    Any change of one element changes it: a difference that is not 0 modulo 2^64, times an odd number, is not either. So
    does an exchange of two different elements: what is lost or gained stays below 2^64 for up to 2^31 elements.
    """
    bits = tensor.detach().flatten().view(INTEGERS[tensor.element_size()])
    odd = 2 * torch.arange(min(CHUNK, len(bits)), device=tensor.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].to(torch.int64)
        total += (chunk * odd[: len(chunk)]).sum() + 2 * start * chunk.sum()
    return total
