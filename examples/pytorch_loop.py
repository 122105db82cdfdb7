"""A plain PyTorch policy-gradient loop: three marked lines make it ours, and its entropy can be held.

A small network is given a number and says three digits that add up to it: 45 right answers on average, a reward of 1
for any of them. The loop is GRPO as one writes it by hand: sample groups, normalise their rewards, a few clipped
updates. The lines marked 1 to 3 replace what stands in the comments above them; what holds the entropy stands between 1
and 2. From the repository's root:

    python examples/pytorch_loop.py                          # GRPO: the entropy collapses
    python examples/pytorch_loop.py --target-entropy 0.8     # the same, held at 0.8 nats
    python examples/pytorch_loop.py --method exact_cov       # or clip_cov, kl_cov: at a fixed strength

You see a line every 20 steps: the mean reward, the policy's entropy (nats per digit), how many of 32 answers to one
prompt are right and different, and the share of tokens that the method has treated. GRPO ends with one answer to each
prompt, a target with less reward and more answers. Five seconds on one CPU core; a GPU is taken if there is one.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import entropy_kernels as ek

DIGITS, LENGTH = 10, 3
PROMPTS, GROUP, UPDATES, LR = 32, 8, 2, 3e-3
# strengths for a batch of 768 tokens; the defaults are the paper's, for much larger ones
OPTIONS: dict[str, dict[str, Any]] = {
    "clip_cov": {"ratio": 0.03, "low": 0.2},
    "kl_cov": {"ratio": 0.05},
    "exact_cov": {"share": 0.4},
}


class Policy(nn.Module):
    """Logits of the next digit, from the number asked for and the digits that were said."""

    def __init__(self) -> None:
        super().__init__()
        width = (DIGITS - 1) * LENGTH + 1 + LENGTH * (DIGITS + 1)
        self.net = nn.Sequential(
            nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, DIGITS)
        )

    def forward(self, prompt: Tensor, said: Tensor) -> Tensor:  # (B,), (B, up to 3) -> (B, 10)
        padded = nn.functional.pad(said, (0, LENGTH - said.shape[1]), value=DIGITS)
        digits = nn.functional.one_hot(padded, DIGITS + 1).flatten(1)
        number = nn.functional.one_hot(prompt, (DIGITS - 1) * LENGTH + 1)
        return self.net(torch.cat((number, digits), 1).float())

    def logits(self, prompt: Tensor, actions: Tensor) -> Tensor:  # of every position: (B, 3, 10)
        return torch.stack([self(prompt, actions[:, :i]) for i in range(LENGTH)], 1)


@torch.no_grad()
def sample(policy: Policy, prompt: Tensor) -> Tensor:
    """(B, 3) digits."""
    said = prompt.new_zeros(len(prompt), 0)
    for _ in range(LENGTH):
        said = torch.cat((said, torch.multinomial(policy(prompt, said).softmax(-1), 1)), 1)
    return said


def distinct_right(policy: Policy, device: torch.device) -> float:
    """Right and different answers among 32 samples, mean over prompts 6 to 21."""
    prompt = torch.arange(6, 22, device=device).repeat_interleave(32)
    answers = sample(policy, prompt)
    right = answers[answers.sum(1) == prompt]
    return len(torch.cat((right.sum(1, keepdim=True), right), 1).unique(dim=0)) / 16


def train(method: str, target: float | None, steps: int, seed: int) -> float:
    """Train; the entropy at the end."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = Policy().to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    controller: ek.Controller | None = None
    if target is not None:
        controller = ek.TargetEntropy(target, vocab_size=DIGITS)
    elif method != "grpo":
        controller = ek.Controller(method, **OPTIONS[method])
    print("  step  reward  entropy  distinct of 32  treated")
    for step in range(steps + 1):
        prompt = torch.randint(3, 25, (PROMPTS,), device=device).repeat_interleave(GROUP)
        actions = sample(policy, prompt)  # (256, 3)
        reward = (actions.sum(1) == prompt).float()
        groups = reward.view(PROMPTS, GROUP)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        mask = torch.ones_like(actions, dtype=torch.bool)

        # What a rollout needs: old log-probs and, to control them, entropy and covariance, in one read of the logits.
        with torch.no_grad():
            # before: old_logprob = policy.logits(...).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
            old = ek.token_stats(policy.logits(prompt, actions), actions)  # <- 1
        decided = None
        if controller is not None:
            batch = ek.SelectionBatch()
            batch.add(old.logprob, advantages, mask, entropy=old.entropy, vocab_covariance=old.vocab_covariance)
            settings: dict[str, Any] = {"lr": LR, "updates": UPDATES} if target is not None else {}
            decided = controller.step(batch, **settings)[0]
        for _ in range(UPDATES):
            # before: logprob = policy.logits(...).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
            logprob = ek.logprob_entropy(policy.logits(prompt, actions), actions).logprob  # <- 2
            # before: ratio = (logprob - old_logprob).exp()
            #         loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
            loss = ek.policy_loss(logprob, old.logprob, advantages, mask, control=decided).loss  # <- 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if isinstance(controller, ek.TargetEntropy):  # it learns what its predictions are worth
            with torch.no_grad():
                controller.observe([ek.entropy(policy.logits(prompt, actions))])
        if step % 20 == 0:
            treated = 0.0 if decided is None else float(decided.metrics["touched_frac"])
            told = f"{step:6d} {reward.mean():7.2f} {old.entropy.mean():8.3f} {distinct_right(policy, device):15.1f}"
            print(f"{told} {treated:8.1%}", flush=True)
    return float(old.entropy.mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("grpo", *OPTIONS), default="grpo")
    parser.add_argument("--target-entropy", type=float, metavar="NATS", help="hold the entropy there; without --method")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.target_entropy is not None and given.method != "grpo":
        parser.error("--target-entropy: expected without --method, since both decide about the same tokens")
    if given.steps < 0:
        parser.error(f"--steps: expected at least 0, got {given.steps}")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the tensors are small: more threads would only wait for each other
    final = train(given.method, given.target_entropy, given.steps, given.seed)
    print(f"entropy at the end: {final:.3f} nats of at most {torch.tensor(DIGITS).log():.3f}")


if __name__ == "__main__":
    main()
