r"""Trains an information gain evaluator on a log of denoising trajectories.

It learns, from features of the denoiser at a state, what any jump down the schedule would tell: the
variance of the calibrated value that it resolves, its truncation error, how similar the estimate
after it is to the finished sample, and the mean gain. Prompts are split: a tenth of those to train
on decides when to stop, and how far off predictions are; figures are of splits with other
prompts. A share of the states shows no features, from which the head learns the typical state. ::

    accelerate launch training/train_ige.py --log data/trajectories --output runs/ige

About two minutes for a thousand trajectories on one CPU core. The output folder is what
`InformationGainEvaluator.from_pretrained` loads; its card has the figures, also of grids and
schedulers that are not in the training split, if the log has such splits.

A head is refined on what saved searches observed, without a log and without the denoiser::

    python training/train_ige.py --from_searches runs/searches --init_from runs/ige --output runs/b
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from tqdm import tqdm
from transformers import HfArgumentParser

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.ige_report import (
    Judged,
    Report,
    calibration_figure,
    card_sections,
    figures_table,
    fit_error_model,
    make_report,
    means_of_cells,
    within_correlation,
)
from mctd_diffusers.hub import card_text
from mctd_diffusers.models.calibration import Calibration
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.models.losses import JumpWeights, jump_loss
from mctd_diffusers.models.refining import (
    Learner,
    RefinementSettings,
    check_observations,
    is_known,
    is_validated_on,
    validation_loss,
)
from mctd_diffusers.trajectories.dataset import Log, LogSplit, read_jump_table, read_log
from mctd_diffusers.trajectories.examples import (
    Examples,
    make_examples,
    predict_jumps,
    split_prompts,
    targets_of,
)
from mctd_diffusers.trajectories.jumps import JumpRows, free_jumps, groups_of, strides_of
from mctd_diffusers.trajectories.searches import read_searches
from mctd_diffusers.trajectories.targets import fit_calibration

logger = logging.getLogger("train_ige")


@dataclass
class Options:
    """What to train, on what, and for how long."""

    log: str = field(
        default="data/trajectories", metadata={"help": "folder that mctd log-trajectories wrote"}
    )
    output: str = field(default="runs/ige", metadata={"help": "folder for the head and its card"})
    train_split: str = field(default="train", metadata={"help": "the split to train on"})
    validation_share: float = field(
        default=0.1, metadata={"help": "share of its prompts that decides when to stop"}
    )
    init_from: str = field(default="", metadata={"help": "a head to begin with"})
    from_searches: str = field(
        default="",
        metadata={"help": "saved searches, or their dataset, to refine it on in place of a log"},
    )
    base_model: str = field(default="", metadata={"help": "the model's repository, for the card"})
    embedding_size: int = field(default=32, metadata={"help": "size of each block's projection"})
    hidden_size: int = field(default=128, metadata={"help": "width of the trunk"})
    num_layers: int = field(default=3, metadata={"help": "residual layers of the trunk"})
    feature_dropout: float = field(default=0.7, metadata={"help": "share of features dropped"})
    embedding_dropout: float = field(default=0.5, metadata={"help": "share of projections dropped"})
    typical_share: float = field(
        default=0.15, metadata={"help": "share of states that show no features"}
    )
    variance_weight: float = field(default=0.5, metadata={"help": "weight of the log variance"})
    gain_weight: float = field(default=0.5, metadata={"help": "weight of the mean gain"})
    similarity_weight: float = field(default=2.0, metadata={"help": "weight of the similarity"})
    ranking_weight: float = field(default=0.5, metadata={"help": "weight of the ranking"})
    group_size: int = field(default=8, metadata={"help": "states of one cell in a batch, at most"})
    train_batch_size: int = field(default=32, metadata={"help": "groups of states a step"})
    free_jumps: int = field(default=1, metadata={"help": "jumps along the trajectory, a state"})
    max_train_steps: int = field(default=1500, metadata={"help": "optimiser steps at most"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW, after the warm-up"})
    weight_decay: float = field(default=0.3, metadata={"help": "of AdamW, for matrices"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of rising learning rate"})
    decay_steps: int = field(
        default=750, metadata={"help": "last steps, over which the learning rate falls to zero"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "bound of the gradient's norm"})
    ema_decay: float = field(default=0.99, metadata={"help": "of the averaged weights"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and noise"})
    mixed_precision: str = field(
        default="no", metadata={"help": "no, fp16 or bf16, where the device has it"}
    )
    report_to: str = field(default="none", metadata={"help": "a tracker, or 'none'"})
    validation_steps: int = field(default=100, metadata={"help": "steps between validations"})
    patience: int = field(
        default=6, metadata={"help": "validations without a better one, after which to stop"}
    )
    checkpointing_steps: int = field(default=250, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept"})
    resume_from_checkpoint: str = field(
        default="", metadata={"help": "a checkpoint folder, or 'latest' of the output folder"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "push the head and its card"})
    hub_model_id: str = field(
        default="", metadata={"help": "repository to push to; the output folder's name if ''"}
    )
    hub_private: bool = field(default=False, metadata={"help": "whether a new one is private"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves them be"})


# --- same in every script: checkpointing
class StopRequest:
    """Turns SIGTERM and SIGINT into a flag, so that a run ends with a whole checkpoint."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: object) -> None:
        self.is_set = True

    def is_agreed(self, accelerator: Accelerator) -> bool:
        """Says whether any process was asked to stop; all of them call it once a step."""
        if accelerator.num_processes == 1:
            return self.is_set
        flags = accelerator.gather(torch.tensor([self.is_set], device=accelerator.device))
        return bool(flags.any())


def checkpoints(output: Path) -> list[Path]:
    """Lists the whole checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, limit: int) -> None:
    """Saves weights, optimiser, averages and random state; a killed save leaves no trace.

    The data position needs no file: the order of the data follows from the seed and the step.
    """
    final = output / f"checkpoint-{step}"
    unfinished = output / f"checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)
        for old in checkpoints(output)[:-limit]:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, output: Path, name: str) -> int:
    """Loads a checkpoint by path, or the 'latest' of a run; '' begins anew.

    Returns:
        The step to go on from.

    Raises:
        ConfigError: the named folder is no checkpoint.
    """
    if not name:
        return 0
    if name == "latest":
        found = checkpoints(output)
        if not found:
            return 0
        path = found[-1]
    else:
        path = Path(name)
        if not path.is_dir() or not path.name[11:].isdigit():
            raise ConfigError(f"resume_from_checkpoint={name!r} is no folder checkpoint-STEP")
    accelerator.load_state(str(path))
    return int(path.name[11:])


def batch_indices(num_rows: int, batch_size: int, seed: int, first_step: int) -> Iterator[Any]:
    """Yields the rows of each batch from a step on, every epoch in an order of its own.

    Batches run on over the ends of epochs, so that a set smaller than a batch works too.
    """
    position = first_step * batch_size
    while True:
        rows: list[int] = []
        while len(rows) < batch_size:
            epoch, offset = divmod(position, num_rows)
            order = np.random.default_rng([seed, epoch]).permutation(num_rows)
            taken = order[offset : offset + batch_size - len(rows)]
            rows += taken.tolist()
            position += len(taken)
        yield rows


# --- end


# --- same in every script: learning rate
def learning_rate(step: int, peak: float, warmup: int, decay: int, last: int) -> float:
    """Rises over `warmup` steps, stays at the peak, and falls to zero over the last `decay`."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (last - step) / max(1, decay))
    return peak * rising * falling


# --- end


def make_head(log: Log, train: LogSplit, calibration: Calibration, options: Options) -> Any:
    """Makes a head for what the log holds, or loads one to go on with.

    Raises:
        ConfigError: the one to go on with is for another model.
    """
    table = read_jump_table(options.log, options.train_split)
    trajectories, states = train.trajectories, train.states
    seen: dict[str, Any] = {
        "num_levels": len(table.log_snr),
        "reward_scale": float(trajectories.reward.std()) or 1.0,
        "log_snr_range": [float(states.log_snr.min()), float(states.final_log_snr.max())],
        "grids": np.unique(trajectories.num_steps).tolist(),
        "schedulers": np.unique(trajectories.scheduler).tolist(),
        "guidance_scales": np.unique(trajectories.guidance_scale).tolist(),
        "calibration": calibration.to_dict(),
    }
    head = InformationGainEvaluator(
        log.family,
        log.feature_channels,
        embedding_size=options.embedding_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        feature_dropout=options.feature_dropout,
        embedding_dropout=options.embedding_dropout,
        **seen,
    )
    features = {name: torch.from_numpy(rows) for name, rows in train.features.items()}
    head.fit_features(features, torch.from_numpy(states.log_snr))
    if options.init_from:
        begun = InformationGainEvaluator.from_pretrained(options.init_from)
        begun.check_family(log.family)
        begun.check_features(features)
        weights = {
            name: weight for name, weight in begun.state_dict().items() if "jump" not in name
        }
        try:
            head.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise ConfigError(
                f"init_from={options.init_from!r} has other sizes than embedding_size, hidden_size "
                f"and num_layers say ({error}): name those of its config.json"
            ) from error
    head.jump_log_snr.copy_(torch.from_numpy(table.log_snr))
    head.jump_cost.copy_(torch.from_numpy(table.cost))
    return head


def begin_near(head: InformationGainEvaluator, rows: JumpRows) -> None:
    """Sets the biases of the outputs to what targets are in the mean."""
    variances = rows.sibling_variance[rows.sibling_variance > 0]
    with torch.no_grad():
        if len(variances):
            unit = 2 * math.log(head.config["reward_scale"])
            head.head.bias[1] = float(np.log(variances).mean()) - unit
        head.head.bias[3] = float(np.nanmean(rows.log_truncation_error))


def judge(
    head: InformationGainEvaluator, examples: Examples, prompts: dict[str, int]
) -> dict[str, Judged]:
    """Predicts all jumps of a split of which something is known, by target."""
    predicted = predict_jumps(head, examples, prompts)
    return {target: Judged(*rows) for target, rows in predicted.items()}


def validate(head: InformationGainEvaluator, examples: Examples) -> dict[str, float]:
    """Correlates within cells; the mean of the two correlations decides when to stop."""
    judged = judge(head, examples, {})
    figures = {
        target: within_correlation(judged[target]).mean
        for target in ("truncation_error", "resolved_variance")
        if len(judged[target].actual)
    }
    return {**figures, "score": float(np.mean(list(figures.values())))}


def correct_variance(head: InformationGainEvaluator, examples: Examples) -> None:
    """Shifts the log variance so that it is right in the mean on prompts to validate on."""
    rows = judge(head, examples, {})["resolved_variance"]
    if len(rows.actual):
        with torch.no_grad():
            head.head.bias[1] += float(np.log(np.exp(rows.actual - rows.predicted).mean()))


def measure(head: InformationGainEvaluator, examples: dict[str, Examples]) -> Report:
    """Measures a head on every held-out split."""
    prompts: dict[str, int] = {}
    judged = {name: judge(head, part, prompts) for name, part in examples.items()}
    siblings = {name: part.siblings for name, part in examples.items()}
    errors = fit_error_model(judged.pop("validation"), siblings["validation"])
    known = {target: means_of_cells(rows) for target, rows in judged.pop("train").items()}
    return make_report(judged, siblings, known=known, errors=errors)


def make_card(
    head: InformationGainEvaluator, examples: dict[str, Examples], report: Report, about: Any
) -> str:
    """Writes the model card."""
    config = head.config
    features = ", ".join(
        f"`{name}` ({n})" for name, n in sorted(config["feature_channels"].items())
    )
    rows = "\n".join(
        f"| {name} | {len(part.split.trajectories.number)} "
        f"| {', '.join(np.unique(part.split.trajectories.scheduler).tolist())} "
        f"| {', '.join(map(str, np.unique(part.split.trajectories.num_steps).tolist()))} "
        f"| {part.siblings} |"
        for name, part in examples.items()
    )
    metadata = {
        "library_name": "diffusers",
        "base_model": about["base_model"] or None,
        "tags": ["diffusers", "mctd-diffusers", "information-gain-evaluator"],
    }
    return card_text(
        metadata,
        f"""# Information gain evaluator for {config["family"]}

Predicts, from features of the denoiser at a state x_t, what a jump down the schedule would tell:
its truncation error, the variance of the value that it resolves, the similarity of the estimate
after it with the finished sample, and the mean gain of the calibrated value.

```python
from mctd_diffusers import InformationGainEvaluator

ige = InformationGainEvaluator.from_pretrained("path or repository")
```

{head.num_parameters():,} parameters, trained for {about["steps"]} steps by

```bash
{about["command"]}
```

It reads {features}, at guidance scales {", ".join(map(str, config["guidance_scales"]))} and log-SNR
from {config["log_snr_range"][0]:.2f} to {config["log_snr_range"][1]:.2f}.

| split | trajectories | schedulers | steps | siblings (M) |
| --- | --- | --- | --- | --- |
{rows}

No prompt of train is in another split.

{card_sections(report)}""",
    )


def refine_on_searches(options: Options, command: str) -> None:
    """Refines a head on what saved searches observed; what is not better is not kept.

    Raises:
        ConfigError: no head is named, or it is of another model; or too little was observed.
    """
    if not options.init_from:
        raise ConfigError(
            f"from_searches={options.from_searches!r} refines a head: name it with --init_from"
        )
    data = read_searches(options.from_searches)
    head = InformationGainEvaluator.from_pretrained(options.init_from)
    head.check_family(data.family)
    check_observations(head, data.observations)
    settings = RefinementSettings(
        batch_size=options.group_size * options.train_batch_size,
        learning_rate=options.learning_rate,
        validation_share=options.validation_share,
        typical_share=options.typical_share,
        seed=options.seed,
    )
    seen = data.observations.take(is_known(head, data.observations))
    held_out = np.array(
        [is_validated_on(image, settings.validation_share) for image in seen.image.tolist()], bool
    )
    train, validation = seen.take(~held_out), seen.take(held_out)
    if not len(train) or not len(validation):
        raise ConfigError(
            f"{len(np.unique(seen.image))} images leave {len(train)} groups of siblings to learn "
            f"from and {len(validation)} to validate on: save more searches, or set another "
            f"validation_share than {settings.validation_share}"
        )
    learner = Learner(head, copy.deepcopy(head).requires_grad_(False), settings)
    rng = np.random.default_rng(options.seed)
    losses = {0: validation_loss(head, validation, settings)}
    best, best_step = head, 0
    for step in tqdm(range(1, options.max_train_steps + 1), desc="ige", mininterval=10):
        learner.step(train, rng)
        if step % options.validation_steps == 0 or step == options.max_train_steps:
            losses[step] = validation_loss(learner.head, validation, settings)
            logger.info("step %d: validation loss %.4f", step, losses[step])
            if losses[step] < losses[best_step]:
                best, best_step = copy.deepcopy(learner.head), step
            elif sum(one > best_step for one in losses) >= options.patience:
                break
    best.save_pretrained(options.output)
    counts = {"learned from": train, "validated on": validation}
    rows = "\n".join(
        f"| {name} | {len(np.unique(part.image))} | {len(np.unique(part.prompt))} | {len(part)} |"
        for name, part in counts.items()
    )
    card = card_text(
        {
            "library_name": "diffusers",
            "base_model": options.base_model or None,
            "tags": ["diffusers", "mctd-diffusers", "information-gain-evaluator"],
        },
        f"""# Information gain evaluator for {data.family}, refined on searches

The head `{Path(options.init_from).name}`, refined for {best_step} steps on what searches observed:
values of several children of one state. Truncation errors and similarities, which no search
observes, are held where they were.

```bash
{command}
```

| | images | prompts | groups of siblings |
| --- | --- | --- | --- |
{rows}

Negative log likelihood on the images that were not learned from, in nats a group and up to a
constant: {losses[0]:.4f} before, {losses[best_step]:.4f} after.
""",
    )
    (Path(options.output) / "README.md").write_text(card, "utf-8")
    logger.info("saved %s, of step %d (0: nothing was better)", options.output, best_step)
    if options.push_to_hub:
        push(options)


def push(options: Options) -> None:
    """Pushes the saved head with its card."""
    name = options.hub_model_id or Path(options.output).resolve().name
    saved = InformationGainEvaluator.from_pretrained(options.output)
    commit = saved.push_to_hub(name, private=options.hub_private or None)
    logger.info("pushed to %s", commit)


class Best:
    """The head that validated best, kept in a folder, so that a resumed run knows it.

    Args:
        folder: where it is kept.
        step: that the run goes on from; what was found after it is forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.validations: dict[int, float] = {}
        record = folder / "validations.json"
        if step and record.exists():
            found = json.loads(record.read_text("utf-8"))
            self.validations = {int(one): score for one, score in found.items() if int(one) <= step}

    @property
    def step(self) -> int:
        """Of the best validation; 0 before any."""
        return max(self.validations, key=lambda step: self.validations[step], default=0)

    def is_past(self, patience: int) -> bool:
        """Whether so many validations since were not better."""
        return sum(step > self.step for step in self.validations) >= patience

    def offer(
        self, head: InformationGainEvaluator, score: float, step: int, accelerator: Accelerator
    ) -> None:
        """Keeps the head if its score is the best so far."""
        self.validations[step] = score
        if accelerator.is_main_process:
            if self.step == step:
                head.save_pretrained(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.validations, indent=1)
            (self.folder / "validations.json").write_text(text + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Trains, stops early, measures and saves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["accelerate", "launch", "training/train_ige.py", *given])
    output = Path(options.output)
    if options.from_searches:
        if PartialState().is_main_process:  # a matter of a minute
            refine_on_searches(options, command)
        return

    # Seed and accelerator.
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    set_seed(options.seed)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
    )

    # Data.
    log = read_log(options.log)
    splits = split_prompts(
        log,
        train=options.train_split,
        validation_share=options.validation_share,
        seed=options.seed,
    )
    train = splits["train"]
    calibration = fit_calibration(
        train.states.value,
        train.states.log_snr,
        train.trajectories.reward[train.states.trajectory],
    )
    strides = strides_of(train)
    examples = make_examples(splits, calibration, strides)
    shown, states = examples["train"], examples["train"].states
    groups = [states[group] for group in groups_of(shown.cells[states], options.group_size)]
    logger.info("%d states in %d groups, strides %s", len(states), len(groups), strides)

    # Models.
    output.mkdir(parents=True, exist_ok=True)
    if options.report_to != "none":
        accelerator.init_trackers("logs", config=asdict(options))
    head = make_head(log, train, calibration, options)
    if not options.init_from:
        begin_near(head, shown.rows)
    trained = list(head.parameters())
    ema = EMAModel(trained, decay=options.ema_decay)
    logger.info("%.3f M parameters are trained", sum(p.numel() for p in trained) / 1e6)

    # Optimiser.
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in trained if p.ndim > 1],
                "weight_decay": options.weight_decay,
            },
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
    )
    learner, optimizer = accelerator.prepare(head, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    # Loop.
    stop = StopRequest()
    step = load_checkpoint(accelerator, output, options.resume_from_checkpoint)
    best = Best(output / "best", step)
    weights = JumpWeights(
        options.variance_weight,
        options.gain_weight,
        options.similarity_weight,
        options.ranking_weight,
    )
    share = (accelerator.process_index, accelerator.num_processes)
    size = options.train_batch_size * share[1]
    batches = batch_indices(len(groups), size, options.seed, step)
    progress = tqdm(total=options.max_train_steps, initial=step, desc="ige", mininterval=10)
    is_stopping = False
    while step < options.max_train_steps and not is_stopping and not best.is_past(options.patience):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                options.learning_rate,
                options.warmup_steps,
                options.decay_steps,
                options.max_train_steps,
            )
        # What a step draws follows from the seed and the step, so that a resumed run goes on alike.
        rng = np.random.default_rng([options.seed, step, share[0]])
        chosen = np.concatenate([groups[one] for one in next(batches)[share[0] :: share[1]]])
        free = free_jumps(train, calibration, chosen, options.free_jumps, rng)
        rows = JumpRows(
            *(
                np.concatenate([known[chosen], drawn], axis=1)
                for known, drawn in zip(shown.rows, free, strict=True)
            )
        )
        width = rows.target_log_snr.shape[1]
        cells = shown.cells[chosen][:, None] * width + np.arange(width)
        with accelerator.autocast():
            predicted = learner(
                {
                    name: part[chosen].to(accelerator.device)
                    for name, part in shown.features.items()
                },
                torch.from_numpy(train.states.log_snr[chosen]).to(accelerator.device),
                torch.from_numpy(rows.target_log_snr).float().to(accelerator.device),
                torch.from_numpy(rng.random(len(chosen)) < options.typical_share).to(
                    accelerator.device
                ),
            )
        loss, terms = jump_loss(
            {name: part.float() for name, part in predicted.items()},
            targets_of(rows, accelerator.device),
            torch.from_numpy(np.repeat(chosen[:, None], width, axis=1)).to(accelerator.device),
            torch.from_numpy(cells).to(accelerator.device),
            reward_scale=head.config["reward_scale"],
            weights=weights,
        )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learner.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        step += 1
        is_stopping = stop.is_agreed(accelerator)
        progress.update()

        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise ConfigError(f"the loss is {loss.item()} at step {step}; lower learning_rate")
            values = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
            accelerator.log(values, step=step)
            progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        is_last = step == options.max_train_steps
        if is_last or step % options.validation_steps == 0:
            ema.store(trained)
            ema.copy_to(trained)
            figures = validate(head, examples["validation"])
            best.offer(head, figures["score"], step, accelerator)
            ema.restore(trained)
            accelerator.log({f"validation/{name}": one for name, one in figures.items()}, step=step)
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            logger.info("step %d: loss %.3f, within cells: %s", step, loss.item(), text)
        if is_last or is_stopping or step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, output, step, options.checkpoints_total_limit)
    progress.close()

    # Save.
    if is_stopping and step < options.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    elif accelerator.is_main_process:
        head = InformationGainEvaluator.from_pretrained(output / "best")
        correct_variance(head, examples["validation"])
        report = measure(head, examples)
        about = {"command": command, "steps": best.step, "base_model": options.base_model}
        for line in figures_table(report.figures):
            logger.info(line)
        head.register_to_config(_name_or_path="")  # no path of this machine in what is saved
        head.save_pretrained(output)
        calibration_figure(report.judged, report.transforms).savefig(output / "calibration.png")
        (output / "figures.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
        (output / "README.md").write_text(make_card(head, examples, report, about), "utf-8")
        logger.info("saved %s, of step %d", output, best.step)
        if options.push_to_hub:
            push(options)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"train_ige: {error}")
