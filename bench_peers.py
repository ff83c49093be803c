"""
The other side of bench.py: the same work done by transformers and TRL, one step at a time, in whatever interpreter has them.

bench.py starts this file and talks to it in lines of JSON. It says its versions; an order {"task", "steps", ...} builds the task outside the clock and is answered with
{"ready": true}; every further line lets one step run and is answered with its seconds. Weights, prompts and pairs come in a file, so that both sides
work on the same ones. It imports nothing of this repository: the peers' interpreter need not have what the repository needs.
"""

import copy
import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def networks(setup, kind, weights="weights"):
    """A Hugging Face GPT-2 of the given kind with the benchmark's weights, and no dropout."""
    import transformers

    config = transformers.GPT2Config(**setup["sizes"], num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                     bos_token_id=setup["end"], eos_token_id=setup["end"], pad_token_id=setup["pad"])
    model = getattr(transformers, kind)(config)
    missing = model.load_state_dict(setup[weights], strict=False).missing_keys
    if any(name != "score.weight" for name in missing):
        raise RuntimeError(f"weights that {kind} has and the benchmark does not: {missing}")
    return model.to(setup["device"])


def tokenizer(setup):
    """Word i is spelled t<i>, so that TRL, which takes texts, arrives at the ids of the benchmark."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"t{i}" for i in range(setup["sizes"]["vocab_size"])]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[setup["end"]], pad_token=words[setup["pad"]], padding_side="left")


def spell(ids):
    return " ".join(f"t{i}" for i in ids)


def arguments(setup, **more):
    """What all of TRL's trainers are told: float32 without checkpointing, nothing written, nothing saved."""
    return dict(output_dir=setup["folder"], report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, dataloader_pin_memory=False, use_cpu=setup["device"] == "cpu", learning_rate=setup["lr"], **more)


def stepper(tick):
    from transformers import TrainerCallback

    class Stepper(TrainerCallback):
        told = {}

        def on_log(self, *args, logs=None, **kwargs):
            if logs and "objective/rlhf_reward" in logs:  # PPO's score - beta KL of the rollout
                self.told = dict(objective=logs["objective/rlhf_reward"])

        def on_step_end(self, *args, **kwargs):
            tick(**self.told)

    return [Stepper()]


# ---------------------------------------------------------------------------------------------------------------------
# the tasks: each builds what it needs and returns the function that runs all steps and calls tick after each

def rollout(setup, order, tick):
    model = networks(setup, "GPT2LMHeadModel").eval()
    prompts, pad, end = setup["prompts"][:order["batch"]], setup["pad"], setup["end"]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=setup["device"])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=setup["device"])

    @torch.no_grad()
    def run():
        for _ in range(order["steps"]):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=setup["cap"], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 use_cache=True, eos_token_id=end, pad_token_id=pad)[:, width:]
            ended = (out == end).cumsum(dim=1)
            tick(tokens=int(((ended == 0) | ((ended == 1) & (out == end))).sum()))  # up to and including E
    return run


def ppo(setup, order, tick):
    import trl
    from datasets import Dataset

    if not hasattr(trl, "PPOTrainer"):
        raise RuntimeError("it has no trl.PPOTrainer")
    policy = networks(setup, "GPT2LMHeadModel")
    reward_model = networks(setup, "GPT2ForSequenceClassification", "reward_weights" if "reward_weights" in setup else "weights")
    data = Dataset.from_list([{"input_ids": prompt} for prompt in setup["prompts"]])
    args = trl.PPOConfig(**arguments(setup, **{"temperature": 1.0, **order.get("settings", {})}), per_device_train_batch_size=order["batch"],
                     num_mini_batches=order.get("minibatches", 1), num_ppo_epochs=order["epochs"], total_episodes=order["batch"] * order["steps"],
                     local_rollout_forward_batch_size=order["batch"], num_sample_generations=0, response_length=setup["cap"], stop_token="eos")
    return trl.PPOTrainer(args, tokenizer(setup), policy, copy.deepcopy(policy), reward_model, data, copy.deepcopy(reward_model), eval_dataset=data,
                      callbacks=stepper(tick)).train


def dpo(setup, order, tick):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": spell(pair["prompt"]), "chosen": " " + spell(pair["chosen"][:-1]), "rejected": " " + spell(pair["rejected"][:-1])}
                              for pair in setup["pairs"]])                              # TRL adds the E itself
    args = DPOConfig(**arguments(setup), per_device_train_batch_size=order["batch"], max_steps=order["steps"], precompute_ref_log_probs=True)
    return DPOTrainer(networks(setup, "GPT2LMHeadModel"), None, args, train_dataset=data, processing_class=tokenizer(setup), callbacks=stepper(tick)).train


def reward(setup, order, tick):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    data = Dataset.from_list([{f"{side}_input_ids": pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in setup["pairs"]])
    args = RewardConfig(**arguments(setup), per_device_train_batch_size=order["batch"], max_steps=order["steps"])
    return RewardTrainer(networks(setup, "GPT2ForSequenceClassification"), args, train_dataset=data, processing_class=tokenizer(setup),
                         callbacks=stepper(tick)).train


# ---------------------------------------------------------------------------------------------------------------------
# the conversation

def main(path):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not stand between the answers

    def answer(**message):
        print(json.dumps(message), file=answers, flush=True)

    setup = torch.load(path)
    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    started = done = 0

    def clock():
        if setup["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def tick(**told):
        nonlocal started, done
        seconds, done = clock() - started, done + 1
        answer(seconds=seconds, **told, memory=torch.cuda.max_memory_allocated() if setup["device"] == "cuda" else None)
        if done < order["steps"]:
            if not sys.stdin.readline():
                sys.exit()
            started = clock()

    answer(torch=torch.__version__, transformers=version("transformers"), trl=version("trl"))
    while line := sys.stdin.readline():
        order, done = json.loads(line), 0
        try:
            run = dict(rollout=rollout, ppo=ppo, dpo=dpo, reward=reward)[order["task"]](setup, order, tick)
            if setup["device"] == "cuda":
                torch.cuda.reset_peak_memory_stats()
            answer(ready=True)
            sys.stdin.readline()
            started = clock()
            run()
        except Exception as fault:  # whatever a peer's version cannot do is one line of the report and not its end
            traceback.print_exc()
            if done < order["steps"]:
                answer(error=f"{order['task']}: {type(fault).__name__}: {fault}".splitlines()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
