"""Triton kernels for the operators of ``fastrnn.ops``: see docs/triton-kernels.md.

This module imports nothing; ``plan`` is plain Python, the other files need triton.
"""
