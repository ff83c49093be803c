"""
The stages: supervised fine-tuning, and what each stage reads, trains and leaves.

A stage reads what earlier ones left in the run's folder and returns its result as text. Its docstring is its heading.
"""

import copy
import json
import math
import random

import torch

import world
from checks import check_trains, finite
from data import UserError, collate, decode, end_id, frequent_pieces, pad_id
from dpo import train_dpo
from evaluate import reward_accuracy, sample_policy
from grpo import train_grpo
from model import GPT, GPTConfig, response_logprobs
from pipeline.limits import need
from pipeline.page import page, watcher
from pipeline.progress import ProgressBar
from pipeline.report import AT_CHANCE, number, report
from pipeline.run import SPLITS
from pipeline.tokens import KEYS, describe, unpack
from ppo import train_ppo
from reward import RewardModel, normalise, train_reward_model

# ---- supervised fine-tuning -----------------------------------------------------------------------

def train_sft(network, examples, steps, peak_lr, config, pad, seed, name, log, progress=ProgressBar):
    """
    Maximise the log-likelihood of the responses of examples, (prompt ids, response ids) each, over response tokens.

    The learning rate rises for about 20 steps and then falls linearly towards 0. Returns the last loss, in nats per
    token. Raises CanaryError when a loss is not finite. Pretraining uses it too, with a prompt of one E.
    """
    device = network.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    check_trains(f"{name} network", network, optimizer, peak_lr)
    bar = progress(steps, name, "step", dict(network=network, optimizer=optimizer, generator=generator))
    for step in bar:
        picks = torch.randint(len(examples), (config.batch_size,), generator=generator).tolist()
        prompts = [examples[i][0] for i in picks]
        responses = [examples[i][1] for i in picks]
        batch = collate(prompts, responses, pad, device)
        loss = -response_logprobs(network, batch).sum() / batch.mask.sum()
        value = finite(loss, name, "lower its learning rate in pipeline/config.py")
        optimizer.param_groups[0]["lr"] = peak_lr * min((step + 1) / 20, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value:.3f}", perplexity=f"{loss.exp().item():.2f}")
        log(step=step, loss=value)
    return value


# ---- the stages -----------------------------------------------------------------------------------

def run_pretrain(run, log):
    """A small GPT learns the language from messy text."""
    config = run.config
    run.make_split()
    if config.data:
        train, _ = run.texts()
        texts = [pair["prompt"] + pair[side] for pair in train for side in ("chosen", "rejected")]
        del train  # a large file: its texts are not needed a second time
    else:
        rng = random.Random(config.seed)
        texts = [world.make_document(rng) for _ in range(config.documents)]
    run.saw(texts=texts)
    run.write("tokenizer.json", json.dumps(frequent_pieces(texts, config.vocab_size)))
    tokenizer = run.tokenizer
    if config.data:
        del texts  # their ids are read below
    run.write("tokens.pt", run.encode())
    size = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd)
    network = GPT(size).to(run.device)
    end, most = end_id(tokenizer), config.block_size - 1
    if config.data:
        train = run.tokens()["train"]
        columns = [unpack(train[key]) for key in KEYS]
        encoded = (prompt + response for prompt, *responses in zip(*columns) for response in responses)
    else:
        encoded = (tokenizer.encode_ordinary(text) for text in texts)
    # a text has no prompt: it starts after an E, as if another text had just ended
    examples = [([end], (ids + [end])[:most]) for ids in encoded]
    loss = train_sft(network, examples, config.pretrain_steps, config.pretrain_lr, config, pad_id(tokenizer),
                     config.seed, "pretrain", log, run.progress)
    run.save_network("pretrained", network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters:,} parameters, {len(examples):,} texts, loss {loss:.2f} nats a token"


def run_sft(run, log):
    """The network learns to answer prompts by imitating demonstrations, good and bad alike."""
    config, tokenizer = run.config, run.tokenizer
    if config.data:
        pairs, _ = run.own_pairs("train")
        examples = [(pair["prompt"], pair["chosen"]) for pair in pairs]
    else:
        train, _ = run.texts()
        rng = random.Random(config.seed + 1)
        examples = []
        for text in rng.choices(train, k=config.demonstrations):
            review = tokenizer.encode_ordinary(" " + world.make_demonstration(rng, text["prompt"]))
            response = (review + [end_id(tokenizer)])[:config.response_tokens]  # one that is cut has no E
            examples.append((tokenizer.encode_ordinary(text["prompt"]), response))
    run.saw(examples=examples)
    network = run.load_network("pretrained").requires_grad_(True)
    loss = train_sft(network, examples, config.sft_steps, config.sft_lr, config, pad_id(tokenizer),
                     config.seed + 1, "sft", log, run.progress)
    run.save_network("sft", network)
    return f"{len(examples):,} demonstrations, loss {loss:.2f} nats a token"


def run_preferences(run, log):
    """Two answers to each prompt are compared, and only which one was preferred is kept."""
    rows, text = pairs_from_file(run) if run.config.data else pairs_from_gold(run)
    run.write("preferences.jsonl", (json.dumps(row) + "\n" for row in rows))
    for split in ("train", "heldout"):
        run.saw(**{split: [row["prompt"] for row in rows if row["split"] == split]})
    return text


def as_lists(pairs):
    return [[pair["prompt"], pair["chosen"], pair["rejected"]] for pair in pairs]


def pairs_from_file(run):
    """The user's own pairs as token ids that fit. Counts what was cut or dropped."""
    rows, totals = [], {}
    for split in SPLITS:
        pairs, counts = run.own_pairs(split)
        rows += [dict(split=split, **pair) for pair in pairs]
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    if len({row["split"] for row in rows}) < 2:
        raise UserError(f"{run.config.data}: too few pairs are left after {totals['identical_dropped']} were dropped "
                        "because their two responses are the same")
    return rows, f"{len(rows):,} pairs; {describe(totals)}"


def pairs_from_gold(run):
    """Two SFT samples for each prompt, labelled by gold with Bradley-Terry noise, `preference_probability`."""
    config, tokenizer = run.config, run.tokenizer
    rng = random.Random(config.seed + 2)
    train, heldout = run.prompts()
    prompts = [rng.choice(train) for _ in range(config.pairs)] + [rng.choice(heldout) for _ in range(512)]
    twice = [prompt for prompt in prompts for _ in range(2)]  # side by side
    responses = []
    for rollout in sample_policy(run.load_network("sft"), twice, config.response_tokens, config.temperature,
                                 config.seed + 2, "preferences"):
        responses += rollout.response_ids()
    raw = run.raw_gold(twice, responses)                                                      # (2 pairs,)
    need(raw.max() > raw.min(), "the SFT policy's answers all have the same gold, so none is better than another: "
         "train it longer with --pretrain-steps and --sft-steps")
    mean, std = raw.mean().item(), raw.std(correction=0).item()
    gold = ((raw - mean) / std).tolist()
    rows = []
    for i, prompt in enumerate(prompts):
        a, b = 2 * i, 2 * i + 1
        if responses[a] == responses[b]:  # teaches nothing
            continue
        p = preference_probability(gold[a] - gold[b], config.label_temperature, config.flip)
        chosen, rejected = (a, b) if rng.random() < p else (b, a)
        texts = [decode(tokenizer, ids) for ids in (prompt, responses[chosen], responses[rejected])]
        rows.append(dict(split="train" if i < config.pairs else "heldout", prompt=prompt, chosen=responses[chosen],
                         rejected=responses[rejected], gold=[gold[chosen], gold[rejected]], ceiling=max(p, 1 - p),
                         text=texts))
    need(len({row["split"] for row in rows}) == 2, "the SFT policy's two answers are the same to almost every prompt, "
         "so too few pairs are left: raise --pairs")
    run.write("gold.json", json.dumps(dict(mean=mean, std=std)))
    wrong = sum(row["gold"][0] < row["gold"][1] for row in rows) / len(rows)
    return rows, f"{len(rows):,} pairs; in {wrong:.0%} of them the annotator preferred the response with less gold"


def preference_probability(difference, temperature, flip):
    """The probability that a is preferred to b, given gold a - gold b. At temperature 0 the better one always wins."""
    if temperature > 0:
        p = 0.5 + 0.5 * math.tanh(difference / temperature / 2)  # the sigmoid of Bradley-Terry, without overflow
    else:
        p = 0.5 if difference == 0 else float(difference > 0)
    return p * (1 - flip) + (1 - p) * flip


def run_reward(run, log):
    """A copy of the SFT network learns which answer was preferred. Its scores are normalised on SFT samples."""
    config, pad = run.config, pad_id(run.tokenizer)
    train, heldout = run.pairs()
    run.saw(train=as_lists(train), heldout=as_lists(heldout))
    sft = run.load_network("sft")
    model = RewardModel(sft).to(run.device).requires_grad_(True)
    train_reward_model(model, train, pad, config, config.seed + 3, log, run.progress)
    model.requires_grad_(False)
    prompts, _ = run.prompts()
    prompts = [prompts[i % len(prompts)] for i in range(1024)]
    run.saw(normalise=prompts)
    samples = sample_policy(sft, prompts, config.response_tokens, config.temperature, config.seed + 3, "normalise")
    normalise(model, samples)
    run.save_network("reward", model)

    result = dict(reward_accuracy(model, heldout, pad, run.device), pairs=len(train))
    run.write("reward.json", json.dumps(result, allow_nan=False))
    text = f"accuracy {number(result['accuracy'], result['accuracy_se'], 3)} on {len(heldout)} held-out pairs"
    if not config.data:
        text += (f" (at most {result['label_ceiling']:.3f} with the labels' noise), "
                 f"{number(result['gold_accuracy'], result['gold_accuracy_se'], 3)} against the order by gold")
    return text + (f"\n     warning: {AT_CHANCE}" if result["at_chance"] else "")


def run_ppo(run, log):
    """The policy is trained on the reward model's score, and pays for its KL from the SFT policy."""
    config = run.config
    reference, reward_model = run.load_network("sft"), run.scorer()
    policy = copy.deepcopy(reference).requires_grad_(True)
    critic = run.load_network("reward").requires_grad_(True)
    prompts, _ = run.prompts()
    run.saw(prompts=prompts)
    train_ppo(policy, critic, reference, reward_model, prompts, config, config.seed + 4, log,
              None if config.data else run.rollout_gold, run.progress, watcher(run, "ppo", reward_model))
    run.save_network("ppo", policy)
    run.save_network("critic", critic)
    return run.last_metrics("ppo", ("score", "gold", "kl", "length"))


def run_grpo(run, log):
    """As PPO, but without a critic: an answer is compared with other answers to the same prompt."""
    config = run.config
    reference, reward_model = run.load_network("sft"), run.scorer()
    policy = copy.deepcopy(reference).requires_grad_(True)
    prompts, _ = run.prompts()
    run.saw(prompts=prompts)
    train_grpo(policy, reference, reward_model, prompts, config, config.seed + 4, log,  # the seed of PPO
               None if config.data else run.rollout_gold, run.progress, watcher(run, "grpo", reward_model))
    run.save_network("grpo", policy)
    return run.last_metrics("grpo", ("score", "gold", "kl", "length"))


def run_dpo(run, log):
    """Another copy of the SFT policy is fitted to the same pairs directly, without a reward model."""
    config = run.config
    reference = run.load_network("sft")
    policy = copy.deepcopy(reference).requires_grad_(True)
    pairs, _ = run.pairs()
    run.saw(pairs=as_lists(pairs))
    train_dpo(policy, reference, pairs, pad_id(run.tokenizer), config, config.seed + 5, log, run.progress)
    run.save_network("dpo", policy)
    return run.last_metrics("dpo", ("loss", "margin", "chosen_logp", "rejected_logp"))


def run_report(run, log):
    """Every policy answers the same held-out prompts, beside the best that any policy could do."""
    report(run)
    page(run)
    return f"written to {run.folder}: report.json, report.md, report.html, samples.txt, metrics.jsonl, the networks"
