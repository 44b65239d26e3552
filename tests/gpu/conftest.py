"""Tests of the kernels, the same ones everywhere: on a GPU compiled and at V3's sizes, on a CPU in Triton's
interpreter (made
exact) and small. They need torch, triton, pytest and ``deepseek_kernels`` alone."""
