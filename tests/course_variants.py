"""
Functions that are wrong, as replacements of a piece of the true text, and right ones that look different, as bodies.

test_sets.py grades them all: a wrong one must lose points, a right one must keep them.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "course"

WRONG = [  # (function, piece of the true text, what is there instead)
    ("step", "(*state, action)", "[*state, action]"),
    ("step", "next_state, 0.0, False", "next_state, self.reward(self.start, next_state[len(self.start):]), False"),
    ("step", "next_state[len(self.start):]), True", "next_state), True"),
    ("step", "raise ValueError", "raise KeyError"),
    ("token_logp", "torch.where(tree.mask, logp[tree.state_index, tokens], 0.0)", "logp[tree.state_index, tokens]"),
    ("token_logp", "torch.log_softmax(logits, dim=-1)", "torch.log_softmax(logits.detach(), dim=-1)"),
    ("token_logp", "torch.log_softmax(logits, dim=-1)", "torch.softmax(logits, dim=-1)"),
    ("token_logp", "torch.log_softmax(logits, dim=-1)", "torch.log_softmax(logits.float(), dim=-1)"),
    ("kl", "logp.exp()", "response_logp(tree, ref_logits).exp()"),
    ("kl", ".sum()", ".mean()"),
    ("kl", "logp.exp() *", "logp.exp().detach() *"),
    ("objective", "score - beta", "score + beta"),
    ("objective", "rewards.to(logits.dtype)", "rewards"),
    ("policy_gradient", "logits.detach().clone().requires_grad_()", "logits.requires_grad_(); logits.data += 0.1"),
    ("policy_gradient", "return ", "return -"),
    ("solve", "torch.logsumexp(ref_logp[s] + Q[s] / beta, dim=0)", "torch.logsumexp(Q[s] / beta, dim=0)"),
    ("solve", "if beta <= 0:", "if beta < 0:"),
    ("solve", "ref_logp + (Q - V[:, None]) / beta", "ref_logp + Q / beta"),
    ("state_values", "logp[s].exp() *", "ref_logp[s].exp() *"),
    ("state_values", "- beta *", "+ beta *"),
    ("token_scores", "-probs[s]", "probs[s]"),
    ("token_scores", "scores[y, t, s, a] += 1", "scores[y, t, s, a] = 1"),
    ("quality", "G * (probs", "(probs"),
    ("quality", "policy_gradient(tree, logits, ref_logits, rewards, beta)",
     "policy_gradient(tree, logits, logits, rewards, beta)"),
    ("quality", "estimates(tree, logits, ref_logits, rewards, beta, estimator, G)",
     "estimates(tree, logits, ref_logits, rewards, beta, estimator, 2)"),
    ("quality", "policy_gradient(tree, logits, ref_logits, rewards, beta)",
     "policy_gradient(tree, logits, ref_logits, rewards, 0.5)"),
    ("attention_mask", "| (keys == queries)", ""),
    ("attention_mask", "keys <= queries", "keys <= queries + 1"),
    ("attention_mask", "keys >= start[:, None, None]", "keys > start[:, None, None]"),
    ("attention_mask", "return mask[:, None]", "return torch.where(mask[:, None], 0.0, float('-inf'))"),
    ("append", "self.used = old + k.shape[2]", "self.used = k.shape[2]"),
    ("append", "self.kv[1, :, :, old:self.used] = v", "self.kv[1, :, :, old:self.used] = k"),
    ("forward", "attn_mask=mask)", "is_causal=cache is None, attn_mask=mask if cache is not None else None)"),
    ("forward", "y.transpose(1, 2)", "y"),
    ("forward", "k, v = cache.append(k, v)", "cache.append(k, v)"),
    ("forward", "q, k, v = qkv", "k, q, v = qkv"),
    ("forward", "self.c_attn(x)", "self.c_attn(x.detach())"),
    ("hidden", "columns - start[:, None]", "columns - past - start[:, None]"),
    ("hidden", "(columns - start[:, None]).clamp(min=0)", "(columns + 0 * start[:, None]).clamp(min=0)"),
    ("hidden", "past + T > self.block_size and ", ""),
    ("hidden", "past + T - int(start.min())", "past + T"),
    ("hidden", "past + T - int(start.min())", "past + T - int(start.max())"),
    ("hidden", "self.ln_f(x)", "x"),
    ("response_hidden", ".contiguous()", ""),
    ("response_hidden", "batch.P - 1:-1", "batch.P:"),
    ("response_hidden", "batch.ids, batch.start", "batch.ids"),
    ("response_hidden", ".contiguous()", ".contiguous().detach()"),
    ("log_softmax", "/ temperature", "* temperature"),
    ("log_softmax", "logits.to(dtype)", "logits"),
    ("log_softmax", "torch.promote_types(logits.dtype, torch.float32)", "torch.float32"),
    ("log_softmax", "logits.to(dtype) /", "logits.detach().to(dtype) /"),
    ("generate", "sample(step_logp.exp(), generator)", "sample(step_logp.exp(), None)"),
    ("generate", "sample(step_logp.exp(), generator)", "step_logp.argmax(dim=1, keepdim=True)"),
    ("generate", "log_softmax(model.head(x), temperature)", "log_softmax(model.head(x))"),
    ("generate", "(is_end.cumsum(dim=1) - is_end.long()) == 0", "is_end.cumsum(dim=1) == 0"),
    ("generate", "is_end.any(dim=1)", "torch.ones(B, dtype=torch.bool)"),
    ("generate", "torch.where(mask, responses, pad)", "responses"),
    ("generate", "if not temperature > 0:", "if temperature < 0:"),
    ("sft_loss", ".sum() / batch.mask.sum()", ".mean()"),
    ("sft_loss", ".sum() / batch.mask.sum()", ".sum() / len(batch)"),
    ("sft_loss", "-response_logprobs(network, batch)", "-response_logprobs(network, batch).detach()"),
    ("preference_probability", "p * (1 - flip) + (1 - p) * flip", "p * (1 - flip)"),
    ("preference_probability", "difference / temperature / 2", "difference / temperature"),
    ("preference_probability", "0.5 if difference == 0 else float(difference > 0)", "float(difference > 0)"),
    ("bradley_terry_loss", "r_chosen - r_rejected", "r_rejected - r_chosen"),
    ("bradley_terry_loss", "-F.logsigmoid(r_chosen - r_rejected)", "-torch.sigmoid(r_chosen - r_rejected).log()"),
    ("bradley_terry_loss", ".mean()", ".sum()"),
    ("bradley_terry_loss", "r_chosen - r_rejected", "r_chosen - r_rejected.detach()"),
    ("last_hidden", "batch.ids, batch.start", "batch.ids"),
    ("last_hidden", "batch.P + batch.response_lens - 1", "batch.response_lens * 0 - 1"),
    ("last_hidden", "batch.P + batch.response_lens - 1", "batch.P + batch.response_lens - 2"),
    ("last_hidden", "x[torch.arange(len(x), device=last.device), last]",
     "x[torch.arange(len(x), device=last.device), last].detach()"),
    ("scale", ".float()", ""),
    ("scale", "/ self.std", "* self.std"),
    ("scale", "self.score(x)", "self.score(x.detach())"),
    ("scale", "- self.mean) / self.std", ") / self.std - self.mean"),
    ("normalise", "reward_model.mean.zero_()", "pass"),
    ("normalise", "scores.std(correction=0)", "scores.std()"),
    ("normalise", ".clamp(min=1e-6)", ""),
    ("best_of_n", "math.comb(i, n - 1)", "math.comb(i, n)"),
    ("best_of_n", "if not 1 <= n <= N:", "if n < 1:"),
    ("best_of_n", "proxy.cpu().argsort(dim=-1, stable=True)", "gold.cpu().argsort(dim=-1, stable=True)"),
    ("best_of_n", "argsort(dim=-1, stable=True)", "flip(-1).argsort(dim=-1, stable=True)"),
    ("optimum", "x.logsumexp(0)", "x.exp().sum().log()"),
    ("optimum", "- math.log(len(x))", ""),
    ("optimum", "(2 * log_sum - (2 * x).logsumexp(0)).exp()", "torch.tensor(float(len(x)))"),
    ("optimum_mean", "/ beta", "* beta"),
    ("wins", "0.5 * (a == b).float()", "(a == b).float()"),
    ("wins", "a > b", "a >= b"),
    ("masked_mean", "torch.where(mask, x, 0.0)", "(x * mask)"),
    ("masked_mean", ".clamp(min=1)", ""),
    ("masked_mean", "torch.where(mask, x, 0.0).sum()", "torch.where(mask, x, 0.0).sum().detach()"),
    ("masked_mean", "mask.sum().clamp(min=1)", "x.numel()"),
    ("kl_estimates", "logp - ref_logp", "ref_logp - logp"),
    ("kl_estimates", "logp - ref_logp", "(logp - ref_logp).detach()"),
    ("kl_estimates", "torch.expm1(-log_ratio)", "torch.exp(-log_ratio) - 1"),
    ("kl_estimates", "** 2 / 2", "** 2"),
    ("token_rewards", "-beta * k1", "beta * k1"),
    ("token_rewards", "torch.where(mask, -beta * k1, 0.0)", "-beta * k1"),
    ("token_rewards", "mask.sum(dim=1, keepdim=True) - 1", "mask.shape[1] - 1"),
    ("token_rewards", "- 1  ", "- 1 + (mask.sum(dim=1, keepdim=True) == 0)  "),
    ("gae", "rewards = torch.where(mask, rewards, 0.0)", "pass"),
    ("gae", "values = torch.where(mask, values, 0.0)", "pass"),
    ("gae", "values = torch.where(mask, values, 0.0)", "values[~mask] = 0.0"),
    ("gae", "gamma * lam * next_advantage", "lam * next_advantage"),
    ("gae", "next_value = values[:, t]", "next_value = 0"),
    ("gae", "torch.where(mask, advantages + values, 0.0)", "advantages"),
    ("gae", "torch.zeros_like(values)", "torch.zeros(values.shape)"),
    ("whiten", "masked_mean((torch.where(mask, x, 0.0) - mean) ** 2, mask)", "torch.var(x[mask])"),
    ("whiten", "mean = masked_mean(x, mask)", "mean = torch.where(mask, x, 0.0).mean()"),
    ("whiten", "(x - mean)", "x"),
    ("whiten", "torch.where(mask & (smallest != largest), whitened, 0.0)", "whitened"),
    ("clipped_surrogate", "-torch.minimum", "-torch.maximum"),
    ("clipped_surrogate", "1 - clip, 1 + clip", "1 - clip, 1 + 2 * clip"),
    ("clipped_surrogate", "1 - clip, 1 + clip", "0.8, 1.2"),
    ("clipped_surrogate", "torch.exp(torch.where(mask, logp - old_logp, 0.0))", "torch.exp(logp - old_logp)"),
    ("clipped_surrogate", "if clip <= 0:", "if clip < 0:"),
    ("clipped_surrogate", "advantages * ratio,", "advantages * ratio.detach(),"),
    ("value_loss", "torch.maximum", "torch.minimum"),
    ("value_loss", "0.5 *", ""),
    ("value_loss", "values = torch.where(mask, values, 0.0)", "pass"),
    ("value_loss", "(values - old_values).clamp", "(values - old_values).detach().clamp"),
    ("values", "torch.where(part.mask, values, 0.0)", "values"),
    ("values", "self.scale(response_hidden(self.trunk, part))",
     "self.scale(self.trunk.hidden(part.ids, part.start)[:, part.P:])"),
    ("values", "torch.where(part.mask, values, 0.0)", "torch.where(part.mask, values, 0.0).detach()"),
    ("learn_ppo", "(1 - iteration / iterations)", "(1 - (iteration + 1) / (iterations + 1))"),
    ("learn_ppo", "advantages = whiten(advantages, mask)", "pass"),
    ("learn_ppo", "lam=1.0", "lam=0.95"),
    ("learn_ppo", "step_rewards = step_rewards + shaping[y]", "pass"),
    ("learn_ppo", "token_logp(tree, logits)[y], old_logp", "token_logp(tree, logits)[y], token_logp(tree, logits)[y]"),
    ("learn_ppo", "range(epochs)", "range(2)"),
    ("learn_ppo", "ref_logits.clone().requires_grad_()", "ref_logits.requires_grad_()"),
    ("group_advantages", "/ (group - 1)", "/ group"),
    ("group_advantages", "grouped.std(dim=1, keepdim=True)", "grouped.std(dim=1, keepdim=True, correction=0)"),
    ("group_advantages", "rewards.view(-1, group)", "rewards.view(group, -1).T"),
    ("group_advantages", "whiten(rewards, torch.ones_like(rewards, dtype=torch.bool))", "rewards - rewards.mean()"),
    ("group_advantages", "rewards.dim() != 1 or ", ""),
    ("group_advantages", "torch.where(equal, 0.0, advantages)", "(advantages * 1e12)"),
    ("loss_mean", 'if kind == "reinforce++":', 'if kind != "grpo":'),
    ("loss_mean", "torch.where(mask, losses, 0.0)", "(losses * mask)"),
    ("loss_mean", "else cap", "else mask.shape[1]"),
    ("loss_mean", "torch.where(mask, losses, 0.0)", "torch.where(mask, losses, 0.0).detach()"),
    ("gspo_surrogate", "/ mask.sum(dim=1).clamp(min=1)", ""),
    ("gspo_surrogate", "/ mask.sum(dim=1).clamp(min=1)", "/ mask.shape[1]"),
    ("cispo_surrogate", ".detach()", ""),
    ("cispo_surrogate", "max=1 + clip", "min=1 - clip, max=1 + clip"),
    ("kl_loss", '["k3"]', '["k1"]'),
    ("kl_loss", "logp, ref_logp)[", "ref_logp, logp)["),
    ("implicit_reward", "beta *", "0.5 *"),
    ("implicit_reward", "logp - ref_logp", "(logp - ref_logp).detach()"),
    ("dpo_loss", "(chosen - ref_chosen) - (rejected - ref_rejected)", "chosen - rejected"),
    ("dpo_loss", "- (rejected - ref_rejected)", "- (rejected - ref_rejected).detach()"),
    ("dpo_loss", "1 / (2 * beta)", "1 / beta"),
    ("dpo_loss", "F.relu(1 - beta * h)", "F.relu(1 - h)"),
    ("dpo_loss", "/ (1 - 2 * e)", ""),
    ("dpo_loss", "if beta <= 0:", "if beta < 0:"),
    ("dpo_loss", "(1 - e) * label_is_right + e * label_is_wrong", "label_is_right"),
    ("solve_ipo", "wins.mean(dim=1)", "wins.mean(dim=0)"),
    ("solve_ipo", "wins.mean(dim=1)", "wins.sum(dim=1)"),
    ("learn_dpo", "(1 - step / steps)", "1"),
    ("learn_dpo", "if size < len(chosen):", "if False:"),
    ("learn_dpo", "beta, kind)", "beta)"),
    ("learn_dpo", "logits.detach().clone()", "logits"),
    ("pair_losses", "kl(tree, logits, ref_logits).detach()", "kl(tree, logits, ref_logits)"),
    ("pair_losses", "logp / tree.mask.sum(dim=1)", "logp"),
    ("pair_losses", "- 1)", ")"),
    ("pair_losses", "torch.sigmoid(beta * (z - f))", "torch.sigmoid(beta * (f - z))"),
]

RIGHT = [  # (function, body)
    ("token_logp", """
out = torch.zeros(tree.mask.shape, dtype=logits.dtype)
table = logits - logits.logsumexp(1, keepdim=True)
y, t = tree.mask.nonzero(as_tuple=True)
out[y, t] = table[tree.state_index[y, t], tree.responses[y, t]]
return out"""),
    ("kl", """
p, q = response_logp(tree, logits), response_logp(tree, ref_logits)
return torch.dot(p.exp(), p - q)"""),
    ("kl", """
p, q = response_logp(tree, logits), response_logp(tree, ref_logits.detach())
return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")"""),
    ("objective", """
p = torch.exp(response_logp(tree, logits))
value = 0.0
for y in range(tree.Y):
    value = value + p[y] * rewards[y]
return value - beta * kl(tree, logits, ref_logits)"""),
    ("policy_gradient", """
x = torch.tensor(logits.tolist(), dtype=logits.dtype, requires_grad=True)
objective(tree, x, ref_logits, rewards, beta).backward()
return x.grad"""),
    ("solve", """
if not beta > 0:
    raise ValueError("beta")
ref = torch.log_softmax(ref_logits, -1)
V = [None] * tree.S
Q = torch.empty_like(ref)
for s in range(tree.S - 1, -1, -1):
    for a, n in enumerate(tree.next_state[s].tolist()):
        Q[s, a] = V[n] if n < tree.S else rewards[n - tree.S]
    V[s] = beta * (ref[s] + Q[s] / beta).exp().sum().log()
V = torch.stack(V)
return Solution(V, Q, torch.log_softmax(ref + Q / beta, -1), V[0])"""),
    ("token_scores", """
S, V = logits.shape
out = torch.zeros(*tree.mask.shape, S, V, dtype=logits.dtype)
p = logits.softmax(1)
for y, leaf in enumerate(tree.leaves):
    for t, a in enumerate(leaf):
        s = tree.state_index[y, t]
        out[y, t, s] -= p[s]
        out[y, t, s, a] += 1
return out.reshape(tree.Y, -1, S * V)"""),
    ("quality", """
exact = policy_gradient(tree, logits, ref_logits, rewards, beta).reshape(-1)
p, g = estimates(tree, logits, ref_logits, rewards, beta, estimator, G)
mean = (p[:, None] * g).sum(0)
var = G * ((p[:, None] * g ** 2).sum() - mean.dot(mean))
if torch.linalg.norm(exact) < 1e-12:
    nan = float("nan")
    return Quality(nan, nan, nan, float(var), nan)
n = exact.norm()
return Quality((mean @ exact / n / mean.norm()).item(), float(mean.norm() / n), float((mean - exact).norm() / n),
               float(var), float(var ** 0.5 / mean.norm()))"""),
    ("attention_mask", """
rows = []
for s in start.tolist():
    rows.append([[(s <= k <= past + t) or k == past + t for k in range(past + T)] for t in range(T)])
return torch.tensor(rows).unsqueeze(1)"""),
    ("append", """
T = k.shape[2]
self.kv[0][:, :, self.used:self.used + T].copy_(k)
self.kv[1][:, :, self.used:self.used + T].copy_(v)
self.used += T
return self.kv[0][:, :, :self.used], self.kv[1][:, :, :self.used]"""),
    ("forward", """
B, T, C = x.shape
q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
if cache is not None:
    k, v = cache.append(k, v)
scores = q @ k.mT / math.sqrt(q.shape[-1])
weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
return self.c_proj((weights @ v).transpose(1, 2).contiguous().view(B, T, C))"""),
    ("response_hidden", """
P = batch.P
states = model.hidden(batch.ids, start=batch.start)
return states[:, P - 1:P - 1 + batch.R].clone()"""),
    ("log_softmax", """
x = logits.double() if logits.dtype == torch.float64 else logits.float()
x = x / temperature
return x - torch.logsumexp(x, dim=-1, keepdim=True)"""),
    ("generate", """
if max_new_tokens < 1 or not temperature > 0:
    raise ValueError("no")
left, lens = pad_prompts(prompts, model.pad, model.device)
B, P = left.shape
if P + max_new_tokens > model.block_size:
    raise ValueError("too long")
start, ids = P - lens, left
logps = []
for t in range(max_new_tokens):  # no cache at all
    logp = log_softmax(model(ids, start)[:, -1], temperature)
    token = torch.multinomial(logp.exp(), 1, generator=generator)
    logps.append(logp.gather(1, token))
    ids = torch.cat([ids, token], dim=1)
new, logp = ids[:, P:], torch.cat(logps, dim=1)
n = torch.full((B,), max_new_tokens)
done = torch.zeros(B, dtype=torch.bool)
for b in range(B):
    where = (new[b] == model.end).nonzero()
    if len(where):
        n[b], done[b] = where[0, 0] + 1, True
R = int(n.max())
keep = torch.arange(R) < n[:, None]
ids = torch.cat([left, new[:, :R].masked_fill(~keep, model.pad)], dim=1)
return Rollout(ids, lens, n, P, logp[:, :R].masked_fill(~keep, 0.0), done)"""),
    ("sft_loss", """
logp = response_logprobs(network, batch)
return -logp[batch.mask].mean()"""),
    ("preference_probability", """
if temperature == 0:
    p = (difference > 0) + 0.5 * (difference == 0)
else:
    z = torch.tensor(difference / temperature, dtype=torch.float64)
    p = torch.sigmoid(z).item()
return (1 - 2 * flip) * p + flip"""),
    ("bradley_terry_loss", "return F.softplus(r_rejected - r_chosen).mean()"),
    ("bradley_terry_loss", """
d = r_chosen - r_rejected
return F.binary_cross_entropy_with_logits(d, torch.ones_like(d))"""),
    ("last_hidden", """
x = trunk.hidden(batch.ids, start=batch.start)
at = (batch.P + batch.response_lens - 1).view(-1, 1, 1).expand(-1, 1, x.shape[-1])
return x.gather(1, at).squeeze(1)"""),
    ("scale", "return (self.score(x).squeeze(-1).to(torch.float32) - self.mean).div(self.std)"),
    ("normalise", """
raw = torch.cat([reward_model(b) * reward_model.std + reward_model.mean for b in batches])
reward_model.mean.fill_(raw.mean().item())
reward_model.std.fill_(max(raw.std(unbiased=False).item(), 1e-6))"""),
    ("best_of_n", """
N = proxy.size(-1)
if n < 1 or n > N:
    raise ValueError(n)
w = torch.tensor([math.comb(i, n - 1) for i in range(N)], dtype=torch.float64) / math.comb(N, n)
_, order = torch.sort(proxy, dim=-1, stable=True)
return torch.take_along_dim(gold, order, dim=-1).double() @ w"""),
    ("optimum", """
if beta <= 0:
    raise ValueError("beta")
s = scores.double().reshape(-1)
top = s.max()
w = torch.exp((s - top) / beta)
return Optimum((top + beta * w.mean().log()).item(), (w.sum() ** 2 / (w ** 2).sum()).item())"""),
    ("optimum_mean", """
s, v = scores.double().reshape(-1), values.double().reshape(-1)
w = torch.exp((s - s.max()) / beta)
return float((w * v).sum() / w.sum())"""),
    ("wins", "return torch.where(a == b, 0.5, (a > b).float())"),
    ("wins", "return (torch.sign(a - b) + 1) / 2"),
    ("masked_mean", """
n = mask.sum()
return x.masked_fill(~mask, 0).sum() / max(int(n), 1)"""),
    ("masked_mean", """
if not mask.any():
    return x[mask].sum()
return x[mask].mean()"""),
    ("kl_estimates", """
r = logp - ref_logp.detach()
return dict(k3=torch.special.expm1(-r) + r, k2=0.5 * r.square(), k1=r)"""),
    ("token_rewards", """
out = torch.zeros_like(logp)
for b, n in enumerate(mask.sum(1).tolist()):
    out[b, :n] = -beta * (logp[b, :n] - ref_logp[b, :n])
    if n:
        out[b, n - 1] += scores[b]
return out"""),
    ("gae", """
with torch.no_grad():
    B, R = values.shape
    adv = torch.zeros(B, R, dtype=values.dtype)
    n = mask.sum(1)
    for b in range(B):
        last = 0.0
        for t in range(int(n[b]) - 1, -1, -1):
            after = values[b, t + 1] if t + 1 < n[b] else 0.0
            last = rewards[b, t] + gamma * after - values[b, t] + gamma * lam * last
            adv[b, t] = last
    ret = torch.zeros_like(adv)
    ret[mask] = adv[mask] + values[mask]
    return adv, ret"""),
    ("whiten", """
real = x[mask]
out = torch.zeros_like(x)
if real.numel() and real.max() > real.min():
    out[mask] = (real - real.mean()) / (real.std(unbiased=False) + 1e-8)
return out"""),
    ("whiten", """
mean = masked_mean(x, mask)
var = masked_mean((x - mean) ** 2, mask)
constant = len(set(x[mask].tolist())) < 2
return torch.where(mask, (x - mean) * torch.rsqrt(var + 1e-5), 0.0) * (not constant)"""),
    ("clipped_surrogate", """
if not clip > 0:
    raise ValueError("clip")
d = (logp - old_logp.detach()).masked_fill(~mask, 0)
r = d.exp()
a = torch.where(mask, advantages.detach(), 0.0)
return torch.max(-a * r, -a * torch.clamp(r, 1 - clip, 1 + clip))"""),
    ("clipped_surrogate", """
if clip <= 0:
    raise ValueError("clip")
r = torch.exp(torch.where(mask, logp - old_logp, 0.0))
out = (advantages > 0) & (r > 1 + clip) | (advantages < 0) & (r < 1 - clip)
return torch.where(out, -advantages * torch.where(advantages > 0, 1 + clip, 1 - clip), -advantages * r)"""),
    ("value_loss", """
v, o, r = (torch.where(mask, z, 0.0) for z in (values, old_values.detach(), returns.detach()))
near = torch.clamp(v, o - clip, o + clip)
return masked_mean(torch.max((v - r) ** 2, (near - r) ** 2), mask) / 2"""),
    ("values", """
v = self.scale(response_hidden(self.trunk, batch))
return v.masked_fill(~batch.mask, 0.0)"""),
    ("learn_ppo", """
logits = ref_logits.clone().detach().requires_grad_(True)
critic = torch.zeros(tree.S, dtype=ref_logits.dtype, requires_grad=True)
opt = torch.optim.Adam([{"params": [logits]}, {"params": [critic]}], lr=lr)
for i in range(iterations + 1):
    y = rollout(tree, logits, B, generator)
    mask = tree.mask[y]
    with torch.no_grad():
        old, ref = token_logp(tree, logits)[y], token_logp(tree, ref_logits)[y]
        v = critic[tree.state_index[y]]
    r = token_rewards(rewards[y], old, ref, mask, beta)
    if shaping is not None:
        r = r + shaping[y]
    adv, ret = gae(r, v, mask, 1.0, 1.0)
    adv = whiten(adv, mask)
    yield i, logits.detach().clone(), r.sum() / B
    if i == iterations:
        break
    for group in opt.param_groups:
        group["lr"] = lr * (1 - i / iterations)
    for _ in range(epochs):
        opt.zero_grad()
        policy_loss(token_logp(tree, logits)[y], old, adv, mask).backward()
        value_loss(critic[tree.state_index[y]], v, ret, mask).backward()
        opt.step()"""),
    ("group_advantages", """
if kind not in ("rloo", "grpo", "dr_grpo", "reinforce++"):
    raise ValueError(kind)
if rewards.ndim != 1 or group < (1 if kind == "reinforce++" else 2) or rewards.numel() % group:
    raise ValueError("groups")
if kind == "reinforce++":
    d = rewards - rewards.mean()
    return torch.zeros_like(d) if rewards.max() == rewards.min() else d / rewards.std(unbiased=False)
out = []
for g in rewards.split(group):
    d = g - g.mean()
    if kind == "rloo":
        d = d * group / (group - 1)
    elif kind == "grpo":
        d = torch.zeros_like(d) if g.max() == g.min() else d / g.std()
    out.append(d)
return torch.cat(out)"""),
    ("loss_mean", """
x = losses.masked_fill(~mask, 0)
if kind == "grpo":
    return torch.stack([row.sum() / max(1, n) for row, n in zip(x, mask.sum(1).tolist())]).mean()
if kind == "reinforce++":
    return x.sum() / mask.sum()
return x.sum() / cap / len(x)"""),
    ("gspo_surrogate", """
n = mask.sum(1, keepdim=True).clamp(min=1)
d = torch.where(mask, logp - old_logp, 0.0).sum(1, keepdim=True) / n
ratio = torch.exp(d)
return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))"""),
    ("cispo_surrogate", """
with torch.no_grad():
    w = torch.exp((logp - old_logp).masked_fill(~mask, 0)).clamp(max=1 + clip)
return -(w * advantages * logp.masked_fill(~mask, 0))"""),
    ("kl_loss", """
d = ref_logp - logp
return torch.exp(d) - d - 1"""),
    ("implicit_reward", "return logp * beta - ref_logp * beta"),
    ("dpo_loss", """
if not beta > 0 or kind not in ("dpo", "ipo", "slic", "robust") or not 0 <= label_smoothing < 0.5:
    raise ValueError("argument")
if label_smoothing and kind in ("ipo", "slic"):
    raise ValueError("smoothing")
h, e = chosen - rejected - (ref_chosen - ref_rejected).detach(), label_smoothing
z = beta * h
if kind == "dpo":
    return ((1 - e) * F.softplus(-z) + e * F.softplus(z)).mean()
if kind == "robust":
    return (((1 - e) * F.softplus(-z) - e * F.softplus(z)) / (1 - 2 * e)).mean()
if kind == "ipo":
    return ((h - 0.5 / beta) ** 2).mean()
return torch.clamp(1 - z, min=0).mean()"""),
    ("solve_ipo", "return solve(tree, ref_logits, wins.sum(1) / tree.Y, beta)"),
    ("learn_dpo", """
logits = ref_logits.detach().clone().requires_grad_()
with torch.no_grad():
    ref = response_logp(tree, ref_logits)
opt = torch.optim.Adam([logits], lr)
for i in range(steps):
    yield i, logits.detach().clone()
    a, b = chosen, rejected
    if size < len(chosen):
        at = torch.randint(len(chosen), (size,), generator=generator)
        a, b = chosen[at], rejected[at]
    opt.param_groups[0]["lr"] = lr * (1 - i / steps)
    logp = response_logp(tree, logits)
    opt.zero_grad()
    dpo_loss(logp[a], logp[b], ref[a], ref[b], beta=beta, kind=kind).backward()
    opt.step()
yield steps, logits.detach().clone()"""),
    ("pair_losses", """
logp = response_logp(tree, logits)
f = logp - response_logp(tree, ref_logits).detach()
with torch.no_grad():
    z = kl(tree, logits, ref_logits)
l = logp / tree.mask.sum(1)
odds = l - torch.log1p(-l.exp())
a = lambda x: x[:, None]
return dict(KTO=2 - torch.sigmoid(beta * (a(f) - z)) - torch.sigmoid(beta * (z - f))[None],
            ORPO=-a(l) + 0.1 * F.softplus(-(a(odds) - odds)),
            SimPO=F.softplus(1 - 2 * (a(l) - l)))"""),
]
