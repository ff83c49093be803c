"""
A small GPT-2, and the two things that RLHF does with it: sample responses, and say how likely a response is.

The network is GPT-2 to the letter (learned positions, pre-norm, tanh GELU, tied embeddings), so its weights come and go (`from_gpt2`, `to_gpt2`).
Left out: dropout, because a policy whose two forward passes differ has no meaningful ratio or KL; top-k and top-p, because then the tokens
would not come from the distribution whose log-probs are scored.

What is different from a textbook GPT: padding is not computed. Between the embedding and the end, x holds the real tokens of all rows, one after
another, the shortest row first; only attention spreads them out over rows again, rows of like length together and each starting at slot 0, so that
there is nothing to mask but the future, and little of the grid is empty. The last MLP runs only on those tokens whose states are wanted.
On a CPU, short rows are attended by the formula, and in training GELU goes without its tanh: the same functions, sooner done than by PyTorch's kernels.
Left out because each gains a few per cent at most and costs clarity: one pass over the prompt that two responses share, policy and critic side by side
with a thread each.

Letters: B batch, P prompt columns, R response columns, T = P + R, V vocabulary, C embedding, H heads, D = C / H, N real tokens in the batch,
G rows of a group that is attended together, L slots of a row: in a group its longest row's real tokens, in a cache those in use,
S tokens of one decoding step, n as many as its line says.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Batch, pad_prompts


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int

    def __post_init__(self):
        if min(self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError(f"every size of a GPT is at least 1, got {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} cannot be divided into {self.n_head} heads")


# ---------------------------------------------------------------------------------------------------------------------
# the network

GROUP = 32   # rows that are attended together: fewer leave less of the grid empty, more keep the processor busier
SHORT = 200  # slots up to which a CPU is faster with the formula of attention than with PyTorch's kernel


def attend(q, k, v, mask=None):
    """
    Attention, softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, equation 1): queries (n, S, D), keys and values (n, L, D) -> (n, S, D).

    mask (n, S, L) is 0 where a query sees a key and -inf where it does not; None: S = L, and each token sees itself and those before it. Short rows
    on a CPU go by the formula as it stands, all else by PyTorch's kernel, which need not hold the weights (n, S, L).
    """
    L, D = k.shape[1:]
    if k.device.type != "cpu" or L > SHORT:
        # the kernel wants heads; with one each, its answer has no gaps in memory on any device
        q, k, v, mask = (None if x is None else x[:, None] for x in (q, k, v, mask))   # (n, 1, S or L, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[:, 0]
    if mask is None:
        mask = torch.full((L, L), -math.inf, dtype=q.dtype).triu(1)                    # 0 up to the diagonal, -inf beyond it
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D ** -0.5).softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, groups):
        """
        Attention of all real tokens x (N, C) to themselves and to those before them in their row. Returns (N, C), and their keys and values (N, 2, H, D).

        groups: (places, G, L) each; places (n,) says where in a grid of G rows of L slots, laid out flat, the group's tokens stand.
        """
        H, D = self.n_head, x.shape[1] // self.n_head
        parts, qkv = [], self.c_attn(x).view(-1, 3 * H, D)                             # (N, 3H, D)
        for part, (places, G, L) in zip(qkv.split([len(places) for places, _, _ in groups]), groups):  # (n, 3H, D) each, the group's n tokens
            grid = part.new_zeros(3 * H, G * L, D).index_copy_(1, places, part.transpose(0, 1))  # every row's tokens from slot 0 on
            y = attend(*grid.view(3, H * G, L, D))                                     # (H * G, L, D)
            parts.append(y.view(H, G * L, D).index_select(1, places))                  # (H, n, D)
        return self.c_proj(torch.cat(parts, dim=1).transpose(0, 1).flatten(1)), qkv.unflatten(1, (3, H))[:, 1:]

    def step(self, x, kv, mask):
        """
        Attention of S new tokens a row, x (B * S, C), to all that the row has read; returns (B * S, C).

        Their keys and values go into the last S of the L slots in use of kv (2, B, H, size, D); mask (B * H, S, L).
        """
        B, H, D, (S, L) = kv.shape[1], self.n_head, x.shape[1] // self.n_head, mask.shape[1:]
        qkv = self.c_attn(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)                # (3, B, H, S, D)
        kv[:, :, :, L - S:L] = qkv[1:]
        y = attend(qkv[0].flatten(0, 1), *kv[:, :, :, :L].flatten(1, 2), mask)         # (B * H, S, D)
        return self.c_proj(y.view(B, H, S, D).transpose(1, 2).reshape(B * S, -1))      # (B * S, C)


class Gelu(torch.autograd.Function):
    """
    GPT-2's GELU, x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016, section 2), for training on a CPU.

    It is x s with s = sigmoid(2u), and its slope s + x s (1 - s) 2u': no tanh, which takes twice the time of an exp. What can be is done in place,
    because a new tensor of this size costs more than the arithmetic on it.
    """
    LINEAR, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715  # 2u = LINEAR x + CUBIC x^3

    @staticmethod
    def forward(ctx, x):
        s = (x * x).mul_(Gelu.CUBIC).add_(Gelu.LINEAR).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, grad):
        x, s = ctx.saved_tensors
        y = (x * x).mul_(3 * Gelu.CUBIC).add_(Gelu.LINEAR).mul_(x)                     # x 2u'
        y.addcmul_(y, s, value=-1)                                                     # x 2u' (1 - s)
        grad = grad * s
        return grad.addcmul_(grad, y)


def gelu(x):
    return Gelu.apply(x) if x.requires_grad and x.device.type == "cpu" else F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    """The parts of one layer; `GPT.hidden` and `GPT.step` run them."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)


class Cache:
    """
    The keys and values of what each row has read so far, of the dtype and on the device of the tensor `like`. All rows end together: row b occupies
    the slots first[b] .. used - 1 of `size`.
    """

    def __init__(self, config, B, size, like):
        shape = (config.n_layer, 2, B, config.n_head, size, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)             # (layers, 2, B, H, size, D)
        self.first, self.used = torch.zeros(B, dtype=torch.long, device=like.device), 0

    def keep(self, rows):
        """Forget all rows but these (n,), in place: what is left moves to the front, and only the slots in use are copied."""
        n = len(rows)
        self.kv[:, :, :n, :, :self.used] = self.kv[:, :, rows, :, :self.used]
        self.kv, self.first = self.kv[:, :, :n], self.first[rows]


class GPT(nn.Module):
    """GPT(config)(ids, prompt_lens) -> logits (B, T, V). See `hidden` for the arguments."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                # GPT-2's initialisation; what is added to the residual stream is smaller, the deeper the network
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def head(self, x):
        """Hidden states (..., C) -> logits (..., V); the output matrix is the token embedding."""
        return F.linear(x, self.wte.weight)

    def forward(self, ids, prompt_lens=None, response_lens=None, P=None):
        return self.head(self.hidden(ids, prompt_lens, response_lens, P))

    def hidden(self, ids, prompt_lens=None, response_lens=None, P=None, wanted=None, cache=None):
        """
        The last hidden states of sequences in the batch layout: (B, T, C) with zeros at pads, or (n, C) of the n cells that are wanted.

        ids (B, T); prompt_lens (B,) real tokens of each left-padded prompt (None: no left padding, P = 0), in P columns (None: the longest prompt);
        response_lens (B,) real tokens after column P (None: all of them). wanted (B, T) is True at real tokens only; their states come in
        reading order, and the others skip the last MLP. With a cache, the keys and values of column c are left in its slot c for `step`; it takes no
        response_lens, because all rows have to end in one column. Raises ValueError for both together, and when a row is longer than the block.
        """
        B, T = ids.shape
        if prompt_lens is None:
            prompt_lens = ids.new_zeros(B)
            P = 0
        elif P is None:
            P = int(prompt_lens.max())
        first = P - prompt_lens                                                        # (B,) column of the first real token
        stop = P + response_lens if response_lens is not None else first.new_full((B,), T)  # (B,) one past the last real token
        if cache is not None and response_lens is not None:
            raise ValueError("a cache is filled from rows that end in one column: leave out response_lens")
        lengths, order = (stop - first).sort(stable=True)                              # (B,) each, the shortest row first
        sizes = lengths.tolist()  # a GPU is waited for here: all shapes follow from these
        N = sum(sizes)
        if sizes[-1] > self.config.block_size:
            raise ValueError(f"a sequence of {sizes[-1]} tokens does not fit a block of {self.config.block_size}")
        rows = order.repeat_interleave(lengths, output_size=N)                         # (N,) the row of each real token
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=N)  # (N,) where its row begins among them
        positions = torch.arange(N, device=ids.device) - starts                        # (N,) 0 on each row's first real token
        columns = first[rows] + positions                                              # (N,)
        # a GPU attends all rows at once: there it is the number of kernels that takes the time, and not what they compute
        groups, at, size = [], 0, GROUP if ids.device.type == "cpu" else B
        for part in lengths.split(size):
            G, n = len(part), sum(sizes[:len(part)])
            L, sizes = sizes[G - 1], sizes[G:]
            places = (torch.arange(G, device=ids.device) * L).repeat_interleave(part, output_size=n) + positions[at:at + n]  # (n,)
            groups, at = [*groups, (places, G, L)], at + n
        cells = rows * T + columns                                                     # (N,) where each real token stands in ids
        if wanted is not None:
            # cells, inverted: where x has the token of each cell; a pad's is no place in x, so that wanting one is an error
            in_x = cells.new_full((B * T,), N).index_copy_(0, cells, torch.arange(N, device=ids.device))  # (B * T,)
            wanted = in_x[wanted.flatten()]                                            # (n,) places in x, in reading order
        if cache is not None:
            cache.first, cache.used = first, T

        x = self.wte(ids[rows, columns]) + self.wpe(positions)                         # (N, C)
        for layer, block in enumerate(self.h):
            y, kv = block.attn(block.ln_1(x), groups)
            if cache is not None:
                cache.kv[layer, :, rows, :, columns] = kv
            x = x + y
            if wanted is not None and block is self.h[-1]:
                x = x.index_select(0, wanted)                                          # (n, C)
            x = x + block.mlp(block.ln_2(x))
        x = self.ln_f(x)
        return x if wanted is not None else x.new_zeros(B * T, x.shape[1]).index_copy_(0, cells, x).view(B, T, x.shape[1])

    def step(self, ids, cache):
        """The next S tokens of every row, ids (B, S), after what the cache holds -> hidden states (B, S, C)."""
        B, S = ids.shape
        slots = torch.arange(cache.used + S, device=ids.device)                        # (L,)
        new, first = slots[cache.used:, None], cache.first[:, None, None]              # (S, 1) the slots of these tokens, (B, 1, 1)
        unseen = (slots < first) | (slots > new)                                       # (B, S, L)
        mask = torch.zeros(unseen.shape, dtype=self.wte.weight.dtype, device=ids.device).masked_fill(unseen, -math.inf)
        mask = mask.repeat_interleave(self.config.n_head, dim=0)                       # (B * H, S, L)
        x = (self.wte(ids) + self.wpe((new - first).squeeze(2))).view(B * S, -1)       # (B * S, C)
        for layer, block in enumerate(self.h):
            x = x + block.attn.step(block.ln_1(x), cache.kv[layer], mask)
            x = x + block.mlp(block.ln_2(x))
        cache.used += S
        return self.ln_f(x).view(B, S, -1)


# ---------------------------------------------------------------------------------------------------------------------
# what RLHF does with it

def log_softmax(logits, temperature=1.0):
    """Log-probs of logits / temperature, in float32 or better: bfloat16 has three digits, and a ratio of 1.03 is already a step of PPO."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def sample(probs, generator=None):
    """One index a row (B, 1), drawn with the given probabilities (B, V): where a uniform number in (0, 1] falls in the cumulative sum."""
    cumulative = probs.cumsum(dim=-1)
    uniform = 1 - torch.rand(len(probs), 1, generator=generator, dtype=probs.dtype, device=probs.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:])  # never an index of probability 0


@dataclass
class Rollout(Batch):
    logp: torch.Tensor = None      # (B, R) log-prob of each sampled token under the policy that sampled it, 0 outside the mask
    finished: torch.Tensor = None  # (B,) True where the response ended with E, False where it was cut at the cap


def sample_tokens(model, x, cache, max_new_tokens, temperature, generator, end, pad, watch=True):
    """
    The loop over tokens, from the states x (B, C) that have read the prompts and the cache that they left. Returns right (B, max_new_tokens), the ids
    up to E and `pad` beyond it, logp (B, max_new_tokens), response_lens (B,) and finished (B,). watch: drop rows that have ended, and stop after the
    last; a GPU is then waited for at every token.
    """
    B, device = len(x), x.device
    right = torch.full((B, max_new_tokens), pad, device=device)
    logp = torch.zeros(B, max_new_tokens, dtype=torch.promote_types(x.dtype, torch.float32), device=device)
    rows = torch.arange(B, device=device)                                              # (n,) the rows that are still decoded
    alive = torch.ones(B, dtype=torch.bool, device=device)                             # (n,) False where one has ended and waits to be dropped
    for t in range(max_new_tokens):
        step_logp = log_softmax(model.head(x), temperature)                            # (n, V)
        token = sample(step_logp.exp(), generator)                                     # (n, 1)
        right[rows, t] = token[:, 0]
        logp[rows, t] = step_logp.gather(1, token)[:, 0]
        alive &= token[:, 0] != end
        running = int(alive.sum()) if watch else B
        if running == 0 or t + 1 == max_new_tokens:
            break
        if running < 0.8 * len(rows):  # shrinking copies the cache, so it waits until it pays
            kept = alive.nonzero().squeeze(1)
            rows, token, alive = rows[kept], token[kept], alive[kept]
            cache.keep(kept)
        x = model.step(token, cache)[:, 0]                                             # (n, C)
    ends = right == end                                                                # (B, max_new_tokens)
    real = ends.cumsum(dim=1) - ends.long() == 0                                       # (B, max_new_tokens) True up to the first E
    return right.where(real, pad), logp.where(real, 0), real.sum(dim=1), ends.any(dim=1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None, end=None, pad=None, P=0, loop=sample_tokens):
    """
    Sample one response for each prompt, token by token, until E or until `max_new_tokens` (the horizon of the MDP; a cut response has no E).

    prompts: lists of token ids, at least one id each. temperature > 0 divides the logits; `response_logprobs` takes the same one.
    generator: a torch.Generator on the model's device. end, pad: ids of E and PAD; by default the last but one and the last of the vocabulary,
    as `data.make_tokenizer` makes them. P: prompt columns, if more than the longest prompt needs. loop: `sample_tokens`, or a graph of it
    (graphs.py). Raises ValueError when there is no prompt, one is empty or the padded prompts do not fit the block together with their responses, and when
    `max_new_tokens` is below 1 or the temperature not above 0.
    Returns a Rollout on the model's device, as many response columns as the longest response has.
    """
    V = model.config.vocab_size
    end, pad = V - 2 if end is None else end, V - 1 if pad is None else pad
    device = model.wte.weight.device
    left, prompt_lens = pad_prompts(prompts, pad, device, P)                           # (B, P)
    B, P = left.shape
    if max_new_tokens < 1 or P + max_new_tokens > model.config.block_size:
        raise ValueError(f"prompts in {P} columns and {max_new_tokens} new tokens (at least 1) do not fit a block of {model.config.block_size}")
    if not temperature > 0:
        raise ValueError(f"the temperature is above 0, got {temperature}")
    cache = Cache(model.config, B, P + max_new_tokens, model.wte.weight)
    x = model.hidden(left, prompt_lens, P=P, wanted=(torch.arange(P, device=device) == P - 1).expand(B, P), cache=cache)  # (B, C)
    right, logp, response_lens, finished = loop(model, x, cache, max_new_tokens, temperature, generator, end, pad)
    R = int(response_lens.max())
    return Rollout(torch.cat([left, right[:, :R]], 1), prompt_lens, response_lens, P, logp[:, :R], finished)


def response_hidden(model, batch):
    """Hidden states (n, C) from which each of the n real response tokens is predicted: THE slice, columns P-1 to T-2, under the response mask."""
    # the last token of a response predicts nothing, so it is not read
    wanted = F.pad(batch.mask, (batch.P - 1, 0))                                       # (B, T - 1)
    return model.hidden(batch.ids[:, :-1], batch.prompt_lens, batch.response_lens - 1, batch.P, wanted)


def spread(x, mask):
    """The values x (n,) of the real response tokens, put back in their places: (B, R), zeros outside the mask."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def response_logprobs(model, batch, temperature=1.0):
    """
    log pi(token | everything before it), in nats, of every response token of a batch: (B, R), zeros outside the mask.

    The sampler's twin: same slice, same temperature, same positions, so on a fresh rollout it returns the rollout's own log-probs.
    """
    logp = log_softmax(model.head(response_hidden(model, batch)), temperature)         # (n, V)
    logp = logp.gather(1, batch.responses[batch.mask][:, None]).squeeze(1)             # (n,)
    return spread(logp, batch.mask)                                                    # (B, R)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2 weights

def to_gpt2(model):
    """The weights under the names and in the orientation of Hugging Face's GPT2LMHeadModel, whose linear layers are stored transposed."""
    state = {f"transformer.{name}": (w.t() if ".c_" in name and w.dim() == 2 else w) for name, w in model.state_dict().items()}
    return {**state, "lm_head.weight": model.wte.weight.detach()}


def from_gpt2(state, n_head):
    """A GPT with the weights of a GPT-2 state dict (as `to_gpt2` gives it); the sizes are read off the weights, the number of heads cannot be."""
    state = {name.removeprefix("transformer."): w for name, w in state.items()}
    (V, C), n_layer = state["wte.weight"].shape, 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    model = GPT(GPTConfig(V, state["wpe.weight"].shape[0], n_layer, n_head, C))
    model.load_state_dict({name: (state[name].t() if ".c_" in name and w.dim() == 2 else state[name])
                           for name, w in model.state_dict().items()})
    return model
