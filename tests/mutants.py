"""
Planted bugs that test the tests: each is a small change that somebody's RLHF code really had, and a named test has to notice it.

    python tests/mutants.py              plant every bug, one at a time, in a copy of the repository, and run the test that is to kill it
    python tests/mutants.py clip k3      only those whose name contains one of the words

Prints `killed` or `SURVIVED` and the seconds for each; exit status 1 when one survives, or when a named test fails without any bug. P1 to P74 are
the pitfalls that the bugs stand for, as the docstrings of the tests tell them. A teacher's exercise: plant one, hide the tests, and ask for the line.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    name: str
    pitfall: str
    file: str
    right: str  # the text in the file, which occurs there once
    wrong: str  # what is planted in its place
    killer: str  # the test that is to fail


MUTANTS = [
    # model.py
    Mutant("logits off by one", "P1", "model.py",
           "wanted = F.pad(batch.mask, (batch.P - 1, 0)) ",
           "wanted = F.pad(batch.mask, (batch.P - 2, 1)) ",
           "tests/test_model.py::test_a_planted_model_that_reads_positions_only"),
    Mutant("positions not shifted by the padding", "P5", "model.py",
           "self.wpe(positions)                         #",
           "self.wpe(columns)                         #",
           "tests/test_model.py::test_positions_start_at_zero_on_the_first_real_token"),
    Mutant("attention sees the future", "P1", "model.py",
           "is_causal=True",
           "is_causal=False",
           "tests/test_model.py::test_the_future_has_no_gradient"),
    Mutant("GELU is not GPT-2's", "-", "model.py",
           'approximate="tanh"',
           'approximate="none"',
           "tests/test_model.py::test_logits_are_those_of_the_textbook_gpt"),
    Mutant("dropout in the policy", "P13", "model.py",
           'return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))',
           'return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), 0.1, self.training)',
           "tests/test_model.py::test_dropout_is_absent"),
    Mutant("temperature in the scorer only", "P15", "model.py",
           "step_logp = log_softmax(model.head(x), temperature) ",
           "step_logp = log_softmax(model.head(x)) ",
           "tests/test_model.py::test_the_first_token_follows_the_model_at_the_temperature"),
    Mutant("temperature in the sampler only", "P15", "model.py",
           "log_softmax(model.head(response_hidden(model, batch)), temperature)         #",
           "log_softmax(model.head(response_hidden(model, batch)))         #",
           "tests/test_model.py::test_response_logprobs_equal_a_loop_over_tokens"),
    Mutant("top-k in the sampler only", "P16", "model.py",
           "token = sample(step_logp.exp(), generator)",
           "token = sample(step_logp.exp().where(step_logp >= step_logp.topk(5).values[:, -1:], 0.0), generator)",
           "tests/test_model.py::test_the_first_token_follows_the_model_at_the_temperature"),
    Mutant("E is not counted in the response", "P6", "model.py",
           "response_lens[rows] += running",
           "response_lens[rows] += running & (token[:, 0] != end)",
           "tests/test_model.py::test_a_response_ends_at_e_and_e_is_part_of_it"),
    Mutant("the cap counts as finished", "P31", "model.py",
           "finished[rows] = ~running",
           "finished[rows] = ~running | (t + 1 == max_new_tokens)",
           "tests/test_model.py::test_a_response_cut_at_the_horizon_is_not_finished"),
    Mutant("the cache keeps the wrong rows", "P18", "model.py",
           "store[:, :n, :, :self.used] = store[:, rows, :, :self.used]",
           "store[:, :n, :, :self.used] = store[:, :n, :, :self.used]",
           "tests/test_model.py::test_the_cache_keeps_the_rows_it_is_told_to_keep"),
    Mutant("cached positions are one late", "P18", "model.py",
           "self.wpe((new - first).squeeze(2))",
           "self.wpe((new - first).squeeze(2) + 1)",
           "tests/test_model.py::test_decoding_in_steps_equals_the_full_forward_pass"),
    Mutant("wanted states in the order of length", "P18", "model.py",
           "wanted = places[wanted.flatten()] ",
           "wanted = places[wanted.flatten()].sort().values ",
           "tests/test_model.py::test_wanted_states_are_those_of_the_full_pass_in_reading_order"),
    Mutant("positions counted on the CPU", "-", "model.py",
           "positions = torch.arange(N, device=ids.device) - starts",
           "positions = torch.arange(N) - starts",
           "tests/test_device.py::test_the_loops_learn_the_same_on_a_gpu"),
    Mutant("a minibatch's rows stay on the CPU", "-", "ppo.py",
           "rows = rows.to(device, non_blocking=True)",
           "rows = rows.to('cpu')",
           "tests/test_device.py::test_the_loops_learn_the_same_on_a_gpu"),
    Mutant("a GPU waits for the number of real tokens", "-", "model.py",
           "rows = order.repeat_interleave(lengths, output_size=N)",
           "rows = order.repeat_interleave(lengths)",
           "tests/test_device.py::test_a_pass_waits_for_shapes_only"),
    Mutant("a GPU attends a few rows at a time", "-", "model.py",
           'GROUP if ids.device.type == "cpu" else B',
           "GROUP",
           "tests/test_device.py::test_a_gpu_attends_all_rows_at_once"),
    Mutant("a GPU waits for every token twice", "-", "model.py",
           "running = ~finished[rows] ",
           "running = ~finished[rows[finished[rows] | True]] ",
           "tests/test_device.py::test_a_step_of_sampling_waits_once"),
    Mutant("a graph answers with the first rollout's cache", "-", "graphs.py",
           "zip(self.inputs, inputs)",
           "zip(self.inputs[:1], inputs)",
           "tests/test_graphs.py::test_replayed_rollouts_know_their_logprobs"),
    Mutant("the recording is taken for a rollout", "-", "graphs.py",
           "            self.graph.replay()",
           "            self.graph.replay() if inputs is not self.inputs else None",
           "tests/test_graphs.py::test_replayed_rollouts_know_their_logprobs"),
    Mutant("a tape replays for any temperature", "-", "graphs.py",
           "elif settings != self.settings:",
           "elif settings[:4] != self.settings[:4]:",
           "tests/test_graphs.py::test_a_tape_serves_what_it_was_recorded_with"),
    Mutant("graphs only where the longest prompt is", "-", "ppo.py",
           "replay = dict(P=max(map(len, prompts)), loop=Tape())",
           "replay = dict(loop=Tape())",
           "tests/test_graphs.py::test_ppo_learns_from_replayed_rollouts"),
    Mutant("--cuda-graphs goes nowhere", "-", "minirlhf.py",
           "cuda_graphs=config.cuda_graphs, log=log,",
           "log=log,",
           "tests/test_device.py::test_the_whole_pipeline_runs_on_a_gpu"),
    Mutant("a graph's random numbers are not registered", "-", "graphs.py",
           "self.graph.register_generator_state(generator)",
           "generator.initial_seed()",
           "tests/test_graphs.py::test_the_generator_is_registered"),
    Mutant("a graph recorded behind its warm-up", "-", "graphs.py",
           "cache.used = settings[2]",
           "pass",
           "tests/test_graphs.py::test_replayed_rollouts_know_their_logprobs"),
    Mutant("log-probs in bfloat16", "P14", "model.py",
           "logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature",
           "logits / temperature",
           "tests/test_model.py::test_half_precision_logits_are_scored_in_float32"),
    Mutant("log-probs left outside the mask", "P8", "model.py",
           "return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)",
           "return torch.ones(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)",
           "tests/test_model.py::test_response_logprobs_equal_a_loop_over_tokens"),
    # data.py
    Mutant("E is left out of the mask", "P6", "data.py",
           "device=self.ids.device) < self.response_lens[:, None]",
           "device=self.ids.device) < self.response_lens[:, None] - 1",
           "tests/test_data.py::test_the_mask_comes_from_lengths"),
    Mutant("mask from ids that are not the pad", "P6", "data.py",
           "return torch.arange(self.R, device=self.ids.device) < self.response_lens[:, None]",
           "return self.responses != self.ids.max()",
           "tests/test_data.py::test_the_mask_comes_from_lengths"),
    Mutant("the prompt is cut on its right", "P48", "data.py",
           "prompt=prompt[-prompt_tokens:]",
           "prompt=prompt[:prompt_tokens]",
           "tests/test_data.py::test_long_prompts_lose_their_left_and_long_responses_their_right"),
    Mutant("no E after a demonstration", "P56", "data.py",
           "tokenizer.encode_ordinary(pair[key]) + [end]",
           "tokenizer.encode_ordinary(pair[key])",
           "tests/test_data.py::test_pairs_are_encoded_with_one_e_each"),
    Mutant("identical pairs are kept", "P48", "data.py",
           "if chosen[:response_tokens] == rejected[:response_tokens]:",
           "if False:",
           "tests/test_data.py::test_identical_pairs_are_dropped_and_counted"),
    Mutant("a prompt on both sides of the split", "P49", "data.py",
           "if len(groups) < 10:",
           "if True:",
           "tests/test_data.py::test_no_prompt_is_on_both_sides_of_a_split"),
    Mutant("transcripts are split at the first turn", "P55", "data.py",
           "chosen.rfind(ASSISTANT, 0, shared)",
           "chosen.find(ASSISTANT, 0, shared)",
           "tests/test_data.py::test_transcripts_split_where_their_shared_beginning_last_asks_the_assistant"),
    # ppo.py
    Mutant("k1 with its sign turned", "P20", "ppo.py",
           'log_ratio = logp - ref_logp\n',
           'log_ratio = ref_logp - logp\n',
           "tests/test_ppo.py::test_k1_and_k3_have_the_exact_kl_as_expectation"),
    Mutant("k3 in the other direction", "P20", "ppo.py",
           "(torch.expm1(-log_ratio) + log_ratio).clamp(min=0)",
           "(torch.expm1(log_ratio) - log_ratio).clamp(min=0)",
           "tests/test_ppo.py::test_k1_and_k3_have_the_exact_kl_as_expectation"),
    Mutant("k3 without expm1", "P22", "ppo.py",
           "(torch.expm1(-log_ratio) + log_ratio).clamp(min=0)",
           "(torch.exp(-log_ratio) - 1 + log_ratio)",
           "tests/test_ppo.py::test_k3_is_never_negative_and_keeps_its_digits_in_float32"),
    Mutant("the mean counts the padding", "P9", "ppo.py",
           "torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
           "torch.where(mask, x, 0.0).mean()",
           "tests/test_ppo.py::test_masked_mean_is_one_mean_over_all_real_cells"),
    Mutant("the KL penalty is a bonus", "P20", "ppo.py",
           "torch.where(mask, -beta * k1, 0.0)",
           "torch.where(mask, beta * k1, 0.0)",
           "tests/test_ppo.py::test_token_rewards_sum_to_the_objective"),
    Mutant("the score on the pad after the end", "P23", "ppo.py",
           "last = columns == mask.sum(dim=1, keepdim=True) - 1 ",
           "last = columns == mask.sum(dim=1, keepdim=True) ",
           "tests/test_ppo.py::test_score_sits_on_the_last_real_token"),
    Mutant("GAE bootstraps from a pad", "P30", "ppo.py",
           "torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)",
           "torch.where(mask, rewards, 0.0), values",
           "tests/test_ppo.py::test_gae_never_reads_a_pad"),
    Mutant("GAE forgets lambda", "P30", "ppo.py",
           "gamma * lam * next_advantage",
           "gamma * next_advantage",
           "tests/test_ppo.py::test_gae_equals_its_definition"),
    Mutant("returns from whitened advantages", "P32", "ppo.py",
           "torch.where(mask, advantages + values, 0.0)",
           "torch.where(mask, whiten(advantages, mask) + values, 0.0)",
           "tests/test_ppo.py::test_gae_lambda_1_is_reward_to_go_and_lambda_0_is_the_td_error"),
    Mutant("whitening over the padding", "P33", "ppo.py",
           "variance = masked_mean((torch.where(mask, x, 0.0) - mean) ** 2, mask)",
           "variance = ((torch.where(mask, x, 0.0) - mean) ** 2).mean()",
           "tests/test_ppo.py::test_whiten_makes_mean_0_and_variance_1_over_real_tokens"),
    Mutant("whitening loses the mean that it should keep", "P28", "ppo.py",
           "whitened if shift_mean else whitened + mean",
           "whitened",
           "tests/test_ppo.py::test_whiten_by_hand"),
    Mutant("min for max in the clip", "P38", "ppo.py",
           "return masked_mean(torch.maximum(-advantages * ratio",
           "return masked_mean(torch.minimum(-advantages * ratio",
           "tests/test_ppo.py::test_policy_loss_six_cases"),
    Mutant("the ratio upside down", "P38", "ppo.py",
           "torch.exp(torch.where(mask, logp - old_logp, 0.0))",
           "torch.exp(torch.where(mask, old_logp - logp, 0.0))",
           "tests/test_ppo.py::test_policy_loss_six_cases"),
    Mutant("the clip on one side only", "P38", "ppo.py",
           "ratio.clamp(1 - clip, 1 + clip)), mask)",
           "ratio.clamp(max=1 + clip)), mask)",
           "tests/test_ppo.py::test_policy_loss_six_cases"),
    Mutant("min for max in the value clip", "P36", "ppo.py",
           "0.5 * masked_mean(torch.maximum(",
           "0.5 * masked_mean(torch.minimum(",
           "tests/test_ppo.py::test_value_loss_table"),
    Mutant("old log-probs are the new ones", "P17", "ppo.py",
           "actor, critics = (logp, part.logp,",
           "actor, critics = (logp, logp.detach(),",
           "tests/test_ppo.py::test_old_log_probs_are_frozen"),
    Mutant("rewards of other rows after the shuffle", "P44", "ppo.py",
           "advantages[rows]), (values",
           "advantages[:len(rows)]), (values",
           "tests/test_ppo.py::test_loop_equals_a_slow_replay"),
    Mutant("experience keeps a graph", "P17", "ppo.py",
           '@torch.no_grad()\ndef experience',
           "def experience",
           "tests/test_ppo.py::test_experience_by_hand"),
    Mutant("the critic is the reward model itself", "P45", "ppo.py",
           "critic = copy.deepcopy(reward_model if critic is None else critic)",
           "critic = (reward_model if critic is None else critic)",
           "tests/test_ppo.py::test_only_policy_and_critic_learn"),
    Mutant("the critic that was given is ignored", "P45", "ppo.py",
           "copy.deepcopy(reward_model if critic is None else critic)",
           "copy.deepcopy(reward_model)",
           "tests/test_ppo.py::test_critic_starts_where_it_is_told"),
    Mutant("the learning rate does not fall", "P42", "ppo.py",
           "base * (1 - iteration / iterations)",
           "base",
           "tests/test_ppo.py::test_learning_rates_fall_linearly_to_0"),
    # dpo.py
    Mutant("the mean of log-probs for their sum", "P53", "dpo.py",
           "logp = response_logprobs(reference, collate_pairs(pairs[at:at + size], pad, device)).sum(dim=1)",
           "logp = response_logprobs(reference, collate_pairs(pairs[at:at + size], pad, device)).mean(dim=1)",
           "tests/test_dpo.py::test_reference_log_probs_are_sums_over_each_response_alone"),
    Mutant("chosen and rejected change places", "P50", "dpo.py",
           "h = (chosen - ref_chosen) - (rejected - ref_rejected)                              #",
           "h = (rejected - ref_rejected) - (chosen - ref_chosen)                              #",
           "tests/test_dpo.py::test_loss_equals_its_formula"),
    Mutant("the reference is forgotten", "P57", "dpo.py",
           "h = (chosen - ref_chosen) - (rejected - ref_rejected)                              #",
           "h = chosen - rejected                              #",
           "tests/test_dpo.py::test_loss_depends_on_the_reference"),
    Mutant("IPO aims at twice its margin", "P57", "dpo.py",
           "(h - 1 / (2 * beta)) ** 2).mean()",
           "(h - 1 / beta) ** 2).mean()",
           "tests/test_dpo.py::test_ipo_is_solved_at_a_finite_margin"),
    Mutant("label smoothing smooths nothing", "P59", "dpo.py",
           "wrong * F.logsigmoid(-beta * h)",
           "wrong * F.logsigmoid(beta * h)",
           "tests/test_dpo.py::test_label_smoothing_has_its_minimum_where_sigmoid_is_1_minus_e"),
    Mutant("reference log-probs of other pairs", "P44", "dpo.py",
           "ref_logp[rows.to(device)].unbind",
           "ref_logp[:len(rows)].unbind",
           "tests/test_dpo.py::test_every_row_meets_its_own_reference"),
    Mutant("robust DPO smooths in place of correcting", "P59", "dpo.py",
           "-e / (1 - 2 * e))",
           "e / (1 - 2 * e))",
           "tests/test_dpo.py::test_robust_loss_is_the_clean_loss_on_average_over_flips"),
    Mutant("robust DPO forgets 1 - 2e", "P59", "dpo.py",
           "((1 - e) / (1 - 2 * e), -e / (1 - 2 * e))",
           "(1 - e, -e)",
           "tests/test_dpo.py::test_robust_loss_is_the_clean_loss_on_average_over_flips"),
    Mutant("the implicit reward without its reference", "P57", "dpo.py",
           "return beta * (logp - ref_logp)",
           "return beta * logp",
           "tests/test_dpo.py::test_implicit_reward_of_the_optimum_is_the_reward"),
    # reward.py
    Mutant("log of a sigmoid that is 0", "P47", "reward.py",
           "-F.logsigmoid(r_chosen - r_rejected - margin).mean()",
           "-torch.log(torch.sigmoid(r_chosen - r_rejected - margin)).mean()",
           "tests/test_reward.py::test_a_difference_of_minus_100_costs_100"),
    Mutant("the margin helps instead of asking for more", "P50", "reward.py",
           "-F.logsigmoid(r_chosen - r_rejected - margin)",
           "-F.logsigmoid(r_chosen - r_rejected + margin)",
           "tests/test_reward.py::test_margin_is_subtracted"),
    Mutant("the score is read on the last column", "P46", "reward.py",
           "last = batch.P + batch.response_lens - 1 ",
           "last = torch.full_like(batch.response_lens, batch.ids.shape[1] - 1) ",
           "tests/test_reward.py::test_score_is_read_at_the_last_real_token"),
    Mutant("the value is read one step late", "P2", "reward.py",
           "spread(self._scale(response_hidden(self.trunk, batch)), batch.mask)",
           "spread(self._scale(self.trunk.hidden(batch.ids, batch.prompt_lens, batch.response_lens, batch.P)[:, batch.P:][batch.mask]), batch.mask)",
           "tests/test_reward.py::test_value_does_not_see_the_action"),
    Mutant("the normalisation is not applied", "P26", "reward.py",
           "(self.score(x).squeeze(-1).float() - self.mean) / self.std",
           "self.score(x).squeeze(-1).float()",
           "tests/test_reward.py::test_normalise_gives_mean_0_and_standard_deviation_1"),
    Mutant("the normalisation is not in the checkpoint", "P26", "reward.py",
           'self.register_buffer("mean", torch.zeros(()))',
           'self.register_buffer("mean", torch.zeros(()), persistent=False)',
           "tests/test_reward.py::test_normalisation_reaches_values_and_survives_a_checkpoint"),
    Mutant("normalised twice is normalised wrongly", "P25", "reward.py",
           '    reward_model.std.fill_(1.0)\n',
           "",
           "tests/test_reward.py::test_normalise_twice_is_normalise_once"),
    Mutant("rejected responses come first", "P50", "reward.py",
           '[pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]',
           '[pair["rejected"] for pair in pairs] + [pair["chosen"] for pair in pairs]',
           "tests/test_reward.py::test_collate_pairs_puts_the_chosen_first"),
    Mutant("ratings of other responses", "P44", "reward.py",
           "device=device).T.flatten()",
           "device=device).flatten()",
           "tests/test_reward.py::test_loop_equals_a_slow_replay"),
    Mutant("one baseline for the whole batch", "-", "reward.py",
           "scores - baseline.mean(dim=1)",
           "scores - baseline.mean()",
           "tests/test_reward.py::test_contrastive_by_hand"),
    Mutant("the worst case is the best", "-", "reward.py",
           "return scores.amin(dim=0)",
           "return scores.amax(dim=0)",
           "tests/test_reward.py::test_aggregate_equals_a_loop"),
    Mutant("the standard deviation for the variance in UWO", "-", "reward.py",
           "scores.var(dim=0, correction=0)",
           "scores.std(dim=0, correction=0)",
           "tests/test_reward.py::test_aggregate_equals_a_loop"),
    Mutant("the members of an ensemble share a head", "-", "reward.py",
           "torch.manual_seed(k * seed + i)",
           "torch.manual_seed(seed)",
           "tests/test_reward.py::test_members_have_seeds_of_their_own"),
    Mutant("sampled rewards without the std", "-", "reward.py",
           "(means + stds * noise - target)",
           "(means + noise - target)",
           "tests/test_reward.py::test_brme_loss_by_hand_and_on_average"),
    Mutant("the likelihood without its log std", "-", "reward.py",
           "((target - means) / stds).square() + stds.log()).mean()",
           "((target - means) / stds).square()).mean()",
           "tests/test_reward.py::test_mse_drives_every_std_to_0_and_likelihood_finds_the_spread"),
    Mutant("every head learns from every pair", "-", "reward.py",
           "generator=generator) < share ",
           "generator=generator) < 1 ",
           "tests/test_reward.py::test_heads_learn_their_own_pairs_and_the_scores_of_those"),
    Mutant("heads learn the scores of other pairs", "P44", "reward.py",
           "targets[:, rows.to(device)]",
           "targets[:, :len(rows)]",
           "tests/test_reward.py::test_heads_learn_their_own_pairs_and_the_scores_of_those"),
    Mutant("nominal trusts the head that is least sure", "-", "reward.py",
           "stds.argmin(dim=0, keepdim=True)",
           "stds.argmax(dim=0, keepdim=True)",
           "tests/test_reward.py::test_nominal_and_robust_reward_equal_a_loop"),
    Mutant("the robust reward hopes for the best head", "-", "reward.py",
           "(1 - lam) * means.amin(dim=0)",
           "(1 - lam) * means.amax(dim=0)",
           "tests/test_reward.py::test_nominal_and_robust_reward_equal_a_loop"),
    # evaluate.py
    Mutant("the law is in KL, not in its root", "-", "evaluate.py",
           "[d, -torch.special.xlogy(d, d)]",
           "[d ** 2, -torch.special.xlogy(d ** 2, d ** 2)]",
           "tests/test_evaluate.py::test_fit_law_finds_the_law_that_made_the_points"),
    Mutant("0 log 0 is NaN", "P47", "evaluate.py",
           "-torch.special.xlogy(d, d)",
           "-d * d.log()",
           "tests/test_evaluate.py::test_fit_law_finds_the_law_that_made_the_points"),
    Mutant("gold is not sorted with the proxy", "P68", "evaluate.py",
           "gold.cpu().double().gather(-1, proxy.cpu().argsort(dim=-1, stable=True))",
           "gold.cpu().double()",
           "tests/test_evaluate.py::test_best_of_n_equals_all_subsets"),
    Mutant("best-of-n picks the worst", "P68", "evaluate.py",
           "proxy.cpu().argsort(dim=-1, stable=True)",
           "proxy.cpu().argsort(dim=-1, stable=True, descending=True)",
           "tests/test_evaluate.py::test_best_of_n_equals_all_subsets"),
    Mutant("KL in the other direction", "P20", "evaluate.py",
           "(logp.exp() * (logp - ref_logp))",
           "(ref_logp.exp() * (ref_logp - logp))",
           "tests/test_evaluate.py::test_exact_kl_equals_brute_force"),
    Mutant("the optimum of a sum, not of a mean", "P60", "evaluate.py",
           "(x.logsumexp(0).item() - math.log(len(x)))",
           "x.logsumexp(0).item()",
           "tests/test_evaluate.py::test_optimum_of_two_atoms"),
    Mutant("a tie counts as a win", "P69", "evaluate.py",
           "0.5 * (a == b).float()",
           "1.0 * (a == b).float()",
           "tests/test_evaluate.py::test_win_rate_counts_ties_as_a_half"),
    # world.py
    Mutant("negation is not heard", "P70", "world.py",
           "(NEGATION if negated else 1.0)",
           "1.0",
           "tests/test_world.py::test_gold_is_what_the_formula_says_by_hand"),
    Mutant("every aspect is on topic", "P70", "world.py",
           'on_topic = aspect == "verdict" or aspect in ASPECTS.get(subject, ())',
           "on_topic = True",
           "tests/test_world.py::test_the_prompt_decides_what_is_on_topic"),
    Mutant("training prompts in the evaluation", "P74", "world.py",
           '        if prompt not in train:\n            heldout[prompt] = None',
           "        heldout[prompt] = None",
           "tests/test_world.py::test_prompts_are_distinct_disjoint_and_as_many_as_asked"),
    # mdp.py
    Mutant("the soft value without the reference", "P60", "mdp.py",
           "V[s] = beta * torch.logsumexp(ref[s] + Q[s] / beta, dim=0)",
           "V[s] = beta * torch.logsumexp(Q[s] / beta, dim=0)",
           "tests/test_mdp.py::test_value_iteration_is_the_reweighted_reference"),
    Mutant("the KL of J with the sign of a bonus", "P20", "mdp.py",
           "rewards.to(logits.dtype) - beta * kl(",
           "rewards.to(logits.dtype) + beta * kl(",
           "tests/test_mdp.py::test_what_a_policy_lacks_is_its_kl_from_the_optimum"),
    # minirlhf.py
    Mutant("the reference is trained along", "P45", "minirlhf.py",
           'reference, reward_model = run.load_network("sft", "sft"), run.load_network("reward", "reward")\n    policy = copy.deepcopy(reference).requires_grad_(True)',
           'reference, reward_model = run.load_network("sft", "sft"), run.load_network("reward", "reward")\n    policy = reference.requires_grad_(True)',
           "tests/test_minirlhf.py::test_a_stage_run_again_gives_the_same"),
    # studies.py
    Mutant("a fall from a peak that its own noise picked", "-", "studies.py",
           "others = [curves[:i] + curves[i + 1:] or curves for i in range(len(curves))]",
           "others = [curves for i in range(len(curves))]",
           "tests/test_studies.py::test_peak_and_fall"),
]

# a function whose body is replaced by zeros must not pass either: (file, function, what it returns then, killer)
ZEROS = [
    ("model.py", "response_logprobs", "spread(torch.zeros(int(batch.mask.sum())), batch.mask)", "tests/test_model.py::test_response_logprobs_equal_a_loop_over_tokens"),
    ("reward.py", "bradley_terry_loss", "0.0 * r_chosen.mean()", "tests/test_reward.py::test_loss_equals_its_formula"),
    ("ppo.py", "kl_estimates", "{k: 0.0 * logp for k in (\"k1\", \"k2\", \"k3\")}", "tests/test_ppo.py::test_kl_estimates_by_formula"),
    ("ppo.py", "token_rewards", "0.0 * logp", "tests/test_ppo.py::test_token_rewards_equal_a_double_loop"),
    ("ppo.py", "gae", "torch.zeros_like(values), torch.zeros_like(values)", "tests/test_ppo.py::test_gae_equals_its_definition"),
    ("ppo.py", "whiten", "0.0 * x", "tests/test_ppo.py::test_whiten_by_hand"),
    ("ppo.py", "policy_loss", "0.0 * logp.sum()", "tests/test_ppo.py::test_policy_loss_six_cases"),
    ("ppo.py", "value_loss", "0.0 * values.sum()", "tests/test_ppo.py::test_value_loss_table"),
    ("dpo.py", "dpo_loss", "0.0 * chosen.mean()", "tests/test_dpo.py::test_loss_equals_its_formula"),
    ("evaluate.py", "optimum", "Optimum(0.0, 0.0)", "tests/test_evaluate.py::test_optimum_of_two_atoms"),
    ("evaluate.py", "best_of_n", "torch.zeros(())", "tests/test_evaluate.py::test_best_of_n_equals_all_subsets"),
    ("evaluate.py", "exact_kl", "torch.zeros(len(batch))", "tests/test_evaluate.py::test_exact_kl_equals_brute_force"),
    ("evaluate.py", "fit_law", "(0.0, 0.0), 0.0", "tests/test_evaluate.py::test_fit_law_is_least_squares"),
    ("reward.py", "aggregate", "0.0 * scores[0]", "tests/test_reward.py::test_aggregate_equals_a_loop"),
    ("world.py", "gold", "0.0", "tests/test_world.py::test_gold_is_what_the_formula_says_by_hand"),
    ("mdp.py", "kl", "0.0 * logits.sum()", "tests/test_mdp.py::test_kl_and_entropy_are_sums_over_tokens"),
    ("mdp.py", "objective", "0.0 * logits.sum()", "tests/test_mdp.py::test_what_a_policy_lacks_is_its_kl_from_the_optimum"),
]


def zeroed(file, function, returns, killer):
    """The mutant of a function that returns zeros, whatever it is asked."""
    text = (ROOT / file).read_text()
    signature = text[text.index(f"\ndef {function}("):]
    signature = signature[:signature.index(":\n") + 2]
    return Mutant(f"{function} returns zeros", "-", file, signature, f"{signature}    return {returns}\n", killer)


def copy_of_the_repository():
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_tests(folder, tests):
    """Whether these tests pass in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *sorted(tests)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 1):  # neither passed nor failed: no such test, or the bug is no Python
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def plant(mutant):
    """(mutant, whether its test noticed, seconds)."""
    started, folder = time.perf_counter(), copy_of_the_repository()
    try:
        text = (folder / mutant.file).read_text()
        if text.count(mutant.right) != 1:
            raise RuntimeError(f"mutant '{mutant.name}': its text occurs {text.count(mutant.right)} times in {mutant.file}, not once")
        (folder / mutant.file).write_text(text.replace(mutant.right, mutant.wrong))
        return mutant, not run_tests(folder, [mutant.killer]), time.perf_counter() - started
    finally:
        shutil.rmtree(folder)


def main(words):
    mutants = [mutant for mutant in [*MUTANTS, *(zeroed(*zero) for zero in ZEROS)] if not words or any(word in mutant.name for word in words)]
    if not run_tests(ROOT, {mutant.killer for mutant in mutants}):
        sys.exit("the tests fail without any bug: mend them first")
    survived = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, killed, seconds in pool.map(plant, mutants):
            survived += not killed
            print(f"{'killed  ' if killed else 'SURVIVED'} {seconds:5.1f} s  {mutant.file:<12} {mutant.pitfall:<4} {mutant.name:<46} {mutant.killer}", flush=True)
    print(f"{len(mutants) - survived} of {len(mutants)} planted bugs killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
