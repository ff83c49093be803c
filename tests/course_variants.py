"""Functions that are wrong, and right ones that look different: course/test_sets.py grades them all."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "course"

WRONG = [  # (function, piece of the true text, what is there instead)
    ("step", "(*state, action)", "[*state, action]"),
    ("step", "not self.done(next_state)",
     "len(state) - len(self.start) < self.horizon - 1 and self.end not in next_state"),
    ("token_logp", "torch.log_softmax(logits, dim=-1)", "torch.log_softmax(logits.detach(), dim=-1)"),
    ("token_logp", "torch.log_softmax(logits, dim=-1)", "torch.log_softmax(logits.float(), dim=-1)"),
    ("kl", "logp.exp() *", "logp.exp().detach() *"),
    ("objective", "rewards.to(logits.dtype)", "rewards"),
    ("policy_gradient", "logits.detach().clone().requires_grad_()", "logits.requires_grad_(); logits.data += 0.1"),
    ("policy_gradient", "logits.detach().clone().requires_grad_()", "logits.requires_grad_()"),
    ("solve", "if beta <= 0:", "if beta < 0:"),
    ("solve", "if beta <= 0:", "if beta == 0:"),
    ("solve", "ref_logp[s] + Q[s] / beta", "Q[s] / beta"),
    ("state_values", "logp[s].exp() *", "ref_logp[s].exp() *"),
    ("token_scores", "scores[y, t, s, a] += 1", "scores[y, t, s, a] = 1"),
    ("quality", "policy_gradient(tree, logits, ref_logits, rewards, beta)",
     "policy_gradient(tree, logits, logits, rewards, beta)"),
    ("quality", "exact.norm() < 1e-12", "exact.norm() < 0"),
    ("attention_mask", "| (keys == queries)", ""),
    ("append", "old = self.used", "old = self.used if k.shape[2] == 1 else 0"),
    ("append", "", """
self.k, self.v = (torch.cat([getattr(self, name), x], dim=2) if self.used else x for name, x in (("k", k), ("v", v)))
self.used = self.k.shape[2]
return self.k, self.v"""),  # `keep` does not know them
    ("forward", "attn_mask=mask)", "is_causal=cache is None, attn_mask=mask if cache is not None else None)"),
    ("forward", "self.c_attn(x)", "self.c_attn(x.detach())"),
    ("forward", "self.c_attn(x)", "F.linear(x, self.c_attn.weight.detach(), self.c_attn.bias)"),
    ("forward", "attn_mask=mask)", "attn_mask=mask if T > 1 else None)"),
    ("hidden", "columns - start[:, None]", "columns - past - start[:, None]"),
    ("hidden", "past + T - int(start.min())", "past + T"),
    ("hidden", "past + T > self.block_size and ", ""),
    ("hidden", "torch.zeros(B, dtype=torch.long, device=ids.device)", "torch.full((B,), past, device=ids.device)"),
    ("hidden", "self.wpe(positions)", "self.wpe(positions).detach()"),
    ("response_hidden", "batch.ids, batch.start", "batch.ids"),
    ("response_hidden", ".contiguous()", ".contiguous().detach()"),
    ("response_hidden", ".contiguous()", ""),
    ("log_softmax", "torch.promote_types(logits.dtype, torch.float32)", "torch.float32"),
    ("log_softmax", "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
    ("log_softmax", "torch.log_softmax(logits.to(dtype) / temperature, dim=-1)",
     "torch.softmax(logits.to(dtype) / temperature, dim=-1).log()"),
    ("generate", "sample(step_logp.exp(), generator)", "sample(step_logp.exp(), None)"),
    ("generate", "log_softmax(model.head(x), temperature)", "log_softmax(model.head(x))"),
    ("generate", "(is_end.cumsum(dim=1) - is_end.long()) == 0", "is_end.cumsum(dim=1) == 0"),
    ("generate", "is_end.any(dim=1)", "response_lens < max_new_tokens"),
    ("generate", "torch.where(mask, responses, pad)", "responses"),
    ("generate", "if not temperature > 0:", "if temperature == 0:"),
    ("generate", "P + max_new_tokens > model.block_size", "P + max_new_tokens >= model.block_size"),
    ("generate", "sample(step_logp.exp(), generator)", "sample(torch.softmax(model.head(x), dim=-1), generator)"),
    ("sft_loss", ".sum() / batch.mask.sum()", ".mean()"),
    ("sft_loss", "-response_logprobs(network, batch)", "-response_logprobs(network, batch).detach()"),
    ("sft_loss", "", """
from model import response_hidden
labels = batch.responses
labels[~batch.mask] = -100
return nn.functional.cross_entropy(network.head(response_hidden(network, batch)).flatten(0, 1), labels.flatten())"""),
    ("preference_probability", "0.5 if difference == 0 else float(difference > 0)", "float(difference > 0)"),
    ("preference_probability", "0.5 + 0.5 * math.tanh(difference / temperature / 2)",
     "1 / (1 + math.exp(-difference / temperature))"),
    ("bradley_terry_loss", "-F.logsigmoid(r_chosen - r_rejected)", "-torch.sigmoid(r_chosen - r_rejected).log()"),
    ("bradley_terry_loss", "r_chosen - r_rejected", "r_chosen - r_rejected.detach()"),
    ("last_hidden", "batch.ids, batch.start", "batch.ids"),
    ("last_hidden", "batch.P + batch.response_lens", "batch.start + (batch.ids != trunk.pad).sum(dim=1)"),
    ("scale", ".float()", ""),
    ("normalise", "reward_model.mean.zero_()", "pass"),
    ("normalise", "scores.std(correction=0)", "scores.std()"),
    ("normalise", ".clamp(min=1e-6)", ""),
    ("best_of_n", "if not 1 <= n <= N:", "if n < 1:"),
    ("best_of_n", "argsort(dim=-1, stable=True)", "flip(-1).argsort(dim=-1, stable=True)"),
    ("best_of_n", "stable=True", "descending=True, stable=True).flip(-1"),
    ("optimum", "x.logsumexp(0)", "x.exp().sum().log()"),
    ("optimum", "if beta <= 0:", "if beta == 0:"),
    ("optimum_mean", "torch.softmax(scores.cpu().double().flatten() / beta, dim=0)",
     "(lambda w: w / w.sum())((scores.cpu().double().flatten() / beta).exp())"),
    ("wins", "0.5 * (a == b).float()", "(a == b).float()"),
    ("masked_mean", "torch.where(mask, x, 0.0)", "(x * mask)"),
    ("masked_mean", "torch.where(mask, x, 0.0)", "torch.where(mask, x.detach(), 0.0)"),
    ("masked_mean", ".clamp(min=1)", ""),
    ("kl_estimates", "logp - ref_logp", "(logp - ref_logp).detach()"),
    ("kl_estimates", "logp - ref_logp", "(logp - ref_logp).clamp(-10, 10)"),
    ("kl_estimates", "torch.expm1(-log_ratio)", "torch.exp(-log_ratio) - 1"),
    ("token_rewards", "torch.where(mask, -beta * k1, 0.0)", "-beta * k1"),
    ("token_rewards", "mask.sum(dim=1, keepdim=True) - 1", "mask.shape[1] - 1"),
    ("gae", "rewards = torch.where(mask, rewards, 0.0)", "pass"),
    ("gae", "values = torch.where(mask, values, 0.0)", "values[~mask] = 0.0"),
    ("gae", "torch.zeros_like(values)", "torch.zeros(values.shape)"),
    ("whiten", "masked_mean((torch.where(mask, x, 0.0) - mean) ** 2, mask)", "torch.var(x[mask])"),
    ("whiten", "torch.where(mask & (smallest != largest), whitened, 0.0)", "whitened"),
    ("whiten", "mask & (smallest != largest)", "mask"),
    ("whiten", "variance + 1e-8", "variance + 1e-3"),
    ("clipped_surrogate", "torch.exp(torch.where(mask, logp - old_logp, 0.0))", "torch.exp(logp - old_logp)"),
    ("clipped_surrogate", "advantages * ratio,", "advantages * ratio.detach(),"),
    ("clipped_surrogate", "1 - clip, 1 + clip", "1 - clip, 1 / (1 - clip)"),
    ("clipped_surrogate", "clip <= 0", "clip == 0"),
    ("value_loss", "values = torch.where(mask, values, 0.0)", "pass"),
    ("value_loss", "values - old_values", "values.detach() - old_values"),
    ("values", "torch.where(part.mask, values, 0.0)", "values"),
    ("learn_ppo", "advantages = whiten(advantages, mask)", "pass"),
    ("learn_ppo", "ref_logits.clone().requires_grad_()", "ref_logits.requires_grad_()"),
    ("learn_ppo", "rollout(tree, logits, B, generator)", "rollout(tree, logits, B)"),
    ("learn_ppo", "returns, mask)", "returns, mask, clip=10.0)"),
    ("learn_ppo", "critic[states], old_values", "critic[states], critic.detach()[states]"),
    ("learn_ppo", "pg_loss + vf_loss", "pg_loss + 0.5 * vf_loss"),
    ("learn_ppo", "optimizer.step()", "torch.nn.utils.clip_grad_norm_([logits, critic], 1.0); optimizer.step()"),
    ("group_advantages", "grouped.std(dim=1, keepdim=True)", "grouped.std(dim=1, keepdim=True, correction=0)"),
    ("group_advantages", "torch.where(is_equal(rewards, group)[:, None], 0.0, advantages)", "advantages"),
    ("group_advantages", "+ 1e-6", "+ 1e-4"),
    ("group_advantages", "/ (group - 1)", "/ group"),
    ("group_advantages", "whiten(rewards, ", "(rewards.std() / rewards.std(correction=0)) * whiten(rewards, "),
    ("group_advantages", "len(rewards) % group", "(kind != 'reinforce++' and len(rewards) % group)"),
    ("loss_mean", "torch.where(mask, losses, 0.0)", "torch.where(mask, losses.detach(), 0.0)"),
    ("loss_mean", "torch.where(mask, losses, 0.0)", "torch.nan_to_num(losses)"),
    ("loss_mean", "else cap", "else mask.shape[1]"),
    ("loss_mean", 'kind == "grpo"', 'kind != "dr_grpo"'),
    ("loss_mean", 'kind == "grpo"', 'kind != "rloo"'),
    ("loss_mean", ".clamp(min=1)", ".clamp(min=2)"),
    ("gspo_surrogate", "/ mask.sum(dim=1).clamp(min=1)", "/ mask.shape[1]"),
    ("gspo_surrogate", "mask, clip)", "mask, 1e9)"),
    ("cispo_surrogate", ".detach()", ""),
    ("cispo_surrogate", "max=1 + clip", "min=1 - clip, max=1 + clip"),
    ("kl_loss", "logp, ref_logp)[", "ref_logp, logp)["),
    ("implicit_reward", "logp - ref_logp", "(logp - ref_logp).detach()"),
    ("dpo_loss", "/ (1 - 2 * e)", ""),
    ("dpo_loss", "-F.logsigmoid(beta * h)", "-torch.sigmoid(beta * h).log()"),
    ("dpo_loss", "(chosen, ref_chosen", "(chosen.detach(), ref_chosen"),
    ("dpo_loss", "(rejected, ref_rejected", "(rejected.detach(), ref_rejected"),
    ("dpo_loss", "1 / (2 * beta)", "1 / beta"),
    ("dpo_loss", "F.relu(1 - beta * h)", "1 - beta * h"),
    ("dpo_loss", "+ e * label_is_wrong", "+ e * label_is_right"),
    ("dpo_loss", "(share >= 0) & (share < 0.5)", "(share < 0.5)"),
    ("dpo_loss", "kind not in SMOOTHED", "kind == 'ipo'"),
    ("solve_ipo", "wins.mean(dim=1)", "wins.mean(dim=0)"),
    ("learn_dpo", "logits.detach().clone()", "logits"),
    ("learn_dpo", "generator=generator", "generator=None"),
    ("learn_dpo", "size < len(chosen)", "size <= len(chosen)"),
    ("learn_dpo", "beta, kind)", "beta)"),
    ("pair_losses", "kl(tree, logits, ref_logits).detach()", "kl(tree, logits, ref_logits)"),
]

RIGHT = [  # (function, piece of the true text or "" for the whole body, what is as good)
    ("policy_gradient", "", "return torch.func.grad(lambda x: objective(tree, x, ref_logits, rewards, beta))(logits)"),
    ("solve", "ref_logp + (Q - V[:, None]) / beta", "torch.log_softmax(ref_logp + Q / beta, dim=-1)"),
    ("preference_probability", "p * (1 - flip) + (1 - p) * flip", "torch.tensor((1 - 2 * flip) * p + flip)"),
    ("whiten", "torch.rsqrt(variance + 1e-8)", "1 / (variance.sqrt() + 1e-8)"),
    ("learn_ppo", "step_rewards.sum(dim=1).mean()", "step_rewards.sum().item() / B"),
    ("group_advantages", "grouped - others", "advantages * group / (group - 1)"),
    ("dpo_loss", "implicit_reward(chosen, ref_chosen, 1, kind) - implicit_reward(rejected, ref_rejected, 1, kind)",
     "chosen - rejected - (ref_chosen - ref_rejected).detach()"),
    ("forward", "", """
B, T, C = x.shape
q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
if cache is not None:
    k, v = cache.append(k, v)
scores = q @ k.mT / math.sqrt(q.shape[-1])
weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
return self.c_proj((weights @ v).transpose(1, 2).contiguous().view(B, T, C))"""),
    ("generate", "", """
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
    ("log_softmax", "", "return F.log_softmax(logits.double() / temperature, dim=-1)"),
    ("normalise", "", """
raw = score_batches(reward_model, batches) * reward_model.std + reward_model.mean
reward_model.mean, reward_model.std = raw.mean(), raw.std(correction=0).clamp(min=1e-6)"""),
    ("kl_estimates", "", """
r = logp - ref_logp.detach()
return dict(k3=torch.special.expm1(-r) + r, k2=0.5 * r.square(), k1=r)"""),
    ("token_rewards", "", """
out = torch.zeros_like(logp)
for b, n in enumerate(mask.sum(1).tolist()):
    out[b, :n] = -beta * (logp[b, :n] - ref_logp[b, :n])
    if n:
        out[b, n - 1] += scores[b]
return out"""),
    ("clipped_surrogate", "", """
if not clip > 0:
    raise ValueError("clip")
d = (logp - old_logp.detach()).masked_fill(~mask, 0)
r = d.exp()
a = torch.where(mask, advantages.detach(), 0.0)
return torch.max(-a * r, -a * torch.clamp(r, 1 - clip, 1 + clip))"""),
    ("solve_ipo", "", "return solve(tree, ref_logits, wins.sum(1) / tree.Y, beta)"),
    ("append", "", """
self.kv = torch.cat([self.kv[:, :, :, :self.used], torch.stack([k, v])], dim=3)
self.used = self.kv.shape[3]
return self.kv.unbind(0)"""),
    ("whiten", "", """
y = torch.where(mask, x - x[mask][0], 0.0)
mean = y.sum() / mask.sum()
variance = (y ** 2).sum() / mask.sum() - mean ** 2
return torch.where(mask, (y - mean) / (variance.clamp(min=0).sqrt() + 1e-5), 0.0)"""),
    ("learn_ppo", "", """
iterations, B, lr, epochs = training
logits, critic = (torch.nn.Parameter(x.clone()) for x in (ref_logits, torch.zeros_like(ref_logits[:, 0])))
optimizers = [torch.optim.Adam([x], lr=lr) for x in (logits, critic)]
for i in range(iterations + 1):
    y = rollout(tree, logits, B, generator)
    mask, values = tree.mask[y], critic.detach()[tree.state_index[y]]
    old = token_logp(tree, logits).detach()[y]
    step_rewards = token_rewards(rewards[y], old, token_logp(tree, ref_logits)[y], mask, beta)
    step_rewards = step_rewards if shaping is None else step_rewards + shaping[y]
    advantages, returns = gae(step_rewards, values, mask, 1.0, 1.0)
    advantages = whiten(advantages, mask)
    yield i, logits.detach().clone(), float(step_rewards.sum() / B)
    for _ in range(epochs if i < iterations else 0):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * (1 - i / iterations)
            optimizer.zero_grad()
        policy_loss(token_logp(tree, logits)[y], old, advantages, mask).backward()
        value_loss(critic[tree.state_index[y]], values, returns, mask).backward()
        for optimizer in optimizers:
            optimizer.step()"""),
    ("learn_dpo", "", """
steps, size, lr, _ = training
x = ref_logits.clone().requires_grad_()
m, v, ref_logp = torch.zeros_like(ref_logits), torch.zeros_like(ref_logits), response_logp(tree, ref_logits)
for t in range(steps + 1):
    yield t, x.detach().clone()
    if t < steps:  # Adam by hand
        rows = torch.randint(len(chosen), (size,), generator=generator) if size < len(chosen) else slice(None)
        a, b, logp = chosen[rows], rejected[rows], response_logp(tree, x)
        g, = torch.autograd.grad(dpo_loss(logp[a], logp[b], ref_logp[a], ref_logp[b], beta, kind), x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        size_now = (v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
        x.data -= lr * (1 - t / steps) * m / (1 - 0.9 ** (t + 1)) / size_now"""),
]
