"""
Two other ratios for the clipped surrogate of ppo.py: one for a whole response (GSPO), and one that keeps the gradient
of clipped tokens (CISPO). They take the place of `clipped_surrogate` in train_grpo.

Letters: as in ppo.py.
"""

import torch

from ppo import clipped_surrogate


def gspo_surrogate(logp, old_logp, advantages, mask, clip=0.2):
    """
    `clipped_surrogate` with one ratio for a whole response, the geometric mean of its tokens' ratios: (B, R).

    Zheng et al. 2025, GSPO, 2507.18071, equation 7. Sensible clips are far smaller than PPO's, 3e-4 in the paper.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)    # (B,)
    log_ratio = log_ratio[:, None].expand(mask.shape)                                         # (B, R)
    return clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, mask, clip)


def cispo_surrogate(logp, old_logp, advantages, mask, clip=0.2):
    """
    The token losses -A w log pi, (B, R), zero outside the mask. w is the ratio pi/pi_old, at most 1 + clip and without
    a gradient: a clipped token has less weight, but keeps a gradient. There is no lower clip.

    MiniMax-M1, 2506.13585, equation 4.
    """
    weight = torch.exp(torch.where(mask, logp - old_logp, 0.0)).clamp(max=1 + clip).detach()  # (B, R)
    return torch.where(mask, -weight * advantages * logp, 0.0)
