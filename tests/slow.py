"""
Slow and obvious: a textbook GPT, and what all replays of loops need. The tests compare the real ones with these.

The GPT reads one sequence without padding, one head at a time. A text is a (prompt, response) of ids.
"""

import math

import pytest
import torch
from helpers import E, close, rows_of

from model import generate


def _norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def _gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def hidden(model, ids):
    """Hidden states (len(ids), C) after the last norm. Differentiable in the model's parameters."""
    w = dict(model.named_parameters())
    C, H = model.config.n_embd, model.config.n_head
    D = C // H
    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for n in range(model.config.n_layer):
        b = {name.removeprefix(f"h.{n}."): p for name, p in w.items() if name.startswith(f"h.{n}.")}
        a = _norm(x, b["ln_1.weight"], b["ln_1.bias"])
        qkv = a @ b["attn.c_attn.weight"].T + b["attn.c_attn.bias"]
        q, k, v = qkv[:, :C], qkv[:, C:2 * C], qkv[:, 2 * C:]
        heads = []
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(D)).exp().tril()  # no token sees a later one
            heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, part])
        x = x + torch.cat(heads, dim=1) @ b["attn.c_proj.weight"].T + b["attn.c_proj.bias"]
        m = _norm(x, b["ln_2.weight"], b["ln_2.bias"])
        m = _gelu(m @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"])
        x = x + m @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    return _norm(x, w["ln_f.weight"], w["ln_f.bias"])


def logits(model, ids):
    """Logits (len(ids), V)."""
    return hidden(model, ids) @ model.wte.weight.T


def logprobs(model, prompt, response, temperature=1.0):
    """log pi(token | everything before it) of each response token, (len(response),)."""
    logp = torch.log_softmax(logits(model, prompt + response) / temperature, dim=1)
    return logp[range(len(prompt) - 1, len(prompt + response) - 1), torch.tensor(response, dtype=torch.long)]


def values(model, prompt, response):
    """What a reward model says before each response token, (n,), and of the whole text."""
    states = hidden(model.trunk, prompt + response) @ model.score.weight[0] + model.score.bias[0] - model.mean
    return states[len(prompt) - 1:-1] / model.std, states[-1] / model.std


def scores(model, texts):
    """What a reward model says of whole (prompt, response) texts, (B,)."""
    return torch.stack([values(model, *text)[1] for text in texts])


# ---- replays of loops ------------------------------------------------------------------------------------------------

def step(model, adam, lr, loss):
    """One step of an optimizer with the gradient clipped to length 1. Returns the length before."""
    adam.param_groups[0]["lr"] = lr
    adam.zero_grad()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum((gradient ** 2).sum().item() for gradient in gradients))
    for gradient in gradients:
        gradient /= max(1.0, norm + 1e-6)  # clip_grad_norm_ adds 1e-6
    adam.step()
    return norm


def tokens_of(pairs):
    """The tokens that both texts of these pairs have, prompts included."""
    return sum(2 * len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs)


def orders(n, parts, generator):
    """The rows of each update: in each of two epochs all n in random order, in so many parts."""
    return [rows for _ in range(2) for rows in torch.randperm(n, generator=generator).tensor_split(parts)]


@torch.no_grad()
def sample(rollout, policy, reference, prompts, config, sampler):
    """
    Sample a rollout again, with a slow policy. Returns its (prompt, response) texts, and the log-probs of policy and
    reference, lists of a (length,) for each text.
    """
    again = generate(policy, prompts, config.response_tokens, config.temperature, sampler)
    assert torch.equal(again.ids, rollout.ids)
    texts = rows_of(rollout)
    logp, ref_logp = [[logprobs(network, *text, config.temperature) for text in texts]
                      for network in (policy, reference)]
    close(torch.cat(logp), rollout.logp[rollout.mask], 1e-5)
    return texts, logp, ref_logp


def metrics(texts, scores, logp, ref_logp, beta, updates):
    """The metrics of a rollout, and the means of those of the updates on it (a list of dicts)."""
    B, score = len(texts), scores.mean().item()
    kl = sum((a - b).sum().item() for a, b in zip(logp, ref_logp)) / B
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return dict(means, score=score, kl=kl, objective=score - beta * kl, entropy=-torch.cat(logp).mean().item(),
                length=sum(len(response) for _, response in texts) / B,
                finished=sum(response[-1] == E for _, response in texts) / B)


def update_metrics(logp, old_logp, clip):
    """The metrics of an update of PPO or GRPO, from log-probs (n,) of the same n tokens."""
    x = (logp - old_logp).detach()
    return dict(clip_fraction=((x.exp() - 1).abs() > clip).double().mean().item(),
                approx_kl=(x.exp() - 1 - x).mean().item())


def same_metrics(metrics, expected, iteration):
    """Assert that the metrics of an iteration are the expected ones and the canaries'."""
    canaries = {"ratio_error", "kl_at_start"} if iteration == 0 else {"ratio_error"}
    measured = {name: value for name, value in metrics.items() if name not in canaries}
    assert measured == pytest.approx(dict(expected, step=iteration), rel=1e-4, abs=1e-5)


def same_weights(module, other, tolerance):
    for name, w in module.state_dict().items():
        close(w, other.state_dict()[name], tolerance)
