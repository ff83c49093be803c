"""
minirlhf: how a language model learns from human feedback, from the first line to the last.

    python minirlhf.py                       pretrain, SFT, preferences, reward model, PPO, DPO, report; about three minutes on two CPU cores
    python minirlhf.py --quick               the same, small, in half a minute
    python minirlhf.py --data pairs.jsonl    the same on your own pairs of {"prompt", "chosen", "rejected"}
    python minirlhf.py --stages trace --prompt "i saw this little film with my sister last night ."

Read in this order: mdp.py, model.py, reward.py, ppo.py, dpo.py, and then this file, which only puts them together.
"""

import argparse
import copy
import dataclasses
import difflib
import inspect
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import world
from data import DataError, collate, decode, encode_pairs, end_id, frequent_pieces, pad_id, read_pairs
from dpo import KINDS, SMOOTHED, train_dpo
from evaluate import CanaryError, finite, sample_policy, win_rate
from model import GPT, GPTConfig, response_logprobs
from ppo import train_ppo
from report import report, sample, trace
from reward import RewardModel, normalise, score_pairs, train_reward_model
from run import Run, UserError


@dataclass
class Config:
    seed: int = 0  # everything random follows from it
    out: str = ""  # folder of the run; by default runs/default, runs/quick, or runs/ and the name of the data file
    device: str = ""  # cpu, cuda or mps (not tried yet); by default cuda where there is one
    cuda_graphs: bool = False  # on a GPU, record PPO's sampling once and replay it
    stages: str = "pretrain,sft,preferences,reward,ppo,dpo,report"  # what to do, in this order; or sample, or trace
    quick: bool = False  # a small network and few steps: the whole pipeline in half a minute
    data: str = ""  # preference pairs, .jsonl or .jsonl.gz; by default the built-in world
    prompt: str = ""  # the prompt for the stages sample and trace

    n_layer: int = 2  # blocks of the network
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # width of the network
    block_size: int = 64  # tokens of prompt and response together, at most (192 with --data)
    response_tokens: int = 48  # tokens of a response, at most: the horizon of the MDP (64 with --data)
    vocab_size: int = 2048  # pieces that the tokenizer may know beyond bytes, at most

    documents: int = 16000  # texts to pretrain on
    pretrain_steps: int = 360  # steps of pretraining
    pretrain_lr: float = 3e-3  # its highest learning rate
    demonstrations: int = 4000  # reviews to imitate
    sft_steps: int = 250  # steps of supervised fine-tuning
    sft_lr: float = 2e-3  # its highest learning rate
    batch_size: int = 32  # sequences a step in pretraining and SFT, pairs a step in reward model and DPO

    pairs: int = 4000  # preference pairs to label
    label_temperature: float = 0.3  # noise of the labels: they follow sigmoid(difference in gold / this); 0 is no noise
    flip: float = 0.0  # share of labels turned around at random
    grumpy: float = 0.0  # share of labels given by a second annotator, who prefers criticism to praise
    held_out: str = ""  # a subject (film, restaurant, hotel, book, concert) that only evaluation sees

    reward_epochs: int = 2  # passes over the pairs
    reward_lr: float = 1e-3  # learning rate of the reward model
    weight_decay: float = 0.1  # of the reward model: the width of the prior on its parameters

    beta: float = 0.2  # price of one nat of KL from the SFT policy, in standard deviations of the score; in PPO and in the objective
    ppo_iterations: int = 60  # rollouts
    ppo_batch: int = 256  # episodes in a rollout
    minibatch: int = 64  # episodes in an update
    ppo_epochs: int = 2  # passes over a rollout
    ppo_lr: float = 5e-4  # learning rate of the policy
    critic_lr: float = 1e-3  # learning rate of the critic
    gamma: float = 1.0  # discount; 1 because an episode is short and ends
    lam: float = 0.95  # GAE's trade between bias (0) and variance (1)
    clip: float = 0.2  # how far the ratio may move in one iteration
    value_clip: float = 0.2  # how far a value may, in standard deviations of the score
    temperature: float = 1.0  # of sampling, scoring and KL alike

    dpo_beta: float = 0.5  # DPO's beta, in its own units: nats of label per nat of log pi/ref
    dpo_epochs: int = 2  # passes over the pairs
    dpo_lr: float = 2e-4  # learning rate of DPO
    dpo_kind: str = "dpo"  # dpo, ipo, slic or robust
    dpo_label_smoothing: float = 0.0  # the share of labels that the kinds dpo and robust take to be wrong

    eval_prompts: int = 512  # held-out prompts
    best_of: int = 16  # n of best-of-n


STAGES = Config.stages.split(",")
QUICK = dict(n_embd=64, documents=4000, pretrain_steps=100, pretrain_lr=5e-3, demonstrations=1000, sft_steps=40, sft_lr=2e-3, pairs=400,
             ppo_iterations=8, ppo_batch=64, minibatch=64, eval_prompts=64, best_of=16)
WITH_DATA = dict(block_size=192, response_tokens=64)
BUILT_ON = dict(pretrain=STAGES[1:], sft=STAGES[2:], preferences=["reward", "ppo", "dpo", "report"], reward=["ppo", "report"],
                ppo=["report"], dpo=["report"], report=[])  # what is out of date once a stage has run again
LOOKS = dict(sample=sample, trace=trace)  # stages that only look at a finished run


# ---------------------------------------------------------------------------------------------------------------------
# the command line

class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[1], flags, 1)
            message = f"unknown flag {unknown[1]}" + (f", did you mean {close[0]}?" if close else "; see --help")
        raise UserError(message)


def parse_config(argv):
    """
    The configuration in force. In rising order of precedence: the defaults, --data's and --quick's, what an earlier stage of the same run was
    given (when this command does not begin the run anew), and the flags.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))  # a field's comment is its help
    head, tail = __doc__.split("\nRead", 1)
    parser = OneLineParser(prog="minirlhf.py", description=head, epilog="Read" + tail, formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        flag, text = "--" + field.name.replace("_", "-"), comments[field.name].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=field.type, metavar=field.name.split("_")[-1].upper(), help=f"{text} ({field.default!r})")
    given = vars(parser.parse_args(argv))
    folder = given.get("out") or os.path.join("runs", Path(given["data"]).name.split(".")[0] if given.get("data") else
                                              "quick" if given.get("quick") else "default")
    stages = given.get("stages", Config.stages).split(",")
    check_stages(stages, given.get("prompt"))
    saved = {}
    if "pretrain" not in stages:
        try:
            known = [field.name for field in dataclasses.fields(Config)]
            saved = {name: value for name, value in json.loads(Path(folder, "config.json").read_text()).items() if name in known}
        except FileNotFoundError:
            raise UserError(f"{folder} holds no run: begin with --stages pretrain, or name another folder with --out") from None
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            raise UserError(f"{folder}/config.json is damaged: begin the run anew with --stages pretrain") from None
    flags = {**saved, **given}
    config = Config(**{**(WITH_DATA if flags.get("data") else {}), **(QUICK if flags.get("quick") else {}), **flags, "out": folder})
    check(config)
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "data"):
        if name in saved and saved[name] != getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} is {saved[name]!r} in the run in {folder}: begin anew with --stages pretrain to change it")
    return config


def need(condition, message):
    if not condition:
        raise UserError(message)


def check_stages(stages, prompt):
    """Raise UserError unless the list of stages can be done."""
    for stage in stages:
        need(stage in (*STAGES, *LOOKS), f"unknown stage {stage!r} in --stages, choose from {', '.join(STAGES)}, sample, trace")
    looks = [stage in LOOKS for stage in stages]
    need(prompt or not any(looks), "the stages sample and trace need a --prompt")
    need(all(looks) or not any(looks), "the stages sample and trace look at a finished run: run them by themselves")


def check(config):
    """Raise UserError for a configuration that cannot work."""
    for field in dataclasses.fields(config):
        name, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
        if field.type is int and field.name != "seed":
            need(value >= 1, f"{name} is at least 1, got {value}")
        if field.type is float:
            need(math.isfinite(value) and value >= 0, f"{name} is a number that is not negative, got {value}")
    for name in ("dpo_beta", "temperature", "value_clip"):
        need(getattr(config, name) > 0, f"--{name.replace('_', '-')} is above 0, got {getattr(config, name)}")
    for name in ("flip", "grumpy", "lam", "gamma"):
        need(getattr(config, name) <= 1, f"--{name} is between 0 and 1, got {getattr(config, name)}")
    need(config.seed >= 0, f"--seed is not negative, got {config.seed}")
    need(config.n_embd % config.n_head == 0, f"--n-embd {config.n_embd} cannot be divided into --n-head {config.n_head} heads")
    need(config.block_size >= config.response_tokens + (1 if config.data else 16),
         f"--response-tokens {config.response_tokens} leaves no room for a prompt in a --block-size of {config.block_size}")
    need(config.minibatch <= config.ppo_batch, f"--minibatch {config.minibatch} is larger than --ppo-batch {config.ppo_batch}")
    need(config.dpo_kind in KINDS, f"--dpo-kind is one of {', '.join(KINDS)}, got {config.dpo_kind!r}")
    need(config.dpo_label_smoothing < 0.5, f"--dpo-label-smoothing is below 0.5, got {config.dpo_label_smoothing}")
    need(config.dpo_label_smoothing == 0 or config.dpo_kind in SMOOTHED,
         f"--dpo-label-smoothing belongs to --dpo-kind {' and '.join(SMOOTHED)}, got {config.dpo_kind!r}")
    need(config.held_out in ("", *world.ASPECTS), f"--held-out is one of {', '.join(world.ASPECTS)}, got {config.held_out!r}")
    need(config.device.split(":")[0] in ("", "cpu", "cuda", "mps"), f"--device is cpu, cuda or mps, got {config.device!r}")
    need(config.device[:4] != "cuda" or torch.cuda.is_available(), "--device cuda: this machine, or this build of torch, has no CUDA")
    need(not config.cuda_graphs or config.device[:4] in ("", "cuda") and torch.cuda.is_available(), "--cuda-graphs needs CUDA: leave it out here")
    need(config.device != "mps" or torch.backends.mps.is_available(), "--device mps: this machine, or this build of torch, has no MPS")
    if config.data:
        read_pairs(config.data)  # a broken file is told before any work


# ---------------------------------------------------------------------------------------------------------------------
# the stages: each reads what earlier ones left in the run's folder, and returns its result in one line

def imitate(network, examples, steps, lr, run, seed, name, log):
    """Maximise the log-likelihood of responses given their prompts, (prompt ids, response ids) each, over the real response tokens only."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    pad = pad_id(run.tokenizer)
    bar = tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True)
    for step in bar:
        picked = [examples[i] for i in torch.randint(len(examples), (run.config.batch_size,), generator=generator).tolist()]
        batch = collate([prompt for prompt, _ in picked], [response for _, response in picked], pad, run.device)
        loss = -response_logprobs(network, batch).sum() / batch.mask.sum()
        value = finite(loss, name, "lower its learning rate")
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value:.3f}", perplexity=f"{loss.exp().item():.2f}")
        log(step=step, loss=value)
    return value


def pretrain(run, log):
    """A small GPT learns the language from messy text."""
    config = run.config
    if config.data:
        texts = [pair["prompt"] + pair[side] for pair in run.texts()[0] for side in ("chosen", "rejected")]
    else:
        rng = random.Random(config.seed)
        texts = [world.make_document(rng) for _ in range(config.documents)]
    run.write("tokenizer.json", json.dumps(frequent_pieces(texts, config.vocab_size)))
    tokenizer = run.tokenizer
    network = GPT(GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd)).to(run.device)
    end = end_id(tokenizer)
    # a text has no prompt: it starts after an E, as if another text had just ended
    examples = [([end], (ids + [end])[:config.block_size - 1]) for ids in tokenizer.encode_ordinary_batch(texts)]
    loss = imitate(network, examples, config.pretrain_steps, config.pretrain_lr, run, config.seed, "pretrain", log)
    run.save_network("pretrained", network)
    return f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(texts):,} texts, loss {loss:.2f} nats a token"


def sft(run, log):
    """The network learns to answer prompts by imitating demonstrations, good and bad alike."""
    config, tokenizer = run.config, run.tokenizer
    end, room = end_id(tokenizer), config.block_size - config.response_tokens
    if config.data:
        pairs, _ = encode_pairs(run.texts()[0], tokenizer, room, config.response_tokens)
        examples = [(pair["prompt"], pair["chosen"]) for pair in pairs]
    else:
        rng = random.Random(config.seed + 1)
        prompts = [pair["prompt"] for pair in rng.choices(run.texts()[0], k=config.demonstrations)]
        # a demonstration that is longer than a response may be is cut, and loses its E with its end
        examples = [(tokenizer.encode_ordinary(prompt), (tokenizer.encode_ordinary(" " + world.make_demonstration(rng, prompt)) + [end])
                     [:config.response_tokens]) for prompt in prompts]
    network = run.load_network("pretrained", "pretrain").requires_grad_(True)
    loss = imitate(network, examples, config.sft_steps, config.sft_lr, run, config.seed + 1, "sft", log)
    run.save_network("sft", network)
    return f"{len(examples):,} demonstrations, loss {loss:.2f} nats a token"


def preferences(run, log):
    """Two answers to each prompt are compared, and only which one was preferred is kept."""
    return pairs_from_file(run) if run.config.data else pairs_from_gold(run)


def pairs_from_file(run):
    """The user's own pairs, as token ids that fit; what was cut or dropped is counted aloud."""
    config, rows, totals = run.config, [], {}
    for split, side in zip(("train", "heldout"), run.texts()):
        pairs, counts = encode_pairs(side, run.tokenizer, config.block_size - config.response_tokens, config.response_tokens)
        totals = {name: totals.get(name, 0) + count for name, count in counts.items()}
        rows += [dict(split=split, **pair) for pair in pairs]
    run.write("preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if len({row["split"] for row in rows}) < 2:
        raise UserError(f"{config.data}: too few pairs are left after dropping {totals['identical_dropped']} whose two responses are the same")
    return (f"{len(rows):,} pairs; {totals['prompts_cut']:,} prompts cut on the left, {totals['responses_cut']:,} responses cut on the right, "
            f"{totals['identical_dropped']:,} pairs dropped because their two responses are the same")


def pairs_from_gold(run):
    """Two SFT samples for each prompt, labelled by Bradley-Terry on gold: preferred with probability sigmoid(difference / label_temperature)."""
    config, tokenizer = run.config, run.tokenizer
    rng = random.Random(config.seed + 2)
    policy = run.load_network("sft", "sft")
    train, heldout = run.prompts()
    asked = [rng.choice(train) for _ in range(config.pairs)] + [rng.choice(heldout) for _ in range(512)]
    twice = [prompt for prompt in asked for _ in range(2)]
    rollouts = sample_policy(policy, twice, config.response_tokens, config.temperature, config.seed + 2, "preferences")
    responses = [ids for rollout in rollouts for ids in rollout.response_ids()]
    raw = run.raw_gold(twice, responses)
    mean, std = raw.mean().item(), raw.std(correction=0).item()
    run.write("gold.json", json.dumps(dict(mean=mean, std=std)))
    grumpy = (run.raw_gold(twice, responses, taste=-1.0) - mean) / std
    gold = (raw - mean) / std
    rows = []
    for i, prompt in enumerate(asked):
        a, b = 2 * i, 2 * i + 1
        taste = grumpy if rng.random() < config.grumpy else gold
        wins = chance_of_preferring((taste[a] - taste[b]).item(), config.label_temperature)
        wins = wins * (1 - config.flip) + (1 - wins) * config.flip
        if rng.random() >= wins:
            a, b, wins = b, a, 1 - wins
        if responses[a] != responses[b]:  # a pair of one response twice teaches nothing
            rows.append(dict(split="train" if i < config.pairs else "heldout", prompt=prompt, chosen=responses[a], rejected=responses[b],
                             gold=[gold[a].item(), gold[b].item()], ceiling=max(wins, 1 - wins),
                             text=[decode(tokenizer, ids) for ids in (prompt, responses[a], responses[b])]))
    run.write("preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    wrong = sum(row["gold"][0] < row["gold"][1] for row in rows) / len(rows)
    return f"{len(rows):,} pairs; in {wrong:.0%} of them the annotator preferred what is worse by gold"


def chance_of_preferring(difference, temperature):
    if temperature == 0:
        return float(difference > 0) if difference else 0.5
    return 1 / (1 + math.exp(-difference / temperature))


def reward(run, log):
    """A copy of the SFT network learns to tell which answer was preferred, and is set to mean 0 and deviation 1 on SFT samples."""
    config, pad = run.config, pad_id(run.tokenizer)
    train, heldout = run.pairs()
    sft = run.load_network("sft", "sft")
    model = RewardModel(sft).to(run.device).requires_grad_(True)
    train_reward_model(model, train, pad, epochs=config.reward_epochs, batch_size=config.batch_size, lr=config.reward_lr,
                       weight_decay=config.weight_decay, seed=config.seed + 3, log=log)
    # normalised on what PPO will start from: samples of the SFT policy on training prompts
    prompts = (run.prompts()[0] * 1024)[:1024]
    model.requires_grad_(False)
    normalise(model, sample_policy(sft, prompts, config.response_tokens, config.temperature, config.seed + 3, "normalise"))
    run.save_network("reward", model)
    r_chosen, r_rejected = score_pairs(model, heldout, pad, run.device)
    row = dict(accuracy=win_rate(r_chosen, r_rejected), gold_accuracy=None, label_ceiling=None, pairs=len(train))
    if not config.data:
        difference = torch.tensor([row["gold"][0] - row["gold"][1] for row in heldout])
        untied = difference != 0
        row["gold_accuracy"] = win_rate((r_chosen - r_rejected).cpu()[untied] * difference[untied], torch.zeros(int(untied.sum())))
        row["label_ceiling"] = sum(pair["ceiling"] for pair in heldout) / len(heldout)
    run.write("reward.json", json.dumps(row))
    return (f"accuracy on {len(heldout)} held-out pairs {row['accuracy']:.3f}"
            + ("" if config.data else f" (the labels' noise allows {row['label_ceiling']:.3f}), against the gold ordering {row['gold_accuracy']:.3f}"))


def ppo(run, log):
    """The policy is trained on the reward model's score, on a leash of KL to the SFT policy."""
    config = run.config
    reference, reward_model = run.load_network("sft", "sft"), run.load_network("reward", "reward")
    policy = copy.deepcopy(reference).requires_grad_(True)
    critic = train_ppo(
        policy, reference, reward_model, run.prompts()[0], iterations=config.ppo_iterations, batch_size=config.ppo_batch,
        minibatch_size=config.minibatch, epochs=config.ppo_epochs, beta=config.beta, lr=config.ppo_lr, critic_lr=config.critic_lr,
        gamma=config.gamma, lam=config.lam, clip=config.clip, value_clip=config.value_clip, temperature=config.temperature,
        max_new_tokens=config.response_tokens, seed=config.seed + 4, cuda_graphs=config.cuda_graphs, log=log,
        judge=None if config.data else lambda prompts, rollout: run.gold(prompts, rollout.response_ids()))
    run.save_network("ppo", policy)
    run.save_network("critic", critic)
    return last_metrics(run, "ppo", "score", "gold", "kl", "length")


def dpo(run, log):
    """Another copy of the SFT policy is fitted to the same pairs directly, without a reward model."""
    config = run.config
    reference = run.load_network("sft", "sft")
    policy = copy.deepcopy(reference).requires_grad_(True)
    train_dpo(policy, reference, run.pairs()[0], pad_id(run.tokenizer), epochs=config.dpo_epochs, batch_size=config.batch_size,
              beta=config.dpo_beta, lr=config.dpo_lr, kind=config.dpo_kind, label_smoothing=config.dpo_label_smoothing,
              seed=config.seed + 5, log=log)
    run.save_network("dpo", policy)
    return last_metrics(run, "dpo", "loss", "margin", "chosen_logp", "rejected_logp")


def last_metrics(run, stage, *names):
    """Means of a stage's last ten logged rows, as one line."""
    rows = [row for row in run.metrics() if row["stage"] == stage and "step" in row][-10:]
    return ", ".join(f"{name.replace('_', ' ')} {sum(row[name] for row in rows) / len(rows):.2f}" for name in names if name in rows[-1])


# ---------------------------------------------------------------------------------------------------------------------
# the main job

def run_stages(run):
    """The stages that were asked for, one after another, each with a heading, its bar, and its result in one line."""
    config = run.config
    run.write("config.json", json.dumps(run.saved_config(), indent=1))
    print(f"minirlhf  seed {config.seed}, {run.device}, torch {torch.__version__}, writing to {run.folder}")
    for stage in config.stages.split(","):
        function = dict(zip(STAGES, (pretrain, sft, preferences, reward, ppo, dpo, report)))[stage]
        print(f"\n{STAGES.index(stage) + 1}/{len(STAGES)}  {stage}: {function.__doc__.splitlines()[0]}", flush=True)
        torch.manual_seed(1000 * config.seed + STAGES.index(stage))  # so that a stage gives the same alone as after the others
        log = run.begin_metrics(stage)
        started = time.perf_counter()
        result = function(run, log)
        seconds = time.perf_counter() - started
        log(stage_seconds=seconds)
        print(f"     {result}  [{seconds:.0f} s]", flush=True)
    done = list(run.seconds())  # in the order in which they ended
    old = [stage for i, stage in enumerate(done) if any(stage in BUILT_ON[later] for later in done[i + 1:])]
    if old:
        print(f"\nout of date, because what they are built on is newer: go on with --stages {','.join(sorted(old, key=STAGES.index))}")


def main(argv=None):
    """The command line; returns the exit status. What a user can put right is told in one line, with status 2."""
    try:
        run = Run(parse_config(argv))
        stages = run.config.stages.split(",")
        if stages[0] in LOOKS:
            for stage in stages:
                LOOKS[stage](run)
        else:
            run_stages(run)
        return 0
    except (UserError, DataError) as fault:
        print(f"minirlhf: {fault}", file=sys.stderr)
        return 2
    except CanaryError as fault:
        print(f"\nminirlhf: stopped: {fault}. The checkpoints of the stages before are as they were.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nminirlhf: stopped by hand; finished stages are kept, go on with --stages", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
