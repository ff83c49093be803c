"""
Go on with TRL, on several GPUs or machines, from a folder that `--export` wrote. docs/outgrow.md says what differs.

    python minirlhf.py --out runs/default --export hf
    python examples/trl_continue.py hf dpo OUT           the SFT policy learns from hf/pairs.jsonl
    python examples/trl_continue.py hf reward OUT        the reward model learns from hf/pairs.jsonl
    python examples/trl_continue.py hf grpo OUT          the SFT policy answers hf/prompts.jsonl, hf/reward judges
    python examples/trl_continue.py hf grpo OUT --reward-from examples/rewards.py:short_sentences

On two GPUs, or as two processes without a GPU: put `accelerate launch --multi_gpu --num_processes 2` in the place of
`python`. OUT becomes a folder of Hugging Face. Needs `pip install trl`, and of this project nothing but hf.
"""

import argparse
import runpy
import sys
from pathlib import Path


def model_score(model, tokenizer):
    """A reward model as a reward of TRL. TRL's own way drops E, and at E our reward model has learned to judge."""
    model.requires_grad_(False)

    def score(prompts, completion_ids, **columns):
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        rows = [prompt + response for prompt, response in zip(prompt_ids, completion_ids)]
        # padded on the right: the model reads the score at the last token that is not PAD
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(model.device)
        return model(**batch).logits[:, 0].tolist()
    return score


def function_score(name):
    """FILE.py:FUNCTION, which takes one row, as a reward of TRL, which takes columns."""
    path, _, function = name.rpartition(":")
    sys.path.append(str(Path(path).resolve().parent))  # it may import its neighbours
    reward = runpy.run_path(path)[function]

    def score(prompts, completions, completion_ids, response=None, **columns):
        columns = {name: column for name, column in columns.items() if isinstance(column, list)}  # not TRL's own
        rows = [{name: column[at] for name, column in columns.items()} for at in range(len(prompts))]
        return [float(reward(prompt, response, **row)) for prompt, response, row in zip(prompts, completions, rows)]
    return score


def make_trainer(args):
    import torch  # here, so that a mistake in the command is told at once
    import trl
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.start)
    length = AutoConfig.from_pretrained(args.start).max_position_embeddings
    data = dict(train_dataset=load_dataset("json", data_files=args.rows, split="train"), processing_class=tokenizer)
    common = dict(output_dir=args.out, max_steps=args.steps, learning_rate=args.lr, logging_steps=1, report_to="none",
                  per_device_train_batch_size=args.batch, save_strategy="no", bf16=torch.cuda.is_available(),
                  use_cpu=not torch.accelerator.is_available())  # or processes without a GPU would not find each other
    if args.trainer == "dpo":
        return trl.DPOTrainer(args.start, args=trl.DPOConfig(beta=args.beta, max_length=length, **common), **data)
    if args.trainer == "reward" or not args.reward_from:
        model = AutoModelForSequenceClassification.from_pretrained(args.folder / "reward")
        # a tokenizer without a PAD would pad with E, and the score would not be read at E any more
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    if args.trainer == "reward":
        return trl.RewardTrainer(model, args=trl.RewardConfig(max_length=length, **common), **data)
    room = length - max(len(ids) for ids in tokenizer(list(data["train_dataset"]["prompt"]))["input_ids"])
    if args.response_tokens > room:
        args.refuse(f"the longest prompt leaves room for {room} tokens, lower --response-tokens {args.response_tokens}")
    settings = trl.GRPOConfig(loss_type="grpo", beta=args.beta, num_generations=args.group,  # TRL's own: "dapo", 0, 8
                              max_completion_length=args.response_tokens, **common)
    score = function_score(args.reward_from) if args.reward_from else model_score(model.to(settings.device), tokenizer)
    return trl.GRPOTrainer(args.start, reward_funcs=score, args=settings, **data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda fault: parser.exit(2, f"trl_continue.py hf dpo|reward|grpo OUT: {fault}\n")
    parser.add_argument("folder", type=Path)
    parser.add_argument("trainer", choices=["dpo", "reward", "grpo"])
    parser.add_argument("out")
    parser.add_argument("--reward-from", help="FILE.py:FUNCTION for grpo, in the place of the reward model")
    for name, default in dict(steps=100, batch=8, group=4, response_tokens=48, lr=2e-5, beta=0.1).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=f"({default})")
    args = parser.parse_args()
    args.refuse = parser.error
    args.start = str(args.folder / ("reward" if args.trainer == "reward" else "sft"))
    args.rows = str(args.folder / ("prompts.jsonl" if args.trainer == "grpo" else "pairs.jsonl"))
    if not (Path(args.start).exists() and Path(args.rows).exists()):
        parser.error(f"{args.start} or {args.rows} is not there: python minirlhf.py --out RUN --export {args.folder}")
    trainer = make_trainer(args)
    trainer.accelerator.print(f"{trainer.accelerator.num_processes} processes on {trainer.accelerator.device.type}")
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
