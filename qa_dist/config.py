"""`RunConfig`: every setting of a run, complete, frozen and checked.

The engine, the precision and the number of processes are not here: Accelerate's launch config is their
one source. How a `RunConfig` comes out of YAML files and command-line flags is in `config_sources.py`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


def _as_names(value: object) -> object:
    return () if value is None or value == ["none"] else (value,) if isinstance(value, str | Path) else value


FileNames = Annotated[tuple[Annotated[str, "PATH"], ...], BeforeValidator(_as_names)]
"""One file name or several."""
Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
ColumnName = Annotated[str, Field(coerce_numbers_to_str=True)]
"""A column's name, or its number."""


class Section(BaseModel):
    """One section of the config: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class SyntheticConfig(Section):
    """A built-in corpus of the task, generated from a seed: for demos and tests, without a network."""

    train_examples: PositiveInt = 6000
    """Number of training examples."""
    validation_examples: PositiveInt = 600
    """Number of held-out examples, on other contexts than the training ones."""
    unanswerable_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of questions that the context does not answer; needs data.unanswerable allow."""
    long_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of contexts (or texts) of about 250 words, longer than one window of the demo."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the corpus; the same seed gives the same corpus on every machine."""


class DataConfig(Section):
    """Where examples come from, and how they are cut into windows."""

    train_file: FileNames = ()
    """Training examples: one or more files, or patterns such as data/*.json. SQuAD's nested JSON, a flat JSON list,
    JSON lines, CSV, TSV or Parquet; for token classification columns as in the CoNLL shared tasks, JSON, JSON lines or
    Parquet. Each may be compressed with gzip."""
    validation_file: FileNames = ()
    """Validation examples, in the same forms; where nothing names any, nothing is evaluated."""
    dataset: str | None = None
    """Instead of files: a data set, as an id on the Hugging Face Hub or a directory of the `datasets` library."""
    dataset_config: str | None = None
    """Configuration of the data set, where it has several."""
    train_split: str = "train"
    """Split of the data set to train on."""
    validation_split: str | None = "validation"
    """Split of the data set to evaluate on."""
    columns: dict[str, ColumnName] = {}
    """Names of the columns, where they are not id, question, context and answers; answers may also be the two columns
    answer_text and answer_start. Such as {context: passage, id: question_id}. For token classification id, tokens and
    ner_tags, such as {ner_tags: labels}; of columns without names their numbers, such as {tokens: 2}."""
    labels: Names = ()
    """For token classification: the names of all labels, such as O B-PER I-PER, in the order of their numbers where
    tags are numbers. By default those of the data set, or those found in the training examples."""
    validation_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training examples to hold out for validation, in whole contexts (or sentences); instead of
    validation data."""
    max_train_samples: PositiveInt | None = None
    """Train on the first so many examples only."""
    max_validation_samples: PositiveInt | None = None
    """Evaluate on the first so many examples only."""
    synthetic: SyntheticConfig | None = None
    """Generate the corpus instead of reading files."""
    on_misaligned: Literal["error", "drop", "repair"] = "error"
    """What to do with an answer_start that does not point at its text: stop, leave the answer out, or move it
    to the nearest place where the text stands (and leave it out where there is none)."""
    unanswerable: Literal["error", "drop", "allow"] = "error"
    """What to do with questions that have no answer: stop, leave them out, or learn to predict "no answer"
    (SQuAD 2.0)."""
    max_length: PositiveInt = 384
    """Longest window, in tokens: question, context (or words) and special tokens together."""
    stride: NonNegativeInt = 128
    """Tokens, of the context or the words, that two neighbouring windows of one example share."""
    cache_dir: Path | None = None
    """Where prepared features are kept; by default qa_dist/ in the cache of `datasets`."""


class ModelConfig(Section):
    """The model and its tokenizer."""

    name: str | None = None
    """Pretrained model: a directory, or an id on the Hugging Face Hub."""
    config: dict[str, JsonValue] | None = None
    """Instead of a name: settings of a model trained from scratch, as in its config.json; needs model_type."""
    tokenizer: str | None = None
    """Tokenizer directory or Hub id, where it is not the model's own."""
    vocab_size: PositiveInt = 4000
    """Vocabulary of the tokenizer that is trained on the training texts when there is a config and no tokenizer."""
    attention: Literal["auto", "sdpa", "eager", "varlen"] = "auto"
    """How attention is computed: as transformers finds best for the model, by PyTorch's fused kernels (sdpa), step by
    step (eager), or on windows laid end to end without padding (varlen; NVIDIA GPUs in bf16 or fp16; BERT, RoBERTa,
    DistilBERT and their like)."""
    trust_remote_code: bool = False
    """Run code that comes with the model's repository. Only for repositories whose code you have read."""


class TrainConfig(Section):
    """Optimization. A global batch is the same set of examples however many processes share it."""

    epochs: PositiveInt = 2
    """Passes over the training examples."""
    global_batch_size: PositiveInt = 32
    """Windows per optimizer step, over all processes and accumulation steps together."""
    tokens_per_batch: PositiveInt | None = None
    """Instead of a number of windows per optimizer step: most tokens, not counting padding. A step then has more
    short windows, or fewer long ones."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Most windows that one process takes at once; gradients are accumulated until the global batch is whole.
    By default a process takes its whole share at once; with auto as much of it as the GPU's memory holds."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: to zero in a line, to zero along a cosine, or level."""
    warmup_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; biases and normalization weights are left out."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of AdamW's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Term added to AdamW's denominator."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Gradients are scaled down to this norm, on every engine alike; zero leaves them as they are. Those of question
    answering are large (about 15 for a small BERT): clipped to the usual 1, short runs learn markedly less."""
    group_by_length: bool = True
    """Build batches of windows of similar length, so that little is padded."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more work."""
    compile: bool = False
    """Compile the model (torch.compile). Lengths are then padded to multiples of 64, so that there are few shapes."""
    tf32: bool = True
    """Let GPUs that can multiply float32 matrices in TensorFloat-32: several times faster, 10 bits of mantissa."""
    max_skipped_steps: PositiveInt = 20
    """Stop when so many float16 steps in a row have overflowed and were left out."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of the new weights, the order of the examples and dropout."""


class EvaluationConfig(Section):
    """Evaluation after every epoch."""

    batch_size: PositiveInt = 32
    """Windows per process and forward pass."""
    at_start: bool = False
    """Also evaluate before the first step."""
    n_best: int = Field(default=20, ge=1, le=100)
    """Starts and ends considered per window, and answers kept per example."""
    max_answer_length: PositiveInt = 30
    """Longest answer, in tokens."""
    null_score_diff_threshold: float = 0.0
    """With data.unanswerable allow: predict no answer where its score exceeds the best answer's by more."""


class OutputConfig(Section):
    """The run directory and what is written while training."""

    name: str | None = None
    """Name of the run; by default that of run.output_dir, or else of the config file; of an evaluation without
    run.output_dir, one that is made of the model's and the data's names."""
    output_dir: Path | None = None
    """The run directory; by default runs/ and the run's name."""
    timeout_minutes: PositiveInt = 60
    """How long preparing the data, scoring an evaluation, or writing a checkpoint to the disk may take, and how long a
    process waits for another one that is alive. The first step, and the first batch of an evaluation where kernels
    have to be chosen or compiled, have this limit too."""
    step_timeout_minutes: PositiveFloat = 10.0
    """How long a step of training, or a batch of an evaluation, may take, and how long a process may give no sign of
    life (frozen, or its machine gone) whatever the run is doing. Beyond it the run ends with where each process was."""
    max_hours: PositiveFloat | None = None
    """Stop with a checkpoint after so many hours; the same command with --resume auto continues."""
    end_margin_minutes: PositiveFloat = 5.0
    """In a SLURM job: stop with a checkpoint so long before its time limit; at most a quarter of the time there is."""
    log_every: PositiveInt = 10
    """Optimizer steps between two logged ones."""
    export: Literal["last", "best"] = "last"
    """Which epoch's weights and predictions the run directory ends with."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights in model/."""


def _as_interval(value: object) -> object:
    """`500` is 500 steps."""
    return f"{value} steps" if isinstance(value, int) and not isinstance(value, bool) else value


def _interval(text: str) -> tuple[int, str]:
    """Number and unit of such as "500 steps", the unit in the singular; (0, "") for none."""
    if text == "none":
        return 0, ""
    digits = "".join(character for character in text if character.isdigit())
    return int(digits), text[len(digits) :].strip().rstrip("s")


class CheckpointConfig(Section):
    """Complete states of the run, from which it can go on: checkpoints/ in the run directory."""

    every: Annotated[
        str, BeforeValidator(_as_interval), Field(pattern=r"^(none|[1-9]\d* ?(steps?|epochs?|minutes?))$")
    ] = "1 epoch"
    """How often one is written, such as 500 steps, 1 epoch or 30 minutes; or none. There is also one when a run ends or
    is asked to stop."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Number of checkpoints to keep beside them, by their evaluation's score. Those of an epoch's end have one."""

    @property
    def interval(self) -> tuple[int, str]:
        """Number and unit: step, epoch or minute; (0, "") for none."""
        return _interval(self.every)


class HubConfig(Section):
    """Pushing to the Hugging Face Hub in the background. The token is that of the environment (HF_TOKEN) or of
    `hf auth login`; it has no place here."""

    repo_id: str | None = None
    """Model repository to push to, as user/name; it is made if it is not there. None: nothing is pushed."""
    private: bool = True
    """Whether a repository that is made is private."""
    branch: str = "training-state"
    """Branch of the training states, from which a run can go on; the model itself lies on main."""
    push_every: Annotated[
        str,
        BeforeValidator(_as_interval),
        Field(pattern=r"^(none|[1-9]\d* ?(checkpoints?|steps?|epochs?|minutes?))$"),
    ] = "1 checkpoint"
    """How often at most a checkpoint is pushed, such as 1 checkpoint (each one), 500 steps, 2 epochs or 30 minutes, and
    the model of an epoch likewise; none: only what a run ends with. The first and the last are always pushed."""
    keep: PositiveInt = 2
    """Number of newest training states to keep on the Hub."""
    keep_models: PositiveInt | None = None
    """Number of models that the history of main may hold; where there are more, it is squashed to its newest commit,
    which frees their storage. All files stay, also those of other people. None: all of them."""
    strict: bool = True
    """Whether a run does not start when the Hub cannot be reached, or the token cannot write; else it is a warning."""
    drain_timeout: PositiveFloat = 600.0
    """Seconds that a run which is done waits for its last pushes."""
    license: str | None = None
    """Licence of the model, for its card, such as apache-2.0."""

    @property
    def interval(self) -> tuple[int, str]:
        """Number and unit: checkpoint, step, epoch or minute; (0, "") for none."""
        return _interval(self.push_every)


CARRIED_SETTINGS = (
    "task",
    "data.max_length",
    "data.stride",
    "data.unanswerable",
    "train.tf32",
    "evaluation.batch_size",
    "evaluation.n_best",
    "evaluation.max_answer_length",
    "evaluation.null_score_diff_threshold",
)
"""Settings that travel with a trained model, for whoever uses it; nothing else is taken from there."""


OWN_SETTINGS = {
    "question_answering": (
        "data.synthetic.unanswerable_share",
        "data.on_misaligned",
        "data.unanswerable",
        "evaluation.n_best",
        "evaluation.max_answer_length",
        "evaluation.null_score_diff_threshold",
    ),
    "token_classification": ("data.labels",),
}
"""Settings that mean something to one task only."""


FREE_TO_CHANGE = (
    "run",
    "checkpoint",
    "hub",
    "evaluation.batch_size",
    "evaluation.at_start",
    "data.cache_dir",
    "data.max_validation_samples",
    "data.train_file",
    "data.validation_file",
    "data.dataset",
    "data.dataset_config",
    "data.train_split",
    "data.columns",
    "model.name",
    "model.tokenizer",
    "model.attention",
    "model.trust_remote_code",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.tf32",
    "train.max_skipped_steps",
)
"""Settings, or sections, that may differ when a run is resumed: they change where things lie, or how fast they are
computed. That training data and tokenizer are the same is seen from the features themselves."""


BATCHING = ("train.global_batch_size", "train.tokens_per_batch", "train.group_by_length")
"""Settings that decide which examples are trained on together. They can change at the end of an epoch only."""


class RunConfig(Section):
    """Every setting of a run."""

    task: Literal["question_answering", "token_classification"] = "question_answering"
    """What is learned."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hub: HubConfig = HubConfig()
    run: OutputConfig = OutputConfig()

    @property
    def output_dir(self) -> Path:
        return self.run.output_dir or Path("runs") / (self.run.name or "run")
