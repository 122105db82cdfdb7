"""A Hugging Face model: generate, log-probs and entropy without the logits, and a Clip-Cov loss.

A tiny Llama with random weights is rewarded for even token ids, a stand-in for your verifier. Nothing is downloaded.
Run it from the repository's root, with transformers installed:

    python examples/hf_model.py                          # some seconds on one CPU core; a GPU is taken if there is one
    python examples/hf_model.py --fused                  # statistics, selection and loss in one call, as few products
    python examples/hf_model.py --model NAME_OR_PATH     # any causal language model of yours, with its tokenizer

You see a line per update: the rollout's reward and entropy, the loss, how many tokens Clip-Cov dropped, and how far the
policy has moved since the rollout (0 in the first of its two updates). The reward rises from 0.5.

What it replaces, in a loop that you have:

    - logits = model(ids, attention_mask=attention, position_ids=positions).logits[:, :-1] / temperature
    - logp = logits.log_softmax(-1)                                    # (B, L, V), and once more in the backward pass
    - logprob = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    - entropy = -(logp.exp() * logp).sum(-1)
    + logprob, entropy = ek.hf.causal_lm_logprob_entropy(
    +     model, ids, attention_mask=attention, position_ids=positions, temperature=temperature
    + )                                                                # (B, L): position t belongs to token t + 1
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek

PROMPTS, GROUP, LENGTH, UPDATES, TEMPERATURE = 8, 8, 16, 2, 1.0
# for a batch of a thousand tokens; the defaults are the paper's, for much larger ones: 2e-4, 1 to 5
CLIP_COV: dict[str, Any] = {"ratio": 0.02, "low": 0.5, "high": 10.0}


class Rollout(NamedTuple):
    """Prompts with their answers. What belongs to a label stands at the position before it, as logits do."""

    ids: Tensor  # (B, L)
    attention: Tensor  # (B, L), 1 = a token
    positions: Tensor  # (B, L): the first token of a left-padded prompt has 0, as in generate
    mask: Tensor  # (B, L) bool, where the next token is the answer's
    reward: Tensor  # (B,)


def tiny() -> tuple[Any, Tensor, Tensor]:
    """A Llama of 60 k parameters, prompts of random tokens (all of one length) and their attention mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    prompts = torch.randint(256, (PROMPTS, 6))
    return LlamaForCausalLM(config), prompts, torch.ones_like(prompts)


def pretrained(name: str) -> tuple[Any, Tensor, Tensor]:
    """A model of yours, and prompts, padded on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = tokenizer([f"{i} times {i + 3} is" for i in range(1, PROMPTS + 1)], padding=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(name)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, prompts.input_ids, prompts.attention_mask


@torch.no_grad()
def rollout(model: Any, prompts: Tensor, attention: Tensor) -> Rollout:
    """GROUP answers to each prompt, from the very distribution that is trained: no top-k, no top-p."""
    ids = model.generate(
        prompts.repeat_interleave(GROUP, 0), attention_mask=attention.repeat_interleave(GROUP, 0), do_sample=True,
        temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=LENGTH,
    )  # fmt: skip
    answers = ids[:, prompts.shape[1] :]
    end = model.generation_config.eos_token_id
    ends = torch.zeros_like(answers) if end is None else torch.isin(answers, torch.tensor(end).to(answers)).long()
    real = ends.cumsum(1) - ends == 0  # up to the end token, with it
    attention = torch.cat((attention.repeat_interleave(GROUP, 0), real.long()), 1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompts.shape[1] - 1 : -1] = real
    reward = ((answers % 2 == 0) & real).sum(1) / real.sum(1)
    return Rollout(ids, attention, (attention.cumsum(1) - 1).clamp(min=0), mask, reward)


def loss_of(
    model: Any, batch: Rollout, old_logprob: Tensor, advantages: Tensor, seed: int, fused: bool
) -> ek.PolicyLoss:
    """Clip-Cov's loss of one update, from log-probs, or from hidden states with as few matrix products."""
    if not fused:
        logprob, entropy = ek.hf.causal_lm_logprob_entropy(
            model, batch.ids, attention_mask=batch.attention, position_ids=batch.positions, temperature=TEMPERATURE
        )
        return ek.clip_cov_loss(logprob, old_logprob, advantages, batch.mask, entropy=entropy, seed=seed, **CLIP_COV)
    parts = ek.hf.causal_lm_parts(model)
    hidden = parts.backbone(batch.ids, attention_mask=batch.attention, position_ids=batch.positions, use_cache=False)[0]
    return ek.linear_policy_loss(
        hidden * parts.scale, parts.weight, ek.hf.next_tokens(batch.ids), old_logprob, advantages, batch.mask,
        parts.bias, method="clip_cov", seed=seed, temperature=TEMPERATURE, softcap=parts.softcap,
        vocab_size=parts.vocab_size, **CLIP_COV,
    )  # fmt: skip


def train(name: str | None, rollouts: int, fused: bool, seed: int, lr: float) -> list[float]:
    """Train; the mean reward of every rollout."""
    torch.manual_seed(seed)
    model, prompts, attention = pretrained(name) if name else tiny()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, prompts, attention = model.to(device).eval(), prompts.to(device), attention.to(device)  # eval: no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rewards, update = [], 0
    print("rollout  update  reward  entropy     loss  dropped  |log-ratio|, mean")
    for i in range(rollouts):
        batch = rollout(model, prompts, attention)
        groups = batch.reward.view(-1, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)).div(groups.std(1, keepdim=True) + 1e-6).view(-1, 1)
        with torch.no_grad():
            old_logprob, _ = ek.hf.causal_lm_logprob_entropy(
                model, batch.ids, attention_mask=batch.attention, position_ids=batch.positions, temperature=TEMPERATURE
            )
        for _ in range(UPDATES):
            loss, metrics = loss_of(model, batch, old_logprob, advantages, seed=update, fused=fused)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update += 1
            told = f"{i + 1:7d} {update:7d} {batch.reward.mean():7.3f} {metrics['entropy']:8.3f} {loss:+8.4f}"
            print(f"{told} {metrics['selected_frac']:8.2%} {metrics['ppo_kl_abs']:18.4f}", flush=True)
        rewards.append(float(batch.reward.mean()))
    return rewards


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="of transformers; default: a tiny random Llama")
    parser.add_argument("--fused", action="store_true", help="ek.linear_policy_loss in place of log-probs and a loss")
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="default: 5e-3 for the tiny model, 1e-6 for yours")
    given = parser.parse_args()
    if given.rollouts < 1:
        parser.error(f"--rollouts: expected at least 1, got {given.rollouts}")
    lr = given.lr if given.lr is not None else 1e-6 if given.model else 5e-3
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit(f"{parser.prog} needs transformers, which is not installed: pip install 'transformers>=4.56'")
    rewards = train(given.model, given.rollouts, given.fused, given.seed, lr)
    print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
