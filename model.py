"""
A small GPT-2, and the two things that RLHF does with it: sample responses, and score how likely a response is.

Left out of GPT-2: dropout, because two forward passes would differ, and no ratio or KL would mean anything.
Left out of sampling: top-k and top-p, because the tokens would not follow the distribution whose log-probs are scored.

Letters: B batch, P prompt columns, R response columns, T columns read now, L columns read so far, V vocabulary,
C embedding, H heads, D = C / H, n rows not dropped yet, b rows of a part of the batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Batch, by_length, pad_prompts


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int  # a multiple of n_head


# ---- the network ----------------------------------------------------------------------------------

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache=None):
        """x (B, T, C); mask (B or 1, 1, T, L), True where a query may look; a cache adds earlier keys. -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)    # (B, 3H, T, D)
        q, k, v = qkv.chunk(3, dim=1)                                                         # (B, H, T, D) each
        if cache is not None:  # the new queries look at the keys of all columns so far
            k, v = cache.append(k, v)                                                         # (B, H, L, D) each
        # is_causal=True would do without padding: it hides the future, but not the pads on the left
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                           # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU is the tanh approximation


class Block(nn.Module):
    """Attention mixes the columns, the MLP works on each column alone. Both add to the residual stream x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)  # norm first: the residual stream itself is never normalised
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """The keys and values of one layer for all columns read so far, so that a new token computes only its own."""

    def __init__(self, config, B, columns, like):
        """Make room for B rows of so many columns, of the dtype and on the device of the tensor `like`."""
        shape = (2, B, config.n_head, columns, config.n_embd // config.n_head)
        # all columns at once: to append a column to a full tensor copies it, at every token
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.used = 0  # columns in use

    def append(self, k, v):
        """Add keys and values of T new columns, (B, H, T, D) each. Returns both for all columns, (B, H, L, D) each."""
        old = self.used
        self.used = old + k.shape[2]
        self.kv[0, :, :, old:self.used] = k
        self.kv[1, :, :, old:self.used] = v
        return self.kv[:, :, :, :self.used]

    def keep(self, rows):
        """Drop all rows but these: their responses have ended."""
        self.kv = self.kv[:, rows]


def attention_mask(start, past, T):
    """
    Which of L = past + T columns the last T may see, bool (B, 1, T, L): no future, nothing left of `start` (B,).

    One mask serves scoring and the reading of prompts (past = 0, T = all columns) and decoding (past = the columns in
    the cache, T = 1). So sampled and scored log-probs agree.
    """
    keys = torch.arange(past + T, device=start.device)                                        # (L,)
    queries = keys[past:, None]                                                               # (T, 1)
    real = keys >= start[:, None, None]                                                       # (B, 1, L)
    # a pad sees itself, because it sees nothing else, and a softmax over nothing is NaN
    mask = ((keys <= queries) & real) | (keys == queries)
    return mask[:, None]


class GPT(nn.Module):
    """GPT(config)(ids, start) -> logits (B, T, V). See `hidden` for the arguments."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.width, self.block_size = config.n_embd, config.block_size
        self.micro_batch = 0  # most rows at a time in scoring, see `by_length`; 0: no limit
        self.end, self.pad = config.vocab_size - 2, config.vocab_size - 1  # ids of E and PAD: the tokenizer's last two
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output matrix, which saves V x C weights
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # 2 n_layer outputs add up in the residual stream: GPT-2 scales them so that their sum keeps its size
                depth = 2 * config.n_layer if "c_proj" in name else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    @property
    def device(self):
        return self.wte.weight.device

    @property
    def dtype(self):
        return self.wte.weight.dtype

    def forward(self, ids, start=None):
        return self.head(self.hidden(ids, start))

    def head(self, x):
        """Turn hidden states (..., C) into logits (..., V). The output matrix is the token embedding."""
        return F.linear(x, self.wte.weight)

    def caches(self, B, columns):
        """Empty caches for `hidden`, one a layer, with room for B rows of so many columns."""
        return [KVCache(self.config, B, columns, self.wte.weight) for _ in self.h]

    def hidden(self, ids, start=None, caches=None):
        """
        Compute the last hidden states (B, T, C) of ids (B, T). At a pad they mean nothing.

        start (B,): the column of each row's first real token; None when no row is padded on the left.
        caches: one KVCache a layer, of the columns read before; ids are then the columns that follow.
        Raises ValueError when a row's columns, from `start` to the last one, do not fit the block.
        """
        B, T = ids.shape
        past = caches[0].used if caches else 0
        if start is None:
            start = torch.zeros(B, dtype=torch.long, device=ids.device)
        # tested in this order, because int(start.min()) makes a GPU wait
        if past + T > self.block_size and past + T - int(start.min()) > self.block_size:
            raise ValueError(f"a row of more than {self.block_size} columns does not fit the block")
        columns = torch.arange(past, past + T, device=ids.device)                             # (T,)
        # positions count from the first real token, so padding on the left changes nothing
        positions = (columns - start[:, None]).clamp(min=0)                                   # (B, T) 0 at `start`
        mask = attention_mask(start, past, T)                                                 # (B, 1, T, L)
        x = self.wte(ids) + self.wpe(positions)                                               # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, mask, caches[layer] if caches else None)
        return self.ln_f(x)  # every block has added to x: without a norm, the logits would grow with the depth


# ---- sampling -------------------------------------------------------------------------------------

@dataclass
class SamplingConfig:
    response_tokens: int = 48  # most tokens of a response, the horizon of the MDP; 64 with --data
    temperature: float = 1.0   # of sampling, and of all log-probs and KLs


def log_softmax(logits, temperature=1.0):
    """Log-probs of logits / temperature, in float32 or better: bfloat16 has under three digits, too few for a ratio."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # not softmax(...).log(): a small probability is rounded to 0, and its log-prob would be -inf
    return torch.log_softmax(logits.to(dtype) / temperature, dim=-1)


def sample(probs, generator=None):
    """Draw one index per row (B, 1) from probs (B, V). Like torch.multinomial, but faster on a CPU."""
    cumulative = probs.cumsum(dim=-1)                                                         # (B, V)
    uniform = 1 - torch.rand(len(probs), 1, generator=generator, dtype=probs.dtype, device=probs.device)  # (B, 1) > 0
    # the first index whose cumulative sum reaches the draw. A draw of 0 would stop at an index of probability 0
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:])  # the last sum is 1 only up to rounding


@dataclass
class Rollout(Batch):
    logp: torch.Tensor      # (B, R) log-prob of each sampled token under the policy, 0 outside the mask
    finished: torch.Tensor  # (B,) True where the response ended with E, False where it was cut


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None):
    """
    Sample a response to each prompt (a list of ids), token by token, until E or until max_new_tokens: a Rollout.

    temperature > 0 divides the logits. generator: a torch.Generator on the model's device.
    Raises ValueError for an empty prompt, for no tokens or more than fit the block, and for a temperature of 0 or less.
    """
    device, end, pad = model.device, model.end, model.pad
    left, prompt_lens = pad_prompts(prompts, pad, device)                                     # (B, P), (B,)
    B, P = left.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if P + max_new_tokens > model.block_size:  # found here, and not after half of the tokens
        raise ValueError(f"{P} prompt columns and {max_new_tokens} new tokens do not fit a block of {model.block_size}")
    if not temperature > 0:  # at 0 the policy is greedy: the token it takes has the log-prob 0, all others -inf
        raise ValueError(f"the temperature must be above 0, got {temperature}")

    caches = model.caches(B, P + max_new_tokens)
    responses = torch.full((B, max_new_tokens), pad, device=device)
    logp = torch.zeros(B, max_new_tokens, dtype=torch.promote_types(model.dtype, torch.float32), device=device)
    rows = torch.arange(B, device=device)                                                     # (n,) rows in the caches
    start = P - prompt_lens                                                                   # (n,)
    running = torch.ones(B, dtype=torch.bool, device=device)                                  # (n,) False after E
    ids = left  # read first: all prompts at once. After that, one new token at a time
    for t in range(max_new_tokens):
        # padding is on the left, so the last column is the last token of every prompt, however long
        x = model.hidden(ids, start, caches)[:, -1]                                           # (n, C)
        # the temperature is part of the policy: what scores these tokens has to divide by it too
        step_logp = log_softmax(model.head(x), temperature)                                   # (n, V)
        ids = sample(step_logp.exp(), generator)                                              # (n, 1)
        responses[rows, t] = ids[:, 0]
        # kept, because PPO compares later policies with the one that has sampled
        logp[rows, t] = step_logp.gather(1, ids)[:, 0]
        running = running & (ids[:, 0] != end)
        n_running = int(running.sum())  # a GPU waits here, once a token
        if n_running == 0 or t + 1 == max_new_tokens:
            break
        if n_running < 0.8 * len(rows):  # dropping rows copies the caches: wait until it pays
            kept = running.nonzero()[:, 0]
            rows, start, running, ids = rows[kept], start[kept], running[kept], ids[kept]
            for cache in caches:
                cache.keep(kept)

    # rows that had ended were sampled further until they were dropped: erase all tokens after the first E.
    # E itself stays, with its log-prob: to stop is an action, which the policy has to learn
    is_end = responses == end                                                                 # (B, max_new_tokens)
    mask = (is_end.cumsum(dim=1) - is_end.long()) == 0                                        # True until E and on it
    response_lens = mask.sum(dim=1)                                                           # (B,)
    R = int(response_lens.max())  # if all rows ended early, the last columns are padding
    ids = torch.cat([left, torch.where(mask, responses, pad)[:, :R]], dim=1)                  # (B, P + R)
    return Rollout(ids, prompt_lens, response_lens, P, torch.where(mask, logp, 0.0)[:, :R], is_end.any(dim=1))


# ---- scoring --------------------------------------------------------------------------------------

def response_hidden(model, batch):
    """The hidden states (B, R, C) from which the response tokens are predicted: one column to the left of each."""
    # the last column is left out: it predicts a token that was never sampled
    # contiguous: a strided product may round differently in a trained and in a frozen network of equal weights
    return model.hidden(batch.ids, batch.start)[:, batch.P - 1:-1].contiguous()


def response_logprobs(model, batch, temperature=1.0):
    """log pi(token | all tokens before it), in nats, of every response token: (B, R), zeros outside the mask."""
    def score(part):
        logp = log_softmax(model.head(response_hidden(model, part)), temperature)             # (b, R, V)
        logp = logp.gather(2, part.responses[:, :, None])[:, :, 0]                            # (b, R) of the tokens
        return torch.where(part.mask, logp, 0.0)  # not logp * mask: -inf at a pad would become NaN
    return by_length(score, batch, model.micro_batch)
