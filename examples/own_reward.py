"""
A pretrained language model learns from a reward that is a Python function: RLOO, without a reward model.

    python examples/own_reward.py FOLDER        a folder of Hugging Face, or a name where there is a network

The reward here is a style: short sentences. Write your own `reward`. Every iteration prints the mean reward, the KL
from the start in nats, and an answer. Needs `pip install transformers`.
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo import GRPOConfig, train_grpo
from pretrained import load_pretrained
from tokenizer import decode

QUESTIONS = ["What is the sun?", "Why do we sleep?", "What is a prime number?", "How does a plant grow?"]
SETTINGS = GRPOConfig(kind="rloo", group=4, ppo_batch=16, minibatch=4, ppo_epochs=1, ppo_iterations=12, grpo_lr=2e-5,
                      beta=0.02, response_tokens=40)


def reward(text):
    """The more sentences for its words, the better: 1 for ten words a sentence, 2 for five."""
    return 10 * (text.count(".") + text.count("!")) / max(len(text.split()), 5)


def main(name, settings=SETTINGS):
    policy, tokenizer = load_pretrained(name)
    reference = copy.deepcopy(policy).requires_grad_(False)
    prompts = [tokenizer.encode_chat(question) for question in QUESTIONS]

    def answers(rollout):
        return [decode(tokenizer, ids) for ids in rollout.response_ids()]

    def score(rollout):
        return torch.tensor([reward(text) for text in answers(rollout)], device=policy.device)

    for metrics, _, rollout in train_grpo(policy, reference, score, prompts, settings, seed=0):
        print(f"{metrics['step']:3}  reward {metrics['score']:.2f}  KL {metrics['kl']:.2f}  {answers(rollout)[0]!r}",
              flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__.strip(), file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1])
