"""Kernels in torch, Triton and Gluon, and the probe that finds which of them a device runs."""
