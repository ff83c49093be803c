"""Tests of dpo.py: the losses against formulas and known optima, the loops against slow replays."""

import pytest
import slow
import torch
from helpers import PAIRS, close, double, finish, noise, rng, rows_of, tiny_gpt, tiny_reward_model

import dpo
import estimators
import mdp
from ppo import PPOConfig


def slow_reward(log_ratio, kind):
    """The implicit reward / beta."""
    return log_ratio + log_ratio.exp() if kind == "chipo" else log_ratio


def slow_loss(h, beta, kind, e):
    """The mean loss of margins h (B,), by the formulas. Only for moderate h."""
    right = torch.log(1 + torch.exp(-beta * h))
    wrong = torch.log(1 + torch.exp(beta * h))
    losses = {"dpo": (1 - e) * right + e * wrong, "chipo": right, "ipo": (h - 1 / (2 * beta)) ** 2,
              "slic": (1 - beta * h).clamp(min=0), "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e)}
    return losses[kind].mean()


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", torch.linspace(0, 0.49, 7)), ("ipo", 0.0), ("slic", 0.0),
                                     ("robust", 0.1), ("chipo", 0.0)])
def test_loss_equals_its_formula(kind, e):
    """Bug: a wrong sign, factor or default, a missing reference or beta, a sum over pairs, or a detached term."""
    beta, four = 0.3, [noise(seed, 7).requires_grad_() for seed in range(4)]
    chosen, rejected, ref_chosen, ref_rejected = four
    h = slow_reward(chosen - ref_chosen, kind) - slow_reward(rejected - ref_rejected, kind)
    close(dpo.dpo_loss(*four, beta, kind, e).item(), slow_loss(h, beta, kind, e).item())
    assert torch.equal(dpo.dpo_loss(*four), dpo.dpo_loss(*four, 0.1, "dpo", 0.0))
    assert torch.autograd.gradcheck(lambda *four: dpo.dpo_loss(*four, beta, kind, e), four)


def test_losses_far_from_the_reference_are_finite():
    """Bug: log(sigmoid(x)) is -inf for x = -1000, or exp(log pi/ref) overflows: a step writes NaN into the weights."""
    zero = torch.zeros(1)
    for h, loss in ((-1000.0, 1000.0), (1000.0, 0.0)):
        close(dpo.dpo_loss(torch.tensor([h]), zero, zero, zero, beta=1.0), loss)
    chosen = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = dpo.dpo_loss(chosen, zero, zero, zero, kind="chipo")
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all()


def test_robust_loss_is_the_clean_loss_on_average_over_flips():
    """Bug: a wrong sign of the second term, or a missing 1 - 2e."""
    beta, e, h, zero = 0.7, 0.3, noise(3, 5).requires_grad_(), torch.zeros(5)

    def mean_over_flips(kind):
        right, wrong = [dpo.dpo_loss(sign * h, zero, zero, zero, beta, kind, e) for sign in (1, -1)]
        return (1 - e) * right + e * wrong

    clean, robust = dpo.dpo_loss(h, zero, zero, zero, beta), mean_over_flips("robust")
    close(robust.item(), clean.item(), 1e-12)
    close(torch.autograd.grad(robust, h)[0], torch.autograd.grad(clean, h)[0], 1e-12)
    assert abs(mean_over_flips("dpo").item() - clean.item()) > 1e-3


def test_chipo_rests_at_the_optimum_of_kl_plus_chi_squared():
    """
    Bug: a ratio of the wrong sign, the logarithm alone, or a clamp that cuts ratios which the optimum has.

    At the optimum beta (z + log z) = r - c for all responses, with one number c and z = pi/ref.
    """
    beta, tree = 0.3, mdp.Tree(3, 2)  # 7 responses
    ref_logits, r = noise(0, tree.S, 3), noise(1, tree.Y)
    ref = mdp.response_logp(tree, ref_logits)
    a, b = torch.triu_indices(tree.Y, tree.Y, 1)
    a_wins = torch.sigmoid(r[a] - r[b])

    def gradient(logits):
        logp = mdp.response_logp(tree, logits.requires_grad_())

        def losses(a, b):  # dpo_loss is a mean over pairs: one pair at a time
            return torch.vmap(lambda *four: dpo.dpo_loss(*four, beta, "chipo"))(logp[a], logp[b], ref[a], ref[b])

        loss = (a_wins * losses(a, b) + (1 - a_wins) * losses(b, a)).mean()
        return torch.autograd.grad(loss, logits)[0]

    logits, update = estimators.rest(ref_logits, gradient, steps=200)
    logp = mdp.response_logp(tree, logits)
    pi, z = logp.exp(), (logp - ref).exp()
    c = r - beta * (z + z.log())
    close(pi * (c - (pi * c).sum()), torch.zeros(tree.Y), 1e-4)
    assert update < 1e-5 and 1 < z.max() < 1 + (r.max() - r.min()) / beta


@pytest.mark.parametrize("kind, e, alpha, weight, temperature", [
    ("dpo", 0.2, 0.3, 0.0, 0.7), ("chipo", 0.0, 0.0, 0.7, 1.3)])
def test_loop_equals_a_slow_replay(monkeypatch, kind, e, alpha, weight, temperature):
    """
    Bug: another setting, a mean over tokens, a temperature that is lost, reference log-probs of other rows, gradients
    that add up, a price paid to long responses, an SFT term of the wrong sign or length, or a wrong metric.

    The policy does not start as the reference, so that no margin is 0.
    """
    seen = []
    monkeypatch.setattr(dpo, "check_start_margin", lambda *inputs: seen.append(inputs))
    beta, lr, steps = 0.3, 0.02, 8
    config = dpo.DPOConfig(dpo_kind=kind, dpo_beta=beta, dpo_lr=lr, dpo_epochs=2, label_smoothing=e, dpo_batch=2,
                           length_penalty=alpha, sft_weight=weight)
    policy, twin, reference = tiny_gpt(1), tiny_gpt(1), tiny_gpt(0)
    ref = double([[slow.logprobs(reference, pair["prompt"], pair[side], temperature).sum().item()
                   for side in ("chosen", "rejected")] for pair in PAIRS])                    # (pairs, 2)
    rows = finish(dpo.train_dpo(policy, reference, PAIRS, config, seed=0, temperature=temperature))
    orders, norms = slow.orders(7, 4, rng(0)), []
    adam = torch.optim.AdamW(twin.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (order, row) in enumerate(zip(orders, rows, strict=True)):
        chosen, rejected = [
            torch.stack([slow.logprobs(twin, PAIRS[i]["prompt"], PAIRS[i][side], temperature).sum() for i in order])
            for side in ("chosen", "rejected")]
        lengths, rejected_lengths = [double([len(PAIRS[i][side]) for i in order]) for side in ("chosen", "rejected")]
        chosen_reward = beta * slow_reward(chosen - ref[order, 0], kind)
        rejected_reward = beta * slow_reward(rejected - ref[order, 1], kind)
        margin = chosen_reward - rejected_reward
        h = (margin + alpha * (lengths - rejected_lengths)) / beta
        loss = slow_loss(h, beta, kind, e) - weight * (chosen / lengths).mean()
        if step == 0:
            close(seen[0][0], margin / beta)
            close(seen[0][1], torch.cat([chosen, rejected]))
        norms.append(slow.step(twin, adam, lr * min((step + 1) / 1.8, (steps - step) / steps), loss))
        expected = dict(loss=loss, margin=margin.mean(), chosen_logp=chosen.mean(), rejected_logp=rejected.mean(),
                        chosen_reward=chosen_reward.mean(), rejected_reward=rejected_reward.mean(),
                        accuracy=(margin > 0).double().mean())
        expected = dict(step=step, tokens=slow.tokens_of(PAIRS[i] for i in order),
                        **{name: value.item() for name, value in expected.items()})
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(seen) == 1 and max(norms) > 1
    slow.same_weights(policy, twin, 1e-5)


def test_a_tie_is_not_accurate():
    """Bug: margins of 0 count as learned, and the accuracy begins at 1."""
    pairs = [dict(prompt=[1, 2], chosen=[3, 4], rejected=[3, 4])] * 2
    (metrics, _), = dpo.train_dpo(tiny_gpt(0), tiny_gpt(0), pairs, dpo.DPOConfig(dpo_epochs=1), seed=0)
    assert metrics["margin"] == metrics["accuracy"] == 0


def test_online_dpo_equals_a_slow_replay():
    """Bug: pairs across prompts, a winner, an error or log-probs of another pair, another setting or rate, a metric."""
    beta, temperature, prompts = 0.3, 0.8, [[1, 2, 3], [4], [5, 6]]
    config = PPOConfig(beta=beta, ppo_iterations=2, ppo_batch=10, minibatch=5, ppo_lr=0.03, response_tokens=5,
                       temperature=temperature)
    reward_model = tiny_reward_model(7)

    def score(rollout):
        """Rounded, so that some pairs tie."""
        with torch.no_grad():
            return (2 * slow.scores(reward_model, rows_of(rollout))).round()

    policy, twin, reference = [tiny_gpt(1) for _ in range(3)]
    adam = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    shuffle, sampler, shares = rng(0), rng(0), []
    loop = dpo.train_online_dpo(policy, tiny_gpt(1), score, prompts, config, seed=0)
    for iteration, (metrics, _, rollout) in enumerate(loop):
        picked = [prompts[i] for i in torch.randint(3, (5,), generator=shuffle) for _ in range(2)]
        texts, old, ref = slow.sample(rollout, twin, reference, picked, config, sampler)
        scores, updates = score(rollout), []
        for pairs in slow.orders(5, 2, shuffle):
            losses = []
            for pair in pairs.tolist():
                won, lost = 2 * pair, 2 * pair + 1
                if scores[won] < scores[lost]:
                    won, lost = lost, won
                e = torch.sigmoid(scores[lost] - scores[won]).clamp(max=0.499)
                shares.append(e.item())
                chosen, rejected = [slow.logprobs(twin, *texts[i], temperature).sum() - ref[i].sum()
                                    for i in (won, lost)]
                losses.append(slow_loss(chosen - rejected, beta, "dpo", e))
            loss = sum(losses) / len(losses)
            norm = slow.step(twin, adam, 0.03 * (2 - iteration) / 2, loss)
            updates.append(dict(loss=loss.item(), grad_norm=norm))
        slow.same_metrics(metrics, slow.metrics(texts, scores, old, ref, beta, updates), iteration)
        slow.same_weights(policy, twin, 1e-5)
    assert iteration == 1 and min(shares) < 0.3 and max(shares) == pytest.approx(0.499)
