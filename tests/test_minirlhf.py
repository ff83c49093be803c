"""
The whole program: inputs and results of each stage, runs that are stopped and continued, exit statuses.

The hand-over tests read what conftest.py noted while the tiny run was made.
"""

import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, Files, stop_in

import minirlhf
import ppo
import world
from evaluate import reliability, standard_error
from pipeline import run as run_module
from pipeline import stages
from pipeline.config import POLICIES, Config, policy_config
from pipeline.stages import all_stages, settings_of
from tokenizer import frequent_pieces

ROOT = Path(__file__).parent.parent
STAGES = ["pretrain", "sft", "preferences", "reward", "dpo", "ppo", "grpo", "ppo_no_kl", "report"]


def same_weights(a, b):
    return set(a) == set(b) and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def contents(folder):
    """The bytes of all files of a run, without the seconds that it took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.html"}
    rows = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = [{name: x for name, x in row.items() if "seconds" not in name} for row in rows]
    found["report.json"] = {**json.loads(found["report.json"]), "seconds": None}
    return found


# ---- the tiny run as a whole ---------------------------------------------------------------------------------------

def test_a_run_learns(files):
    """Bug: nothing is learned: a loop changes nothing, moves away from the reward, or its start is saved."""
    rows = files.report["policies"]
    assert files.report["reward_model"]["accuracy"] > 0.55
    assert rows["best_of_n"]["score"] > rows["sft"]["score"] + 0.5
    for name in ("ppo", "grpo"):
        assert rows[name]["score"] > rows["sft"]["score"] + 0.3
    assert rows["ppo_no_kl"]["kl"] > rows["ppo"]["kl"]  # in two iterations its score may or may not rise
    assert rows["dpo"]["score"] > rows["sft"]["score"] + 0.1
    starts = {**dict.fromkeys(files.policies, "sft"), "sft": "pretrained", "ppo_critic": "reward"}
    for name, start in starts.items():
        assert not same_weights(files.weights(start), files.weights(name))
    for stage in ("pretrain", "sft", "reward", "dpo"):
        losses = [row["loss"] for row in files.metrics(stage)]
        few = len(losses) // 4
        assert statistics.mean(losses[-few:]) < statistics.mean(losses[:few]) - 0.01


def test_metrics_have_a_row_for_each_step(files):
    """Bug: a setting that counts steps, epochs or iterations goes nowhere; or a stage that ended does not say so."""
    settings, pairs = files.config, len(files.preferences("train"))
    expected = dict(pretrain=settings["pretrain_steps"], sft=settings["sft_steps"], preferences=0,
                    reward=settings["reward_epochs"] * math.ceil(pairs / settings["reward_batch"]),
                    dpo=settings["dpo_epochs"] * math.ceil(pairs / settings["dpo_batch"]), report=0,
                    ppo=settings["ppo_iterations"], grpo=settings["ppo_iterations"],
                    ppo_no_kl=settings["ppo_iterations"] // 3)
    assert policy_config(Config(ppo_iterations=2), "ppo_no_kl").ppo_iterations == 1
    rows = files.rows("metrics.jsonl")
    assert [row["stage"] for row in rows if "step" not in row] == STAGES
    for stage in STAGES:
        *steps, last = [row for row in rows if row["stage"] == stage]
        assert [row["step"] for row in steps] == list(range(expected[stage]))
        assert set(last) == {"stage", "stage_seconds"}
        assert sum(row["seconds"] for row in steps) < last["stage_seconds"] < 600


# ---- what the stages hand over -------------------------------------------------------------------------------------

def test_pretraining_starts_fresh_and_reads_documents(seen, files):
    """Bug: pretraining continues an old network, reads other texts than its tokenizer, or never the end of a text."""
    loop, settings = seen.loops["pretrain"], files.config
    assert loop.network.trainable == {True}
    assert not same_weights(loop.network.weights, files.weights("pretrained"))
    assert loop.network.weights["wte.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert vars(loop.config) == dict(sft_steps=55, sft_lr=1e-2, sft_batch=24)
    sizes = torch.load(files.folder / "pretrained.pt", weights_only=True)["config"]
    assert sizes.pop("vocab_size") == files.tokenizer.n_vocab
    assert sizes == {name: settings[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    rng = random.Random(settings["seed"])
    texts = [world.make_document(rng) for _ in range(settings["documents"])]
    pieces = json.loads((files.folder / "tokenizer.json").read_text())
    assert pieces == frequent_pieces(texts, settings["vocab_size"]) and len(loop.examples) == len(texts)
    cut = 0
    for (prompt, response), text in zip(loop.examples, texts):
        whole = [*files.tokenizer.encode_ordinary(text), files.end]
        assert prompt == [files.end] and response == whole[:settings["block_size"] - 1]
        cut += len(response) < len(whole)
    assert 0 < cut < len(texts)


def test_sft_imitates_demonstrations_of_training_prompts(seen, files):
    """Bug: SFT starts from a fresh network, sees prompts of the evaluation, or demonstrations for other prompts."""
    loop, settings = seen.loops["sft"], files.config
    assert loop.network.trainable == {True} and same_weights(loop.network.weights, files.weights("pretrained"))
    assert (loop.config.sft_steps, loop.config.sft_lr, loop.config.sft_batch) == (40, 5e-3, 28)
    rng, (train, _) = random.Random(loop.seed), world.make_prompts(settings["seed"], 4000, 512)
    prompts, cut = rng.choices(train, k=settings["demonstrations"]), 0
    for (prompt, response), text in zip(loop.examples, prompts, strict=True):
        whole = [*files.tokenizer.encode_ordinary(" " + world.make_demonstration(rng, text)), files.end]
        assert prompt == files.tokenizer.encode_ordinary(text) and response == whole[:settings["response_tokens"]]
        cut += len(response) < len(whole)
    assert 0 < cut < len(loop.examples) / 2


def sample_of(seen, files, stage):
    """The samples of a stage: they must come from the SFT policy, with the settings of the run."""
    sample = next(sample for sample in seen.samples if sample.stage == stage)
    assert same_weights(sample.policy.weights, files.weights("sft"))
    assert (sample.tokens, sample.temperature) == (files.config["response_tokens"], files.config["temperature"])
    return sample


def test_preferences_compare_two_samples_of_the_sft_policy(seen, files):
    """Bug: the pairs are answers of the pretrained network, to prompts of the other side, or to two different ones."""
    sample, n = sample_of(seen, files, "preferences"), files.config["pairs"]
    train, heldout = [set(map(tuple, side)) for side in files.prompts()]
    prompts = list(map(tuple, sample.prompts))
    assert prompts[::2] == prompts[1::2] and len(prompts) == 2 * (n + 512)
    assert set(prompts[:2 * n]) <= train and len(set(prompts[:2 * n])) > 0.9 * n
    assert set(prompts[2 * n:]) <= heldout and len(set(prompts[2 * n:])) > 0.5 * 512  # not those of the report only

    expected = []  # which two responses are in each row, in no order
    for i in range(0, len(prompts), 2):
        if sample.responses[i] != sample.responses[i + 1]:
            split = "train" if i < 2 * n else "heldout"
            expected.append((split, list(prompts[i]), sorted(sample.responses[i:i + 2])))
    found = [(row["split"], row["prompt"], sorted([row["chosen"], row["rejected"]]))
             for split in ("train", "heldout") for row in files.preferences(split)]
    assert found == expected

    golds = [world.gold(files.text(prompt), files.text(response))
             for prompt, response in zip(sample.prompts, sample.responses)]
    assert files.scale["mean"] == pytest.approx(statistics.mean(golds), abs=1e-5)
    assert files.scale["std"] == pytest.approx(statistics.pstdev(golds), abs=1e-5)


def test_labels_carry_their_gold_and_their_ceiling(files):
    """Bug: a pair has the gold of other responses, or its two are exchanged; the ceiling forgets the temperature."""
    better = 0
    for row in files.preferences("train")[::3] + files.preferences("heldout")[::5]:
        golds = [files.gold(row["prompt"], row["chosen"]), files.gold(row["prompt"], row["rejected"])]
        assert row["gold"] == pytest.approx(golds, abs=1e-5)
        p = 1 / (1 + math.exp(-(golds[0] - golds[1]) / files.config["label_temperature"]))
        p = 0.97 * p + 0.03 * (1 - p)
        assert row["ceiling"] == pytest.approx(max(p, 1 - p), abs=1e-5)
        better += (golds[0] > golds[1]) - (golds[0] < golds[1])
    assert better > 30


def test_the_reward_model_starts_from_sft_and_learns_training_pairs(seen, files):
    """Bug: the reward model is trained on the held-out pairs, or starts from another network than the SFT policy."""
    loop = seen.loops["reward"]
    model = loop.reward_model.weights
    trunk = {name.removeprefix("trunk."): model[name] for name in model if name.startswith("trunk.")}
    assert loop.reward_model.trainable == {True} and same_weights(trunk, files.weights("sft"))
    assert loop.pairs == files.preferences("train") and vars(loop.config) == files.config


def test_scores_are_normalised_on_sft_samples_of_training_prompts(seen, files):
    """Bug: the reward model is normalised on other samples, on held-out prompts, or not at all."""
    sample = sample_of(seen, files, "reward")
    assert sample.prompts == files.prompts()[0][:1024]
    scores = [files.scores("reward", prompt + response)[-1]
              for prompt, response in zip(sample.prompts, sample.responses)]
    assert statistics.mean(scores) == pytest.approx(0, abs=1e-3)
    assert statistics.pstdev(scores) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["dpo", "ppo", "grpo", "ppo_no_kl"])
def test_a_policy_starts_where_it_should(name, seen, files):
    """Bug: a policy, its critic or its reference is another network; other prompts, pairs or settings are used."""
    loop, sft, reward = seen.loops[name], files.weights("sft"), files.weights("reward")
    assert same_weights(loop.policy.weights, sft) and loop.policy.trainable == {True}
    assert same_weights(loop.reference.weights, sft) and loop.reference.trainable == {False}
    if name == "dpo":
        assert loop.pairs == files.preferences("train") and loop.temperature == files.config["temperature"]
    else:
        assert same_weights(loop.reward_model.weights, reward) and loop.reward_model.trainable == {False}
        assert loop.prompts == files.prompts()[0]
    if name.startswith("ppo"):
        assert same_weights(loop.critic.weights, reward) and loop.critic.trainable == {True}
    iterations = files.config["ppo_iterations"] // (3 if name == "ppo_no_kl" else 1)
    assert vars(loop.config) == {**files.config, **POLICIES[name][2], "ppo_iterations": iterations}
    assert (loop.config.beta == 0) == (name == "ppo_no_kl")


@pytest.mark.parametrize("name, run, own", [
    *[(kind, stages.run_dpo, dict(dpo_kind=kind, label_smoothing=0)) for kind in ("ipo", "slic", "chipo")],
    ("dr_grpo", stages.run_grpo, dict(kind="dr_grpo")), ("online_dpo", stages.run_grpo, {})])
def test_a_policy_has_its_own_settings(name, run, own):
    """Bug: Dr. GRPO is trained as GRPO, IPO with the label smoothing of DPO, or a policy with another loop."""
    settings = Config(policies=name, kind="", dpo_kind="", label_smoothing=0.1, ppo_iterations=9)
    assert vars(policy_config(settings, name)) == {**vars(settings), **own}
    assert all_stages(settings)[name].run is run


def test_stages_have_random_numbers_of_their_own(seen, files):
    """Bug: two stages draw the same numbers: PPO answers as the responses were that its reward was learned from."""
    policies = ("dpo", "ppo", "grpo", "ppo_no_kl")
    assert len({seen.loops[name].seed for name in policies}) == 1  # so that their rows compare
    seeds = {name: {loop.seed, seen.seeds[name]} for name, loop in seen.loops.items() if name not in policies[1:]}
    for sample in seen.samples:
        seeds.setdefault(sample.stage, {seen.seeds[sample.stage]}).add(sample.seed)
    everything = [seed for stage in seeds for seed in seeds[stage]]
    assert len(everything) == len(set(everything))
    robust = 1000 * files.config["seed"] + minirlhf.SEEDS["robust"]  # which the tiny run does not have
    assert robust not in everything + [max(everything) + 1]  # with a task, the report draws once more
    assert all(3000 <= seed < 4000 for seed in everything)  # 1000 times the seed of the run: no other run has them


def used(name, settings):
    """The names of all settings and of all earlier stages in settings_of."""
    found = set()
    for key, value in settings_of(name, settings).items():
        found |= {key} | (used(key, settings) if isinstance(value, dict) else set())
    return found


def test_a_stage_is_taken_over_by_all_that_it_depends_on(seen, files):
    """Bug: `--from` takes over a stage although a setting that it reads, or a stage whose files it reads, changed."""
    settings = Config(**files.config)
    table = all_stages(settings)
    assert list(table) == STAGES
    maker = {name: stage for stage in table for name in table[stage].files}
    for stage in STAGES[:-1]:
        fields = {name for name in seen.settings[stage] if name in files.config}
        parents = {maker[name] for name in seen.reads[stage] if name in maker} - {stage}
        assert fields | parents <= used(stage, settings), stage
        assert set(table[stage].after) <= parents | {"preferences"}, stage
    assert "data_sha256" in used("sft", settings) and "reward_sha256" in used("ppo", settings)  # the users' files
    assert {name for files_ in seen.reads.values() for name in files_} <= set(maker) | {"metrics.jsonl", "watch.jsonl"}


def test_the_accuracy_of_the_reward_model(files):
    """Bug: accuracy on the training pairs, a tie counted as right, or the ceiling of other pairs."""
    heldout = files.preferences("heldout")
    prompts, margins, longer = [], [], 0.0
    for row in heldout:
        chosen, rejected = [files.scores("reward", row["prompt"] + row[side])[-1] for side in ("chosen", "rejected")]
        prompts.append(tuple(row["prompt"]))
        margins.append(chosen - rejected)
        difference = len(row["chosen"]) - len(row["rejected"])
        longer += (difference > 0) + 0.5 * (difference == 0)
    assert min(map(abs, margins)) > 1e-5  # close enough to a tie to be rounded to another side
    golds = [row["gold"][0] - row["gold"][1] for row in heldout]
    right = torch.tensor([float(margin > 0) for margin in margins])
    decided = [i for i, gold in enumerate(golds) if gold != 0]
    agrees = torch.tensor([float((margins[i] > 0) == (golds[i] > 0)) for i in decided])
    assert right.mean() != agrees.mean() and len(decided) < len(heldout)
    raw = torch.tensor(margins) * files.networks["reward"][1]["std"]
    bins, error = reliability(raw.abs().sigmoid(), right)  # which test_evaluate.py has by hand, as the errors

    result = json.loads((files.folder / "reward.json").read_text())
    assert result.pop("at_chance") is False
    for found, row in zip(result.pop("reliability"), bins, strict=True):
        assert found == pytest.approx(row, abs=1e-4)
    assert result == pytest.approx(dict(
        accuracy=right.mean().item(), accuracy_se=standard_error(right, prompts), gold_accuracy=agrees.mean().item(),
        gold_accuracy_se=standard_error(agrees, [prompts[i] for i in decided]), calibration_error=error,
        label_ceiling=statistics.mean(row["ceiling"] for row in heldout), longer_chosen=longer / len(heldout),
        first_chosen=statistics.mean(row["first"] for row in heldout), pairs=len(files.preferences("train"))), abs=1e-4)


@pytest.mark.parametrize("scores, chance", [
    ([(1, 0)] * 30 + [(0, 1)] * 2, False), ([(1, 0)] * 21 + [(0, 1)] * 11, True), ([(1, 0)] * 4, True)])
def test_a_reward_model_at_chance(scores, chance, monkeypatch):
    """Bug: the scores of a coin, or four lucky pairs, are trained on and nobody is told."""
    pairs = [dict(prompt=[i], chosen=[1], rejected=[2], gold=[1.0, 1.0], ceiling=0.5) for i in range(len(scores))]
    monkeypatch.setattr(stages, "score_pairs", lambda model, pairs: torch.tensor(scores, dtype=torch.float32).T)
    result = stages.reward_accuracy(None, pairs)
    assert result["at_chance"] is chance and result["gold_accuracy"] is None and result["label_ceiling"] == 0.5


# ---- runs that are stopped and continued ---------------------------------------------------------------------------

def test_a_run_that_is_stopped_everywhere_ends_with_the_same_bytes(smallest, exact, monkeypatch):
    """Bug: a continued run has other random numbers, a fresh optimizer, rows twice, or half a result after Ctrl-C."""
    again = smallest.parent / "again" / "smallest"
    left = stop_in(monkeypatch, [("pretrain", 3), ("sft", 11), ("reward", 1), ("dpo", 2), ("ppo", 0), ("ppo", 1)])
    write_file, files = run_module.write_file, ["ppo.pt"]  # which is written after ppo_critic.pt

    def writing(path, content):
        if path.name in files:
            files.remove(path.name)
            raise KeyboardInterrupt
        write_file(path, content)

    monkeypatch.setattr("pipeline.run.write_file", writing)
    for _ in left + files:
        assert minirlhf.main([*COMMAND, str(again)]) == 130
    assert not left and not files and minirlhf.main([*COMMAND, str(again)]) == 0
    assert contents(again) == contents(smallest)


PROGRAM = """
import sys, conftest, minirlhf
conftest.config.QUICK, conftest.run.SAVES = conftest.SMALLEST, 0.0
sys.exit(minirlhf.main())
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_in_another(smallest, exact):
    """Bug: a run that was continued in another process has other numbers, or rows twice."""
    folder = smallest.parent / "again" / "smallest"
    metrics = folder / "metrics.jsonl"
    for hash_seed, stage, status in (("0", "sft", -9), ("1", "ppo", -9), ("2", "none", 0)):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, *COMMAND, str(folder)], env=env)
        while process.poll() is None and not (metrics.exists() and f'"stage": "{stage}"' in metrics.read_text()):
            time.sleep(0.02)
        process.kill()
        assert process.wait() == status
    assert contents(folder) == contents(smallest)


def test_a_removed_file_is_made_again(smallest, device, exact, capsys):
    """Bug: a stage depends on what ran before it, what is done runs again, half a line stays, a result is not shown."""
    files, expected = Files(smallest, device), contents(smallest)
    with open(smallest / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ppo", "st')  # a run was killed while it logged
    for name in ("gold.json", "reward.pt", "ppo_critic.pt"):
        (smallest / name).unlink()
    capsys.readouterr()
    assert minirlhf.main([*COMMAND, str(smallest)]) == 0
    out, found = capsys.readouterr().out, contents(smallest)
    done = re.findall(r"^(\d/7  \w+): done$", out, re.MULTILINE)
    assert done == ["1/7  pretrain", "2/7  sft", "5/7  dpo", "7/7  report"]
    train, heldout = files.preferences("train"), files.preferences("heldout")
    wrong = sum(row["gold"][0] < row["gold"][1] for row in train + heldout) / len(train + heldout)
    assert (f"{len(train)} pairs to train on, {len(heldout)} held out; in {wrong:.0%} of them the annotator preferred "
            "the response with less gold [") in " ".join(out.split())  # long lines are wrapped
    for rows in (found, expected):  # the stages that ran again come last
        rows["metrics.jsonl"] = sorted([row for row in rows["metrics.jsonl"] if "step" in row], key=str)
        rows["watch.jsonl"] = sorted(rows["watch.jsonl"].splitlines())
    assert found == expected


# ---- canaries and exit statuses ------------------------------------------------------------------------------------

def test_a_canary_stops_the_run_and_keeps_what_was_good(smallest, capsys, monkeypatch):
    """Bug: a broken invariant is trained on silently, or the stop destroys what was good."""
    (smallest / "ppo.pt").unlink()
    before = {path.name: path.read_bytes() for path in smallest.iterdir() if path.suffix == ".pt"}
    exact = ppo.response_logprobs
    monkeypatch.setattr(ppo, "response_logprobs", lambda model, batch, temperature=1.0: exact(model, batch, 0.7))
    assert minirlhf.main([*COMMAND, str(smallest)]) == 1
    out, error = capsys.readouterr()
    assert "ppo: The policy is trained on the score" in out
    assert "minirlhf: stopped: the ratio on the first minibatch" in error and "Traceback" not in error
    assert {path.name: path.read_bytes() for path in smallest.iterdir() if path.suffix == ".pt"} == before


def failing(fault):
    def function(run, name, seed):
        """Fail."""
        raise fault
    return function


@pytest.mark.parametrize("fault, status, message", [
    (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device\n"),
    (KeyboardInterrupt(), 130, "stopped; the same command continues from here\n"),
    (MemoryError(), 2, "out of memory: lower --ppo-batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory: lower --ppo")])
def test_exit_statuses(fault, status, message, tmp_path, capsys, monkeypatch):
    """Bug: a stop ends in a traceback or with status 0, more than one line is said, or memory has no limit."""
    limits = []
    monkeypatch.setattr(minirlhf, "limit_memory", lambda: limits.append("set"))
    monkeypatch.setattr(stages, "run_pretrain", failing(fault))
    assert minirlhf.main(["--device", "cpu", "--out", str(tmp_path)]) == status and limits == ["set"]
    error = capsys.readouterr().err
    assert error.strip().startswith(f"minirlhf: {message}".strip()) and len(error.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("name, text, limits, expected", [
    ("memory.max", "max\n", (-1, -1), 100), ("job/memory.max", "80\n", (95, 97), 80),
    ("memory.max", "99\n", (95, 97), 95)])
def test_the_smallest_limit_of_memory(name, text, limits, expected, monkeypatch):
    """Bug: the memory of a container, of a cluster's job or of ulimit is taken for that of the machine."""
    import resource
    files = {f"/sys/fs/cgroup/{name}": text, "/proc/self/cgroup": "0::/job\n"}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    seen = []
    monkeypatch.setattr(minirlhf.Path, "read_text", read_text)
    monkeypatch.setattr(minirlhf.os, "sysconf", dict(SC_PAGE_SIZE=10, SC_PHYS_PAGES=10).get)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda *arguments: seen.append(arguments))
    minirlhf.limit_memory()
    assert seen == [(resource.RLIMIT_DATA, (expected, limits[1]))]


@pytest.mark.parametrize("code, message", [
    ('raise ValueError("one\\ntwo\\x9b2J")', "mine.py cannot be run: ValueError: one two\\x9b2J\n"),
    ("def f(prompt, response, answer): pass", "gets a prompt and a response: missing a required argument: 'answer'\n")])
def test_a_bad_reward_function_is_one_line_before_any_work(code, message, tmp_path, capsys):
    """Bug: a user's message breaks the line or takes over the terminal; a function that needs a row fails in PPO."""
    (tmp_path / "mine.py").write_text(code)
    assert minirlhf.main(["--reward-from", f"{tmp_path}/mine.py:f", "--out", f"{tmp_path}/x"]) == 2
    error = capsys.readouterr().err
    assert error.endswith(message) and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    """Bug: a bug of ours is reported as a mistake of the user."""
    monkeypatch.setattr(stages, "run_pretrain", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        minirlhf.main(["--out", str(tmp_path)])


# ---- in a real shell -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("tail, status", [
    ("| head -1; exit ${PIPESTATUS[0]}", 128 + signal.SIGPIPE), ("| grep -F ?.", 0)])
def test_a_stream_that_is_closed_or_not_in_utf_8(tail, status, smallest):
    """Bug: a run dies with a traceback because nobody reads, or because the terminal cannot show a sign."""
    line = f"{sys.executable} -u {ROOT / 'minirlhf.py'} --compare {smallest} {tail}"
    done = subprocess.run(["bash", "-c", line], cwd=smallest.parent, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode == status


@pytest.mark.slow
def test_a_signal_ends_in_a_line(tmp_path):
    """Bug: a signal other than Ctrl-C ends the process without a line, and with another status than 130."""
    process = subprocess.Popen([sys.executable, str(ROOT / "minirlhf.py"), "--quick", "--out", str(tmp_path / "x")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("minirlhf")  # the texts are made next
    process.send_signal(signal.SIGTERM)
    assert "stopped; the same command continues" in process.communicate()[1] and process.returncode == 130
