"""
The results of a run: the table of all policies, and a few prompts answered by each.

Every policy answers the same held-out prompts once, sampled at the temperature of training, all with one seed. SFT
answers each n + K times with another seed, for best-of-n, the optimum and the opponents.

Letters: M prompts, n of best-of-n, N samples, K opponents.
"""

import json
import math
import textwrap
from typing import NamedTuple

import torch

import evaluate
from evaluate import standard_error, wins
from pipeline.config import POLICIES
from pipeline.diagnose import diagnose
from pipeline.errors import BOLD, YELLOW, printable, styled
from pipeline.files import clean
from pipeline.scores import make_scorer, scaled_gold
from ppo import exact_kl
from reward import parse_bias
from tokenizer import decode

TRIED, TRIES, PASS = 128, 16, 8  # of pass@k: prompts, answers to each of them, and k
OPPONENTS = 4  # K fresh SFT samples of each prompt: the win rate is the share of them that an answer beats
NAMES = {"pretrained": "pretrained", "sft": "SFT", "best_of_n": "best of n",
         **{name: label for name, (label, *_) in POLICIES.items()}}
AT_CHANCE = ("the reward model is no better than a coin: its scores mean nothing, and what is trained on them learns "
             "nothing; give it more pairs")
WIDTH = 79  # columns of a terminal, less one
FEW = 3     # effective samples: an optimum from fewer is one or two lucky answers


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


@torch.no_grad()
def answer(run, name, policy, reference, scorer, prompts, seed):
    """Sample one answer to each prompt and measure it: Answers."""
    responses, score, kl, finished = [], [], [], []
    for rollout in run.sample(name, policy, prompts, seed):
        responses += rollout.response_ids()
        score.append(scorer(rollout))
        finished.append(rollout.finished.float())
        if policy is not reference:
            kl.append(exact_kl(policy, reference, rollout, run.config.temperature))
    kl = torch.cat(kl).cpu() if kl else torch.zeros(len(prompts))
    length = torch.tensor([float(len(response)) for response in responses])
    gold = scaled_gold(run, prompts, responses)
    return Answers(responses, gold, torch.cat(score).cpu(), kl, length, torch.cat(finished).cpu())


def make_row(answers, opponents, beta, prompts):
    """One policy's row of report.json, from Answers to M prompts (M hashables) and the gold of K opponents (M, K)."""
    score, kl = answers.score.mean().item(), answers.kl.mean().item()
    won = wins(answers.gold[:, None], opponents).mean(dim=1)                                  # (M,)
    no_oracle = answers.gold.isnan().any()
    return dict(gold=answers.gold.mean().item(), gold_se=standard_error(answers.gold, prompts), score=score,
                score_se=standard_error(answers.score, prompts), kl=kl, kl_se=standard_error(answers.kl, prompts),
                objective=score - beta * kl, objective_se=standard_error(answers.score - beta * answers.kl, prompts),
                optimum_share=None, optimum_share_se=None, win_rate=None if no_oracle else won.mean().item(),
                win_rate_se=None if no_oracle else standard_error(won, prompts),
                length=answers.length.mean().item(), finished=answers.finished.mean().item())


def add_shares(rows, J, ess, error):
    """
    Fill in the share of the optimum J in each row, or return a warning.

    ess: the effective sample size of J. error: the standard error of J minus SFT's objective.
    """
    start = rows["sft"]["objective"]
    if ess < FEW:  # J is little more than the best sample, and a policy may well be better than that
        return [f"the optimum is known from too few samples, effective sample size {ess:.0f}: there is no share of it"]
    if not J - start > 2 * error:  # a share of a gain that may be 0 could be anything
        return ["the SFT policy is at the optimum, up to the error of both: there is no share of it"]
    warnings = []
    for name, row in rows.items():
        share = (row["objective"] - start) / (J - start)
        if share >= -10:
            row["optimum_share"] = share
        else:
            warnings.append(f"{NAMES[name]} is {number(row['kl'])} nats from SFT, which costs many times more than can "
                            "be gained: there is no share of the optimum")
    return warnings


def turning_point(steps, gold, score):
    """The step at which gold turned while the score still climbed, None if it did not. docs/page.md has the rule."""
    size = max(1, len(gold) // 10)  # steps in a tenth of the run
    starts = range(len(gold) % size, len(gold), size)  # the last part ends with the run
    golds = [sum(gold[at:at + size]) / size for at in starts]
    scores = [sum(score[at:at + size]) / size for at in starts]
    top = golds.index(max(golds))
    changes = [after - before for before, after in zip(gold, gold[1:])]  # from step to step there is little but noise
    noise = math.sqrt(sum(change ** 2 for change in changes) / max(len(changes), 1) / 2)
    error = noise * math.sqrt(2 / size)
    turned = golds[top] - golds[-1] > max(0.1, 3 * error) and scores[-1] > scores[top]
    return steps[starts[top] + size // 2] if turned else None


def logged_rows(run):
    """{stage: the rows of its steps}, in the order of training."""
    stages = {}
    for row in run.rows():
        if "step" in row:
            stages.setdefault(row["stage"], []).append(row)
    for rows in stages.values():
        keys = rows[0].keys() - {"kl_at_start"}  # which only the first step has
        run.need_readable(all(row.keys() == keys for row in rows[1:]), "metrics.jsonl")
    return stages


def turning_points(metrics):
    """{policy: the iteration at which its gold turned, or None} of all loops that log gold. metrics: `logged_rows`."""
    return {name: turning_point(*[[row[key] for row in rows] for key in ("step", "gold", "score")])
            for name, rows in metrics.items() if "gold" in rows[0]}


@torch.no_grad()
def write_report(run, seed):
    """Measure all policies on the same held-out prompts, write report.json and samples.txt, and print."""
    config, n = run.config, run.config.best_of
    reference, scorer, heldout, M = run.load_network("sft"), make_scorer(run), run.prompts[1], config.eval_prompts
    prompts = [heldout[i % len(heldout)] for i in range(M)]  # repeated if there are few
    keys = [tuple(prompt) for prompt in prompts]

    # n + K samples of the SFT policy for each prompt: n for SFT, best-of-n and the optimum, K opponents
    many = [prompt for prompt in prompts for _ in range(n + OPPONENTS)]
    samples = answer(run, "SFT samples", reference, reference, scorer, many, seed)
    score = samples.score.view(M, n + OPPONENTS)[:, :n]                                       # (M, n)
    gold = samples.gold.view(M, n + OPPONENTS)[:, :n]                                         # (M, n)
    opponents = samples.gold.view(M, n + OPPONENTS)[:, n:]                                    # (M, K)
    firsts = [i * (n + OPPONENTS) for i in range(M)]
    bests = [first + best for first, best in zip(firsts, score.argmax(dim=1).tolist())]
    answers = {"sft": samples.pick(firsts), "best_of_n": samples.pick(bests)}
    for name in ("pretrained", *config.policies.split(",")):
        answers[name] = answer(run, name, run.load_network(name), reference, scorer, prompts, seed + 1)
    rows = {name: make_row(answers[name], opponents, config.beta, keys) for name in NAMES if name in answers}

    # SFT: the mean over all n samples, which is less noisy than one answer. By construction its gold is about 0
    error = standard_error(score.mean(dim=1), keys)
    rows["sft"].update(score=score.mean().item(), score_se=error, objective=score.mean().item(), objective_se=error,
                       gold=gold.mean().item(),
                       gold_se=standard_error(gold.flatten(), [key for key in keys for _ in range(n)]))
    if config.in_world:
        won = wins(gold[:, :, None], opponents[:, None]).mean(dim=(1, 2))                     # (M,)
        rows["sft"].update(win_rate=won.mean().item(), win_rate_se=standard_error(won, keys))
    kl = evaluate.best_of_n_kl(n)
    best_score = evaluate.best_of_n(score, score, n)                                          # (M,)
    error = standard_error(best_score, keys)
    rows["best_of_n"].update(score=best_score.mean().item(), score_se=error, kl=kl, objective_se=error,
                             objective=best_score.mean().item() - config.beta * kl)
    for phrase in [name.removeprefix("phrase:") for name, _ in parse_bias(config.bias) if name.startswith("phrase:")]:
        for name, row in rows.items():
            texts = [decode(run.tokenizer, response) for response in answers[name].responses]
            row.setdefault("phrases", {})[phrase] = sum(phrase in text for text in texts) / M

    if config.reward_from == "task":  # several answers to each prompt: pass@k falls if they get too alike
        tried = [prompt for prompt in prompts[:TRIED] for _ in range(TRIES)]
        for name in ("pretrained", "sft", *config.policies.split(",")):
            passed = answer(run, name, run.load_network(name), reference, scorer, tried, seed + 2).score
            rows[name]["pass_at_k"] = evaluate.pass_at_k(passed.view(-1, TRIES), PASS).mean().item()

    best, reward = None, dict(accuracy=None, pairs=0)
    if not config.prompts:
        reward = run.read("reward.json" if config.reward_model == "single" else "robust.json")
    at_chance = reward.get("at_chance") and config.reward_from == "model"
    warnings = [AT_CHANCE] if at_chance else []
    different = len(set(keys))
    if different < M or M == 1:
        warnings.append(f"{M} answers to {different} different prompts: the errors count prompts, not answers"
                        if different > 1 else "all answers are to one prompt: the errors say nothing of others")
    if config.beta > 0:
        J, ess = evaluate.optimum(score, config.beta)
        best = dict(objective=J, kl=(evaluate.optimum_mean(score, score, config.beta) - J) / config.beta,
                    gold=evaluate.optimum_mean(gold, score, config.beta), ess=ess)
        if not at_chance:
            warnings += add_shares(rows, J, ess, evaluate.gain_error(score, config.beta, keys))
        objectives = {name: each.score - config.beta * each.kl for name, each in answers.items()}
        objectives["best_of_n"] = best_score - config.beta * kl
        for name, row in rows.items():
            if row["optimum_share"] is not None:
                row["optimum_share_se"] = evaluate.share_error(objectives[name], score, config.beta, keys)
        rows["sft"]["optimum_share_se"] = 0.0  # its share is 0 by definition
    metrics = logged_rows(run)
    warnings += [f"{NAMES[name]} over-optimised: from iteration {turn} on gold fell while the score rose"
                 for name, turn in turning_points(metrics).items() if turn is not None]
    seconds = {row["stage"]: round(row["stage_seconds"], 1) for row in run.rows() if "stage_seconds" in row}
    result = dict(policies=rows, optimum=best, frontier=evaluate.frontier(score, gold, config.beta),
                  reward_model=reward, warnings=warnings, seconds=seconds, config=vars(config),
                  device=str(run.device), torch=torch.__version__)
    result["diagnosis"] = diagnose(result, metrics)
    result = clean(result)
    table, few = format_table(result), format_samples(run, prompts[:3], answers)
    run.write("samples.txt", format_samples(run, prompts[:16], answers))
    run.write("report.json", json.dumps(result, indent=1, allow_nan=False))
    print(f"\n{few}\n\n{table}\n")


# ---- on the screen --------------------------------------------------------------------------------

def number(x, se=None, digits=2):
    """A number with its standard error, '-' where it is not known."""
    if x is None or math.isnan(x):
        return "-"
    digits = 1 if abs(x) >= 10 else digits  # so that a row of the table fits a terminal
    x = round(x, digits) + 0.0  # never "-0.00"
    return f"{x:.{digits}f}" + (f" ±{se:.{digits}f}" if se else "")


def percent(x, se):
    """A share in percent with its standard error; a share beyond 100% has none, since nobody asks for it."""
    if x is None:
        return "-"
    return f"{x:.0%}" + (f" ±{100 * se:.0f}" if se and abs(x) < 1 else "")


def accuracy_text(reward):
    """How good the reward model is, from reward.json."""
    if reward["accuracy"] is None:
        return "none: the reward is a function"
    text = f"accuracy {number(reward['accuracy'], reward.get('accuracy_se'), 3)} on held-out pairs"
    if reward.get("label_ceiling") is not None:
        text += f" (at most {reward['label_ceiling']:.3f} with the labels' noise)"
    if reward.get("gold_accuracy") is not None:
        text += f", {number(reward['gold_accuracy'], reward['gold_accuracy_se'], 3)} against the order by gold"
    for key, rule in (("longer_chosen", "the longer answer"), ("first_chosen", "the first answer")):
        if reward.get(key) is not None:
            text += f"; \"{rule} wins\" {reward[key]:.3f}"
    if reward.get("spread_correlation") is not None:
        text += (f"; the members' spread {reward['spread']:.2f}, correlation with their error "
                 f"{reward['spread_correlation']:.2f}, gold within two spreads {reward['spread_coverage']:.0%}")
    return text


HEADINGS = ("policy", "gold", "score", "KL", "objective", "optimum", "wins", "tokens", f"pass@{PASS}")


def make_table(result):
    """The table of a report as rows of texts: the headings first, the optimum last, no column that is empty."""
    rows = {f"best of {result['config']['best_of']}" if name == "best_of_n" else NAMES[name]: row
            for name, row in result["policies"].items()}
    best = result["optimum"]
    if best:
        score = best["objective"] + result["config"]["beta"] * best["kl"]
        rows["the optimum"] = dict(best, score=score, optimum_share=1, win_rate=None, length=None)
    task = result["config"].get("reward_from") == "task"  # a terminal has no room for tokens and pass@k
    table = []
    for label, row in rows.items():
        gold, score, kl, objective = [number(row[name], row.get(f"{name}_se"))
                                      for name in ("gold", "score", "kl", "objective")]
        share, won = [percent(row[name], row.get(f"{name}_se")) for name in ("optimum_share", "win_rate")]
        objective = objective if best else "-"  # without a beta it is the score
        length = None if task else row["length"]
        cells = [gold, score, kl, objective, share, won, number(length, digits=1), number(row.get("pass_at_k"))]
        table.append([label, *[cell.replace("±0.", "±.") for cell in cells]])  # so that a row fits a terminal
    columns = [column for column in zip(HEADINGS, *table) if set(column[1:]) != {"-"}]
    return [list(cells) for cells in zip(*columns)]


def format_rows(table):
    """The rows of a table as lines of text."""
    first, *others = [max(map(len, column)) for column in zip(*table)]
    return [" ".join([label.ljust(first), *[cell.rjust(width) for cell, width in zip(cells, others)]])
            for label, *cells in table]


def format_notes(result):
    """The notes below the table: a list of sentences, the warnings last."""
    beta, best, has_gold = result["config"]["beta"], result["optimum"], result["policies"]["sft"]["gold"] is not None
    wins = ", wins against SFT by gold" if has_gold else ""
    objective = f", objective = score - {beta:g} KL" if best else ""
    reward_from = result["config"].get("reward_from", "model")
    scaled = ["gold"] * has_gold + ["score"] * (reward_from in ("model", "gold"))  # others stay as they are
    scale = f"{' and '.join(scaled)} in standard deviations of SFT's, " if scaled else ""
    notes = [f"{scale}KL in nats per response{objective}{wins}."]
    if reward_from == "task":
        notes.append(f"score: the share of answers that pass. pass@{PASS}: the chance that one of {PASS} does.")
    if best:
        warning = "" if best["ess"] >= 100 else ", below 100: the optimum is uncertain"
        n_samples = result["config"]["best_of"] * result["config"]["eval_prompts"]
        notes.append(f"the optimum is an upper bound over prompts, by reweighting {n_samples:,} SFT samples, effective "
                     f"sample size {best['ess']:.0f}{warning}.")
    notes.append(f"the KL of best of {result['config']['best_of']} is at most the one in the table.")
    direct = [label for name, (label, loop, _) in POLICIES.items() if loop == "dpo" and name in result["policies"]]
    if direct and best:
        notes.append(f"{', '.join(direct)}: trained on the labels and not on the score, so this optimum is not the "
                     "aim. The beta is --dpo-beta, and training ends when the learning rate is 0.")
    for phrase in result["policies"]["sft"].get("phrases", {}):
        shares = [f"{NAMES[name]} {row['phrases'][phrase]:.0%}" for name, row in result["policies"].items()]
        notes.append(f"answers with \"{phrase}\", which an annotator likes: {', '.join(shares)}.")
    if not has_gold:
        notes.append("this data has no oracle, so the true reward is not known.")
    return notes + [f"warning: {warning}" for warning in result["warnings"]]


def format_table(result):
    """The report as a table of plain text, and the notes to it."""
    heading, *rows = format_rows(make_table(result))
    rule = "-" * len(heading)
    lines = [styled(heading, BOLD), rule, *rows, rule]
    for note in format_notes(result) + result["diagnosis"]:
        colour = YELLOW if note.startswith("warning: ") else ""
        lines += [styled(line, colour) for line in textwrap.wrap(note, WIDTH)]
    return "\n".join(lines)


def shown(text):
    """A text as a reader sees it."""
    return printable(text).strip() or "(empty)"


def wrapped(label, text):
    """A label and a text, whose lines are wrapped and indented to stay right of the label."""
    lines = [part for line in shown(text).split("\n")
             for part in textwrap.wrap(line, WIDTH - 14) or [""]]
    return f"  {label:<12}" + ("\n" + 14 * " ").join(lines)


def format_samples(run, prompts, answers):
    """The same prompts answered by every policy, with the score and gold of each answer; answers: {name: Answers}."""
    blocks = []
    for i, prompt in enumerate(prompts):
        lines = [wrapped("", decode(run.tokenizer, prompt))[14:].replace("\n" + 14 * " ", "\n")]
        for name in [name for name in NAMES if name in answers]:
            text = shown(decode(run.tokenizer, answers[name].responses[i]))
            score, gold = answers[name].score[i].item(), answers[name].gold[i].item()
            known = "" if math.isnan(gold) else f", gold {gold:.1f}"
            lines.append(wrapped(NAMES[name], f"{text}  [score {score:.1f}{known}]"))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
