"""Triton kernels as plain functions on tensors. Needs torch and triton, and nothing else of this package."""
