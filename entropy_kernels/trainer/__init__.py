"""The reference trainer: PPO on a causal LM with verifiable rewards (``python -m entropy_kernels.trainer --help``)."""
