"""
A look at single answers, token by token: `--prompt TEXT` prints them, and the page shows them.

Letters: R response columns.
"""

import torch

from model import generate, log_softmax, response_hidden, response_logprobs
from pipeline.config import policy_config
from pipeline.errors import need, printable
from pipeline.report import NAMES, number, shown, wrapped
from ppo import gae, token_rewards
from tokenizer import decode, end_id


def sample_answer(run, policy, prompt):
    """Sample an answer to a prompt (ids), with other random numbers for another prompt: a Rollout of one row."""
    sampler = torch.Generator(run.device).manual_seed(run.config.seed + sum(prompt))
    return generate(policy, [prompt], run.config.response_tokens, run.config.temperature, sampler)


@torch.no_grad()
def measure_episode(config, rollout, reference, scorer, critic):
    """
    What PPO computes of a rollout of one row: a dict of score (1,) and, for every action, logp, ref_logp, kl_terms
    -beta (log pi - log ref), rewards, and with a critic values of the states before and advantages, (1, R) each.
    """
    score = scorer(rollout)                                                                   # (1,)
    ref_logp = response_logprobs(reference, rollout, config.temperature)                      # (1, R)
    kl_terms = -config.beta * (rollout.logp - ref_logp)                                       # (1, R)
    rewards = token_rewards(score, rollout.logp, ref_logp, rollout.mask, config.beta)         # (1, R)
    steps = dict(score=score, logp=rollout.logp, ref_logp=ref_logp, kl_terms=kl_terms, rewards=rewards)
    if critic is not None:
        steps["values"] = critic.values(rollout)                                              # (1, R)
        steps["advantages"], _ = gae(rewards, steps["values"], rollout.mask, config.gamma, config.lam)
    return steps


# ---- for the page ---------------------------------------------------------------------------------

def token_text(tokenizer, token):
    """One token as text. A part of a character is written as its bytes, like \\xf0."""
    if token == end_id(tokenizer):
        return "E"
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")
    return printable(text).replace("\n", "⏎")


def make_episode(run, name, policy, reference, scorer, critic, prompt):
    """The answer to a prompt (ids) that --prompt would print: lists of R numbers or texts, and what it earned."""
    config, tokenizer = policy_config(run.config, name), run.tokenizer
    rollout = sample_answer(run, policy, prompt)
    steps = measure_episode(config, rollout, reference, scorer, critic)
    score, response = steps.pop("score").item(), rollout.response_ids()[0]
    logp = log_softmax(policy.head(response_hidden(policy, rollout)), config.temperature)[0]  # (R, vocabulary)
    return dict({name: x[0].tolist() for name, x in steps.items()},
                prob=rollout.logp[0].exp().tolist(), entropy=(-logp.exp() * logp).sum(dim=1).tolist(), score=score,
                gold=run.gold([prompt], [response]).item(), beta=config.beta, finished=bool(rollout.finished),
                text=shown(decode(tokenizer, response)), tokens=[token_text(tokenizer, token) for token in response])


# ---- on the screen --------------------------------------------------------------------------------

def show_prompt(run, text):
    """Print the answer of each policy to a prompt, and PPO's answer as the MDP that it is, token by token."""
    ids, room = run.tokenizer.encode_ordinary(text), run.room
    need(ids, "--prompt is empty: type some words")
    need(len(ids) <= room, f"--prompt has {len(ids)} tokens, and there is room for {room}: shorten it. A word that the "
         "run does not know counts for several")
    print(printable(text))
    for name in ("pretrained", "sft", *run.config.policies.split(",")):
        if run.has([f"{name}.pt"]):
            rollout = sample_answer(run, run.load_network(name), ids)
            print(wrapped(NAMES[name], decode(run.tokenizer, rollout.response_ids()[0])))
    if run.has(["ppo.pt", "ppo_critic.pt"]):
        rollout = sample_answer(run, run.load_network("ppo"), ids)
        trace(run, ids, rollout)


def trace(run, ids, rollout):
    """Print an episode of PPO's policy: a row for each token, and the sums."""
    reference, critic = run.load_network("sft"), run.load_network("ppo_critic")
    episode = measure_episode(run.config, rollout, reference, run.scorer(), critic)
    score, *columns = [x[0] for x in episode.values()]                                        # a number; (R,) each
    response = rollout.response_ids()[0]
    print("\nPPO's answer as an episode. state: the text so far. action: the next token. reward:\n"
          "-beta (log pi - log ref), and the score at the last token.\n")
    print(f"{'t':>3}  {'action':<14}{'log pi':>9}{'log ref':>9}{'KL term':>9}{'reward':>9}{'value':>9}"
          f"{'advantage':>11}")
    for t, token in enumerate(response):
        print(f"{t:>3}  {run.tokenizer.decode([token])!r:<14}" + "".join(f"{x[t]:>9.3f}" for x in columns[:-1])
              + f"{columns[-1][t]:>11.3f}")
    print(f"{'sum':>3}  {'':<14}" + "".join(f"{x.sum():>9.3f}" for x in columns[:4]))
    kl = (columns[0] - columns[1]).sum().item()
    gold = "" if run.config.data else f"; gold {number(run.gold([ids], [response]).item())}"
    ending = "" if rollout.finished.item() else "; cut at the cap, the horizon of the MDP"
    print(f"\nthe rewards add up to score - beta * log pi/ref = {score:.3f} - {run.config.beta:g} * {kl:.3f} = "
          f"{score - run.config.beta * kl:.3f}{gold}{ending}")
