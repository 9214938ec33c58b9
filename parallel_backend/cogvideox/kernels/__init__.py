"""Kernels in torch, Triton and Gluon, and the probe that tests which of them a device supports."""
