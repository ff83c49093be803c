"""
What a run has to show: the report on every policy, one prompt answered by each, and one episode token by token.

All policies are judged in one way: one sample for each held-out prompt at the temperature of training, the same seed, the same prompts; gold
against four fresh SFT samples for the same prompt gives the win rate. KL is measured by its exact next-token terms along the samples.

Letters: M prompts, n of best-of-n.
"""

import json

import torch

from data import decode
from evaluate import best_of_n, best_of_n_kl, exact_kl, optimum, optimum_mean, sample_policy, standard_error, win_rate
from model import generate
from ppo import experience
from reward import score_batches
from run import UserError

OPPONENTS = 4  # fresh SFT samples for each prompt, that a policy's sample is compared with
NAMES = {"pretrained": "pretrained", "sft": "SFT", "best_of_n": "best of n", "dpo": "DPO", "ppo": "PPO"}


def policy_row(run, name, policy, reference, reward_model, prompts, opponents):
    """(one policy's row of the report, its responses): sampled once for each prompt."""
    config = run.config
    rollouts = sample_policy(policy, prompts, config.response_tokens, config.temperature, config.seed + 100, name)
    responses = [ids for rollout in rollouts for ids in rollout.response_ids()]
    score = score_batches(reward_model, rollouts).cpu()                                       # (M,)
    kl = torch.cat([exact_kl(policy, reference, rollout, config.temperature) for rollout in rollouts]).cpu()       # (M,)
    gold = run.gold(prompts, responses)                                                                            # (M,) or None
    finished = torch.cat([rollout.finished for rollout in rollouts]).float().mean().item()
    return make_row(score, kl.mean().item(), standard_error(kl), gold, opponents, [len(ids) for ids in responses], finished, config.beta), responses


def make_row(score, kl, kl_se, gold, opponents, lengths, finished, beta):
    """A policy's row of report.json; gold and win rate are None where there is no oracle. The optimum's share is filled in later."""
    return dict(gold=None if gold is None else gold.mean().item(), gold_se=None if gold is None else standard_error(gold),
                score=score.mean().item(), kl=kl, kl_se=kl_se, objective=score.mean().item() - beta * kl, optimum_share=None,
                win_rate=None if gold is None else win_rate(gold[:, None], opponents), length=sum(lengths) / len(lengths), finished=finished)


def report(run, log):
    """Every policy answers the same held-out prompts, beside the best that any policy could do."""
    config = run.config
    n, prompts = config.best_of, run.prompts()[1]
    M = len(prompts)
    reference, reward_model = run.load_network("sft", "sft"), run.load_network("reward", "reward")
    policies = {name: run.load_network(name, name) for name in ("pretrained", "dpo", "ppo") if (run.folder / f"{name}.pt").exists()}

    # n SFT samples for each prompt serve the SFT row, best-of-n and the optimum; the last ones are the opponents of every policy
    many = [prompt for prompt in prompts for _ in range(n + OPPONENTS)]
    rollouts = sample_policy(reference, many, config.response_tokens, config.temperature, config.seed + 99, "SFT samples")
    responses = [ids for rollout in rollouts for ids in rollout.response_ids()]
    scores = score_batches(reward_model, rollouts).cpu().view(M, n + OPPONENTS)                       # (M, n + 4)
    finished = torch.cat([rollout.finished for rollout in rollouts]).cpu().float().view(M, n + OPPONENTS)
    lengths = torch.tensor([len(ids) for ids in responses]).float().view(M, n + OPPONENTS)
    golds = run.gold(many, responses)
    golds = golds if golds is None else golds.view(M, n + OPPONENTS)
    opponents = None if golds is None else golds[:, n:]                                                            # (M, 4)
    scores, finished, lengths, golds = (x if x is None else x[:, :n] for x in (scores, finished, lengths, golds))  # (M, n)

    rows, answers = {}, {}
    for name, policy in policies.items():
        rows[name], answers[name] = policy_row(run, name, policy, reference, reward_model, prompts, opponents)
    own = None if golds is None else golds[:, 0]
    rows["sft"] = make_row(scores, 0.0, 0.0, own, opponents, lengths[:, 0].tolist(), finished.mean().item(), config.beta)
    best = scores.argmax(dim=1)                                                                                    # (M,)
    pick = (torch.arange(M), best)
    rows["best_of_n"] = make_row(best_of_n(scores, scores, n), best_of_n_kl(n), 0.0, None if golds is None else golds[pick], opponents,
                                 lengths[pick].tolist(), finished[pick].mean().item(), config.beta)
    answers["sft"] = responses[::n + OPPONENTS]
    answers["best_of_n"] = [responses[i * (n + OPPONENTS) + j] for i, j in enumerate(best.tolist())]

    best_possible = None
    if config.beta > 0:
        objective, ess = optimum(scores, config.beta)
        best_possible = dict(objective=objective, kl=(optimum_mean(scores, scores, config.beta) - objective) / config.beta,
                             gold=None if golds is None else optimum_mean(golds, scores, config.beta), ess=ess)
        for row in rows.values():
            row["optimum_share"] = (row["objective"] - rows["sft"]["objective"]) / (objective - rows["sft"]["objective"])
    rows = {name: rows[name] for name in NAMES if name in rows}
    result = dict(policies=rows, optimum=best_possible, reward_model=run.read("reward.json", "reward"), seconds=run.seconds(), config=run.saved_config(),
                  device=str(run.device), torch=torch.__version__)
    if (peak := peak_memory(run.device)) is not None:
        result.update(peak_memory=peak, cuda_graphs=config.cuda_graphs)
    table, samples = format_table(result, n), format_samples(run, prompts[:3], answers)
    run.write("report.json", json.dumps(result, indent=1))
    run.write("report.md", f"# {run.folder.name}\n\n```\n{table}\n```\n\n```\n{samples}\n```\n")
    run.write("samples.txt", format_samples(run, prompts[:16], answers))
    print(f"\n{table}\n\n{samples}\n")
    return f"written to {run.folder}: report.json, report.md, samples.txt, metrics.jsonl, the networks"


def peak_memory(device):
    """The most bytes that tensors of this process had on a GPU at one time; None on another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# ---------------------------------------------------------------------------------------------------------------------
# on the screen

def number(x, digits=2):
    return "-" if x is None else f"{x:.{digits}f}"


def format_table(result, n):
    """The report as a table of plain text."""
    def line(name, row, kl_se, win):
        gold = number(row["gold"]) + (f" ±{row['gold_se']:.2f}" if row.get("gold_se") is not None else "")
        return (f"{name:<12}{gold:>13}{number(row['score']):>8}{number(row['kl']) + kl_se:>14}{number(row['objective']):>11}"
                f"{'' if row['optimum_share'] is None else format(row['optimum_share'], '.0%'):>9}{win:>7}"
                f"{number(row.get('length'), 1):>9}{'' if row.get('finished') is None else format(row['finished'], '.0%'):>10}")

    head = f"{'policy':<12}{'gold':>13}{'score':>8}{'KL':>14}{'objective':>11}{'optimum':>9}{'wins':>7}{'tokens':>9}{'finished':>10}"
    lines = [head, "-" * len(head)]
    for name, row in result["policies"].items():
        label = f"best of {n}" if name == "best_of_n" else NAMES[name]
        lines.append(line(label, row, f" ±{row['kl_se']:.2f}" if row["kl_se"] else "", number(row["win_rate"])))
    beta, best = result["config"]["beta"], result["optimum"]
    if best:
        lines.append(line("the optimum", dict(best, score=best["objective"] + beta * best["kl"], optimum_share=1.0), "", ""))
    lines += ["-" * len(head), "gold and score in standard deviations of SFT's, KL in nats a response, "
              f"objective = score - {beta:g} KL; wins against SFT by gold"]
    if best:
        loose = "" if best["ess"] >= 100 else "; below 100, so the bound is loose"
        lines.append(f"the optimum by reweighting {n * result['config']['eval_prompts']:,} SFT samples, effective sample size {best['ess']:.0f}{loose}")
    if "peak_memory" in result:
        lines.append(f"at most {result['peak_memory'] / 2 ** 20:,.0f} MiB of tensors on the GPU in the stages of this command")
    if result["policies"]["sft"]["gold"] is None:
        lines.append("this data has no oracle: gold and wins are not known")
    return "\n".join(lines)


def format_samples(run, prompts, answers):
    """The same prompts answered by every policy."""
    blocks = []
    for i, prompt in enumerate(prompts):
        lines = [decode(run.tokenizer, prompt).strip()]
        lines += [f"  {NAMES[name]:<12}{decode(run.tokenizer, answers[name][i]).strip()}" for name in NAMES if name in answers]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def prompt_ids(run):
    """The --prompt as token ids that leave room for a response."""
    ids, room = run.tokenizer.encode_ordinary(run.config.prompt), run.config.block_size - run.config.response_tokens
    if len(ids) > room:
        raise UserError(f"--prompt has {len(ids)} tokens, and a block of {run.config.block_size} has room for {room} beside the response: shorten it")
    return ids


def sample(run):
    """The --prompt answered under each policy of a run."""
    ids = prompt_ids(run)
    print(run.config.prompt)
    for name in ("pretrained", "sft", "dpo", "ppo"):
        if (run.folder / f"{name}.pt").exists():
            policy = run.load_network(name, name)
            generator = torch.Generator(run.device).manual_seed(run.config.seed)
            rollout = generate(policy, [ids], run.config.response_tokens, run.config.temperature, generator)
            print(f"  {NAMES[name]:<12}{decode(run.tokenizer, rollout.response_ids()[0]).strip()}")


def trace(run):
    """One episode of the trained PPO policy as the MDP that it is: a row per token, and the sums."""
    config, tokenizer, ids = run.config, run.tokenizer, prompt_ids(run)
    policy, reference = run.load_network("ppo", "ppo"), run.load_network("sft", "sft")
    reward_model, critic = run.load_network("reward", "reward"), run.load_network("critic", "ppo")
    generator = torch.Generator(run.device).manual_seed(config.seed)
    rollout = generate(policy, [ids], config.response_tokens, config.temperature, generator)
    steps = experience(rollout, reference, reward_model, critic, config.beta, config.gamma, config.lam, config.temperature)
    logp, ref_logp, rewards, values, advantages = (x[0].tolist() for x in (
        rollout.logp, steps["ref_logp"], steps["rewards"], steps["values"], steps["advantages"]))
    print("state s_t: the text so far; action a_t: the next token; transition: append it; reward r_t: -beta (log pi - log ref), and the score at the end\n")
    print(f"{'t':>3}  {'state (its last tokens)':<34}{'action':<14}{'log pi':>8}{'log ref':>9}{'KL term':>9}{'reward':>8}{'value':>8}{'advantage':>11}")
    text = list(ids)
    for t, token in enumerate(rollout.response_ids()[0]):
        state = tokenizer.decode(text)[-30:]
        print(f"{t:>3}  {state!r:<34}{tokenizer.decode([token])!r:<14}{logp[t]:>8.3f}{ref_logp[t]:>9.3f}{-config.beta * (logp[t] - ref_logp[t]):>9.3f}"
              f"{rewards[t]:>8.3f}{values[t]:>8.3f}{advantages[t]:>11.3f}")
        text.append(token)
    score, kl = steps["scores"].item(), sum(logp) - sum(ref_logp)
    print(f"{'sum':>3}  {'':<34}{'':<14}{sum(logp):>8.3f}{sum(ref_logp):>9.3f}{-config.beta * kl:>9.3f}{sum(rewards):>8.3f}")
    gold = run.gold([ids], rollout.response_ids())
    print(f"\nthe rewards add up to score - beta * log pi/ref = {score:.3f} - {config.beta:g} * {kl:.3f} = {score - config.beta * kl:.3f}"
          + ("" if gold is None else f"; gold {gold.item():.3f}") + ("" if rollout.finished.item() else "; cut at the cap: the horizon of the MDP"))
