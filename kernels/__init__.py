"""Triton device code and its launchers, one file per op, and the oneDNN products for the CPU.

Tensors in, tensors out: nothing here knows of autograd or of ``torch.nn``. A kernel file imports Triton when it is
imported, so nothing above imports one before a kernel is needed.
"""
