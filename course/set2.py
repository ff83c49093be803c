"""
Set 2, a policy that speaks: inputs of the cases, and how each function is called. Expected values come from the true
code. The networks are tiny and in float64.

Letters: as in model.py.
"""

import torch
from draw import PAD, VOCAB, Draw, E, Trunk, batch_of, network, raised

import model as gpt
from data import pad_prompts
from pipeline import stages
from pipeline.progress import ProgressBar


def draw_attention_mask(draw):
    return [dict(start=torch.tensor([0, 1, draw.integer(2, 3)]), past=0, T=4),
            dict(start=torch.tensor([0, draw.integer(1, 2), 3]), past=3, T=2)]


def run_attention_mask(case):
    return dict(mask=gpt.attention_mask(case["start"], case["past"], case["T"]))


def draw_forward(draw):
    mask = torch.ones(1, 1, 4, 4).tril().bool()
    return [dict(seed=draw.integer(0, 10 ** 6), x=draw.normal(2, 4, 8), mask=mask, cached=0, heads=heads)
            for heads in (2, 4)] + [
        dict(seed=draw.integer(0, 10 ** 6), x=draw.normal(2, 4, 8), mask=mask, cached=2, heads=2)]


def run_forward(case):
    config = gpt.GPTConfig(VOCAB, 8, 1, case["heads"], 8)
    layer = network(case["seed"], block=8, heads=case["heads"]).h[0].attn
    x, mask, cached = case["x"], case["mask"], case["cached"]
    if not cached:
        return dict(y=layer(x, mask))
    cache = gpt.KVCache(config, len(x), 4, x)
    first = layer(x[:, :cached], mask[:, :, :cached, :cached], cache)
    return dict(first=first, then=layer(x[:, cached:], mask[:, :, cached:], cache))


def draw_append(draw):
    return [dict(parts=[draw.normal(2, 2, 2, T, 3) for T in (2, 1, 1)])]  # (k or v, B, H, T, D)


def run_append(case):
    cache = gpt.KVCache(gpt.GPTConfig(5, 8, 1, 2, 6), 2, 4, case["parts"][0])
    return dict(read=[[x.clone() for x in cache.append(*part)] for part in case["parts"]], used=cache.used)


def draw_hidden(draw):
    texts = draw.texts(B=4)
    seed = draw.integer(0, 10 ** 6)
    return [dict(seed=seed, texts=texts, kind=kind) for kind in ("padded", "cached", "block", "device")]


def run_hidden(case):
    batch = batch_of(case["texts"])
    model = network(case["seed"], block=12)
    B, T = batch.ids.shape
    real = torch.arange(T) >= batch.start[:, None]
    if case["kind"] == "padded":
        x = model.hidden(batch.ids, batch.start)
        return dict(hidden=torch.where(real[:, :, None], x, 0.0), unpadded=model.hidden(batch.ids[:1]))
    if case["kind"] == "cached":
        caches = [gpt.KVCache(model.config, B, T, model.wte.weight) for _ in model.h]
        parts = [model.hidden(ids, batch.start, caches) for ids in batch.ids.split([5, 1, T - 6], dim=1)]
        return dict(hidden=torch.where(real[:, :, None], torch.cat(parts, dim=1), 0.0))
    if case["kind"] == "block":  # 12 columns fit; on the left, padding does not count
        ids = torch.zeros(2, 14, dtype=torch.long)
        caches = [gpt.KVCache(model.config, 2, 14, model.wte.weight) for _ in model.h]
        model.hidden(ids[:, :12], torch.tensor([0, 0]), caches)
        return dict(too_long=raised(model.hidden, ids), padded=raised(model.hidden, ids, torch.tensor([2, 3])),
                    one_too_long=raised(model.hidden, ids, torch.tensor([2, 1])),
                    with_cache=raised(model.hidden, ids[:, 12:13], torch.tensor([0, 0]), caches))
    far = model.to("meta")  # no value can be read on this device, as none should be on a GPU
    return dict(shape=list(far.hidden(batch.ids.to("meta"), batch.start.to("meta")).shape))


def draw_response_hidden(draw):
    texts = draw.texts()
    batch = batch_of(texts)
    return [dict(texts=texts, states=draw.normal(*batch.ids.shape, 3))]


def run_response_hidden(case):
    x = gpt.response_hidden(Trunk(case["states"]), batch_of(case["texts"]))
    return dict(hidden=x, contiguous=x.is_contiguous())


def draw_log_softmax(draw):
    x = 3 * draw.normal(2, 3, 5)
    return [dict(logits=x, temperature=1.0), dict(logits=x, temperature=draw.between(0.3, 0.8)),
            dict(logits=x.to(torch.bfloat16), temperature=1.7), dict(logits=100 * x, temperature=0.1)]


def run_log_softmax(case):
    logp = gpt.log_softmax(case["logits"], case["temperature"])
    return dict(dtype=str(logp.dtype), logp=logp)


def draw_generate(draw):
    prompts = draw.texts(B=24)["prompts"]
    seed = draw.integer(0, 10 ** 6)
    often = [dict(seed=draw.integer(0, 10 ** 6), prompts=draw.texts(B=24)["prompts"], temperature=draw.between(1.5, 2),
                  kind="sample") for _ in range(3)]  # hot, so that some rows end early and are dropped
    return [*often, dict(seed=seed, prompts=prompts, temperature=draw.between(0.5, 0.8), kind="sample"),
            dict(seed=seed, prompts=prompts[:2], temperature=draw.between(1.3, 1.8), kind="frequencies"),
            dict(seed=seed, prompts=prompts[:2], temperature=1.0, kind="errors")]


def run_generate(case):
    model = network(case["seed"], std=0.4)
    generator = Draw(str(case["seed"])).generator
    prompts, temperature = case["prompts"], case["temperature"]
    if case["kind"] == "errors":
        return dict(temperature_of_0=raised(gpt.generate, model, prompts, 4, 0.0),
                    empty_prompt=raised(gpt.generate, model, [[]], 4), block=raised(gpt.generate, model, prompts, 24))
    if case["kind"] == "frequencies":
        rollout = gpt.generate(model, [prompts[0]] * 4000, 1, temperature, generator)
        logits = model.head(model.hidden(torch.tensor([prompts[0]])))[0, -1]
        p = torch.softmax(logits / temperature, dim=0)
        share = torch.bincount(rollout.responses[:, 0], minlength=VOCAB) / 4000
        return dict(first_tokens_follow_the_policy=bool(((share - p).abs() < 5 * (p / 4000).sqrt() + 1e-3).all()))
    rollout = gpt.generate(model, prompts, 7, temperature, generator)
    left, lens = pad_prompts(prompts, PAD)
    responses, mask = rollout.responses, rollout.mask
    ends = (responses == E) & mask
    last = rollout.response_lens - 1
    at_the_end = responses[torch.arange(len(left)), last] == E
    logits = model.head(model.hidden(rollout.ids, rollout.start))[:, rollout.P - 1:-1]
    logp = torch.log_softmax(logits / temperature, dim=-1).gather(2, responses[:, :, None])[:, :, 0]
    return dict(prompts_kept=bool((rollout.ids[:, :rollout.P] == left).all() and (rollout.prompt_lens == lens).all()),
                nothing_after_the_end=bool((responses[~mask] == PAD).all()), columns=rollout.R <= 7,
                no_end_before_the_last_token=bool((ends.sum(dim=1) <= at_the_end).all()),
                cut_only_at_the_cap=bool((at_the_end | (rollout.response_lens == 7)).all()),
                finished_means_end=bool((rollout.finished == at_the_end).all()),
                error_of_logp=(torch.where(mask, logp, 0.0) - rollout.logp).abs().max())


def draw_train_sft(draw):
    texts = draw.texts(B=7)
    return [dict(seed=draw.integer(0, 10 ** 6), examples=[list(pair) for pair in zip(*texts.values())], steps=26)]


def run_train_sft(case):
    class config:
        batch_size = 3

    rows, saved = [], []
    network_ = network(case["seed"], std=1.5)  # so far off that gradients are longer than 1
    last = stages.train_sft(network_, case["examples"], case["steps"], 3e-2, config, PAD, case["seed"], "sft",
                            lambda **row: rows.append(row["loss"]), progress=quiet(saved))
    weights = sum((parameter.detach() ** 2).sum() for parameter in network_.parameters())
    return dict(losses=rows, returned=float(last), weights=float(weights), saved=saved)


def quiet(saved, start=0):
    """A progress bar that shows nothing, notes what it was asked to save, and begins at a step as if resumed."""
    def bar(n, name, unit, parts):
        saved.append(sorted(parts))
        shown = ProgressBar(n, name, unit)
        shown.quiet, shown.start = True, start
        return shown
    return bar
