"""A look at single answers, token by token: `--prompt TEXT` prints them, the page shows them. R: response columns."""

import math
import textwrap

import torch

from model import generate, log_softmax, response_hidden, response_logprobs
from pipeline.config import policy_config
from pipeline.errors import need, printable
from pipeline.report import NAMES, WIDTH, number, shown, wrapped
from pipeline.scores import make_scorer, scaled_gold
from ppo import gae, token_rewards
from tokenizer import decode, end_id


def sample_answer(run, policy, prompt):
    """Sample an answer to a prompt (ids), with other random numbers for another prompt: a Rollout of one row."""
    sampler = torch.Generator(run.device).manual_seed(run.config.seed + sum(prompt))
    return generate(policy, [prompt], run.config.response_tokens, run.config.temperature, sampler)


def token_text(tokenizer, token):
    """One token as text. A part of a character is written as its bytes, like \\xf0."""
    if token == end_id(tokenizer):
        return "E"
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")
    return printable(text).replace("\n", "⏎")


@torch.no_grad()
def make_episode(run, name, policy, reference, scorer, critic, prompt):
    """
    Sample the answer to a prompt (ids) that --prompt would print, and measure what PPO computes of it.

    A dict of lists, a number for every action: logp, ref_logp, prob, entropy, kl_terms -beta (log pi - log ref),
    rewards, and with a critic values of the states before and advantages; and the tokens, the text and what it earned.
    """
    config, tokenizer = policy_config(run.config, name), run.tokenizer
    rollout = sample_answer(run, policy, prompt)
    response = rollout.response_ids()[0]
    score = scorer(rollout)                                                                   # (1,)
    ref_logp = response_logprobs(reference, rollout, config.temperature)                      # (1, R)
    kl_terms = -config.beta * (rollout.logp - ref_logp)                                       # (1, R)
    rewards = token_rewards(score, rollout.logp, ref_logp, rollout.mask, config.beta)         # (1, R)
    logp = log_softmax(policy.head(response_hidden(policy, rollout)), config.temperature)[0]  # (R, vocabulary)
    steps = dict(logp=rollout.logp, ref_logp=ref_logp, kl_terms=kl_terms, rewards=rewards)
    if critic is not None:
        steps["values"] = critic.values(rollout)                                              # (1, R)
        steps["advantages"], _ = gae(rewards, steps["values"], rollout.mask, config.gamma, config.lam)
    return dict({name: x[0].tolist() for name, x in steps.items()},
                prob=rollout.logp[0].exp().tolist(), entropy=(-logp.exp() * logp).sum(dim=1).tolist(),
                score=score.item(), gold=scaled_gold(run, [prompt], [response]).item(), beta=config.beta,
                finished=bool(rollout.finished), text=shown(decode(tokenizer, response)),
                tokens=[token_text(tokenizer, token) for token in response])


def show_prompt(run, text):
    """Print the answer of each policy to a prompt, and PPO's answer as the MDP that it is, token by token."""
    text = text.encode(errors="replace").decode()  # without half a character, of a terminal that is not UTF-8
    ids, room = run.encode_prompt(text), run.config.room
    need(ids, "--prompt is empty: type some words")
    need(len(ids) <= room, f"--prompt has {len(ids)} tokens, and there is room for {room}: shorten it. A word that the "
         "run does not know counts for several")
    print(printable(text))
    for name in ("pretrained", "sft", *run.config.policies.split(",")):
        if run.has([f"{name}.pt"]) or name == "pretrained" and run.config.init:
            rollout = sample_answer(run, run.load_network(name), ids)
            print(wrapped(NAMES[name], decode(run.tokenizer, rollout.response_ids()[0])))
    if run.has(["ppo.pt", "ppo_critic.pt"]):
        reference, critic = run.load_network("sft"), run.load_network("ppo_critic")
        trace(make_episode(run, "ppo", run.load_network("ppo"), reference, make_scorer(run), critic, ids))


def chat(run):
    """Read lines, and print each policy's answer with its score, its log pi/ref in nats, and gold where it is known."""
    reference, scorer = run.load_network("sft"), make_scorer(run)
    names = run.config.policies.split(",")
    for name in names:
        need(run.has([f"{name}.pt"]), f"{run.folder} has no policy {name}: leave it out of --policies")
    policies = {name: run.load_network(name) for name in names}
    print("A line is a prompt. An empty line ends the talk.")
    while True:
        try:
            text = input("\n> ")
        except (EOFError, RuntimeError):  # the second one if stdin is closed
            text = ""
        if not text:
            return
        ids = run.encode_prompt(text)[-run.config.room:]
        for name, policy in {"sft": reference, **policies}.items():
            e = make_episode(run, name, policy, reference, scorer, None, ids)
            gold = "" if math.isnan(e["gold"]) else f", gold {number(e['gold'])}"
            log_ratio = sum(e["logp"]) - sum(e["ref_logp"])
            numbers = f"score {number(e['score'])}, log pi/ref {number(log_ratio)}{gold}"
            print(wrapped(NAMES[name], f"{e['text']}  [{numbers}]"))


def trace(e):
    """Print an episode: a row for each token, and the sums."""
    columns = [e[name] for name in ("logp", "ref_logp", "kl_terms", "rewards", "values", "advantages")]
    print("\nPPO's answer as an episode. state: the text so far. action: the next token.\n"
          "reward: -beta (log pi - log ref), and the score at the last token.\n")
    print(f"{'t':>3}  {'action':<14}{'log pi':>9}{'log ref':>9}{'KL term':>9}{'reward':>9}{'value':>9}"
          f"{'advantage':>11}")
    for t, (token, *numbers) in enumerate(zip(e["tokens"], *columns)):
        print(f"{t:>3}  {token!r:<14}" + "".join(f"{x:>9.3f}" for x in numbers[:-1]) + f"{numbers[-1]:>11.3f}")
    print(f"{'sum':>3}  {'':<14}" + "".join(f"{sum(column):>9.3f}" for column in columns[:4]))
    kl = sum(e["logp"]) - sum(e["ref_logp"])
    gold = "" if math.isnan(e["gold"]) else f"; gold {number(e['gold'])}"
    ending = "" if e["finished"] else "; cut at the cap, the horizon of the MDP"
    print("\n" + textwrap.fill(
        f"the rewards add up to score - beta * log pi/ref = {e['score']:.3f} - {e['beta']:g} * {kl:.3f} = "
        f"{e['score'] - e['beta'] * kl:.3f}{gold}{ending}", WIDTH))
