"""Set 2, a policy that speaks: inputs of the cases, and how some functions are called. Letters: as in model.py."""

import torch
from draw import PAD, VOCAB, E, batch_of, called, network, raised

import model as gpt
from data import pad_prompts


def draw_attention_mask(draw):
    return [dict(start=torch.tensor([0, 1, draw.integer(2, 3)]), past=0, T=4),
            dict(start=torch.tensor([0, draw.integer(1, 2), 4]), past=3, T=2)]


def draw_append(draw):
    return [dict(parts=[draw.normal(2, 2, 2, T, 4) for T in (2, 1, 2)])]  # (k or v, B, H, T, D)


def run_append(case):
    cache = gpt.KVCache(gpt.GPTConfig(5, 8, 1, 2, 8), 2, 5, case["parts"][0])
    read = [[x.clone() for x in cache.append(*part)] for part in case["parts"][:2]]
    cache.keep(torch.tensor([1]))
    return dict(read=read, one_row=list(cache.append(*case["parts"][2][:, 1:])), used=cache.used)


def draw_forward(draw):
    """Masks of left padding and of anything else; then the same columns in three parts, with a cache."""
    causal = torch.ones(4, 4).tril().bool()
    padded = causal & (torch.arange(4) >= torch.tensor([0, 2])[:, None, None]) | torch.eye(4).bool()
    other = draw.normal(2, 1, 4, 4) > 0
    masks = (padded[:, None], other | torch.eye(4).bool(), causal[None, None])
    cases = [dict(seed=draw.seed(), x=draw.normal(2, 4, 8), mask=mask, heads=heads, cached=False)
             for mask, heads in zip(masks, (2, 4, 1))]
    return [*cases, dict(cases[0], x=draw.normal(2, 4, 8), cached=True, part="with a cache")]


def run_forward(case):
    model, x, mask = network(case["seed"], heads=case["heads"]), case["x"], case["mask"]
    layer = model.h[0].attn
    if not case["cached"]:
        return called(lambda layer, x, mask: layer(x, mask), dict(layer=layer, x=x, mask=mask))
    cache, _ = model.caches(len(x), 4)
    return dict(parts=[layer(x[:, a:b], mask[:, :, a:b, :b], cache) for a, b in ((0, 1), (1, 3), (3, 4))])


def draw_hidden(draw):
    texts, seed = draw.texts(B=4), draw.seed()
    return [dict(seed=seed, texts=texts, part=part) for part in
            ("padded rows", "with a cache", "too many columns", "no value is read")]


def run_hidden(case):
    batch = batch_of(case["texts"])
    model = network(case["seed"], block=12)
    B, T = batch.ids.shape
    real = torch.arange(T) >= batch.start[:, None]
    if case["part"] == "padded rows":
        found = called(lambda model: torch.where(real[:, :, None], model.hidden(batch.ids, batch.start), 0.0),
                       dict(model=model))
        return dict(found, unpadded=model.hidden(batch.ids[:1]))
    if case["part"] == "with a cache":
        def in_parts(ids, start):
            caches = model.caches(len(ids), T)
            return torch.cat([model.hidden(x, start, caches) for x in ids.split([5, 1, T - 6], dim=1)], dim=1)
        return dict(hidden=torch.where(real[:, :, None], in_parts(batch.ids, batch.start), 0.0),
                    unpadded=in_parts(batch.ids[:1], None))
    if case["part"] == "too many columns":  # 12 columns fit; on the left, padding does not count
        ids = torch.zeros(2, 14, dtype=torch.long)
        caches = model.caches(2, 14)
        model.hidden(ids[:, :12], torch.tensor([0, 0]), caches)
        return dict(too_long=raised(model.hidden, ids), padded=raised(model.hidden, ids, torch.tensor([2, 3])),
                    one_too_long=raised(model.hidden, ids, torch.tensor([2, 1])),
                    with_cache=raised(model.hidden, ids[:, 12:13], torch.tensor([0, 0]), caches))
    far = model.to("meta")  # no value can be read on this device, as none should be on a GPU
    return dict(shape=list(far.hidden(batch.ids.to("meta"), batch.start.to("meta")).shape))


def draw_response_hidden(draw):
    case = dict(model=draw.seed(), batch=draw.texts())
    return [case, dict(case, part="contiguous")]


def run_response_hidden(case):
    model, batch = network(case["model"]), batch_of(case["batch"])
    if "part" in case:  # of a wrong slice it is worth nothing
        x = gpt.response_hidden(model, batch)
        return dict(output=x, contiguous=x.is_contiguous())
    return called(gpt.response_hidden, dict(model=model, batch=batch))


def draw_log_softmax(draw):
    x = 3 * draw.normal(2, 3, 5)
    return [dict(logits=x, temperature=1.0), dict(logits=x, temperature=draw.between(0.3, 0.8)),
            dict(logits=100 * x, temperature=0.1), dict(logits=x.to(torch.bfloat16), temperature=1.7, part="bfloat16")]


def draw_generate(draw):
    hot = [dict(seed=draw.seed(), prompts=draw.texts(B=24)["prompts"], temperature=draw.between(1.5, 2),
                part="sampling") for _ in range(3)]  # so that some rows end early and are dropped
    usual = dict(seed=draw.seed(), prompts=draw.texts(B=24)["prompts"], temperature=draw.between(0.5, 0.8))
    warm = dict(usual, prompts=usual["prompts"][:2], temperature=draw.between(1.3, 1.8))
    return [*hot, dict(usual, part="sampling"), dict(warm, part="the distribution"), dict(warm, part="the generator"),
            dict(warm, part="errors")]


def run_generate(case):
    model = network(case["seed"], std=0.4)
    prompts, temperature = case["prompts"], case["temperature"]

    def sampled(prompts, tokens, seed):
        return gpt.generate(model, prompts, tokens, temperature, torch.Generator().manual_seed(seed))
    if case["part"] == "errors":
        return dict(temperatures=[raised(gpt.generate, model, prompts, 4, t) for t in (0.0, -0.5)],
                    empty_prompt=raised(gpt.generate, model, [[]], 4),  # 5 columns of prompts, and a block of 24
                    tokens=[raised(gpt.generate, model, prompts, n) for n in (0, 19, 20)])
    if case["part"] == "the generator":
        torch.manual_seed(1)
        first = sampled(prompts * 9, 7, 3).ids.tolist()
        torch.manual_seed(2)
        return dict(same_seed=sampled(prompts * 9, 7, 3).ids.tolist() == first,
                    other_seed=sampled(prompts * 9, 7, 4).ids.tolist() == first)
    if case["part"] == "the distribution":
        right, P = [], len(prompts[0])
        for std, t in ((0.4, 0), (0.4, 1), (1.0, 0), (1.0, 1)):  # every token is likely, and the temperature matters
            model = network(case["seed"], std=std)
            rollout = gpt.generate(model, [prompts[0]] * 4000, 2, temperature, torch.Generator().manual_seed(5))
            ids = rollout.ids[rollout.mask[:, t]]  # of the rows that have a token in column t
            logits = model.head(model.hidden(ids[:, :P + t]))[:, -1]
            p = torch.softmax(logits / temperature, dim=1).mean(dim=0)
            share = torch.bincount(ids[:, P + t], minlength=VOCAB) / len(ids)
            right.append(bool(((share - p).abs() < 5 * (p / len(ids)).sqrt() + 1e-3).all()))
        return dict(tokens_follow_the_policy=right)
    return properties(sampled(prompts, 7, case["seed"]), model, prompts, temperature)


def properties(rollout, model, prompts, temperature):
    """Checks that hold for every rollout of at most 7 tokens, whatever was sampled."""
    left, lens = pad_prompts(prompts, PAD)
    responses, mask = rollout.responses, rollout.mask
    ends = (responses == E) & mask
    at_the_end = responses[torch.arange(len(left)), rollout.response_lens - 1] == E
    logp = gpt.response_logprobs(model, rollout, temperature)
    return dict(prompts_kept=bool((rollout.ids[:, :rollout.P] == left).all() and (rollout.prompt_lens == lens).all()),
                pads_after_the_end=bool((responses[~mask] == PAD).all()), columns=rollout.R <= 7,
                no_end_before_the_last_token=bool((ends.sum(dim=1) <= at_the_end).all()),
                cut_only_at_the_cap=bool((at_the_end | (rollout.response_lens == 7)).all()),
                finished_means_end=bool((rollout.finished == at_the_end).all()),
                logp_is_that_of_scoring=bool(torch.allclose(logp, rollout.logp, atol=1e-6)),
                dtype=str(rollout.logp.dtype), gradient=rollout.logp.requires_grad)


def draw_sft_loss(draw):
    return [dict(network=draw.seed(), batch=draw.texts(B=B)) for B in (2, 5)]
