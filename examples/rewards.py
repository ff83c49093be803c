"""
Two rewards for `--reward-from`: a style, and an answer that is checked. Write your own like these.

    python minirlhf.py --init FOLDER --prompts examples/arithmetic.jsonl --reward-from examples/rewards.py:arithmetic

FOLDER holds a language model of Hugging Face; where there is a network, its name will do. `row` is what a line of the
file has besides the prompt. `python examples/rewards.py > examples/arithmetic.jsonl` made the lines.
"""

import json
import random
import re

LONGEST = 8  # words of a short sentence


def short_sentences(prompt, response, **row):
    """
    The share of the words that are in sentences of at most eight words, 0 to 1.

    A policy maximises what is written here, not what was meant: to say nothing but "No." is worth 1 as well.
    """
    lengths = [len(sentence.split()) for sentence in re.split(r"[.!?]", response)]
    return sum(n for n in lengths if n <= LONGEST) / max(1, sum(lengths))


def arithmetic(prompt, response, answer, **row):
    """1 if the last number of the response is the answer, else 0: "3 + 4 = 7" may be said on the way to it."""
    numbers = re.findall(r"\d+", response)
    return float(numbers[-1:] == [str(answer)])


def make_sums(n, seed=0):
    """n different sums of two numbers below 50: rows with a prompt and its answer."""
    pairs = random.Random(seed).sample([(a, b) for a in range(2, 50) for b in range(2, 50)], n)
    return [dict(prompt=f"What is {a} + {b}? Answer with one number.", answer=a + b) for a, b in pairs]


if __name__ == "__main__":
    for row in make_sums(64):
        print(json.dumps(row))
