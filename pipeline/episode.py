"""
A look at single answers of a finished run: `--prompt TEXT`. The numbers of an episode are also on the page.

Letters: R response columns.
"""

from typing import NamedTuple

import torch

from model import generate, response_logprobs
from pipeline.errors import need, printable
from pipeline.report import NAMES, number, wrapped
from ppo import gae, token_rewards
from tokenizer import decode


def sample_answer(run, policy, prompt):
    """Sample an answer to a prompt (ids) with the seed of the run: a Rollout of one row."""
    sampler = torch.Generator(run.device).manual_seed(run.config.seed)
    return generate(policy, [prompt], run.config.response_tokens, run.config.temperature, sampler)


class Episode(NamedTuple):
    score: torch.Tensor       # (1,) of the answer
    logp: torch.Tensor        # (1, R) log pi, and so on for every action
    ref_logp: torch.Tensor    # (1, R)
    kl_terms: torch.Tensor    # (1, R) -beta (log pi - log ref)
    rewards: torch.Tensor     # (1, R) the KL terms, and the score at the last token
    values: torch.Tensor      # (1, R) of the states before the actions
    advantages: torch.Tensor  # (1, R) not whitened


@torch.no_grad()
def measure_episode(config, rollout, reference, scorer, critic):
    """What PPO computes of a rollout of one row: an Episode. Without a critic (None) values and advantages are None."""
    score = scorer(rollout)                                                                   # (1,)
    ref_logp = response_logprobs(reference, rollout, config.temperature)                      # (1, R)
    kl_terms = -config.beta * (rollout.logp - ref_logp)                                       # (1, R)
    rewards = token_rewards(score, rollout.logp, ref_logp, rollout.mask, config.beta)         # (1, R)
    values = advantages = None
    if critic is not None:
        values = critic.values(rollout)                                                       # (1, R)
        advantages, _ = gae(rewards, values, rollout.mask, config.gamma, config.lam)          # (1, R)
    return Episode(score, rollout.logp, ref_logp, kl_terms, rewards, values, advantages)


def show_prompt(run, text):
    """Print the answer of each policy to a prompt, and PPO's answer as the MDP that it is, token by token."""
    ids, room = run.tokenizer.encode_ordinary(text), run.config.block_size - run.config.response_tokens
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
    columns = [x[0] for x in episode[1:]]                                                     # (R,) each
    response = rollout.response_ids()[0]
    print("\nPPO's answer as an episode. state: the text so far. action: the next token. reward:\n"
          "-beta (log pi - log ref), and the score at the last token.\n")
    print(f"{'t':>3}  {'action':<14}{'log pi':>9}{'log ref':>9}{'KL term':>9}{'reward':>9}{'value':>9}"
          f"{'advantage':>11}")
    for t, token in enumerate(response):
        print(f"{t:>3}  {run.tokenizer.decode([token])!r:<14}" + "".join(f"{x[t]:>9.3f}" for x in columns[:-1])
              + f"{columns[-1][t]:>11.3f}")
    print(f"{'sum':>3}  {'':<14}" + "".join(f"{x.sum():>9.3f}" for x in columns[:4]))
    score, kl = episode.score.item(), (episode.logp - episode.ref_logp).sum().item()
    gold = "" if run.config.data else f"; gold {number(run.gold([ids], [response]).item())}"
    ending = "" if rollout.finished.item() else "; cut at the cap, the horizon of the MDP"
    print(f"\nthe rewards add up to score - beta * log pi/ref = {score:.3f} - {run.config.beta:g} * {kl:.3f} = "
          f"{score - run.config.beta * kl:.3f}{gold}{ending}")
