"""The stages of a run. A stage reads what earlier ones left, and returns a text. Its docstring is its heading."""

import copy
import dataclasses
import json
import random
from typing import NamedTuple

import torch

import world
from data import collate_pairs
from dpo import DPOConfig, train_dpo, train_online_dpo
from evaluate import reliability, spread_and_error, standard_error, wins
from grpo import GRPOConfig, train_grpo
from model import SamplingConfig, generate
from pipeline.config import POLICIES, DemonstrationConfig, InitConfig, PretrainConfig, policy_config
from pipeline.errors import need
from pipeline.files import clean
from pipeline.page import fill, gather
from pipeline.pairs import describe, encode_prompt, fit_pair, plain, read_pairs, read_prompts, split_pairs
from pipeline.report import AT_CHANCE, accuracy_text, write_report
from pipeline.run import SHOWN, SPLITS
from pipeline.scores import make_scorer, raw_gold, scaled_gold
from ppo import PPOConfig, train_ppo
from reward import AnnotatorConfig, RewardConfig, RewardModel, label_pairs, normalise, score_pairs, train_reward_model
from robust import RobustConfig, RobustReward, make_members, member_pairs, normalise_robust, steps_of, train_members
from sft import SFTConfig, train_sft
from tokenizer import decode, end_id, frequent_pieces, make_tokenizer

HELD_OUT = 512  # prompts of the built-in world for evaluation
MOMENTS = 12    # of training, at which the first SHOWN held-out prompts are answered


class Stage(NamedTuple):
    run: object       # function of (run, name, seed) -> its result as a text
    after: tuple      # the stages whose results it uses
    settings: tuple   # the dataclasses whose settings it uses
    files: tuple      # that it leaves; when all are there, it is done


def all_stages(config):
    """{name: Stage} of a run, in order."""
    stages = dict(
        pretrain=Stage(run_pretrain, (), (PretrainConfig, InitConfig),
                       ("tokenizer.json", "split.jsonl", "pretrained.pt")),
        sft=Stage(run_sft, ("pretrain",), (DemonstrationConfig, SamplingConfig), ("sft.pt",)),
        preferences=Stage(run_preferences, ("sft",), (AnnotatorConfig,),
                          ("gold.json", "preferences.jsonl") if config.in_world else ("preferences.jsonl",)),
        reward=Stage(run_reward, ("preferences",), (RewardConfig,), ("reward.pt", "reward.json")))
    judge = "reward"  # the stage after which the score is known
    if config.reward_model != "single":
        judge = "robust"
        stages[judge] = Stage(run_robust, ("reward",), (RobustConfig,), ("robust.pt", "robust.json"))
    if config.init:
        stages["pretrain"] = stages["pretrain"]._replace(run=run_init, files=("split.jsonl",))
    if config.prompts:  # no pairs: the reward is a function
        judge = "sft"
        del stages["preferences"], stages["reward"]
    loops = dict(ppo=Stage(run_ppo, (judge,), (PPOConfig,), ()),
                 grpo=Stage(run_grpo, (judge,), (GRPOConfig,), ()),
                 online_dpo=Stage(run_grpo, (judge,), (PPOConfig,), ()),
                 dpo=Stage(run_dpo, ("preferences",), (DPOConfig,), ()))
    for name in config.policies.split(","):
        loop = loops[POLICIES[name][1]]
        files = (f"{name}.pt", f"{name}_critic.pt") if loop.run is run_ppo else (f"{name}.pt",)
        stages[name] = loop._replace(files=files)
    stages["report"] = Stage(run_report, (judge, *config.policies.split(",")), (),
                             ("report.json", "samples.txt", "report.html"))
    return stages


def settings_of(name, config):
    """All settings that a stage's result depends on: its own, and under the names of earlier stages theirs."""
    stage = all_stages(config)[name]
    own = policy_config(config, name)
    used = {"seed": config.seed}
    for section in stage.settings:
        used.update({field.name: getattr(own, field.name) for field in dataclasses.fields(section)})
    if stage.run in (run_ppo, run_grpo):
        used.update(reward_from=config.reward_from, reward_sha256=config.reward_sha256,
                    reward_model=config.reward_model)
    return {**used, **{earlier: settings_of(earlier, config) for earlier in stage.after}}


def last_metrics(run, stage, names):
    """The means of a stage's last ten steps, as one line."""
    rows = [row for row in run.rows() if row["stage"] == stage and "step" in row][-10:]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names if name in rows[-1]}
    return (f"mean of the last {len(rows)} steps: "
            + ", ".join(f"{name.replace('_', ' ')} {mean:.2f}" for name, mean in means.items()))


# ---- data -----------------------------------------------------------------------------------------

def make_data(config, pretrained=None):
    """
    (pieces of the tokenizer, {"train" or "heldout": rows}) of a run: its texts, split once for all stages.

    The rows of own data are pairs of texts, or prompts. All that can be wrong with them is found here, before any work.
    Rows of the built-in world have only a "prompt". pretrained: the tokenizer of --init, which needs no pieces.
    """
    rng = random.Random(config.seed)
    if config.in_world:
        train, heldout = world.make_prompts(config.seed, 4000, HELD_OUT, held_out=config.held_out)
        split = dict(train=[{"prompt": text} for text in train], heldout=[{"prompt": text} for text in heldout])
        return None if pretrained else frequent_pieces(documents(config), config.vocab_size), split
    if config.prompts:
        prompts = read_prompts(config.prompts, config.prompt_key)
        check_prompts(config, pretrained, prompts)
        train, heldout = split_prompts(prompts, 0.1, rng)
        need(train, f"{config.prompts}: one prompt is not enough, since some are held out")
        return None, dict(train=train, heldout=heldout)
    train, heldout = split_pairs(read_pairs(config.data, config.prompt_key), 0.1, rng)
    need(len(train) >= 16, f"{config.data}: {len(train)} pairs to train on, at least 16 are needed")
    texts = [pair["prompt"] + pair[side] for pair in train for side in ("chosen", "rejected")]
    pieces = None if pretrained else frequent_pieces(texts, config.vocab_size)
    split = dict(train=train, heldout=heldout)
    check_pairs(config, pretrained or make_tokenizer(pieces), split)
    return pieces, split


def split_prompts(prompts, share, rng):
    """Split prompts into (training, held-out) lists, in random order; equal prompts are on one side."""
    different = list({plain(row["prompt"]): row for row in prompts}.values())
    rng.shuffle(different)
    cut = max(1, round(share * len(different)))
    return different[cut:], different[:cut]


def check_prompts(config, tokenizer, prompts):
    """Raise UserError if two rows have one prompt, cut to fit, and other values: a reward could not tell them apart."""
    room, found = config.room, {}
    for row in prompts:
        for key in (plain(row["prompt"]), tuple(encode_prompt(tokenizer, row["prompt"])[-room:])):
            first = found.setdefault(key, row)
            need(first["row"] == row["row"], f"{config.prompts}: lines {first['line']} and {row['line']} have one "
                 f"prompt, cut to its last {room} tokens, and other values: make them differ, or raise --block-size")


def check_pairs(config, tokenizer, split):
    """Raise UserError unless both sides of a split of own data have a pair that differs within the cap."""
    for pairs in split.values():
        need(any(fit_pair(pair, tokenizer, config.block_size, config.response_tokens) for pair in pairs),
             f"no pair of {len(pairs)} is left for training or for evaluation: their two responses are the same within "
             f"{config.response_tokens} tokens; raise --response-tokens, or add pairs that differ")


def documents(config):
    """The texts of the built-in world to pretrain on."""
    rng = random.Random(config.seed)
    return [world.make_document(rng) for _ in range(config.documents)]


# ---- the stages -----------------------------------------------------------------------------------

def run_pretrain(run, name, seed):
    """A small GPT learns the language from messy text."""
    config = run.config
    pieces, split = run.data or make_data(config)
    run.write("tokenizer.json", json.dumps(pieces))
    write_split(run, split)
    tokenizer = run.tokenizer
    if config.data:
        encoded = [tokenizer.encode_ordinary(pair["prompt"]) + tokenizer.encode_ordinary(pair[side])
                   for pair in run.texts["train"] for side in ("chosen", "rejected")]
    else:
        encoded = [tokenizer.encode_ordinary(text) for text in documents(config)]
    end = end_id(tokenizer)
    # a text has no prompt: it starts after an E, as if another text had just ended
    examples = [([end], (ids + [end])[:config.block_size - 1]) for ids in encoded]
    network = run.make_network().to(run.device)
    settings = SFTConfig(config.pretrain_steps, config.pretrain_lr, config.pretrain_batch)
    run.train(name, lambda checkpoint: train_sft(network, examples, settings, seed, checkpoint), config.pretrain_steps)
    run.save_network("pretrained", network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters:,} parameters, {len(examples):,} texts; {last_metrics(run, name, ['loss'])} nats a token"


def write_split(run, split):
    run.write_rows("split.jsonl", [dict(split=side, **row) for side in SPLITS for row in split[side]])


def run_init(run, name, seed):
    """A pretrained model takes the place of pretraining."""
    network, tokenizer = run.pretrained
    write_split(run, (run.data or make_data(run.config, tokenizer))[1])
    trained = sum(parameter.numel() for parameter in network.parameters())
    total = sum(parameter.numel() for parameter in network.model.parameters())
    texts = run.texts["train"] + run.texts["heldout"]
    cut = sum(len(run.encode_prompt(row["prompt"])) > run.config.room for row in texts)
    return (f"{total:,} parameters, {trained:,} of them are trained; {len(run.texts['train']):,} rows to train on, "
            f"{len(run.texts['heldout']):,} held out" + (f"; {cut:,} prompts cut on the left" if cut else ""))


def run_sft(run, name, seed):
    """The network learns to answer prompts by imitating demonstrations, good and bad alike."""
    config, tokenizer = run.config, run.tokenizer
    network = run.load_network("pretrained").requires_grad_(True)
    if config.sft_steps == 0:
        run.save_network("sft", network)
        return "no steps: the pretrained model is the SFT policy"
    if config.data:
        examples = [(pair["prompt"], pair["chosen"]) for pair in own_pairs(run, "train")]
    else:
        rng = random.Random(seed)
        examples = []
        for row in rng.choices(run.texts["train"], k=config.demonstrations):
            review = tokenizer.encode_ordinary(" " + world.make_demonstration(rng, row["prompt"]))
            response = (review + [end_id(tokenizer)])[:config.response_tokens]  # one that is cut has no E
            examples.append((run.encode_prompt(row["prompt"])[-config.room:], response))
    run.train(name, lambda checkpoint: train_sft(network, examples, config, seed, checkpoint), config.sft_steps)
    run.save_network("sft", network)
    return f"{len(examples):,} demonstrations; {last_metrics(run, name, ['loss'])} nats a token"


def run_preferences(run, name, seed):
    """Two answers to each prompt are compared, and only which one was preferred is kept."""
    if run.config.data:
        pairs = {split: own_pairs(run, split) for split in SPLITS}
        text = describe(run.texts, pairs, run.tokenizer, run.config.room)
    else:
        pairs, text = preferences_from_gold(run, seed)
    run.write_rows("preferences.jsonl", [dict(split=split, **pair) for split in SPLITS for pair in pairs[split]])
    return text


def own_pairs(run, split):
    """The user's pairs of one split as token ids that fit: `fit_pair`."""
    pairs = [fit_pair(pair, run.tokenizer, run.config.room, run.config.response_tokens) for pair in run.texts[split]]
    return [pair for pair in pairs if pair]


def preferences_from_gold(run, seed):
    """Two SFT samples for each prompt, labelled by gold with noise: ({split: pairs}, a sentence)."""
    config, rng = run.config, random.Random(seed)
    train, heldout = run.prompts
    prompts = [rng.choice(train) for _ in range(config.pairs)]
    prompts += [rng.choice(heldout[:HELD_OUT]) for _ in range(HELD_OUT)]
    twice = [prompt for prompt in prompts for _ in range(2)]  # side by side
    responses = []
    for rollout in run.sample("preferences", run.load_network("sft"), twice, seed):
        responses += rollout.response_ids()
    raw = raw_gold(run, twice, responses)                                                     # (2 pairs,)
    need(raw.max() > raw.min(), "the SFT policy's answers all have the same gold, so none is better than another: "
         "train it longer with --pretrain-steps and --sft-steps")
    mean, std = raw.mean().item(), raw.std(correction=0).item()
    gold = ((raw - mean) / std).tolist()
    texts = [decode(run.tokenizer, response) for response in responses]
    cut = 2 * config.pairs
    pairs = dict(train=label_pairs(prompts[:config.pairs], responses[:cut], gold[:cut], config, rng, texts[:cut]),
                 heldout=label_pairs(prompts[config.pairs:], responses[cut:], gold[cut:], config, rng, texts[cut:]))
    labelled = {pair["annotator"] for pair in pairs["train"]}
    need(len(labelled) == config.annotators and pairs["heldout"], "the SFT policy's two answers are the same to many "
         "prompts, so too few pairs are left: raise --pairs")
    run.write("gold.json", json.dumps(dict(mean=mean, std=std)))
    both = pairs["train"] + pairs["heldout"]
    wrong = sum(pair["gold"][0] < pair["gold"][1] for pair in both) / len(both)
    return pairs, (f"{len(pairs['train']):,} pairs to train on, {len(pairs['heldout'])} held out; in {wrong:.0%} of "
                   "them the annotator preferred the response with less gold")


def run_reward(run, name, seed):
    """A copy of the SFT network learns which answer was preferred. Its scores are normalised on SFT samples."""
    config = run.config
    train, heldout = run.pairs
    sft = run.load_network("sft")
    model = RewardModel(sft).to(run.device).requires_grad_(True)
    steps = config.reward_epochs * -(-len(train) // config.reward_batch)
    run.train(name, lambda checkpoint: train_reward_model(model, train, config, seed, checkpoint), steps)
    model.requires_grad_(False)
    prompts = run.prompts[0]
    n = 128 if config.init else 1024  # a pretrained model takes long for an answer
    normalise(model, run.sample("normalise", sft, [prompts[i % len(prompts)] for i in range(n)], seed))
    run.save_network("reward", model)

    result = dict(reward_accuracy(model, heldout), pairs=len(train))
    run.write("reward.json", json.dumps(result, allow_nan=False))
    return (f"warning: {AT_CHANCE}\n" if result["at_chance"] else "") + accuracy_text(result)


def reward_accuracy(reward_model, pairs):
    """How often a reward model orders held-out pairs right: the dict of reward.json, with errors that count prompts."""
    r_chosen, r_rejected = [scores.cpu() for scores in score_pairs(reward_model, pairs)]      # (pairs,) each
    prompts = [tuple(pair["prompt"]) for pair in pairs]
    right = wins(r_chosen, r_rejected)                                                        # (pairs,)
    accuracy, se = right.mean().item(), standard_error(right, prompts)
    coin_se = 0.5 / len(pairs) ** 0.5  # a few pairs that are all right have an error of 0, and may be luck
    result = dict(accuracy=accuracy, accuracy_se=se, gold_accuracy=None, gold_accuracy_se=None, label_ceiling=None,
                  at_chance=accuracy - 2 * max(se, coin_se) <= 0.5)
    lengths = torch.tensor([[len(pair["chosen"]), len(pair["rejected"])] for pair in pairs])  # (pairs, 2)
    result["longer_chosen"] = wins(lengths[:, 0], lengths[:, 1]).mean().item()
    result["first_chosen"] = sum(pair["first"] for pair in pairs) / len(pairs) if "first" in pairs[0] else None
    if "gold" in pairs[0]:
        gold = torch.tensor([pair["gold"][0] - pair["gold"][1] for pair in pairs])            # (pairs,)
        agrees = ((r_chosen - r_rejected).sign() == gold.sign()).float()[gold != 0]
        decided = [prompt for prompt, difference in zip(prompts, gold) if difference != 0]
        result["label_ceiling"] = sum(pair["ceiling"] for pair in pairs) / len(pairs)  # gold's own accuracy
        if decided:
            result.update(gold_accuracy=agrees.mean().item(), gold_accuracy_se=standard_error(agrees, decided))
    if isinstance(reward_model, RewardModel):
        margin = (r_chosen - r_rejected) * reward_model.std.item()  # Bradley-Terry makes a probability of raw scores
        rows, error = reliability(margin.abs().sigmoid(), right)
        result.update(calibration_error=error, reliability=rows)
    return result


def run_robust(run, name, seed):
    """Several reward models learn the preferences. Their score mixes what they expect with the worst that they fear."""
    config, kind, reference = run.config, run.config.reward_model, run.load_network("sft")
    train = run.pairs[0]
    members = make_members(reference, kind, config.robust_members, seed)
    if kind != "brme" and config.annotators > 1:  # a member learns what its annotator likes
        shares = [[pair for pair in train if pair["annotator"] == i] for i in range(config.annotators)]
    else:
        shares = member_pairs(train, kind, config, seed)
    judge = run.load_network("reward") if kind == "brme" else None
    run.train(name, lambda checkpoint: train_members(members, shares, config, seed, judge, checkpoint),
              sum(steps_of(shares, config)))
    reward = RobustReward(members, kind, config.robust_lambda).to(run.device).requires_grad_(False)
    prompts = run.prompts[0]
    samples = [prompts[i % len(prompts)] for i in range(1024)]
    normalise_robust(reward, run.sample("normalise", reference, samples, seed))
    run.save_network(name, reward)

    heldout = run.pairs[1]
    result = dict(reward_accuracy(reward, heldout), **what_spread_knows(reward, heldout), pairs=len(train))
    run.write("robust.json", json.dumps(clean(result), allow_nan=False))
    return (f"warning: {AT_CHANCE}\n" if result["at_chance"] else "") + accuracy_text(result)


@torch.no_grad()
def what_spread_knows(reward, pairs):
    """The mean spread of the members over held-out answers, and with gold what it knows: `spread_and_error`."""
    answers = [reward.answers(collate_pairs(pairs[at:at + 128], reward.pad, reward.device))[0].unflatten(1, (2, -1))
               for at in range(0, len(pairs), 128)]
    means = torch.cat(answers, dim=2).cpu()                                                   # (k, 2, pairs)
    mean, spread = means.mean(dim=0), means.std(dim=0, correction=0)                          # (2, pairs) each
    known = dict(correlation=None, coverage=None)
    if "gold" in pairs[0]:
        gold = torch.tensor([pair["gold"] for pair in pairs]).T                               # (2, pairs)
        known = spread_and_error(mean.flatten(), spread.flatten(), gold.flatten())
    return dict(spread=spread.mean().item(), **{f"spread_{key}": value for key, value in known.items()})


def make_watcher(run, name, policy, scorer):
    """observe(metrics, rollout) of a loop that samples: it logs gold, and at MOMENTS moments the policy's answers."""
    config, prompts = policy_config(run.config, name), run.prompts[1][:SHOWN]
    moments = {round(i * config.ppo_iterations / (MOMENTS - 1)) for i in range(MOMENTS)}

    @torch.no_grad()
    def observe(metrics, rollout):
        if rollout is not None and run.config.in_world:
            metrics["gold"] = scaled_gold(run, rollout.prompt_ids(), rollout.response_ids()).mean().item()
        if rollout is not None and isinstance(scorer, RobustReward):
            metrics["spread"] = scorer.spread(rollout).mean().item()
        iterations = metrics["step"] + 1 if metrics else 0  # before training there are no metrics
        if iterations not in moments:
            return
        sampler = torch.Generator(run.device).manual_seed(config.seed)  # its own: training is the same without it
        answers = generate(policy, prompts, config.response_tokens, config.temperature, sampler)
        responses = answers.response_ids()
        row = dict(stage=name, step=iterations - 1, texts=[decode(run.tokenizer, response) for response in responses],
                   score=scorer(answers).tolist(), gold=scaled_gold(run, prompts, responses).tolist())
        run.write_rows("watch.jsonl", [*run.rows("watch.jsonl"), clean(row)])
    return observe


def run_ppo(run, name, seed):
    """The policy is trained on the score, and pays for its KL from the SFT policy."""
    config = policy_config(run.config, name)
    reference, scorer = run.load_network("sft"), make_scorer(run)
    policy = copy.deepcopy(reference).requires_grad_(True)
    if config.prompts:  # there is no reward model to begin with: a critic that expects 0 everywhere
        critic = RewardModel(reference).to(run.device)
        torch.nn.init.zeros_(critic.score.weight)
        critic.requires_grad_(True)
    else:
        critic = run.load_network("reward").requires_grad_(True)
    prompts, observe = run.prompts[0], make_watcher(run, name, policy, scorer)
    run.train(name, lambda checkpoint: train_ppo(policy, critic, reference, scorer, prompts, config, seed, checkpoint),
              config.ppo_iterations, observe)
    run.save_network(f"{name}_critic", critic)
    run.save_network(name, policy)
    return last_metrics(run, name, ["score", "gold", "kl", "length"])


def run_grpo(run, name, seed):
    """No critic: an answer is compared with other answers."""
    config = policy_config(run.config, name)
    reference, scorer = run.load_network("sft"), make_scorer(run)
    policy = copy.deepcopy(reference).requires_grad_(True)
    prompts, observe = run.prompts[0], make_watcher(run, name, policy, scorer)
    loop = train_online_dpo if name == "online_dpo" else train_grpo
    run.train(name, lambda checkpoint: loop(policy, reference, scorer, prompts, config, seed, checkpoint),
              config.ppo_iterations, observe)
    run.save_network(name, policy)
    return last_metrics(run, name, ["score", "gold", "kl", "length"])


def run_dpo(run, name, seed):
    """A copy of the SFT policy is fitted to the pairs directly, without a reward model."""
    config = policy_config(run.config, name)
    reference = run.load_network("sft")
    policy = copy.deepcopy(reference).requires_grad_(True)
    train = run.pairs[0]
    steps = config.dpo_epochs * -(-len(train) // config.dpo_batch)
    run.train(name, lambda checkpoint: train_dpo(policy, reference, train, config, seed, checkpoint,
                                                 config.temperature), steps)
    run.save_network(name, policy)
    return last_metrics(run, name, ["loss", "margin", "chosen_logp", "rejected_logp"])


def run_report(run, name, seed):
    """Every policy answers the same held-out prompts, next to the best that any policy could do."""
    write_report(run, seed)
    run.write("report.html", fill([gather(run)]))
    return f"open {run.folder / 'report.html'}"
