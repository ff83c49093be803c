"""
minirlhf: how a language model learns from human feedback, from the first line to the last.

    python minirlhf.py                       all stages, about five minutes on two CPU cores
    python minirlhf.py --quick               the same, small, in half a minute
    python minirlhf.py --data pairs.jsonl    the same on your own pairs of {"prompt", "chosen", "rejected"}
    python minirlhf.py --stages trace --prompt "i saw this little film with my sister last night ."

Read in this order: data.py, model.py, reward.py, ppo.py, grpo.py, dpo.py, mdp.py, evaluate.py, and then this file,
which puts them together. config.py holds the settings, run.py the folder of a run, report.py what is printed.
"""

import copy
import json
import math
import random
import sys
import time

import torch
from tqdm import tqdm

import world
from checks import CanaryError, finite
from config import STAGES, VIEWS, parse_config
from data import UserError, collate, decode, encode_pairs, end_id, frequent_pieces, pad_id
from dpo import train_dpo
from evaluate import sample_policy, win_rate
from grpo import train_grpo
from model import GPT, GPTConfig, response_logprobs
from ppo import train_ppo
from report import report, sample_prompt, trace
from reward import RewardModel, normalise, score_pairs, train_reward_model
from run import Run

# ---- supervised fine-tuning -----------------------------------------------------------------------

def train_sft(network, examples, steps, peak_lr, config, pad, seed, name, log):
    """
    Maximise the log-likelihood of the responses of examples, (prompt ids, response ids) each, over response tokens.

    The learning rate rises for about 20 steps and then falls linearly towards 0. Returns the last loss, in nats per
    token. Raises CanaryError when a loss is not finite. Pretraining uses it too, with a prompt of one E.
    """
    device = network.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    bar = tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True)
    for step in bar:
        picks = torch.randint(len(examples), (config.batch_size,), generator=generator).tolist()
        prompts = [examples[i][0] for i in picks]
        responses = [examples[i][1] for i in picks]
        batch = collate(prompts, responses, pad, device)
        loss = -response_logprobs(network, batch).sum() / batch.mask.sum()
        value = finite(loss, name, "lower its learning rate in config.py")
        optimizer.param_groups[0]["lr"] = peak_lr * min((step + 1) / 20, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value:.3f}", perplexity=f"{loss.exp().item():.2f}")
        log(step=step, loss=value)
    return value


# ---- the stages -----------------------------------------------------------------------------------
# Each reads what earlier ones left in the run's folder and returns its result as one line. Its docstring is printed.

def run_pretrain(run, log):
    """A small GPT learns the language from messy text."""
    config = run.config
    if config.data:
        train, _ = run.texts()
        texts = [pair["prompt"] + pair[side] for pair in train for side in ("chosen", "rejected")]
    else:
        rng = random.Random(config.seed)
        texts = [world.make_document(rng) for _ in range(config.documents)]
    run.write("tokenizer.json", json.dumps(frequent_pieces(texts, config.vocab_size)))
    tokenizer = run.tokenizer
    end = end_id(tokenizer)
    size = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd)
    network = GPT(size).to(run.device)
    # a text has no prompt: it starts after an E, as if another text had just ended
    examples = [([end], (ids + [end])[:config.block_size - 1]) for ids in tokenizer.encode_ordinary_batch(texts)]
    loss = train_sft(network, examples, config.pretrain_steps, config.pretrain_lr, config, pad_id(tokenizer),
                     config.seed, "pretrain", log)
    run.save_network("pretrained", network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters:,} parameters, {len(texts):,} texts, loss {loss:.2f} nats a token"


def run_sft(run, log):
    """The network learns to answer prompts by imitating demonstrations, good and bad alike."""
    config, tokenizer = run.config, run.tokenizer
    train, _ = run.texts()
    if config.data:
        pairs, _ = encode_pairs(train, tokenizer, config.block_size - config.response_tokens, config.response_tokens)
        examples = [(pair["prompt"], pair["chosen"]) for pair in pairs]
    else:
        rng = random.Random(config.seed + 1)
        examples = []
        for text in rng.choices(train, k=config.demonstrations):
            review = tokenizer.encode_ordinary(" " + world.make_demonstration(rng, text["prompt"]))
            response = (review + [end_id(tokenizer)])[:config.response_tokens]  # one that is cut has no E
            examples.append((tokenizer.encode_ordinary(text["prompt"]), response))
    network = run.load_network("pretrained").requires_grad_(True)
    loss = train_sft(network, examples, config.sft_steps, config.sft_lr, config, pad_id(tokenizer),
                     config.seed + 1, "sft", log)
    run.save_network("sft", network)
    return f"{len(examples):,} demonstrations, loss {loss:.2f} nats a token"


def run_preferences(run, log):
    """Two answers to each prompt are compared, and only which one was preferred is kept."""
    return pairs_from_file(run) if run.config.data else pairs_from_gold(run)


def pairs_from_file(run):
    """The user's own pairs as token ids that fit. Counts what was cut or dropped."""
    config = run.config
    rows, totals = [], {}
    for split, texts in zip(("train", "heldout"), run.texts()):
        prompt_tokens = config.block_size - config.response_tokens
        pairs, counts = encode_pairs(texts, run.tokenizer, prompt_tokens, config.response_tokens)
        rows += [dict(split=split, **pair) for pair in pairs]
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    if len({row["split"] for row in rows}) < 2:
        raise UserError(f"{config.data}: too few pairs are left after {totals['identical_dropped']} were dropped "
                        "because their two responses are the same")
    run.write("preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return (f"{len(rows):,} pairs; {totals['prompts_cut']:,} prompts cut on the left, "
            f"{totals['responses_cut']:,} responses cut on the right, "
            f"{totals['identical_dropped']:,} pairs dropped because their two responses are the same")


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
    mean, std = raw.mean().item(), raw.std(correction=0).item()
    run.write("gold.json", json.dumps(dict(mean=mean, std=std)))
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
    run.write("preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    wrong = sum(row["gold"][0] < row["gold"][1] for row in rows) / len(rows)
    return f"{len(rows):,} pairs; in {wrong:.0%} of them the annotator preferred the response with less gold"


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
    sft = run.load_network("sft")
    model = RewardModel(sft).to(run.device).requires_grad_(True)
    train_reward_model(model, train, pad, config, config.seed + 3, log)
    model.requires_grad_(False)
    prompts, _ = run.prompts()
    prompts = [prompts[i % len(prompts)] for i in range(1024)]
    samples = sample_policy(sft, prompts, config.response_tokens, config.temperature, config.seed + 3, "normalise")
    normalise(model, samples)
    run.save_network("reward", model)

    r_chosen, r_rejected = score_pairs(model, heldout, pad, run.device)
    result = dict(accuracy=win_rate(r_chosen, r_rejected), gold_accuracy=None, label_ceiling=None, pairs=len(train))
    text = f"accuracy {result['accuracy']:.3f} on {len(heldout)} held-out pairs"
    if not config.data:
        gold = torch.tensor([row["gold"][0] - row["gold"][1] for row in heldout])
        difference = (r_chosen - r_rejected).cpu()[gold != 0]
        result["gold_accuracy"] = (difference.sign() == gold[gold != 0].sign()).float().mean().item()
        result["label_ceiling"] = sum(row["ceiling"] for row in heldout) / len(heldout)
        text += (f" (at most {result['label_ceiling']:.3f} with the labels' noise), "
                 f"{result['gold_accuracy']:.3f} against the order by gold")
    run.write("reward.json", json.dumps(result))
    return text


def run_ppo(run, log):
    """The policy is trained on the reward model's score, and pays for its KL from the SFT policy."""
    config = run.config
    reference, reward_model = run.load_network("sft"), run.scorer()
    policy = copy.deepcopy(reference).requires_grad_(True)
    critic = run.load_network("reward").requires_grad_(True)
    train_ppo(policy, critic, reference, reward_model, run.prompts()[0], config, config.seed + 4, log,
              None if config.data else run.rollout_gold)
    run.save_network("ppo", policy)
    run.save_network("critic", critic)
    return run.last_metrics("ppo", ("score", "gold", "kl", "length"))


def run_grpo(run, log):
    """As PPO, but without a critic: an answer is compared with other answers to the same prompt."""
    config = run.config
    reference = run.load_network("sft")
    policy = copy.deepcopy(reference).requires_grad_(True)
    train_grpo(policy, reference, run.scorer(), run.prompts()[0], config, config.seed + 4, log,  # the seed of PPO
               None if config.data else run.rollout_gold)
    run.save_network("grpo", policy)
    return run.last_metrics("grpo", ("score", "gold", "kl", "length"))


def run_dpo(run, log):
    """Another copy of the SFT policy is fitted to the same pairs directly, without a reward model."""
    config = run.config
    reference = run.load_network("sft")
    policy = copy.deepcopy(reference).requires_grad_(True)
    train_dpo(policy, reference, run.pairs()[0], pad_id(run.tokenizer), config, config.seed + 5, log)
    run.save_network("dpo", policy)
    return run.last_metrics("dpo", ("loss", "margin", "chosen_logp", "rejected_logp"))


# ---- the main job ---------------------------------------------------------------------------------

FUNCTIONS = dict(pretrain=run_pretrain, sft=run_sft, preferences=run_preferences, reward=run_reward, ppo=run_ppo,
                 grpo=run_grpo, dpo=run_dpo, report=report, sample=sample_prompt, trace=trace)
USED_BY = dict(pretrain=STAGES[1:], sft=STAGES[2:], preferences=("reward", "ppo", "grpo", "dpo", "report"),
                reward=("ppo", "grpo", "report"), ppo=("report",), grpo=("report",), dpo=("report",), report=())


def run_stages(run):
    """Run the stages of the command, one after another: a heading, a progress bar, and the result in one line."""
    config = run.config
    run.write("config.json", json.dumps(run.saved_config(), indent=1))
    print(f"minirlhf  seed {config.seed}, {run.device}, torch {torch.__version__}, writing to {run.folder}")
    for stage in config.stages.split(","):
        number = STAGES.index(stage)
        print(f"\n{number + 1}/{len(STAGES)}  {stage}: {FUNCTIONS[stage].__doc__}", flush=True)
        torch.manual_seed(1000 * config.seed + number)  # a stage run alone gives what it gives after the others
        log = run.begin_metrics(stage)
        started = time.perf_counter()
        result = FUNCTIONS[stage](run, log)
        seconds = time.perf_counter() - started
        log(stage_seconds=seconds)
        print(f"     {result}  [{seconds:.0f} s]", flush=True)
    outdated = outdated_stages(list(run.seconds()))
    if outdated:
        print(f"\nolder than what they are built on: go on with --stages {','.join(outdated)}")


def outdated_stages(done):
    """The stages that ended before a stage whose result they use. done: stages in the order in which they ended."""
    outdated = []
    for stage in STAGES:
        ended_later = done[done.index(stage) + 1:] if stage in done else []
        if any(stage in USED_BY[other] for other in ended_later):
            outdated.append(stage)
    return outdated


def main(argv=None):
    """Run the command line. Returns the exit status: 2 with one line for a mistake of the user, 1 for a canary."""
    try:
        run = Run(parse_config(argv, __doc__))
        stages = run.config.stages.split(",")
        if stages[0] in VIEWS:
            for stage in stages:
                FUNCTIONS[stage](run)
        else:
            run_stages(run)
        return 0
    except UserError as fault:
        print(f"minirlhf: {fault}", file=sys.stderr)
        return 2
    except CanaryError as fault:
        print(f"\nminirlhf: stopped: {fault}. The checkpoints of earlier stages are as they were.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nminirlhf: stopped by hand. Finished stages are kept: go on with --stages.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
