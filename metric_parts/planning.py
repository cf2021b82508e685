"""The sampler applied to a run: its rows, its settings, and how many optimizer steps they make."""

from __future__ import annotations

from metric_parts.corpus import Corpus
from metric_parts.sampler import EpochPlan, SamplerRows, SamplerSettings, plan_epoch
from metric_parts.settings import TrainerSettings


def sampler_rows(corpus: Corpus) -> SamplerRows:
    """What the sampler needs to know of the training rows."""
    train = corpus.train
    codes = corpus.labels.codes(train.labels)
    return SamplerRows(codes, train.metric_mask, train.classifier_mask, train.text_keys)


def plan_of(corpus: Corpus, *, settings: TrainerSettings, epoch: int) -> EpochPlan:
    """The plan of an epoch; with the gradient cache a planned batch is a whole accumulation window."""
    training = settings.training
    n_together = training.gradient_accumulation_steps if training.gradient_cache else 1
    sampling = SamplerSettings(
        training.batch_size * n_together,
        training.samples_per_class,
        upsample=settings.data.upsample,
        downsample=settings.data.downsample,
    )
    return plan_epoch(sampler_rows(corpus), settings=sampling, seed=training.seed, epoch=epoch)


def count_steps(corpus: Corpus, *, settings: TrainerSettings) -> int:
    """Optimizer steps of the run, for the schedule: those of the first epoch, times the epochs."""
    training = settings.training
    n_batches = len(plan_of(corpus, settings=settings, epoch=0).batches)
    a_step = 1 if training.gradient_cache else training.gradient_accumulation_steps
    return -(-n_batches // a_step) * training.num_epochs
