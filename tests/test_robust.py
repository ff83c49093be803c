"""Tests of robust.py: robust rewards against loops, closed forms and reward models alone."""

import copy
import statistics

import pytest
import slow
import torch
from helpers import PAIRS, close, finish, random_batch, rng, rows_of, through_a_file, tiny_gpt, tiny_reward_model

import minirlhf
import robust
from checks import save_parts
from data import collate_pairs
from evaluate import spread_and_error, wins
from model import generate
from pipeline.config import Config, read_settings
from pipeline.files import clean
from pipeline.report import accuracy_text, format_notes
from pipeline.run import Run
from pipeline.scores import make_scorer
from pipeline.stages import run_robust
from reward import RewardConfig, RewardModel, preference_probability, score_batches, train_reward_model
from robust import GaussianReward, RobustReward
from tokenizer import decode

BATCHES = [random_batch(seed, B=4) for seed in range(2)]
SHARES = [PAIRS, PAIRS[:4], PAIRS[2:]]


def tiny_reward(kind, lam):
    make = GaussianReward if kind == "brme" else RewardModel
    return RobustReward([tiny_reward_model(seed, make) for seed in range(3)], kind, lam)


def slow_std(head, text):
    """What a head of brme takes for the standard deviation of a text's reward."""
    return torch.log(1 + torch.exp(head.deviation(slow.hidden(head.trunk, text)[-1])[0])) + 1e-4


def slow_opinions(kind, means, stds):
    """What the members expect and what they fear of one response; means and stds are lists over the members."""
    if kind == "brme":
        return means[stds.index(min(stds))], min(means)
    mean = statistics.mean(means)
    return mean, min(means) if kind == "ensemble" else mean - statistics.pvariance(means)


@pytest.mark.parametrize("kind", ["ensemble", "uwo", "brme"])
def test_scores_equal_a_slow_computation(kind):
    """Bug: another variance, minimum or head; lambda turned round; members that are not normalised; 0 / 0."""
    reward = tiny_reward(kind, 1.0)
    texts = [text for batch in BATCHES for text in rows_of(batch)]
    with torch.no_grad():
        reward.members[1].score.bias += 2.0
        means = torch.stack([slow.scores(member, texts) for member in reward.members])       # (3, 8)
        stds = torch.zeros(3, 8)
        if kind == "brme":
            reward.members[1].deviation.bias += 1.0  # or it would be the surest everywhere
            stds = torch.stack([torch.stack([slow_std(head, prompt + response) for prompt, response in texts])
                                for head in reward.members])
            close(torch.cat([reward.answers(batch)[1] for batch in BATCHES], dim=1), stds, 2e-6)
        else:
            means = (means - means.mean(dim=1, keepdim=True)) / means.std(dim=1, correction=0, keepdim=True)
    assert (kind == "brme") == (len(set(stds.argmin(dim=0).tolist())) > 1)
    opinions = [slow_opinions(kind, *columns) for columns in zip(means.T.tolist(), stds.T.tolist())]
    nominal, worst = torch.tensor(opinions, dtype=torch.float64).T
    robust.normalise_robust(reward, iter(BATCHES))
    robust.normalise_robust(reward, BATCHES)  # once more: the scores are normalised already
    other = tiny_reward(kind, 0.0)
    other.load_state_dict(through_a_file(reward.state_dict()))
    for lam in (0.0, 0.3, 1.0):
        reward.lam = other.lam = lam
        mixed = lam * nominal + (1 - lam) * worst
        scores = score_batches(reward, BATCHES)
        close(scores, (mixed - mixed.mean()) / mixed.std(correction=0), 1e-5)
        assert torch.equal(score_batches(other, BATCHES), scores)
    close(torch.cat([reward.spread(batch) for batch in BATCHES]), means.std(dim=0, correction=0), 1e-5)
    reward.covariance.zero_()  # as if all responses had one score
    assert reward(BATCHES[0]).isfinite().all()


@pytest.mark.parametrize("kind", ["ensemble", "brme"])
def test_members_differ_in_head_and_last_block(kind):
    """Bug: copies, a shared head or block, lost lower blocks, a changed SFT network, the caller's random numbers."""
    trunk, state = tiny_gpt(0, torch.float32).requires_grad_(False), torch.get_rng_state()
    before = copy.deepcopy(trunk)
    members = robust.make_members(trunk, kind, 3, seed=2) + robust.make_members(trunk, kind, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    slow.same_weights(trunk, before, 0)
    for name in ("score.weight", "trunk.h.1.mlp.c_fc.weight"):
        assert len({str(member.state_dict()[name].tolist()) for member in members}) == 6
    for member in members:
        assert torch.equal(member.trunk.h[0].mlp.c_fc.weight, trunk.h[0].mlp.c_fc.weight)
        assert member.trunk.h[1].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.25)  # as a GPT begins
        assert all(parameter.requires_grad for parameter in member.parameters())
        assert (kind == "brme") == isinstance(member, GaussianReward)


def test_heads_on_one_trunk_cannot_disagree():
    """Bug: one network below all heads, as in the paper: nominal and worst are one ranking, lambda changes nothing."""
    model, batch = tiny_reward_model(1).float(), random_batch(9, B=64)
    x = torch.cat([robust.last_hidden(model.trunk, random_batch(seed, B=40)) for seed in range(3)]).detach()
    targets = model.scale(x).detach()
    shared = []
    for seed in range(3):  # linear heads, each on its own half of the responses
        rows = torch.randperm(len(x), generator=rng(seed))[:60]
        solution = torch.linalg.lstsq(x[rows], targets[rows, None]).solution[:, 0]
        shared.append(robust.last_hidden(model.trunk, batch) @ solution)
    opinions = robust.two_opinions("ensemble", torch.stack(shared))
    members = robust.make_members(model.trunk, "brme", 3, 0)
    settings = RewardConfig(reward_batch=3, reward_epochs=20, reward_lr=3e-3)
    finish(robust.train_members(members, [PAIRS] * 3, settings, 0, model))
    own = robust.two_opinions("brme", *[torch.stack(x).detach() for x in zip(*[member(batch) for member in members])])
    assert torch.corrcoef(opinions)[0, 1] > 0.998 > 0.95 > torch.corrcoef(own)[0, 1]


def test_which_pairs_a_member_learns_from():
    """Bug: heads that learn from the same share, a share of another size, an ensemble with fewer pairs."""
    pairs = [dict(prompt=[i]) for i in range(50)]
    settings = robust.RobustConfig(members=4, head_share=0.31)
    assert robust.member_pairs(pairs, "ensemble", settings, 0) == [pairs] * 4
    shares = robust.member_pairs(pairs, "brme", settings, 0)
    assert [len({pair["prompt"][0] for pair in share}) for share in shares] == [16] * 4 == [len(s) for s in shares]
    assert len({str(share) for share in shares}) == 4
    assert shares == robust.member_pairs(pairs, "brme", settings, 0) != robust.member_pairs(pairs, "brme", settings, 1)


def test_training_of_a_head_equals_a_slow_replay():
    """Bug: targets of other pairs, exchanged sides, another rate, clip or weight decay, a target that is trained."""
    model, head, twin = tiny_reward_model(1), tiny_reward_model(0, GaussianReward), tiny_reward_model(0, GaussianReward)
    before = copy.deepcopy(model)
    settings = RewardConfig(reward_batch=3, reward_epochs=1, reward_lr=0.01, weight_decay=0.3)
    rows = finish(robust.train_head(head, model, PAIRS, settings, 5))
    slow.same_weights(model, before, 0)
    orders, norms = torch.randperm(7, generator=rng(5)).tensor_split(3), []
    adam = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.3)
    for step, (order, row) in enumerate(zip(orders, rows, strict=True)):
        losses = []
        for pair in order.tolist():
            for side in ("chosen", "rejected"):
                text = PAIRS[pair]["prompt"], PAIRS[pair][side]
                target = slow.values(model, *text)[1].detach()
                mean, std = slow.values(twin, *text)[1], slow_std(twin, text[0] + text[1])
                losses.append(0.5 * ((target - mean) / std) ** 2 + torch.log(std))
        loss = sum(losses) / len(losses)
        norms.append(slow.step(twin, adam, 0.01 * (3 - step) / 3, loss))
        tokens = slow.tokens_of(PAIRS[i] for i in order)
        assert row == pytest.approx(dict(step=step, loss=loss.item(), tokens=tokens), rel=1e-4, abs=1e-5)
    assert max(norms) > 1
    slow.same_weights(head, twin, 1e-5)


@pytest.mark.parametrize("kind", ["ensemble", "brme"])
def test_members_continue_from_a_checkpoint(kind):
    """Bug: one order, the pairs of another member, heads that learn labels; a member that is trained twice or never."""
    settings, saved, judge = RewardConfig(reward_batch=4, reward_epochs=1), [], None
    whole, alone, *others = [robust.make_members(tiny_gpt(0, torch.float32), kind, 3, seed=2) for _ in range(4)]
    if kind == "brme":
        judge = tiny_reward_model(1).float()
    for metrics, parts in robust.train_members(whole, SHARES, settings, 2, judge):
        saved.append((metrics, through_a_file(save_parts(parts, metrics["step"] + 1))))
    rows = [metrics for metrics, _ in saved]
    assert [(row["member"], row["step"]) for row in rows] == list(zip((0, 0, 1, 2, 2), range(5)))
    assert robust.steps_of(SHARES, settings) == [2, 1, 2]
    for i, (member, one) in enumerate(zip(whole, alone)):
        if kind == "brme":
            metrics = finish(robust.train_head(one, judge, SHARES[i], settings, 6 + i))
        else:
            metrics = finish(train_reward_model(one, SHARES[i], settings, 6 + i))
        slow.same_weights(member, one, 0)
        assert [row["loss"] for row in rows if row["member"] == i] == [row["loss"] for row in metrics]
    for stop, members in zip((2, 4), others):  # after a member, and within the next one
        assert finish(robust.train_members(members, SHARES, settings, 2, judge, saved[stop - 1][1])) == rows[stop:]
        for member, expected in zip(members, whole):
            slow.same_weights(member, expected, 0)


def test_the_heads_of_a_run(smallest):
    """Bug: heads that learn from labels, or each from the pairs of an annotator."""
    settings = dict(read_settings(smallest), reward_model="brme", members=2, annotators=2, head_share=0.9)
    run = Run(smallest, Config(**settings), "cpu")
    members = robust.make_members(run.load_network("sft"), "brme", 2, 7)
    shares = robust.member_pairs(run.pairs[0], "brme", run.config, 7)
    finish(robust.train_members(members, shares, run.config, 7, run.load_network("reward")))
    assert [Config(reward_model="uwo", annotators=n).robust_members for n in (1, 2)] == [5, 2]
    run_robust(run, "robust", 7)
    scorer = make_scorer(run)
    assert scorer.kind == "brme"
    for member, expected in zip(scorer.members, members, strict=True):
        slow.same_weights(member, expected, 0)


def test_a_run_on_a_robust_reward(smallest):
    """Bug: the score of the single reward model; labels of another annotator; the accuracy of training pairs."""
    folder = smallest.parent / "robust"
    flags = "--policies ppo --robust-lambda 0.25 --reward-model ensemble --annotators 2 --bias length=1,phrase:the=3"
    assert minirlhf.main(["--from", str(smallest), "--out", str(folder), *flags.split()]) == 0
    run = Run(folder, Config(**read_settings(folder)), "cpu")
    scorer, labels, report = make_scorer(run), run.pairs[0], run.read("report.json")
    assert (scorer.kind, scorer.lam, len(scorer.members)) == ("ensemble", 0.25, 2)
    assert '"the", which an annotator likes: pretrained' in " ".join(format_notes(report))
    assert len({row["phrases"]["the"] for row in report["policies"].values()}) > 1
    for pair in [pair for pair in labels + run.pairs[1] if pair["annotator"] == 1]:
        a, b = ["the" in decode(run.tokenizer, pair[side]) for side in ("chosen", "rejected")]
        p = preference_probability(pair["gold"][0] - pair["gold"][1] + 3 * (a - b), 0.4, 0.03)  # as SMALLEST has it
        assert pair["ceiling"] == pytest.approx(max(p, 1 - p))
    saved = report["reward_model"]
    assert saved == clean(run.read("robust.json")) != run.read("reward.json")

    batch = collate_pairs(run.pairs[1], scorer.pad, scorer.device)  # the chosen responses, then the rejected ones
    gold = torch.tensor([pair["gold"][side] for side in (0, 1) for pair in run.pairs[1]])
    known = spread_and_error(scorer.answers(batch)[0].mean(dim=0), scorer.spread(batch), gold)
    expected = {"accuracy": wins(*scorer(batch).chunk(2)).mean().item(), "spread": scorer.spread(batch).mean().item(),
                **{f"spread_{name}": value for name, value in known.items()}}
    assert {name: saved[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert "{correlation:.2f}, gold within two spreads {coverage:.0%}".format(**known) in accuracy_text(saved)
    rollouts = run.sample("normalise", run.load_network("sft"), run.prompts[0][:1024], 1000 * run.config.seed + 8)
    scores = score_batches(scorer, rollouts)
    assert (scores.mean().item(), scores.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-4)

    shares = [[pair for pair in labels if pair["annotator"] == i] for i in range(2)]
    members = [row["member"] for row in run.rows() if row["stage"] == "robust" and "step" in row]
    assert [members.count(i) for i in range(2)] == robust.steps_of(shares, run.config)

    first = next(row for row in run.rows() if row["stage"] == "ppo" and "step" in row)  # of the SFT policy's answers
    seed = 1000 * run.config.seed + 4
    picks = torch.randint(len(run.prompts[0]), (8,), generator=rng(seed)).tolist()
    rollout = generate(run.load_network("sft"), [run.prompts[0][i] for i in picks], run.config.response_tokens,
                       run.config.temperature, rng(seed))
    assert first["score"] == pytest.approx(scorer(rollout).mean().item(), abs=1e-5)
    assert first["spread"] == pytest.approx(scorer.spread(rollout).mean().item(), abs=1e-5)
