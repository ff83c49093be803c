"""
What a run has to show: the table of all policies, and a few prompts answered by each.

Every policy answers the same held-out prompts once, sampled at the temperature of training with one seed.

Letters: M prompts, n of best-of-n, N samples, K opponents.
"""

import json
import math
import re
from typing import NamedTuple

import torch

from data import decode, printable
from evaluate import (
    best_of_n,
    best_of_n_kl,
    frontier,
    gain_error,
    known,
    optimum,
    optimum_mean,
    sample_policy,
    standard_error,
    win_rate,
)
from pipeline.config import WITHIN_RL
from ppo import exact_kl

OPPONENTS = 4  # K fresh SFT samples of each prompt: the win rate is the share of them that an answer beats
NAMES = {"pretrained": "pretrained", "sft": "SFT", "best_of_n": "best of n", "dpo": "DPO", "ppo": "PPO",
         "grpo": "GRPO"}
NETWORKS = ("pretrained", "sft", "dpo", "ppo", "grpo")
HEAD = ("policy", "gold", "score", "KL", "objective", "optimum", "wins", "tokens", "finished")
WIDTHS = (12, 13, 8, 14, 11, 9, 7, 9, 10)
AT_CHANCE = ("the reward model is no better than a coin: its scores mean nothing, and what is trained on them learns "
             "nothing; give it more pairs")


# ---- the numbers ----------------------------------------------------------------------------------

class Answers(NamedTuple):
    responses: list         # N lists of token ids
    gold: torch.Tensor      # (N,) NaN without an oracle
    score: torch.Tensor     # (N,)
    kl: torch.Tensor        # (N,) exact KL from the SFT policy along the response, nats
    length: torch.Tensor    # (N,) tokens
    finished: torch.Tensor  # (N,) 1.0 where the response ended with E

    def pick(self, rows):
        """The answers at these places (a list of N' ints)."""
        return Answers([self.responses[row] for row in rows], *[tensor[rows] for tensor in self[1:]])


def answer(run, name, policy, reference, reward_model, prompts, seed):
    """Sample one answer to each prompt and measure it: Answers."""
    responses, score, kl, finished = [], [], [], []
    for rollout in sample_policy(policy, prompts, run.config.response_tokens, run.config.temperature, seed, name):
        responses += rollout.response_ids()
        score.append(reward_model(rollout))
        finished.append(rollout.finished.float())
        if policy is not reference:
            kl.append(exact_kl(policy, reference, rollout, run.config.temperature))
    kl = torch.cat(kl).cpu() if kl else torch.zeros(len(prompts))
    length = torch.tensor([float(len(response)) for response in responses])
    gold = run.gold(prompts, responses)
    return Answers(responses, gold, torch.cat(score).cpu(), kl, length, torch.cat(finished).cpu())


def make_row(answers, opponents, beta, prompts=None):
    """
    One policy's row of report.json, from Answers to M prompts and the gold of K opponents (M, K).

    prompts (M hashables): the errors count different prompts; without them, all are different.
    """
    score, kl = answers.score.mean().item(), answers.kl.mean().item()
    has_oracle = not answers.gold.isnan().any()
    row = dict(gold=answers.gold.mean(), gold_se=standard_error(answers.gold, prompts), score=score, kl=kl,
               kl_se=standard_error(answers.kl, prompts), objective=score - beta * kl, optimum_share=None,
               win_rate=win_rate(answers.gold[:, None], opponents) if has_oracle else None,
               length=answers.length.mean().item(), finished=answers.finished.mean().item())
    return {name: known(x) for name, x in row.items()}


def add_shares(rows, J, error):
    """
    Fill in the share of the optimum J in each row, where it means something. Returns a warning where it does not.

    error: the standard error of J minus SFT's objective. A share of a gain that may be 0 could be anything.
    """
    start = rows["sft"]["objective"]
    if start is None or not J - start > 2 * error:
        return ["the SFT policy is at the optimum, up to the error of both: there is no share of it"]
    warnings = []
    for name, row in rows.items():
        share = -math.inf if row["objective"] is None else (row["objective"] - start) / (J - start)
        if share >= -10:
            row["optimum_share"] = share
        else:
            warnings.append(f"{NAMES[name]} is {number(row['kl'])} nats from SFT, which costs many times more than can "
                            "be gained: there is no share of the optimum")
    return warnings


def other_settings(run):
    """A warning for each policy that was trained with another objective, or other episodes, than the report has."""
    warnings = []
    for stage in ("ppo", "grpo"):
        trained = run.finished().get(stage, {}).get("settings", {})
        others = [f"{name} {trained[name]}" for name in WITHIN_RL
                  if trained.get(name, getattr(run.config, name)) != getattr(run.config, name)]
        if others:
            warnings.append(f"{NAMES[stage]} was trained with {', '.join(others)}: its row does not compare")
    return warnings


@torch.no_grad()
def report(run):
    """Measure all policies on the same held-out prompts, write report.json, report.md and samples.txt, and print."""
    reference = run.load_network("sft")
    reward_model = run.scorer()
    others = {name: run.load_network(name) for name in ("pretrained", "dpo", "ppo", "grpo")
              if (run.folder / f"{name}.pt").exists()}
    config, n = run.config, run.config.best_of  # now with the settings that the networks were trained with
    prompts = run.prompts()[1]
    run.saw(prompts=prompts)
    M = len(prompts)
    keys = [tuple(prompt) for prompt in prompts]

    # n + K samples of the SFT policy for each prompt: n for SFT, best-of-n and the optimum, K opponents
    many = [prompt for prompt in prompts for _ in range(n + OPPONENTS)]
    samples = answer(run, "SFT samples", reference, reference, reward_model, many, config.seed + 99)
    score = samples.score.view(M, n + OPPONENTS)[:, :n]                                       # (M, n)
    gold = samples.gold.view(M, n + OPPONENTS)[:, :n]                                         # (M, n)
    opponents = samples.gold.view(M, n + OPPONENTS)[:, n:]                                    # (M, K)
    firsts = [i * (n + OPPONENTS) for i in range(M)]
    bests = [first + best for first, best in zip(firsts, score.argmax(dim=1).tolist())]
    answers = {"sft": samples.pick(firsts), "best_of_n": samples.pick(bests)}
    for name, policy in others.items():
        answers[name] = answer(run, name, policy, reference, reward_model, prompts, config.seed + 100)
    rows = {name: make_row(answers[name], opponents, config.beta, keys) for name in NAMES if name in answers}

    # the mean over n samples is less noisy than one answer
    rows["sft"].update(score=score.mean().item(), objective=score.mean().item())
    kl = best_of_n_kl(n)
    best_score = best_of_n(score, score, n).mean().item()
    rows["best_of_n"].update(score=best_score, kl=kl, objective=best_score - config.beta * kl)

    best, reward = None, run.read("reward.json")
    at_chance = reward.get("at_chance") and config.reward_from == "model"
    warnings = [AT_CHANCE] if at_chance else []
    warnings += other_settings(run)
    if len(set(keys)) < M:
        warnings.append(f"{M} answers to {len(set(keys))} different prompts: the errors count prompts, not answers")
    if config.beta > 0:
        J, ess = optimum(score, config.beta)
        best = dict(objective=known(J), kl=known((optimum_mean(score, score, config.beta) - J) / config.beta),
                    gold=known(optimum_mean(gold, score, config.beta)), ess=known(ess))
        if not at_chance:
            warnings += add_shares(rows, J, gain_error(score, config.beta, keys))
    result = dict(policies=rows, optimum=best, frontier=frontier(score, gold, config.beta), reward_model=reward,
                  warnings=warnings, seconds=run.used("seconds"), config=run.saved_config(), device=str(run.device),
                  torch=torch.__version__)
    seeds = {**run.used("seed"), "report": config.seed}
    if set(seeds.values()) - {result["config"]["seed"]}:
        result["seeds"] = seeds  # a stage ran with another seed than pretraining
    if run.device.type == "cuda":
        result["peak_memory"] = torch.cuda.max_memory_allocated(run.device)  # bytes of tensors

    table, few = format_table(result), format_samples(run, prompts[:3], answers)
    run.write("report.json", json.dumps(result, indent=1, allow_nan=False))
    run.write("report.md", f"# {run.folder.name}\n\n{fenced(table)}\n{fenced(few)}")
    run.write("samples.txt", format_samples(run, prompts[:16], answers))
    print(f"\n{table}\n\n{few}\n")


def turning_point(steps, gold, score):
    """
    The step at which gold turned while the score still climbed (over-optimisation), None if it did not.

    steps, gold, score: lists of numbers, gold and score in standard deviations. Both are averaged over a tenth of the
    run at a time. Gold turned at its highest tenth if it fell from there to the end by over 0.1, and the score rose.
    """
    size = max(1, len(gold) // 10)
    starts = range(len(gold) % size, len(gold), size)  # the last part ends with the run
    golds = [sum(gold[at:at + size]) / size for at in starts]
    scores = [sum(score[at:at + size]) / size for at in starts]
    top = golds.index(max(golds))
    turned = golds[top] - golds[-1] > 0.1 and scores[-1] > scores[top]
    return steps[starts[top] + size // 2] if turned else None


# ---- on the screen --------------------------------------------------------------------------------

def number(x, se=None, digits=2):
    """A number with its standard error, '-' where it is not known."""
    if x is None:
        return "-"
    return f"{x:.{digits}f}" + (f" ±{se:.{digits}f}" if se else "")


def percent(x):
    return "-" if x is None else f"{x:.0%}"


def format_table(result):
    """The report as a table of plain text."""
    beta, n, best = result["config"]["beta"], result["config"]["best_of"], result["optimum"]
    lines = [HEAD]
    for name, row in result["policies"].items():
        label = f"best of {n}" if name == "best_of_n" else NAMES[name]
        lines.append((label, number(row["gold"], row["gold_se"]), number(row["score"]), number(row["kl"], row["kl_se"]),
                      number(row["objective"]), percent(row["optimum_share"]), number(row["win_rate"]),
                      f"{row['length']:.1f}", percent(row["finished"])))
    notes = ["gold and score in standard deviations of SFT's, KL in nats per response, "
             f"objective = score - {beta:g} KL, wins against SFT by gold"]
    if best:
        lines.append(("the optimum", number(best["gold"]), number(best["objective"] + beta * best["kl"]),
                      number(best["kl"]), number(best["objective"]), "100%", "", "", ""))
        warning = "" if best["ess"] >= 100 else ", below 100: the optimum is uncertain"
        notes.append(f"the optimum by reweighting {n * result['config']['eval_prompts']:,} SFT samples, "
                     f"effective sample size {best['ess']:.0f}{warning}")
    if "grpo" in result["policies"]:
        notes.append(f"GRPO with the advantages of {result['config']['grpo_kind']}, groups of "
                     f"{result['config']['group']}, the KL in the {result['config']['grpo_kl']}")
    if "peak_memory" in result:
        notes.append(f"at most {result['peak_memory'] / 2 ** 20:,.0f} MiB of tensors on the GPU")
    if result["policies"]["sft"]["gold"] is None:
        notes.append("this data has no oracle: gold and wins are not known")
    notes += [f"warning: {warning}" for warning in result.get("warnings", [])]
    text = ["".join([line[0].ljust(WIDTHS[0])] + [cell.rjust(width) for cell, width in zip(line[1:], WIDTHS[1:])])
            for line in lines]
    rule = "-" * sum(WIDTHS)
    return "\n".join([text[0], rule, *text[1:], rule, *notes])


def fenced(text):
    """A block of Markdown that no fence within the text ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}\n"


def format_samples(run, prompts, answers):
    """The same prompts answered by every policy; answers: {name: Answers}. Further lines are indented."""
    def shown(ids):
        return printable(decode(run.tokenizer, ids).strip()).replace("\n", "\n" + 14 * " ")

    blocks = []
    for i, prompt in enumerate(prompts):
        lines = [shown(prompt)]
        for name in NAMES:
            if name in answers:
                lines.append(f"  {NAMES[name]:<12}{shown(answers[name].responses[i])}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
