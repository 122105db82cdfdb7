"""Group-relative advantages, and the unbiased pass@k estimator."""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the standard deviation, as in GRPO's public implementations; a group of equal rewards gets advantage 0.
STD_EPSILON = 1e-6


def group_advantages(rewards: Tensor, *, estimator: str, normalize_std: bool = True) -> Tensor:
    """Advantages of completions from the rewards of their own group.

    Parameters
    ----------
    rewards : Tensor
        (G, n) float: n completions for each of G prompts, n >= 2.
    estimator : str
        ``"grpo"``: r - mean of the group, over its standard deviation (n - 1 in the denominator) if `normalize_std`
        (Shao et al. 2024, arXiv 2402.03300). ``"rloo"``: r - mean of the n - 1 others (Ahmadian et al. 2024,
        arXiv 2402.14740), never normalised.

    Returns
    -------
    Tensor
        (G, n) float32.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: expected shape (groups, completions >= 2), got {tuple(rewards.shape)}")
    rewards = rewards.float()
    size = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if estimator == "rloo":
        # r_i - (sum - r_i)/(n - 1) = (r_i - mean) n/(n - 1)
        return centred * (size / (size - 1))
    if estimator != "grpo":
        raise ValueError(f"estimator: expected grpo or rloo, got {estimator!r}")
    if not normalize_std:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)


def pass_at_k(correct: Tensor, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k completions is right (Chen et al. 2021, arXiv 2107.03374).

    Parameters
    ----------
    correct : Tensor
        (G,) integer: right completions per prompt, out of `samples`.
    samples, k : int
        1 <= k <= samples.

    Returns
    -------
    float
        Mean over prompts of 1 - C(samples - c, k)/C(samples, k).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: expected 1 <= k <= samples = {samples}, got {k}")
    if correct.numel() == 0:
        raise ValueError("correct: expected at least one prompt, got none")
    wrong = (samples - correct).to(torch.float64)
    # C(w, k)/C(n, k) as a product, so that no factorial overflows; a factor reaches 0 as soon as w < k
    index = torch.arange(k, dtype=torch.float64, device=correct.device)
    miss = ((wrong[:, None] - index).clamp_min(0.0) / (samples - index)).prod(dim=1)
    return float((1.0 - miss).mean())
