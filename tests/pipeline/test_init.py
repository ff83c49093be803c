"""Tests of runs that begin with a pretrained model, and of rewards that are functions."""

import json
import math
import random
import shutil
import sys

import pytest
import torch
from helpers import SIZES, rng, save_llama

import checks
import minirlhf
from data import collate
from pipeline import config, stages
from pipeline.own import function_scorer, load_model
from pipeline.pairs import encode_prompt, fit_pair, read_pairs
from pipeline.report import number
from pipeline.run import Run
from pipeline.scores import make_scorer
from tokenizer import make_tokenizer

transformers = pytest.importorskip("transformers")
from pretrained import Pretrained  # noqa: E402

TEXTS = ["which colour is it ? it is red .", "which colour is nice ? blue is nice , red is not ."]
TEMPLATE = ("{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}red :{% endif %}")
SMALL = dict(block_size=40, response_tokens=6, sft_steps=1, sft_batch=4, reward_batch=18, reward_epochs=1,
             ppo_iterations=1, ppo_batch=4, minibatch=4, ppo_epochs=1, dpo_batch=18, dpo_epochs=1, beta=0.05,
             eval_prompts=2, best_of=2, policies="dpo,ppo")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(config, "WITH_INIT", SMALL)
    monkeypatch.setattr(config, "WITH_DATA", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, TEXTS * 3, TEMPLATE)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [
        dict(instruction=f"which colour is {i} ?", chosen="it is red .", rejected=f"it is {i} .") for i in range(20)])


def function(tmp_path, body, needs="**row"):
    (tmp_path / "mine.py").write_text(f"def reward(prompt, response, {needs}):\n    {body}\n")
    return f"{tmp_path / 'mine.py'}:reward"


def test_a_run_with_pairs(folder, pairs, tmp_path, capsys, monkeypatch):
    """Bug: a stage needs our own GPT or tokenizer, E is not the model's, a network does not load, an option is lost."""
    out = tmp_path / "run"
    command = ["--init", str(folder), "--data", pairs, "--out", str(out), "--lora", "2", "--micro-batch", "9",
               "--dtype", "bfloat16"]
    hidden, coarse = Pretrained.hidden, set()
    monkeypatch.setattr(Pretrained, "hidden", lambda net, ids, *rest:
                        coarse.add(checks.is_coarse(ids)) or hidden(net, ids, *rest))
    assert minirlhf.main(command) == 0
    assert True in coarse
    report = json.loads((out / "report.json").read_text())
    assert set(report["policies"]) == {"pretrained", "sft", "dpo", "ppo", "best_of_n"}
    rows = [json.loads(line) for line in (out / "preferences.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert all(tokenizer.decode(row["chosen"]) == "it is red .<|end|>" for row in rows)
    assert {tokenizer.decode(row["prompt"]) for row in rows} == {f"user : which colour is {i} ? red :"
                                                                 for i in range(20)}
    assert all((out / f"{name}.pt").stat().st_size < 40_000 for name in ("sft", "dpo", "ppo_critic", "reward"))
    run = minirlhf.Run(out, config.Config(**config.read_settings(out)))
    assert run.load_network("sft").micro_batch == run.load_network("reward").trunk.micro_batch == 9
    trained = sum(weight.numel() for weight in run.load_network("sft").parameters())
    assert f" parameters, {trained:,} of them are trained;" in " ".join(capsys.readouterr().out.split())
    assert minirlhf.main(command) == 0 and "is finished" in capsys.readouterr().out
    assert minirlhf.main(["--out", str(out), "--export", str(tmp_path / "hf")]) == 0
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "ppo")
    assert policy.config.model_type == "llama" and len((tmp_path / "hf" / "pairs.jsonl").read_text().splitlines()) > 10
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf" / "reward").num_labels == 1


def test_prompts_of_the_world_are_cut_to_fit(folder, tmp_path, capsys, monkeypatch):
    """Bug: SFT in the built-in world is a traceback where a model's tokenizer makes more tokens than there is room."""
    lengths = set()

    def train_sft(network, examples, *rest):
        lengths.update(len(prompt) for prompt, _ in examples)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_sft", train_sft)
    assert minirlhf.main(["--init", str(folder), "--out", str(tmp_path / "run"), "--block-size", "48"]) == 130
    encode = transformers.AutoTokenizer.from_pretrained(folder).encode
    tokens = [len(encode(json.loads(line)["prompt"], add_special_tokens=False))
              for line in (tmp_path / "run" / "split.jsonl").read_text().splitlines()]
    assert lengths == {48 - 6} == {42} & set(tokens)  # some fit without a cut
    assert f"; {sum(n > 42 for n in tokens):,} prompts cut" in capsys.readouterr().out


def test_a_function_is_learned(folder, tmp_path, capsys, monkeypatch):
    """Bug: a function's reward does not reach the policy, a row has another prompt, --chat or --export is wrong."""
    monkeypatch.setattr(config, "WITH_INIT", dict(SMALL, ppo_iterations=7, ppo_batch=16, minibatch=16))
    reward = function(tmp_path, "assert answer in prompt; return sum(map(str.isascii, response)) / 6", "answer")
    prompts = write_rows(tmp_path / "prompts.jsonl", [
        dict(question=[dict(role="user", content=f"which colour is {i} ?")], answer=str(i)) for i in range(20)])
    out = tmp_path / "run"
    options = ["--init", str(folder), "--prompts", prompts, "--prompt-key", "question", "--reward-from", reward,
               "--grpo-lr", "1e-1", "--ppo-lr", "1e-1", "--policies", "rloo,ppo", "--out", str(out)]
    assert minirlhf.main(options) == 0
    report = json.loads((out / "report.json").read_text())
    rows = report["policies"]
    assert rows["rloo"]["score"] > rows["sft"]["score"] + 0.5 and rows["ppo"]["score"] > rows["sft"]["score"] + 0.5
    assert report["optimum"]["ess"] < 3 and rows["rloo"]["optimum_share"] is None  # of four samples
    assert not (out / "reward.pt").exists() and "none: the reward is a function" in (out / "report.html").read_text()
    assert minirlhf.main(["--out", str(out), "--export", str(tmp_path / "hf")]) == 0
    exported = [json.loads(line) for line in (tmp_path / "hf" / "prompts.jsonl").read_text().splitlines()]
    assert len(exported) == 18 and {int(row["answer"]) for row in exported} != set(range(2, 20))  # 2 at random held out
    assert all(row["prompt"] == f"user : which colour is {row['answer']} ? red :" for row in exported)
    (tmp_path / "prompts.jsonl").unlink()  # a run can be moved without its file
    for flags, status in (("--eval-prompts 3", 0), ("--response-tokens 39", 2)):  # room for a token, the same in all
        assert minirlhf.main(["--from", str(out), "--out", str(tmp_path / flags), *flags.split()]) == status
    function(tmp_path, "return float(row['answer'])")
    run = Run(out, config.Config(**config.read_settings(out)))
    batch = collate(run.prompts[1], [[1], [1]], pad=0)
    assert make_scorer(run)(batch).tolist() == [float(row["row"]["answer"]) for row in run.texts["heldout"]]
    lines = iter(["which colour is 3 ?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    capsys.readouterr()
    function(tmp_path, "return 7.0")
    assert minirlhf.main(["--chat", str(out), "--response-tokens", "3", "--temperature", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("score 7.00, log pi/ref") == 3 and "log pi/ref 0.00" in shown and "RLOO" in shown


def scores_of(tmp_path, body):
    """The scores of a function: of a prompt that is in line 3 of a file, and of one that was typed."""
    rows = {(1, 2): dict(prompt="a", line=3, row=dict(answer=5, response="b"))}
    batch = collate([[1, 2], [1, 3]], [[4], [4]], pad=0)
    return function_scorer(function(tmp_path, body), make_tokenizer([]), rows)(batch).tolist()


@pytest.mark.parametrize("body, words", [
    ("return None", "returned None at line 3: a finite number"), ("return float('nan')", "returned nan at line 3"),
    ("raise ValueError('a\\nb')", "failed at line 3: ValueError: a b$"),
    ("exit()", "failed at line 3: SystemExit: None"), ("return 1e300", "returned 1e\\+300 at line 3: a finite")])
def test_a_bad_reward_names_its_row(body, words, tmp_path):
    """Bug: a traceback, or a score of NaN that is called a diverged training."""
    with pytest.raises(config.UserError, match=f"mine.py:reward {words}"):
        scores_of(tmp_path, body)


def test_a_typed_prompt_has_no_row_and_numbers_of_all_kinds_are_scores(tmp_path, monkeypatch):
    """Bug: --chat ends at a prompt that is not in the file; the function cannot import what is next to it."""
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "ten.py").write_text("import numpy\nTEN = numpy.float32(10)\n")
    known, typed = scores_of(tmp_path, "import ten; return row['answer'] + ten.TEN * (prompt == 'a')")
    assert known == 15 and math.isnan(typed) and number(typed) == "-"


def test_a_pretrained_model_is_on_the_device_of_the_run(folder):
    """Bug: SFT is trained on the CPU although there is a GPU; trained weights are in bfloat16; the block is another."""
    run = Run("nowhere", config.Config(init=str(folder), block_size=40, dtype="bfloat16"), "meta")
    network = run.load_network("pretrained")
    assert (network.device.type, network.dtype, network.block_size) == ("meta", torch.float32, 40)


def test_the_first_adapter_follows_from_the_seed(folder):
    """Bug: an adapter, or what a stage draws after it has loaded the model, depends on when the model is loaded."""
    def load(seed, state):
        torch.manual_seed(state)
        network, _ = load_model(config.Config(init=str(folder), block_size=64, lora=2, seed=seed), torch.device("cpu"))
        assert torch.initial_seed() == state and torch.rand(1) == torch.rand(1, generator=rng(state))
        return [parameter.flatten() for parameter in network.parameters()]

    first, again, other = torch.cat(load(0, 1)), torch.cat(load(0, 2)), torch.cat(load(3, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_two_rows_with_one_prompt(folder, tmp_path, capsys):
    """Bug: two prompts are one, as written or after the cut: an answer to the one is judged by the row of the other."""
    long = [dict(prompt=f"which colour is {i} ? " + "it is red . " * 8, answer=i) for i in range(20)]
    twice = [dict(prompt="a", answer=1), dict(prompt="b", completions=["c"]), dict(prompt="a", answer=1)]
    for rows, lines in ((long, "1 and 2"), ([*twice, dict(prompt="a ")], "1 and 4")):
        prompts, out = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "run"
        options = ["--init", str(folder), "--prompts", prompts, "--reward-from", function(tmp_path, "return 1.0")]
        assert minirlhf.main([*options, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"lines {lines} have one prompt, cut to its last 34 tokens, and other values" in error
        assert not out.exists()
    [train], [heldout] = stages.split_prompts(twice, 0.1, random.Random(0))  # "b" and one "a"
    assert train["prompt"] != heldout["prompt"]


def damaged(folder, tmp_path, damage):
    """A copy of a model's folder with one fault."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if damage == "a pickle":
        weights.unlink()
        torch.save({"weight": torch.zeros(1)}, copy / "pytorch_model.bin")
    elif damage == "not causal":
        model = transformers.BertConfig(vocab_size=80, max_position_embeddings=64, hidden_size=32, intermediate_size=48,
                                        num_hidden_layers=1, num_attention_heads=2)
        transformers.BertForMaskedLM(model).save_pretrained(copy)
    elif damage == "small embedding":
        model = transformers.LlamaConfig(vocab_size=100, **SIZES)
        transformers.LlamaForCausalLM(model).save_pretrained(copy)
    elif damage == "scaled logits":
        model = transformers.GraniteConfig(vocab_size=300, logits_scaling=8.0, initializer_range=0.2, **SIZES)
        transformers.GraniteForCausalLM(model).save_pretrained(copy)
    elif damage == "weights do not fit":
        from safetensors.torch import load_file, save_file
        kept = load_file(weights)
        del kept["lm_head.weight"]
        kept["model.norm.weight"] = kept["model.norm.weight"][1:].clone()
        save_file(kept, weights, metadata={"format": "pt"})
    elif damage == "an adapter":
        from peft import LoraConfig, get_peft_model
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for name in ("config.json", "model.safetensors"):
            (copy / name).unlink()
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(copy)
    elif damage == "a template with one kind of message":
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.chat_template = "{% if messages[0].role == 'user' %}{{ raise_exception('no\\nuser') }}{% endif %}"
        theirs.save_pretrained(copy)
    return copy


@pytest.mark.parametrize("damage, options, words", [
    ("a pickle", "", "cannot be loaded"), ("weights do not fit", "", "size: lm_head.weight, model.norm.weight"),
    ("an adapter", "", "merge it into its model"), ("small embedding", "", "its embedding has 100 rows"),
    ("not causal", "", "is not a causal language model"),
    ("a template with one kind of message", "", "the chat template of the model refuses 'Human: a': no user"),
    ("", "--block-size 100", "is more than the 64 positions"),
    ("scaled logits", "", "changes its logits after the output matrix"),
    ("no peft", "--lora 2", "pip install peft"),
    ("", "--prompts x.jsonl --reward-from no.py:f", "cannot be run"),
    ("", "--prompts x.jsonl", "name a reward with --reward-from FILE.py:FUNCTION"),
    ("", "--prompts x.jsonl --reward-from no.py:f --policies dpo", "learns from pairs")])
def test_a_mistake_is_one_line_before_any_work(damage, options, words, folder, pairs, tmp_path, capsys, monkeypatch):
    """Bug: a traceback, or a run that begins and stops later."""
    model = damaged(folder, tmp_path, damage)
    if damage == "no peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    data = [] if "--prompts" in options else ["--data", pairs]
    out = tmp_path / "run"
    assert minirlhf.main(["--init", str(model), "--out", str(out), *data, *options.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("minirlhf: ") and words in error and "\n" not in error
    assert not out.exists()


def test_a_text_is_what_the_template_makes_of_it(folder):
    """Bug: a prompt that begins with empty lines is lost, a transcript is one message, or E is inside of a response."""
    tokenizer = load_model(config.Config(init=str(folder), block_size=40), torch.device("cpu"))[1]
    for text, ids in (
            ("Human: hi\n\nAssistant:", "user : hi red :"), ("Human: hi", "user : Human: hi red :"),
            ("<|end|>user : hi red :", "<|end|>user : hi red :"), ("\n\nhi\n\nyou", "user : hi\n\nyou red :"),
            ("\n\nSystem: be kind\n\nHuman: hi\n\nAssistant:", "system : be kind user : hi red :")):
        assert tokenizer.decode(encode_prompt(tokenizer, text)) == ids
    pair = fit_pair(dict(prompt="hi", chosen="a<|end|>\n", rejected=" b"), tokenizer, 20, 9)
    assert tokenizer.decode(pair["chosen"]) == "a<|end|>" and tokenizer.decode(pair["rejected"]) == "b<|end|>"


def test_a_base_model_has_its_first_token(folder):
    """Bug: a Llama that is no chat model gets prompts without the BOS that began all its texts, or answers with one."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = load_model(config.Config(init=str(folder), block_size=40), torch.device("cpu"))[1]
    tokenizer.own.chat_template, bos = None, tokenizer.own.eos_token
    tokenizer.own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.own.eos_token_id)])
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == bos + "hi"
    pair = fit_pair(dict(prompt="hi", chosen=" a", rejected=" b"), tokenizer, 20, 5)
    assert bos not in tokenizer.decode(pair["chosen"][:-1]) and pair["prompt"] == encode_prompt(tokenizer, "hi")
    tokenizer.own.chat_template = TEMPLATE  # which would write the BOS
    assert tokenizer.decode(encode_prompt(tokenizer, bos + "hi")) == bos + "hi"


def test_rows_as_people_have_them(tmp_path):
    """Bug: Alpaca's input is lost, UltraFeedback's worst answer is chosen, or another prompt key is not read."""
    text = dict(chosen=" a", rejected=" b")
    scored = [dict(response=text, overall_score=score) for text, score in ((" mid", 5), (" best", 10), (" worst", 1))]
    path = write_rows(tmp_path / "rows.jsonl", [
        dict(instruction="Add", input="1 2", **text), dict(instruction="Say", input="", **text),
        dict(instruction="Rate", completions=scored)])
    found = read_pairs(path)
    assert [pair["prompt"] for pair in found] == ["Add\n\n1 2", "Say", "Rate"]
    assert read_pairs(path, "instruction") == found
    assert (found[2]["chosen"], found[2]["rejected"]) == (" best", " worst")
    other = write_rows(tmp_path / "other.jsonl", [dict(prompt="x", question="What ?", completions=scored)])
    assert read_pairs(other, "question") == [dict(prompt="What ?", chosen=" best", rejected=" worst")]
    with pytest.raises(config.UserError, match="the key 'answer' of --prompt-key is missing, found prompt, question"):
        read_pairs(other, "answer")
    answers = [dict(response=text, overall_score=3) for text in (" a", " b")]
    [tie] = read_pairs(write_rows(tmp_path / "tie.jsonl", [dict(instruction="Rate", completions=answers)]))
    assert tie["chosen"] == tie["rejected"]  # which is no preference, and is dropped
