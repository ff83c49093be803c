"""
What a run has to show: the table of all policies, one prompt answered by each, and one episode token by token.

Every policy answers the same held-out prompts once, sampled at the temperature of training with one seed.

Letters: M prompts, n of best-of-n, N samples, K opponents.
"""

import json
import math
from typing import NamedTuple

import torch

from data import UserError, decode
from evaluate import best_of_n, best_of_n_kl, optimum, optimum_mean, sample_policy, standard_error, win_rate
from model import generate, response_logprobs
from ppo import exact_kl, gae, token_rewards

OPPONENTS = 4  # K fresh SFT samples of each prompt: the win rate is the share of them that an answer beats
NAMES = {"pretrained": "pretrained", "sft": "SFT", "best_of_n": "best of n", "dpo": "DPO", "ppo": "PPO",
         "grpo": "GRPO"}
NETWORKS = ("pretrained", "sft", "dpo", "ppo", "grpo")
HEAD = ("policy", "gold", "score", "KL", "objective", "optimum", "wins", "tokens", "finished")
WIDTHS = (12, 13, 8, 14, 11, 9, 7, 9, 10)


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


def known(x):
    """The number, or None where it is not known: JSON has no NaN."""
    return None if math.isnan(x) else float(x)


def make_row(answers, opponents, beta):
    """One policy's row of report.json, from Answers to M prompts and the gold of K opponents (M, K)."""
    score, kl = answers.score.mean().item(), answers.kl.mean().item()
    has_oracle = not answers.gold.isnan().any()
    return dict(gold=known(answers.gold.mean()), gold_se=known(standard_error(answers.gold)), score=score, kl=kl,
                kl_se=standard_error(answers.kl), objective=score - beta * kl, optimum_share=None,
                win_rate=win_rate(answers.gold[:, None], opponents) if has_oracle else None,
                length=answers.length.mean().item(), finished=answers.finished.mean().item())


@torch.no_grad()
def report(run, log):
    """Every policy answers the same held-out prompts, beside the best that any policy could do."""
    config, n = run.config, run.config.best_of
    prompts = run.prompts()[1]
    M = len(prompts)
    reference = run.load_network("sft")
    reward_model = run.scorer()

    # n + K samples of the SFT policy for each prompt: n for SFT, best-of-n and the optimum, K opponents
    many = [prompt for prompt in prompts for _ in range(n + OPPONENTS)]
    samples = answer(run, "SFT samples", reference, reference, reward_model, many, config.seed + 99)
    score = samples.score.view(M, n + OPPONENTS)[:, :n]                                       # (M, n)
    gold = samples.gold.view(M, n + OPPONENTS)[:, :n]                                         # (M, n)
    opponents = samples.gold.view(M, n + OPPONENTS)[:, n:]                                    # (M, K)
    firsts = [i * (n + OPPONENTS) for i in range(M)]
    bests = [first + best for first, best in zip(firsts, score.argmax(dim=1).tolist())]
    answers = {"sft": samples.pick(firsts), "best_of_n": samples.pick(bests)}
    for name in ("pretrained", "dpo", "ppo", "grpo"):
        if (run.folder / f"{name}.pt").exists():
            policy = run.load_network(name)
            answers[name] = answer(run, name, policy, reference, reward_model, prompts, config.seed + 100)
    rows = {name: make_row(answers[name], opponents, config.beta) for name in NAMES if name in answers}

    # the mean over n samples is less noisy than one answer
    rows["sft"].update(score=score.mean().item(), objective=score.mean().item())
    kl = best_of_n_kl(n)
    best_score = best_of_n(score, score, n).mean().item()
    rows["best_of_n"].update(score=best_score, kl=kl, objective=best_score - config.beta * kl)

    best = None
    if config.beta > 0:
        J, ess = optimum(score, config.beta)
        best = dict(objective=J, kl=(optimum_mean(score, score, config.beta) - J) / config.beta,
                    gold=known(optimum_mean(gold, score, config.beta)), ess=ess)
        start = rows["sft"]["objective"]
        for row in rows.values():
            row["optimum_share"] = (row["objective"] - start) / (J - start)
    result = dict(policies=rows, optimum=best, reward_model=run.read("reward.json"), seconds=run.seconds(),
                  config=run.saved_config(), device=str(run.device), torch=torch.__version__)
    if run.device.type == "cuda":
        result["peak_memory"] = torch.cuda.max_memory_allocated(run.device)  # bytes of tensors

    table, few = format_table(result), format_samples(run, prompts[:3], answers)
    run.write("report.json", json.dumps(result, indent=1))
    run.write("report.md", f"# {run.folder.name}\n\n```\n{table}\n```\n\n```\n{few}\n```\n")
    run.write("samples.txt", format_samples(run, prompts[:16], answers))
    print(f"\n{table}\n\n{few}\n")
    return f"written to {run.folder}: report.json, report.md, samples.txt, metrics.jsonl, the networks"


# ---- on the screen --------------------------------------------------------------------------------

def number(x, se=None):
    """A number with its standard error, '-' where it is not known."""
    if x is None:
        return "-"
    return f"{x:.2f}" if not se else f"{x:.2f} ±{se:.2f}"


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
        loose = "" if best["ess"] >= 100 else ", below 100: the bound is loose"
        notes.append(f"the optimum by reweighting {n * result['config']['eval_prompts']:,} SFT samples, "
                     f"effective sample size {best['ess']:.0f}{loose}")
    if "grpo" in result["policies"]:
        notes.append(f"GRPO with the advantages of {result['config']['grpo_kind']}, groups of "
                     f"{result['config']['group']}, the KL in the {result['config']['grpo_kl']}")
    if "peak_memory" in result:
        notes.append(f"at most {result['peak_memory'] / 2 ** 20:,.0f} MiB of tensors on the GPU")
    if result["policies"]["sft"]["gold"] is None:
        notes.append("this data has no oracle: gold and wins are not known")
    text = ["".join([line[0].ljust(WIDTHS[0])] + [cell.rjust(width) for cell, width in zip(line[1:], WIDTHS[1:])])
            for line in lines]
    rule = "-" * sum(WIDTHS)
    return "\n".join([text[0], rule, *text[1:], rule, *notes])


def format_samples(run, prompts, answers):
    """The same prompts answered by every policy; answers: {name: Answers}."""
    blocks = []
    for i, prompt in enumerate(prompts):
        lines = [decode(run.tokenizer, prompt).strip()]
        for name in NAMES:
            if name in answers:
                lines.append(f"  {NAMES[name]:<12}{decode(run.tokenizer, answers[name].responses[i]).strip()}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def answer_prompt(run, policy):
    """Sample an answer to --prompt: (prompt ids, a Rollout of one row)."""
    config = run.config
    ids = run.tokenizer.encode_ordinary(config.prompt)
    room = config.block_size - config.response_tokens
    if len(ids) > room:
        raise UserError(f"--prompt has {len(ids)} tokens, and there is room for {room} in a block of "
                        f"{config.block_size} beside the response: shorten it")
    generator = torch.Generator(run.device).manual_seed(config.seed)
    return ids, generate(policy, [ids], config.response_tokens, config.temperature, generator)


def sample_prompt(run):
    """Print the answer of each policy of a run to --prompt."""
    print(run.config.prompt)
    for name in NETWORKS:
        if (run.folder / f"{name}.pt").exists():
            _, rollout = answer_prompt(run, run.load_network(name))
            print(f"  {NAMES[name]:<12}{decode(run.tokenizer, rollout.response_ids()[0]).strip()}")


@torch.no_grad()
def trace(run):
    """Print one episode of the PPO policy as the MDP that it is: a row for each token, and the sums."""
    config, beta = run.config, run.config.beta
    reward_model, critic = run.scorer(), run.load_network("critic")
    ids, rollout = answer_prompt(run, run.load_network("ppo"))
    score = reward_model(rollout)                                                             # (1,)
    ref_logp = response_logprobs(run.load_network("sft"), rollout, config.temperature)        # (1, R)
    rewards = token_rewards(score, rollout.logp, ref_logp, rollout.mask, beta)                # (1, R)
    values = critic.values(rollout)                                                           # (1, R)
    advantages, _ = gae(rewards, values, rollout.mask, config.gamma, config.lam)              # (1, R)

    print("state s_t: the text so far. action a_t: the next token. transition: append it.\n"
          "reward r_t: -beta (log pi - log ref), and the score at the last token.\n")
    print(f"{'t':>3}  {'state (its end)':<34}{'action':<14}{'log pi':>8}{'log ref':>9}{'KL term':>9}"
          f"{'reward':>8}{'value':>8}{'advantage':>11}")
    kl_terms = -beta * (rollout.logp - ref_logp)                                              # (1, R)
    response = rollout.response_ids()[0]
    for t, token in enumerate(response):
        state = run.tokenizer.decode(ids + response[:t])[-30:]
        action = run.tokenizer.decode([token])
        print(f"{t:>3}  {state!r:<34}{action!r:<14}{rollout.logp[0, t]:>8.3f}{ref_logp[0, t]:>9.3f}"
              f"{kl_terms[0, t]:>9.3f}{rewards[0, t]:>8.3f}{values[0, t]:>8.3f}{advantages[0, t]:>11.3f}")
    print(f"{'sum':>3}  {'':<34}{'':<14}{rollout.logp.sum():>8.3f}{ref_logp.sum():>9.3f}{kl_terms.sum():>9.3f}"
          f"{rewards.sum():>8.3f}")

    kl = (rollout.logp - ref_logp).sum().item()
    ending = "" if rollout.finished.item() else "; cut at the cap, the horizon of the MDP"
    gold = known(run.gold([ids], [response]).item())
    print(f"\nthe rewards add up to score - beta * log pi/ref = {score.item():.3f} - {beta:g} * {kl:.3f} = "
          f"{score.item() - beta * kl:.3f}; gold {number(gold)}{ending}")
