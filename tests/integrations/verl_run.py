"""verl's driver and workers on a CPU: hydra's config, Ray, ActorRolloutRefWorker, FSDP2 over gloo, a tiny Llama.

    python verl_run.py FOLDER

runs as one worker and as two, and writes FOLDER/found.json. verl's code is its own but for the platform (verl_cpu.py);
what stands in the place of a rollout are random tokens. Read :func:`main` first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
import torch
import verl_batches
import verl_cpu
from transformers import LlamaConfig, LlamaForCausalLM
from verl.protocol import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.config import validate_config
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl_command import composed, with_loss

import entropy_kernels as ek

ROWS = 8
SPLITS: dict[str, dict[str, Any]] = {
    "1": {"micro_batch_size_per_gpu": 4}, "2": {"micro_batch_size_per_gpu": 2}, "4": {"micro_batch_size_per_gpu": 1},
    "dynamic": {"use_dynamic_bsz": True, "max_token_len_per_gpu": 30},
}  # fmt: skip


class Watched(ActorRolloutRefWorker):
    """verl's worker; it also tells what our losses were handed, and the gradients before each step."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def watch(self) -> None:
        self.calls, self.grads = [], []
        policy_loss, step = ek.policy_loss, self.actor.engine.optimizer_step

        def seen(logprob: Any, old: Any, advantages: Any, mask: Any, **given: Any) -> Any:
            control = given["control"]
            chosen = None if control is None or control.dropped is None else control.dropped & mask.bool()
            # tokens are known by their advantages, which are all different
            names = [] if chosen is None else advantages[chosen].tolist()
            self.calls.append({"tokens": int(mask.sum()), "dropped": names})
            return policy_loss(logprob, old, advantages, mask, **given)

        def stepping() -> Any:
            parameters = [p.grad.full_tensor().flatten() for p in self.actor.engine.module.parameters()]
            self.grads.append(torch.cat(parameters))
            return step()

        ek.policy_loss, self.actor.engine.optimizer_step = seen, stepping

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def seen(self) -> dict[str, Any]:
        calls, grads = list(self.calls), [grad.tolist() for grad in self.grads]
        self.calls.clear()
        self.grads.clear()
        return {"calls": calls, "grads": grads}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restart(self) -> None:
        """The next step draws as the first."""
        vars(self.loss_fn.keywords["config"]).pop("ek_controller", None)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def patches(self) -> dict[str, Any]:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

        from entropy_kernels.integrations.verl import PATCHES

        found = {patch.target: [patch.active, patch.calls] for patch in PATCHES}
        return {"patches": found, "modes": [name for name in POLICY_LOSS_REGISTRY if name.startswith("ek_")]}


def configured(model: str, mode: str, *own: str, lr: float = 0.0) -> Any:
    actor = {
        "strategy": "fsdp2", "ppo_mini_batch_size": ROWS, "optim.lr": lr, "optim.weight_decay": 0,
        "optim.total_training_steps": 10, "use_torch_compile": "false", "fsdp_config.use_torch_compile": "false",
        "fsdp_config.mixed_precision": "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    }  # fmt: skip
    of_model = {
        "path": model, "load_tokenizer": "false", "use_remove_padding": "false",
        "enable_gradient_checkpointing": "false", "override_config.attn_implementation": "sdpa",
    }  # fmt: skip
    return composed(
        *with_loss(mode, *own),
        *(f"++actor_rollout_ref.actor.{key}={value}" for key, value in actor.items()),
        *(f"++actor_rollout_ref.model.{key}={value}" for key, value in of_model.items()),
        "actor_rollout_ref.rollout.n=1", "trainer.use_v1=false",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    )  # fmt: skip


def workers(config: Any, ranks: int) -> Any:
    arguments = RayClassWithInitArgs(ray.remote(Watched), config=config.actor_rollout_ref, role="actor")
    pool = RayResourcePool(process_on_nodes=[ranks], use_gpu=False, max_colocate_count=1)
    group = RayWorkerGroup(pool, arguments, device_name="cpu")
    group.init_model()
    group.watch()
    return group


def driver(config: Any, group: Any) -> Any:
    """verl's trainer v0, of which two methods are called, after what its main does."""
    validate_config(config, use_reference_policy=False, use_critic=False)
    trainer = object.__new__(RayPPOTrainer)
    trainer.config, trainer.actor_rollout_wg = config, group
    return trainer


def dataproto(made: list[dict[str, Any]]) -> Any:
    """A rollout in the driver: padded, with nothing of the policy's own."""
    names = ("prompts", "responses", "response_mask", "advantages")
    batch = verl_batches.unprocessed([{name: row[name] for name in names} for row in made])
    proto = DataProto.from_single_dict(batch)
    proto.meta_info |= {"temperature": 1.0, "global_token_num": batch["attention_mask"].sum(-1).tolist()}
    return proto


def close(group: Any) -> None:
    for worker in group.workers:
        ray.kill(worker)


def splits(model: str, ranks: int) -> dict[str, Any]:
    """One mini-batch with the old log-probs it comes with, in every split; the policy stays as it is."""
    group = workers(configured(model, "ek_clip_cov", "ratio=0.1", "low=-9", "high=9", "statistics=false"), ranks)
    made, found = verl_batches.rows(ROWS), {}
    for layout in ("nested", "padded"):
        for name, split in SPLITS.items():
            data = getattr(verl_batches, layout)(
                made, **split, temperature=1.0, global_batch_size=ROWS, mini_batch_size=ROWS, epochs=1, seed=1,
                dataloader_kwargs={"shuffle": False}, compute_loss=True, calculate_entropy=False,
            )  # fmt: skip
            group.restart()
            metrics = group.update_actor(data)["metrics"]
            found[f"{layout} {name}"] = {"metrics": _plain(metrics), "ranks": group.seen()}
    found = {"splits": found, "workers": group.patches()}
    close(group)
    return found


def step(trainer: Any, number: int) -> dict[str, Any]:
    """As the driver makes it: old log-probs with their statistics, then the update."""
    batch = dataproto(verl_batches.rows(ROWS, seed=number))
    old, _ = trainer._compute_old_log_prob(batch)
    fields = sorted(old.batch.keys())
    old.batch.pop("entropys")
    metrics = trainer._update_actor(batch.union(old)).meta_info["metrics"]
    return {"fields": fields, "metrics": _plain(metrics), "ranks": trainer.actor_rollout_wg.seen()}


def exact_cov(model: str, ranks: int) -> list[dict[str, Any]]:
    config = configured(model, "ek_exact_cov", "ratio=0.1", lr=1e-3)
    group = workers(config, ranks)
    trainer = driver(config, group)
    found = [step(trainer, number) for number in range(2)]
    found[-1]["workers"] = group.patches()
    close(group)
    return found


def v1(model: str, ranks: int) -> list[dict[str, Any]]:
    """The same by verl's trainer v1, its default: what is computed lies in a TransferQueue, and stays nested."""
    import transfer_queue as tq
    from verl.trainer.ppo.v1 import PPOTrainerSync

    config = configured(model, "ek_exact_cov", "ratio=0.1", lr=1e-3)
    group, found = workers(config, ranks), []
    trainer = object.__new__(PPOTrainerSync)
    trainer.config, trainer.actor_rollout_wg = config, group
    tq.init(config.transfer_queue)
    for number in range(2):
        made = verl_batches.rows(ROWS, seed=number)
        names = {name: name for name in ("prompts", "responses", "response_mask", "advantages")}
        names["rollout_log_probs"] = "old_log_probs"
        data = verl_batches.nested([{name: row[of] for name, of in names.items()} for row in made])
        where = {"keys": [f"{number}-{row}" for row in range(ROWS)], "partition_id": "train"}
        lengths = data["input_ids"].offsets().diff().tolist()
        batch = tq.kv_batch_put(**where, fields=data, tags=[{"seq_len": length} for length in lengths])
        batch.extra_info["temperature"] = 1.0
        batch, metrics = trainer._compute_old_log_prob(batch, {}), {}
        trainer._update_actor(batch, metrics)
        found.append({"fields": sorted(batch.fields), "metrics": _plain(metrics), "ranks": group.seen()})
    tq.close()
    close(group)
    return found


def target(model: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Three steps; the last is repeated from the checkpoint before it, by these workers and by new ones."""
    config = configured(model, "ek_ppo", "target_entropy=4.2", lr=1e-3)
    group, saved = workers(config, ranks), str(folder / f"checkpoint-{ranks}")
    trainer = driver(config, group)
    found: dict[str, Any] = {"steps": [step(trainer, number) for number in range(2)]}
    group.save_checkpoint(saved)
    found["steps"].append(step(trainer, 2))
    found["saved"] = json.loads((Path(saved) / "entropy_kernels.json").read_text())
    found["files"] = sorted(path.name for path in Path(saved).iterdir())
    group.load_checkpoint(saved)
    found["again"] = step(trainer, 2)
    close(group)
    if ranks == 2:
        trainer.actor_rollout_wg = group = workers(config, ranks)
        group.load_checkpoint(saved)
        found["new workers"] = step(trainer, 2)
        close(group)
    return found


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(torch.tensor(value).double().mean()) for name, value in metrics.items()}


def main(folder: Path) -> None:
    model = str(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=verl_batches.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )).save_pretrained(model)  # fmt: skip
    environment = {**verl_cpu.ENVIRONMENT, "PYTHONPATH": os.environ["PYTHONPATH"]}
    ray.init(
        num_cpus=16, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=os.environ["RAY_FOLDER"],
        runtime_env={"env_vars": environment}, log_to_driver=False,
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        for ranks in (1, 2):
            found[f"splits {ranks}"] = splits(model, ranks)
            found[f"exact_cov {ranks}"] = exact_cov(model, ranks)
            found[f"target {ranks}"] = target(model, ranks, folder)
        found["v1 2"] = v1(model, 2)
    finally:
        ray.shutdown()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
