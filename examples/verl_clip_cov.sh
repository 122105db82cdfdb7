#!/usr/bin/env bash
# Clip-Cov in verl 0.9.1, selected over the whole mini-batch: verl's own command, and two lines of ours (marked).
# Before: pip install this package beside verl, in the environment of the driver and the workers.
#   MODEL=Qwen/Qwen2.5-7B TRAIN=train.parquet TEST=test.parquet bash examples/verl_clip_cov.sh
set -euo pipefail

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="${TRAIN:-train.parquet}" \
    data.val_files="${TEST:-test.parquet}" \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=8192 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-7B}" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.2 \
    actor_rollout_ref.actor.policy_loss.loss_mode=ek_clip_cov `# instead of clip_cov` \
    actor_rollout_ref.actor.policy_loss.clip_cov_ratio=0.0002 \
    +actor_rollout_ref.actor.policy_loss.ek.seed=1 `# the draw can be repeated` \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384 \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    "$@"
