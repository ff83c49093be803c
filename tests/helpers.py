"""
Shared by several test files: small conveniences, a tiny GPT, random batches of mixed lengths, a textbook GPT, and a
measure of how well samples fit their probabilities.

The textbook GPT is slow and obvious. The tests compare the real one with it.
"""

import io
import json
import math
import re

import pytest
import torch
from hypothesis import Phase, settings

from data import Batch
from model import GPT, GPTConfig, generate
from reward import RewardModel

torch.set_num_threads(1)  # the tensors here are so small that more threads would only cost time

VOCAB = 11
E, PAD = VOCAB - 2, VOCAB - 1
# for hypothesis: the same examples on every run; they are small already, and to shrink one that fails takes a minute
few = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
PAIRS = [  # preference pairs of mixed lengths; some responses were cut before their E
    dict(prompt=[1, 2, 3], chosen=[4, 5, E], rejected=[6, E]),
    dict(prompt=[4], chosen=[E], rejected=[7, 7, 7, 7]),
    dict(prompt=[5, 6], chosen=[8, 0, 1, 2, E], rejected=[3]),
    dict(prompt=[7, 8, 0, 1], chosen=[2, E], rejected=[2, 2, E]),
    dict(prompt=[3, 3], chosen=[4], rejected=[1, 5, E]),
    dict(prompt=[0], chosen=[6, 1, E], rejected=[E]),
    dict(prompt=[2, 8, 8], chosen=[0, 0], rejected=[1, 1, E]),
]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed, *shape):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    """Assert that two numbers or tensors are equal up to rounding."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def page_data(folder):
    """The data that page.html draws, taken out of a run's report.html."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def weights(module):
    return {name: w.detach().clone() for name, w in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(w, before[name]) for name, w in module.state_dict().items())


def same_weights(module, other, tolerance):
    for name, w in module.state_dict().items():
        close(w, other.state_dict()[name], tolerance)


def finish(loop):
    """Run a training loop to its end: the metrics of all its steps."""
    return [metrics for metrics, *_ in loop]


def through_a_file(checkpoint):
    """A checkpoint as it comes back from a file."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tiny_gpt(seed=0, dtype=torch.float64, vocab=VOCAB, block=24, layers=2, heads=2, embd=8, std=0.3):
    """
    A GPT of a few hundred weights. They depend on the seed and on nothing else.

    Biases and norms are random too, so that no weight is 0 or 1 and the distributions are far from uniform.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab, block, layers, heads, embd)).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def tiny_reward_model(seed=0, make=RewardModel):
    """A reward model with a bias, a mean and a deviation, so that none of them can be forgotten."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(tiny_gpt(seed)).to(torch.float64)
    torch.nn.init.constant_(model.score.bias, 0.9)
    model.mean.fill_(0.4)
    model.std.fill_(1.7)
    return model


def make_batch(prompts, responses, P=None, R=None, pad=PAD):
    """Build the batch layout by hand from lists of ids. P and R may be larger than the longest prompt and response."""
    P = max(map(len, prompts)) if P is None else P
    R = max(map(len, responses)) if R is None else R
    ids = torch.full((len(prompts), P + R), pad)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        for i, token in enumerate(prompt):
            ids[row, P - len(prompt) + i] = token
        for i, token in enumerate(response):
            ids[row, P + i] = token
    return Batch(ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses]), P)


def random_texts(seed=0, B=6, vocab=VOCAB, max_prompt=6, max_response=7, min_response=1):
    """
    B prompts and B responses (lists of ids) of mixed lengths. Every other response ends in E.

    The longest and the shortest of both are among the first two rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens(n):
        return torch.randint(vocab - 2, (n,), generator=generator).tolist()  # neither E nor PAD

    prompts, responses = [], []
    for row in range(B):
        p = (max_prompt, 1)[row] if row < 2 else integer(1, max_prompt)
        r = (min_response, max_response)[row] if row < 2 else integer(min_response, max_response)
        prompts.append(tokens(p))
        responses.append(tokens(r))
        if row % 2 and r:
            responses[-1][-1] = vocab - 2
    return prompts, responses


def random_batch(seed=0, B=6, vocab=VOCAB, max_prompt=6, max_response=7, min_response=1, P=None, R=None):
    """`random_texts` in the batch layout."""
    return make_batch(*random_texts(seed, B, vocab, max_prompt, max_response, min_response), P, R, pad=vocab - 1)


def rows_of(batch):
    """(prompt, response) of each row as lists of ids, taken from the layout by hand."""
    rows = []
    for ids, p, r in zip(batch.ids.tolist(), batch.prompt_lens.tolist(), batch.response_lens.tolist()):
        rows.append((ids[batch.P - p:batch.P], ids[batch.P:batch.P + r]))
    return rows


def is_pad(batch):
    """(B, T), True where there is no token. Computed from the lengths with a loop."""
    pads = torch.ones_like(batch.ids, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(batch.prompt_lens.tolist(), batch.response_lens.tolist())):
        pads[row, batch.P - p:batch.P + r] = False
    return pads


def poison(batch, seed=0, vocab=VOCAB):
    """The same batch with random ids at the pads. Nothing that is computed from it may change."""
    noise = torch.randint(vocab, batch.ids.shape, generator=torch.Generator().manual_seed(seed))
    values = dict(vars(batch))
    values["ids"] = torch.where(is_pad(batch), noise, batch.ids)
    return type(batch)(**values)


# ---- the textbook GPT: one sequence without padding, one token and one head at a time -----------------------------

def _norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def _gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def naive_hidden(model, ids):
    """Hidden states (len(ids), C) after the last norm. Differentiable in the model's parameters."""
    w = dict(model.named_parameters())
    C, H = model.config.n_embd, model.config.n_head
    D = C // H
    x = torch.stack([w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(ids)])
    for n in range(model.config.n_layer):
        b = {name.removeprefix(f"h.{n}."): p for name, p in w.items() if name.startswith(f"h.{n}.")}
        a = _norm(x, b["ln_1.weight"], b["ln_1.bias"])
        qkv = a @ b["attn.c_attn.weight"].T + b["attn.c_attn.bias"]
        q, k, v = qkv[:, :C], qkv[:, C:2 * C], qkv[:, 2 * C:]
        rows = []
        for t in range(len(ids)):
            heads = []
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                weights = (k[:t + 1, part] @ q[t, part] / math.sqrt(D)).exp()
                heads.append(weights / weights.sum() @ v[:t + 1, part])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ b["attn.c_proj.weight"].T + b["attn.c_proj.bias"]
        m = _norm(x, b["ln_2.weight"], b["ln_2.bias"])
        m = _gelu(m @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"])
        x = x + m @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    return _norm(x, w["ln_f.weight"], w["ln_f.bias"])


def naive_logits(model, ids):
    """Logits (len(ids), V)."""
    return naive_hidden(model, ids) @ model.wte.weight.T


def naive_response_logprobs(model, prompt, response, temperature=1.0):
    """log pi(token | everything before it) of each response token, (len(response),)."""
    logp = torch.log_softmax(naive_logits(model, prompt + response) / temperature, dim=1)
    return logp[range(len(prompt) - 1, len(prompt + response) - 1), torch.tensor(response, dtype=torch.long)]


def naive_values(model, prompt, response):
    """What a reward model says before each response token, (n,), and of the whole text."""
    states = naive_hidden(model.trunk, prompt + response) @ model.score.weight[0] + model.score.bias[0] - model.mean
    return states[len(prompt) - 1:-1] / model.std, states[-1] / model.std


def naive_scores(model, texts):
    """What a reward model says of whole (prompt, response) texts, (B,)."""
    return torch.stack([naive_values(model, *text)[1] for text in texts])


# ---- slow replays of loops -------------------------------------------------------------------------------------------

def slow_step(model, adam, lr, loss):
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


def slow_epochs(n, parts, generator, epochs=2):
    """The rows of each update: in every epoch all n in random order, in so many parts."""
    return [rows for _ in range(epochs) for rows in torch.randperm(n, generator=generator).tensor_split(parts)]


@torch.no_grad()
def slow_rollout(rollout, policy, reference, prompts, config, sampler):
    """
    Sample a rollout again, with a slow policy. Returns its (prompt, response) texts, and the log-probs of policy and
    reference, lists of a (length,) for each text.
    """
    again = generate(policy, prompts, config.response_tokens, config.temperature, sampler)
    assert torch.equal(again.ids, rollout.ids)
    texts = rows_of(rollout)
    logp, ref_logp = [[naive_response_logprobs(network, *text, config.temperature) for text in texts]
                      for network in (policy, reference)]
    close(torch.cat(logp), rollout.logp[rollout.mask], 1e-5)
    return texts, logp, ref_logp


def slow_metrics(texts, scores, logp, ref_logp, beta, updates):
    """The metrics of a rollout, and the means of those of the updates on it (a list of dicts)."""
    B, score = len(texts), scores.mean().item()
    kl = sum((a - b).sum().item() for a, b in zip(logp, ref_logp)) / B
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return dict(means, score=score, kl=kl, objective=score - beta * kl, entropy=-torch.cat(logp).mean().item(),
                length=sum(len(response) for _, response in texts) / B,
                finished=sum(response[-1] == E for _, response in texts) / B)


def slow_update_metrics(logp, old_logp, clip):
    """The metrics of an update of PPO or GRPO, from log-probs (n,) of the same n tokens."""
    x = (logp - old_logp).detach()
    return dict(clip_fraction=((x.exp() - 1).abs() > clip).double().mean().item(),
                approx_kl=(x.exp() - 1 - x).mean().item())


def same_metrics(metrics, expected, iteration):
    """Assert that the metrics of an iteration are the expected ones and the canaries'."""
    canaries = {"ratio_error", "kl_at_start"} if iteration == 0 else {"ratio_error"}
    measured = {name: value for name, value in metrics.items() if name not in canaries}
    assert measured == pytest.approx(dict(expected, step=iteration), rel=1e-4, abs=1e-5)


# ---- samples --------------------------------------------------------------------------------------------------------

def surprise(counts, probs):
    """
    How badly counts (V,) fit the probabilities (V,): the chi-square statistic in standard deviations above its mean.

    It is below 4 for samples of these probabilities, and infinite when something of probability 0 was drawn.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    probs = torch.as_tensor(probs, dtype=torch.float64)
    if counts[probs == 0].any():
        return math.inf
    expected = counts.sum() * probs[probs > 0]
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    free = len(expected) - 1
    return float((statistic - free) / math.sqrt(2 * free))
