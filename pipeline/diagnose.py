"""
The known states of a run, in words: what people ask when they see such numbers for the first time.

HEALTHY has the limits; docs/metrics.md says more about each metric. The page draws them as bands.
"""

import math

from pipeline.config import POLICIES

EQUAL = "in {x:.0%} of the groups all scores are equal, and nothing is learned from them: raise --group"
FAR = "{x:.0f} nats from SFT, where texts fall apart: a higher beta keeps a policy near"
CUT = "only {x:.0%} of the answers end by themselves, the others are cut: raise --response-tokens"
CRITIC = "the critic predicts returns worse than their mean does: raise --ppo-iterations"
STILL = "the KL stays 0, so this is still SFT: raise the learning rate, or train longer"
HEALTHY = {  # loops and metric: least, most, words for less, words for more. x is the mean of the last tenth of the run
    "ppo grpo online_dpo kl": (0.01, 20, STILL, FAR),
    "ppo grpo online_dpo finished": (0.5, 1, CUT, ""),
    "ppo grpo online_dpo entropy": (0.1, None, "almost sure of every token: collapsed to a few answers", ""),
    "ppo grpo clip_fraction": (0, 0.3, "", "{x:.0%} of the tokens are outside the clip: lower the learning rate"),
    "ppo grpo approx_kl": (0, 0.05, "", "updates move it by {x:.2f} nats a token: lower the learning rate"),
    "ppo grpo ratio_error": (0, 1e-5, "", ""),
    "ppo explained_variance": (0, 1, CRITIC, ""),
    "grpo equal_groups": (0, 0.5, "", EQUAL),
    "grpo grad_norm": (1e-6, None, "the gradient is 0: every advantage is 0, and nothing is learned", ""),
    "reward loss": (0, 0.693, "", ""),
    "reward dpo accuracy": (0.5, 1, "", ""),
    "dpo margin": (0, None, "", ""),
}


def healthy(loop):
    """The rows of HEALTHY for a loop: {metric: (least, most, words for less, words for more)}."""
    return {key.split()[-1]: limits for key, limits in HEALTHY.items() if loop in key.split()[:-1]}


def ends(rows, metric):
    """The mean of a metric over the first tenth of the rows, and over the last."""
    values = [row[metric] for row in rows if metric in row]
    size = max(1, len(values) // 10)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def states(rows, loop):
    """The known states of one policy's training, in words. rows: what it logged; less than ten of them tell nothing."""
    found = []
    if len(rows) < 10:
        return found
    for metric, (least, most, less, more) in healthy(loop).items():
        if metric in rows[0]:
            x = ends(rows, metric)[1]
            words = less if x < least else more if most is not None and x > most else ""
            found += [words.format(x=x)] if words else []
    if "kl" in rows[0]:
        before, after = ends(rows, "length")
        if not 0.5 <= after / before <= 2:
            change = "more than twice" if after > before else "less than half"
            found.append(f"answers became {change} as long: a drifting length is the commonest sign of an exploited "
                         "reward model")
    if loop == "grpo" and abs(sum(row["loss"] for row in rows) / len(rows)) < 0.05:
        found.append("a loss of 0 is right here: advantages are differences from a mean. Read score and KL")
    if loop == "dpo" and ends(rows, "chosen_reward")[1] < -0.1:
        found.append("chosen answers became less likely, which is usual: only the difference to rejected ones is "
                     "trained")
    return found


def diagnose(result, metrics):
    """Sentences about the known states of a run. result: what report.json has; metrics: {stage: the rows it logged}."""
    sentences, reward = [], result["reward_model"]
    for key, what, sides in (("longer_chosen", "length", ("longer", "shorter")),
                             ("first_chosen", "position", ("first", "second"))):
        share = reward.get(key)
        if share not in (None, 0.5) and reward["accuracy"] <= max(share, 1 - share):  # 0.5: there is no such rule
            side = sides[0] if share > 0.5 else sides[1]
            sentences.append(f"the reward model is no better than {what}: it orders {reward['accuracy']:.0%} of "
                             f"held-out pairs right, and \"the {side} answer is better\" {max(share, 1 - share):.0%}")
    labels = {}
    for stage, (label, loop, _) in POLICIES.items():
        for words in states(metrics.get(stage, []), loop):
            labels.setdefault(words, []).append(label)
    return sentences + [f"{' and '.join(names)}: {words}" for words, names in labels.items()]


def verdicts(result):
    """Success or collapse of every trained policy: dicts of label, big (the number to look at), text and collapsed."""
    found, sft = [], result["policies"]["sft"]
    for name, row in result["policies"].items():
        if name not in POLICIES:
            continue
        gold, score, share = row["gold"], row["score"], row["optimum_share"]
        error = math.hypot(row["gold_se"] or 0, sft["gold_se"] or 0)
        turned = any(warning.startswith(f"{POLICIES[name][0]} over-optimised") for warning in result["warnings"])
        collapsed = gold is not None and score > sft["score"] and (turned or gold < sft["gold"] - 2 * error)
        if collapsed:
            big = f"{gold:+.2f}"
            text = f"in true reward, while the score rose to {score:+.2f}: over-optimised"
        elif share is not None:
            big, text = f"{share:.0%}", "of the best possible gain"
        elif gold is not None:
            big, text = f"{gold:+.2f}", f"in true reward, where SFT has {sft['gold']:+.2f}"
        else:
            big, text = f"{score:+.2f}", f"in score, where SFT has {sft['score']:+.2f}"
        if row["win_rate"] is not None:
            text += f"; better than SFT in {row['win_rate']:.0%} of comparisons"
        found.append(dict(label=POLICIES[name][0], big=big, text=text + ".", collapsed=collapsed))
    return found
