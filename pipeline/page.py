"""
The page of a run: report.html, one file that a browser opens by itself, without a server or a network.

`page` gathers all that there is to look at and puts it into page.html, which draws it. In training, `watcher` keeps
what the policy answers. Letters: R response columns, V vocabulary.
"""

import importlib
import inspect
import json
import re
from pathlib import Path

import torch

from data import collate_pairs
from model import generate, log_softmax, response_hidden
from pipeline.episode import measure_episode, sample_answer
from pipeline.report import NAMES, columns_of, format_line, format_rows, format_table, turning_points
from reward import score_pairs
from tokenizer import decode, end_id

SHOWN = 8       # held-out prompts that are answered on the page
MOMENTS = 12    # of training, at which they are answered
LIKELIEST = 5   # next tokens
PAIRS = (4, 2)  # held-out pairs that the reward model orders wrongly, and rightly


def make_watcher(run, name, policy, scorer):
    """
    watch(iterations done), to be called before the first iteration of a loop and after each.

    At about MOMENTS moments it adds the policy's answers to SHOWN held-out prompts to watch.jsonl. Its random generator
    has the same seed every time, so training goes on as if it were not there.
    """
    config, prompts = run.config, run.prompts[1][:SHOWN]
    moments = {round(i * config.ppo_iterations / (MOMENTS - 1)) for i in range(MOMENTS)}

    @torch.no_grad()
    def watch(iterations):
        if iterations not in moments:
            return
        sampler = torch.Generator(run.device).manual_seed(config.seed)
        rollout = generate(policy, prompts, config.response_tokens, config.temperature, sampler)
        responses = rollout.response_ids()
        row = dict(stage=name, step=iterations - 1, texts=[decode(run.tokenizer, response) for response in responses],
                   score=scorer(rollout).tolist(), gold=run.gold(prompts, responses).tolist())
        run.write_rows("watch.jsonl", [*run.rows("watch.jsonl"), clean(row)])
    return watch


def clean(x):
    """x as JSON would bring it back: numbers with six decimals, None for NaN and infinity."""
    return json.loads(json.dumps(x), parse_float=lambda text: round(float(text), 6), parse_constant=lambda text: None)


def token_text(tokenizer, token):
    """One token as text. A part of a character is written as its bytes, like \\xf0."""
    return tokenizer.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")


def likeliest(tokenizer, logp):
    """The likeliest tokens at each place with their probabilities, from log-probs (R, V)."""
    top = logp.exp().topk(min(LIKELIEST, logp.shape[1]))
    return [[[token_text(tokenizer, token), p] for token, p in zip(tokens, probs)]
            for tokens, probs in zip(top.indices.tolist(), top.values.tolist())]


def make_episode(run, policy, reference, reward_model, critic, prompt):
    """The answer to a prompt (ids) that --prompt would print: lists of R numbers or texts, and what it earned."""
    config, tokenizer = run.config, run.tokenizer
    rollout = sample_answer(run, policy, prompt)
    steps = measure_episode(config, rollout, reference, reward_model, critic)._asdict()
    score, response = steps.pop("score").item(), rollout.response_ids()[0]
    logp = log_softmax(policy.head(response_hidden(policy, rollout)), config.temperature)[0]               # (R, V)
    ref_logp = log_softmax(reference.head(response_hidden(reference, rollout)), config.temperature)[0]     # (R, V)
    return dict({name: x[0].tolist() for name, x in steps.items() if x is not None},
                prob=rollout.logp[0].exp().tolist(), entropy=(-logp.exp() * logp).sum(dim=1).tolist(), score=score,
                gold=run.gold([prompt], [response]).item(), finished=bool(rollout.finished),
                tokens=[token_text(tokenizer, token) for token in response],
                states=[tokenizer.decode(prompt + response[:t])[-30:] for t in range(len(response))],
                top=likeliest(tokenizer, logp), ref_top=likeliest(tokenizer, ref_logp))


def make_pairs(run, reward_model):
    """A few held-out pairs with the reward model's score after every token; those that it orders wrongly first."""
    tokenizer, heldout = run.tokenizer, run.pairs[1]
    r_chosen, r_rejected = score_pairs(reward_model, heldout)
    order = (r_chosen - r_rejected).argsort(stable=True).tolist()  # the worst mistake first
    n_wrong = int((r_chosen <= r_rejected).sum())
    rows = []
    for i in order[:n_wrong][:PAIRS[0]] + order[n_wrong:][::-1][:PAIRS[1]]:
        batch = collate_pairs([heldout[i]], reward_model.pad, run.device)
        scores = reward_model.scale(reward_model.trunk.hidden(batch.ids, batch.start))[:, batch.P:]         # (2, R)
        sides = [dict(tokens=[token_text(tokenizer, token) for token in ids], scores=x[:len(ids)].tolist())
                 for ids, x in zip((heldout[i]["chosen"], heldout[i]["rejected"]), scores)]
        rows.append(dict(prompt=decode(tokenizer, heldout[i]["prompt"]), sides=sides, gold=heldout[i].get("gold")))
    return dict(rows=rows, wrong=n_wrong, total=len(heldout))


@torch.no_grad()
def write_page(run, seed):
    """Write report.html, from what the stages have left and from what the networks answer to a few prompts."""
    result, prompts = run.read("report.json"), run.prompts[1][:SHOWN]
    reference, scorer = run.load_network("sft"), run.scorer()
    episodes = {}
    for name in ("pretrained", "sft", *run.config.policies.split(",")):
        critic = run.load_network(f"{name}_critic") if run.has([f"{name}_critic.pt"]) else None
        policy = run.load_network(name)
        episodes[name] = [make_episode(run, policy, reference, scorer, critic, ids) for ids in prompts]
    metrics, code = {}, {}
    for row in run.rows():
        if "step" in row:
            metrics.setdefault(row["stage"], []).append(row)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    for name in " ".join(re.findall('data-code="(.*?)"', template)).split():
        module, _, function = name.rpartition(".")
        source = inspect.getsource(inspect.unwrap(getattr(importlib.import_module(module), function)))
        code[name] = [f"{module.replace('.', '/')}.py: {function}", source]
    rule = "-" * 20
    watch = [dict(row, step=row["step"] + 1) for row in run.rows("watch.jsonl")]
    data = dict(run=run.folder.name, names=dict(NAMES, reward="reward model"), report=result, code=code,
                notes=format_table(result).rpartition(rule)[2].strip(), metrics=metrics, turns=turning_points(run),
                watch=watch, prompts=[decode(run.tokenizer, ids) for ids in prompts],
                episodes=episodes, pairs=make_pairs(run, run.load_network("reward")),
                end=token_text(run.tokenizer, end_id(run.tokenizer)))
    # in ASCII and without a "<", JSON may stand inside <script>, whatever the texts are
    text = json.dumps(clean(data), allow_nan=False).replace("<", "\\u003c")
    run.write("report.html", template.replace("{DATA}", text))


def compare(runs):
    """Print the tables of several finished runs side by side."""
    results = [run.read("report.json") for run in runs]
    columns = columns_of(results[0])
    print(format_line("policy", list(columns), columns))
    for run, result in zip(runs, results):
        others = [name for name, value in result["config"].items() if value != results[0]["config"].get(name)]
        changes = ", ".join(f"{name} {result['config'][name]}" for name in others)
        print(f"\n{run.folder}{f': {changes}' if changes else ''}")
        print("\n".join(format_rows(result, columns)))
