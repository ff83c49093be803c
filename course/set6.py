"""
Set 6, the bug hunt: inputs of the cases, and how each function that may hold a bug is called. These cases are never
handed out. Expected values come from the true code.
"""

import math

import torch
from draw import PAD, E, batch_of, network, raised, with_gradient
from loops import (
    draw_train_grpo,
    draw_train_ppo,
    run_train_dpo,
    run_train_grpo,
    run_train_ppo,
    run_train_reward_model,
)

import checks
import data
import dpo
import estimators
import evaluate
import grpo
import lesson
import mdp
import model as gpt
import ppo
import reward
import robust
import world


def texts(draw):
    return [dict(texts=draw.texts(B=6), seed=draw.integer(0, 10 ** 6))]


def draw_by_length(draw):
    rows = draw.texts(B=14)
    equal = dict(prompts=[row[:1] for row in rows["prompts"]],
                 responses=[[draw.integer(0, E - 1), E] for _ in range(14)])
    return [dict(texts=rows, seed=0), dict(texts=equal, seed=0)]


draw_trim = draw_check_padding = draw_keep = draw_exact_kl = texts


def parts(batch):
    return dict(ids=batch.ids, prompts=batch.prompt_lens, responses=batch.response_lens, P=batch.P)


def run_trim(case):
    batch = batch_of(case["texts"])
    wide = data.Batch(torch.nn.functional.pad(batch.ids, (2, 3), value=PAD), batch.prompt_lens, batch.response_lens,
                      batch.P + 2)
    return dict(trimmed=parts(wide.trim()), rows=parts(wide.select(torch.tensor([1, 2])).trim()))


def run_by_length(case):
    batch = batch_of(case["texts"])
    sizes = []

    def values(part):
        sizes.append(part.ids.tolist())
        return torch.where(part.mask, part.responses.double(), 0.0)
    return dict(by_column=data.by_length(values, batch, 2), sizes=sizes,
                by_row=data.by_length(lambda part: part.response_lens.double(), batch, 4))


def draw_collate_pairs(draw):
    pairs = []
    for prompt, chosen in zip(*draw.texts(B=6).values()):
        pairs.append(dict(prompt=prompt, chosen=chosen, rejected=[draw.integer(0, E - 1), E]))
    return [dict(pairs=pairs, seed=draw.integer(0, 10 ** 6))]


draw_train_reward_model = draw_reference_logprobs = draw_train_dpo = draw_reward_accuracy = draw_collate_pairs


def run_collate_pairs(case):
    return parts(data.collate_pairs(case["pairs"], PAD))


def draw_minibatches(draw):
    return [dict(seed=draw.integer(0, 10 ** 6))]


def run_minibatches(case):
    batches = data.minibatches(23, 5, 2, torch.Generator().manual_seed(case["seed"]))
    return dict(sizes=[len(rows) for rows in batches], first=sorted(torch.cat(batches[:5]).tolist()))


def draw_finite(draw):
    return [dict(numbers=[draw.between(-2, 2), math.inf, -math.inf, math.nan])]


draw_check_start_kl = draw_check_first_ratio = draw_check_start_margin = draw_check_trains = draw_finite


def run_finite(case):
    return dict(raised=[raised(checks.finite, torch.tensor(x), "a", "b") for x in case["numbers"]])


def run_check_padding(case):
    batch = batch_of(case["texts"])
    real = checks.torch.arange(batch.ids.shape[1])
    functions = dict(right=lambda b: b.mask.double(), left=lambda b: b.ids[:, 0].double(),
                     last=lambda b: b.ids[:, -1].double(), small=lambda b: 1 + 1e-12 * b.ids[:, -1].double(),
                     lens=lambda b: (real < b.start[:, None]).double())
    return {name: raised(checks.check_padding, function, batch) for name, function in functions.items()}


def run_check_start_kl(case):
    rows = ([0.0, 0.0], [1.0, -1.0], [0.0, 1e-9], [-1e-9, 0.0])
    return dict(raised=[raised(checks.check_start_kl, torch.tensor(row)) for row in rows])


def run_check_first_ratio(case):
    return dict(raised=[raised(checks.check_first_ratio, torch.tensor([0.0, x])) for x in (0.0, 1e-6, 0.1, -0.1)])


def run_check_start_margin(case):
    rows = ((0.0, 1.0), (1e-2, 1.0), (-1e-2, 1.0), (1e-2, 5000.0), (1e-2, -5000.0))
    return dict(raised=[raised(checks.check_start_margin, torch.tensor([h]), torch.tensor([logp]))
                        for h, logp in rows])


def run_check_trains(case):
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    adam = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in (("a", a), ("b", b), ("frozen", frozen))}
    tries = ((a, "a", 0.1), (a, "b", 0.1), (frozen, "frozen", 0.1), (a, "a", 0.0), (a, "a", math.nan),
             (frozen, "a", 0.1))
    return dict(raised=[raised(checks.check_trains, "net", net, adam[held], lr) for net, held, lr in tries])


def run_keep(case):
    cache = gpt.KVCache(gpt.GPTConfig(5, 8, 1, 2, 6), 3, 4, torch.zeros((), dtype=torch.float64))
    x = torch.arange(3 * 2 * 2 * 3, dtype=torch.float64).view(3, 2, 2, 3)
    cache.append(x, -x)
    cache.keep(torch.tensor([0, 2]))
    return dict(kv=cache.kv[:, :, :, :2])


def run_exact_kl(case):
    return dict(kl=ppo.exact_kl(network(case["seed"]), network(case["seed"] + 1), batch_of(case["texts"]), 0.7))


def run_reference_logprobs(case):
    return dict(logp=dpo.reference_logprobs(network(case["seed"]), case["pairs"], PAD, "cpu", 4))


def draw_equal_groups(draw):
    return [dict(rewards=draw.normal(3).repeat_interleave(3)),
            dict(rewards=torch.tensor([1.0, 1, 2, 3, 3, 3, 0, 5, 5]))]


def run_equal_groups(case):
    return dict(share=grpo.equal_groups(case["rewards"], 3))


def draw_cispo_loss(draw):
    mask, old = draw.mask(3, 5), draw.normal(3, 5)
    return [dict(logp=old + 0.4 * draw.normal(3, 5), old=old, advantages=draw.normal(3, 5), mask=mask)]


def run_cispo_loss(case):
    return with_gradient(lambda x: grpo.cispo_loss(x, case["old"], case["advantages"], case["mask"]), case["logp"])


def draw_gain_error(draw):
    return [dict(scores=draw.normal(5, 3), beta=draw.beta())]


def run_gain_error(case):
    return dict(error=evaluate.gain_error(case["scores"], case["beta"], list("aabcd")))


def draw_standard_error(draw):
    return [dict(x=draw.normal(6))]


def run_standard_error(case):
    x = case["x"]
    groups = (None, list("abcdef"), list("aabbcd"), list("aaaaaa"))
    return dict(errors=[evaluate.standard_error(x, group) for group in groups], one=evaluate.standard_error(x[:1]))


def run_reward_accuracy(case):
    net = reward.RewardModel(network(case["seed"])).double()
    net.score.weight.data.copy_(torch.linspace(-1, 1, 8)[None])
    gold = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (2.0, 1.0), (0.0, 3.0), (1.0, 1.0))
    pairs = [dict(pair, gold=list(g), ceiling=0.6 + 0.05 * i) for i, (pair, g) in enumerate(zip(case["pairs"], gold))]
    many = [pairs[0]] * 30 + [pairs[1]] * 3
    few = [dict(prompt=pair["prompt"], chosen=pair["chosen"], rejected=pair["rejected"]) for pair in pairs[:2]]
    both = few + [dict(pair, chosen=pair["rejected"], rejected=pair["chosen"]) for pair in few]
    return dict(labelled=evaluate.reward_accuracy(net, pairs, PAD, "cpu"),
                many=evaluate.reward_accuracy(net, many, PAD, "cpu"),
                few=evaluate.reward_accuracy(net, few, PAD, "cpu"),
                best=[evaluate.reward_accuracy(net, [row], PAD, "cpu")["at_chance"] for row in both])


def draw_taste(draw):
    words = ["good", "bad", "very", "fine"]
    return [dict(responses=[[words[draw.integer(0, 3)] for _ in range(6)] + ["."] for _ in range(12)])]


def run_taste(case):
    return dict(scores=[lesson.taste((), words) for words in case["responses"]], cut=lesson.taste((), ["very", "bad"]))


def draw_estimates(draw):
    tree = mdp.Tree(3, 2)
    return [dict(logits=draw.normal(tree.S, 3), ref=draw.normal(tree.S, 3), rewards=draw.normal(tree.Y),
                 beta=draw.beta())]


def run_estimates(case):
    tree = mdp.Tree(3, 2)
    rest = case["logits"], case["ref"], case["rewards"], case["beta"]
    found = {}
    for estimator in estimators.ESTIMATORS:
        for G in (2, 3):
            probs, g = estimators.estimates(tree, *rest, estimator, G)
            found[f"{estimator.name} {G}"] = dict(probs=probs[:9], mean=probs @ g, square=probs @ g.square())
    return found


def draw_aggregate(draw):
    return [dict(means=draw.normal(3, 5), stds=draw.normal(3, 5).abs() + 0.1, target=draw.normal(5))]


draw_gaussian_nll = draw_robust_reward = draw_nominal = draw_aggregate


def run_aggregate(case):
    return dict(scores=[robust.aggregate(case["means"], how) for how in ("mean", "wco", "uwo")],
                unknown=raised(robust.aggregate, case["means"], "other"))


def run_gaussian_nll(case):
    return dict(loss=robust.gaussian_nll(case["means"], case["stds"], case["target"]))


def run_robust_reward(case):
    return dict(rewards=[robust.robust_reward(case["means"], case["stds"], lam) for lam in (0.0, 0.3, 1.0)])


def run_nominal(case):
    return dict(nominal=robust.nominal(case["means"], case["stds"]))


def draw_gold(draw):
    words = dict(adjectives=[list(world.ADJECTIVES)[draw.integer(0, 26)] for _ in range(6)],
                 verbs=[list(world.VERBS)[draw.integer(0, 7)] for _ in range(3)])
    return [words]


draw_parse_clause = draw_gold


def sentences(case):
    a, v = case["adjectives"], case["verbs"]
    return [f"the plot was {a[0]}", f"the plot was not {a[1]}", f"the soup was very {a[2]}",
            f"the music was quite {a[3]}",
            f"the music was not really {a[4]}", f"i {v[0]} the cast", f"i never {v[1]} the cast",
            f"i really {v[2]} the script", "i would recommend it", "i would not complain", "hello there"]


def run_parse_clause(case):
    return dict(parsed=[world.parse_clause(clause) for clause in sentences(case)])


def run_gold(case):
    prompt = "i saw this little film with my sister last night ."
    clauses = sentences(case)
    reviews = [" " + " . ".join(clauses[i:i + 3]) + " ." for i in range(len(clauses))] + [clauses[0], clauses[2] + " ."]
    return dict(gold=[world.gold(prompt, review, taste) for review in reviews for taste in (1.0, -1.0)])


__all__ = ["draw_train_grpo", "draw_train_ppo", "run_train_dpo", "run_train_grpo", "run_train_ppo",
           "run_train_reward_model"]  # found here by name, as all the others
