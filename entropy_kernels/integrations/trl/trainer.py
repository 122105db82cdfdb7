"""TRL's ``GRPOTrainer``, whose own loss gets the advantages per token that a method of this package leaves.

``_compute_loss`` is TRL's, called as it is: clipping, importance sampling against vLLM, off-policy masks, reference KL,
auxiliary loss, adaptive entropy and metrics stay. Read in this order: ``_prepare_inputs`` (where a step is planned),
``_get_per_token_logps_and_entropies`` (where statistics come from), ``_compute_loss``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing

import entropy_kernels as ek
from entropy_kernels.integrations import _reads
from entropy_kernels.integrations._patch import PatchRefused
from entropy_kernels.integrations.trl.config import GRPOConfig
from entropy_kernels.integrations.trl.head import HEAD, head
from entropy_kernels.integrations.trl.plan import Planner, Statistics, penalty, placed
from entropy_kernels.trainer.files import write_text

STATE = "entropy_kernels.json"  # beside TRL's files in a checkpoint


class GRPOTrainer(trl.GRPOTrainer):
    """``trl.GRPOTrainer`` with a method of this package, or a target, that holds the entropy.

        args = GRPOConfig(..., method="exact_cov", method_options={"share": 0.4})
        GRPOTrainer(model, reward_funcs=..., args=args, train_dataset=...).train()

    Without ``method``, ``target_entropy`` and ``fused_head`` it is TRL's, bit for bit. What a method decides is of all
    micro-batches of an optimizer step on all ranks, and what a target plans of a whole rollout. Metrics are in TRL's
    log under ``ek/``; docs/control.md has their definitions.

    Args:
        model, reward_funcs: as in ``trl.GRPOTrainer``.
        args: our ``GRPOConfig``.
        others: as in ``trl.GRPOTrainer``.

    Raises:
        TypeError: TRL's own ``GRPOConfig``.
        PatchRefused: a version of TRL that this was not tested with.

    Source:
        docs/integrations.md.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *others: Any, **named: Any
    ) -> None:
        if args is not None and not isinstance(args, GRPOConfig):
            raise TypeError(
                f"args: expected an entropy_kernels.integrations.trl.GRPOConfig, got {type(args).__module__}."
                f"{type(args).__name__}"
            )
        self._planner: Planner | None = None
        self._ours = False
        super().__init__(model, reward_funcs, args, *others, **named)
        if args is None or (args.method is None and args.target_entropy is None and not args.fused_head):
            return
        if (reason := HEAD.refusal(any_version=args.any_trl_version)) is not None:
            raise PatchRefused(reason)
        self._ours = bool(args.fused_head)
        if args.method is not None or args.target_entropy is not None:
            self._start_planning(args)

    def _start_planning(self, args: GRPOConfig) -> None:
        ranks = self.accelerator.num_processes
        group = torch.distributed.group.WORLD if ranks > 1 else None
        vocab_size = self.model.config.get_text_config().vocab_size
        self._planner = planner = Planner(args, batch_group=group, ranks=ranks, vocab_size=vocab_size)
        self._ours = self._ours or bool(planner.names)
        self._rollout_reads: list[Statistics] | None = None  # while a rollout is scored
        self._read: Statistics | None = None  # of the last forward
        self._awaits_plan: dict[str, Any] | None = None  # a micro-batch that is planned for in its own forward
        self._is_new = False  # the rollout, which nothing was planned for
        if not planner.clips:
            self.epsilon_low = self.epsilon_high = math.inf
        if planner.sets_bonus:
            self._entropy_bonus_enabled = True
        self.add_callback(_AfterStep(self))

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if self._planner is not None and self.model.training:
            self._plan_ahead(self._planner)
        return inputs

    def _plan_ahead(self, planner: Planner) -> None:
        """At the first micro-batch of a step, or with a target of a rollout."""
        micro, window = self._buffered_inputs, self.args.gradient_accumulation_steps
        if self._is_new and planner.old and "ek_logprob" not in micro[0]:
            for inputs in micro:
                inputs |= _kept(self._statistics(inputs))
        starts = self._is_new if planner.has_target else self._step % window == 0
        first = self._step % self.args.steps_per_generation
        moved = not self._is_new
        self._is_new = False
        if planner.source == "forward" or not starts:
            return
        chosen = micro if planner.has_target else micro[first : first + window]
        if planner.source == "fresh" and moved:
            now = [self._statistics(inputs) for inputs in chosen]
        else:
            now = [Statistics(*(x.get(f"ek_{name}") for name in Statistics._fields)) for x in chosen]
        self._plan(chosen, now)

    def _plan(self, micro: list[dict[str, Any]], now: list[Statistics]) -> None:
        assert self._planner is not None
        lr = self.optimizer.param_groups[0]["lr"]
        metrics = self._planner.plan(micro, now, lr=lr, temperature=self.temperature)
        for name, value in metrics.items():
            self._metrics["train"][f"ek/{name}"].append(value)
        if self._planner.sets_bonus:
            self.entropy_coef = metrics["entropy_coef"]

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self._planner is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        self._awaits_plan = inputs if self._planner.source == "forward" else None
        self._read = None
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._awaits_plan = None
        read, self._read = self._read, None
        if "ek_penalty" not in inputs:
            return loss
        if read is None:
            raise RuntimeError(
                "method: expected TRL's loss to read the log-probs that this package's penalty is of, got one without; "
                f"it was tested with TRL {' and '.join(HEAD.versions)}"
            )
        return loss + penalty(inputs, read.logprob)

    # ---- the statistics ----------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, *others: Any, **named: Any
    ) -> Any:
        planner = self._planner
        names = () if planner is None or model is self.ref_model else planner.names
        with self._head(), _reads.collect(*names) as read:
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *others, **named
            )
        if planner is None:
            return found
        given = {name: placed(read[name], attention_mask, logits_to_keep) for name in names}
        self._read = Statistics(found[0], **given)
        if self._rollout_reads is not None:
            self._rollout_reads.append(self._read)
        if self._awaits_plan is not None:
            inputs, self._awaits_plan = self._awaits_plan, None
            self._plan([inputs], [self._read])
        return found

    @contextlib.contextmanager
    def _head(self) -> Iterator[None]:
        """Ours in TRL's place, if asked for, and proof that it ran."""
        if not self._ours:
            yield
            return
        with head(any_version=self.args.any_trl_version) as patch:
            before = patch.calls
            yield
            if patch.calls == before:
                raise RuntimeError(
                    "fused_head: expected TRL's model to read its logits through _ChunkedLogProbFunction, which is "
                    "replaced by this package's head, got a forward that did not"
                )

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self._planner is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._rollout_reads = []
        try:
            output = super()._generate_and_score_completions(inputs)
            reads = self._rollout_reads
        finally:
            self._rollout_reads = None
        rows = len(output["advantages"])
        first = self.accelerator.process_index * rows
        output["ek_row"] = torch.arange(first, first + rows, device=output["advantages"].device)
        for read in reads:  # of the policy; others are of the reference
            if read.logprob is output.get("old_per_token_logps"):
                output |= _kept(read)
        self._is_new = True
        return output

    def _statistics(self, inputs: dict[str, Any]) -> Statistics:
        """Of a micro-batch under the policy as it is, by one forward without gradient."""
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        takes = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
        more = {name: inputs[name] for name in takes if name in inputs}  # images and the like
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(self.model, ids, mask, inputs["completion_ids"].size(1), **more)
        read, self._read = self._read, None
        assert read is not None
        return read

    # ---- the state ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._planner is None or not self.args.should_save:
            return
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        text = json.dumps({**_named(self.args), "state": self._planner.controller.state_dict()}, indent=1)
        write_text(folder / STATE, text)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._planner is None or checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.exists():
            warnings.warn(f"{path}: expected the state of the method, got none: it starts anew", stacklevel=2)
            return
        saved = json.loads(path.read_text())
        if (named := {name: saved.get(name) for name in _named(self.args)}) != _named(self.args):
            raise ValueError(f"{path}: expected the state of {_named(self.args)}, got that of {named}")
        self._planner.controller.load_state_dict(saved["state"])


class _AfterStep(TrainerCallback):
    """Proof that a method took part, and after a rollout's last update what the updates did to its entropy."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, planner = self._trainer, self._trainer._planner
        if planner is None or not planner.plans:
            raise RuntimeError(
                "method: expected TRL's trainer to prepare its inputs where this package plans for them, got a step "
                f"without a plan; it was tested with TRL {' and '.join(HEAD.versions)}"
            )
        if not planner.observes or trainer._step % (args.steps_per_generation * args.num_iterations):
            return
        reads = [trainer._statistics(inputs) for inputs in trainer._buffered_inputs]
        assert isinstance(planner.controller, ek.TargetEntropy)
        planner.controller.observe([read.entropy for read in reads if read.entropy is not None])


def _kept(read: Statistics) -> dict[str, Tensor]:
    """A rollout's statistics as entries of TRL's batch, whose rows it shuffles and splits."""
    return {f"ek_{name}": x for name, x in read._asdict().items() if x is not None}


def _named(args: GRPOConfig) -> dict[str, Any]:
    """Whose state it is."""
    return {"method": args.method, "target_method": None if args.target_entropy is None else args.target_method}
