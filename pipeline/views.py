"""
A look at single answers of a finished run: --stages sample and trace. The numbers of an episode are also on the page.

Letters: R response columns.
"""

from typing import NamedTuple

import torch

from data import UserError, decode, printable
from evaluate import known
from model import generate, response_logprobs
from pipeline.report import NAMES, NETWORKS, number
from ppo import gae, token_rewards


def sample_answer(run, policy, prompt):
    """Sample an answer to a prompt (ids) with the seed of the run: a Rollout of one row."""
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    return generate(policy, [prompt], run.config.response_tokens, run.config.temperature, generator)


def answer_prompt(run, policy):
    """Sample an answer to --prompt: (prompt ids, a Rollout of one row)."""
    config = run.config
    ids = run.tokenizer.encode_ordinary(config.prompt)
    room = config.block_size - config.response_tokens
    if len(ids) > room:
        raise UserError(f"--prompt has {len(ids)} tokens, and there is room for {room} in a block of "
                        f"{config.block_size} beside the response: shorten it")
    return ids, sample_answer(run, policy, ids)


def sample_prompt(run):
    """Print the answer of each policy of a run to --prompt."""
    print(printable(run.config.prompt))
    for name in NETWORKS:
        if (run.folder / f"{name}.pt").exists():
            _, rollout = answer_prompt(run, run.load_network(name))
            print(f"  {NAMES[name]:<12}{printable(decode(run.tokenizer, rollout.response_ids()[0]).strip())}")


class Episode(NamedTuple):
    score: torch.Tensor       # (1,) of the answer
    logp: torch.Tensor        # (1, R) log pi, and so on for every action
    ref_logp: torch.Tensor    # (1, R)
    kl_terms: torch.Tensor    # (1, R) -beta (log pi - log ref)
    rewards: torch.Tensor     # (1, R) the KL terms, and the score at the last token
    values: torch.Tensor      # (1, R) of the states before the actions
    advantages: torch.Tensor  # (1, R) not whitened


@torch.no_grad()
def measure_episode(config, rollout, reference, reward_model, critic):
    """What PPO computes of a rollout of one row: an Episode. Without a critic (None) values and advantages are None."""
    score = reward_model(rollout)                                                             # (1,)
    ref_logp = response_logprobs(reference, rollout, config.temperature)                      # (1, R)
    kl_terms = -config.beta * (rollout.logp - ref_logp)                                       # (1, R)
    rewards = token_rewards(score, rollout.logp, ref_logp, rollout.mask, config.beta)         # (1, R)
    values = advantages = None
    if critic is not None:
        values = critic.values(rollout)                                                       # (1, R)
        advantages, _ = gae(rewards, values, rollout.mask, config.gamma, config.lam)          # (1, R)
    return Episode(score, rollout.logp, ref_logp, kl_terms, rewards, values, advantages)


def trace(run):
    """Print one episode of the PPO policy as the MDP that it is: a row for each token, and the sums."""
    reward_model, critic = run.scorer(), run.load_network("critic")
    ids, rollout = answer_prompt(run, run.load_network("ppo"))
    beta = run.config.beta  # now that with which the policy was trained
    episode = measure_episode(run.config, rollout, run.load_network("sft"), reward_model, critic)
    score = episode.score.item()
    logp, ref_logp, kl_terms, rewards, values, advantages = [x[0] for x in episode[1:]]       # (R,) each

    print("state s_t: the text so far. action a_t: the next token. transition: append it.\n"
          "reward r_t: -beta (log pi - log ref), and the score at the last token.\n")
    print(f"{'t':>3}  {'state (its end)':<34}{'action':<14}{'log pi':>8}{'log ref':>9}{'KL term':>9}"
          f"{'reward':>8}{'value':>8}{'advantage':>11}")
    response = rollout.response_ids()[0]
    for t, token in enumerate(response):
        state = run.tokenizer.decode(ids + response[:t])[-30:]
        action = run.tokenizer.decode([token])
        print(f"{t:>3}  {state!r:<34}{action!r:<14}{logp[t]:>8.3f}{ref_logp[t]:>9.3f}{kl_terms[t]:>9.3f}"
              f"{rewards[t]:>8.3f}{values[t]:>8.3f}{advantages[t]:>11.3f}")
    print(f"{'sum':>3}  {'':<34}{'':<14}{logp.sum():>8.3f}{ref_logp.sum():>9.3f}{kl_terms.sum():>9.3f}"
          f"{rewards.sum():>8.3f}")

    kl = (logp - ref_logp).sum().item()
    ending = "" if rollout.finished.item() else "; cut at the cap, the horizon of the MDP"
    gold = known(run.gold([ids], [response]).item())
    print(f"\nthe rewards add up to score - beta * log pi/ref = {score:.3f} - {beta:g} * {kl:.3f} = "
          f"{score - beta * kl:.3f}; gold {number(gold)}{ending}")
