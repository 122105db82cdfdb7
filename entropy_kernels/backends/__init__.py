"""Kernels per backend (same file stems as :mod:`entropy_kernels.ops`) and the registry that names them."""
