"""
Canaries and checkpoints: what every training loop has, and what is not its algorithm.

A canary checks what must be true while a loop runs. One that fails stops the run and names the likely cause. Many bugs
of RLHF code show at the start: before the first update the policy is the reference, so KL and margins are 0 and every
ratio is 1.

A checkpoint holds everything that a loop changes. A loop that begins from one continues with the same bits.

Letters: B batch, T all columns of a batch.
"""

import math
from dataclasses import replace

import torch


class CanaryError(RuntimeError):
    """An invariant of a training loop is broken. The message names the likely cause."""


def canary(ok, message):
    if not ok:
        raise CanaryError(message)


def finite(loss, name, advice):
    """Return the loss as a number. It must not be NaN or infinite."""
    value = loss.item()
    canary(math.isfinite(value), f"the {name} loss is {value}: the training diverged; {advice}")
    return value


def is_coarse(x):
    """Whether networks compute in bfloat16 now, on the device of x. It has 8 bits for digits, float32 has 24."""
    return torch.is_autocast_enabled(x.device.type)


def check_scores(scores, rows):
    """A scorer must give one finite float for each of the `rows` responses: a tensor (rows,)."""
    is_float = isinstance(scores, torch.Tensor) and scores.is_floating_point()
    canary(is_float, "the scorer must return a tensor of floats, "
                     f"got {getattr(scores, 'dtype', type(scores).__name__)}")
    canary(scores.shape == (rows,), f"the scorer must return one score for each of {rows} responses, shape ({rows},), "
                                    f"got {tuple(scores.shape)}")
    broken = int((~scores.isfinite()).sum())
    canary(broken == 0, f"the scorer gave {broken} of {rows} responses a score that is NaN or infinite")


@torch.no_grad()
def check_padding(function, batch):
    """Other ids at the pads must not change function(batch) by a single bit."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)                       # (T,)
    is_pad = (columns < batch.start[:, None]) | (columns >= batch.P + batch.response_lens[:, None])    # (B, T)
    other_ids = (batch.ids + 1) % (batch.ids.max() + 1)                                       # (B, T)
    changed = replace(batch, ids=torch.where(is_pad, other_ids, batch.ids))
    canary(torch.equal(function(batch), function(changed)),
           "the padding changes the result: a mask or a position comes from the ids and not from the lengths")


def check_kl(kl, length):
    """The mean KL of responses of `length` tokens stays below 8 nats a token: beyond it, the text is lost."""
    canary(kl < 8 * length, f"the policy is {kl:.0f} nats from the reference in {length:.0f} tokens: the training "
                            "exploded; lower the learning rate or raise --beta")


def check_first_ratio(log_ratio):
    """
    On the first minibatch ratios must be 1, up to rounding. Returns the largest distance from 1.

    In bfloat16, sampling and scoring round differently by so much that single tokens are far off, but not their mean.
    """
    errors = torch.expm1(log_ratio).abs()
    error = errors.max().item()
    good = errors.mean().item() < 0.03 if is_coarse(log_ratio) else error < 1e-4
    canary(good, f"the ratio on the first minibatch is off 1 by {error:.3g}: sampling and scoring disagree "
                         "(temperature, positions under padding, the cache, or a slice that is off by one)")
    return error


def check_start_margin(h, logp):
    """
    Before the first step of DPO the policy is the reference: margins h (B,), in nats, must be 0, up to rounding.

    logp: the log-probs of whole responses, in nats. Large sums round by more, so the tolerance grows with them.
    h has no factor beta, which would scale its error.
    """
    largest = h.abs().max().item()
    relative = 0.02 if is_coarse(h) else 1e-5
    canary(largest < max(1e-3, relative * logp.abs().max().item()),
           f"the margins are up to {largest:.3g} nats before the first step, not 0: the reference is not "
           "the network that the policy started from, or its log-probs had other padding")


def check_trains(name, network, lr):
    """Before the first step: something of the network can be trained, at a learning rate above 0."""
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    canary(trainable, f"nothing of the {name} can be trained: call requires_grad_(True) on a loaded network")
    canary(lr > 0, f"the learning rate of the {name} is {lr}: nothing would be learned")


# ---- checkpoints ----------------------------------------------------------------------------------

def save_parts(parts, step):
    """
    The state of a loop after `step` steps, as a dict that torch.save can write.

    parts: {name: module, optimizer or torch.Generator}, all that the loop changes. The dict shares their memory: write
    it before the next step.
    """
    states = {}
    for name, part in parts.items():
        states[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
    return dict(step=step, parts=states)


def load_parts(parts, checkpoint):
    """Put the parts into the state of a checkpoint. Returns the step to begin with: 0 if the checkpoint is None."""
    if checkpoint is None:
        return 0
    for name, part in parts.items():
        state = checkpoint["parts"][name]
        part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
    return checkpoint["step"]
