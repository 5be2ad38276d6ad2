"""Builds the loader of a data set: where its samples, features and embeddings come from, and how they are divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

from PIL import Image
from torch import Tensor

from jettclip.data.captions import CaptionField, Field
from jettclip.data.collate import collate
from jettclip.data.counts import DataError
from jettclip.data.embedding_tars import EmbeddingTars
from jettclip.data.loader import Loader, ShardPipeline
from jettclip.data.plan import divide
from jettclip.data.reinforced import MixedCaptions, ReinforcedFeatures, SyntheticCaptions
from jettclip.data.sample import FeatureSource, SampleReader, TeacherTokenizer, Tokenizer
from jettclip.data.sources import ShardSource, Source
from jettclip.data.store_group import StoreGroup, check_width, open_stores
from jettclip.settings import DataSettings
from jettclip.types import VIEWS, AdapterInfo, TeacherInfo


def get_wds_dataset(
    settings: DataSettings,
    urls: str | Sequence[str] | Source,
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Tokenizer | None,
    *,
    is_train: bool,
    batch_size: int,
    accumulated: int = 1,
    views: Sequence[str] = ("short", "long"),
    teacher_parts: Sequence[str] = ("image", "short", "long"),
    teacher_tokenizers: Sequence[TeacherTokenizer] = (),
    adapter: AdapterInfo | None = None,
    crop_captions: bool = False,
    num_samples: int | None = None,
    resampled: bool = False,
    weights: str | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> Loader:
    """Builds the loader of a data set in webdataset shards, or from another source of samples.

    It yields ``Batch(image, short_caption, long_caption, teacher)``. The order is a function of seed, epoch, rank and
    number of workers.

    Args:
        settings: caption fields, feature stores, limits.
        urls: shards, with braces, joined by ``::``, or a list of such; or a source.
        preprocess: PIL image to uint8 or float tensor [3, H, W].
        tokenizer: caption to token ids [1, L]; None where `settings` say that captions are stored embeddings.
        is_train: shuffled full batches, the same number on every rank; otherwise every sample once, in order.
        batch_size: rows of a batch on this rank.
        accumulated: batches of a training step, of which an epoch has a multiple; what is left over begins the next.
        views: the captions to read, of ``short`` and ``long``.
        teacher_parts: what to read from the feature stores that `settings` names, or to ask teachers of.
        teacher_tokenizers: of teachers that are asked in training, whose token ids the batch then carries in place of
            stored features.
        adapter: what reads stored embeddings, whose width they must have; any width will do if it is None.
        crop_captions: crop token ids to the longest caption of the batch; exact for towers whose embedding does not
            depend on padding.
        num_samples: samples of an epoch, over all ranks; the whole data set by default, and at most in evaluation.
        resampled: draw the shards with replacement, by weight, in training.
        weights: one number a source, separated by ``::``, for `resampled`.
        workers: loader processes; 0 reads in this one.
        rank, world_size: which share of the data this process reads.
        seed: of the order and of the random transform.

    Raises:
        DataError: if shards or stores are missing, hold less than one step, or embeddings of another width.
        ValueError: if `teacher_parts` names a view that is not read, or there is no tokenizer for captions of text.
    """
    resampled = resampled and is_train
    source = (
        ShardSource(urls, weights, resampled=resampled, allow_pipe=settings.allow_pipe_urls)
        if isinstance(urls, (str, list, tuple))
        else cast("Source", urls)
    )
    unread = sorted({*teacher_parts} - {"image", *views})
    if unread and (settings.feature_stores or settings.dataset_reinforcement or teacher_tokenizers):
        raise ValueError(f"teacher_parts {unread} need captions that views {[*views]} leaves out; add them there")
    if source.row_by_row and (settings.feature_stores or settings.text_embeddings):
        raise DataError(
            f"features and embeddings stand beside shards, and {urls_of(source)[0]!r} is none; make shards of it with "
            "scripts/build_shards.py"
        )
    features = open_features(settings, source) if teacher_parts and not teacher_tokenizers else None
    reader = SampleReader(
        settings,
        preprocess,
        tokenizer,
        tuple(views),
        stores=features,
        teacher_parts=tuple(teacher_parts),
        embeddings=open_embeddings(settings, source, adapter),
        seed=seed,
        teacher_tokenizers=teacher_tokenizers,
        adapter=adapter,
        fields=caption_fields(settings),
        sequential=settings.dataset_reinforcement_sample_sequential,
    )
    available = sum(shard.size for shard in source.shards)
    dataset = ShardPipeline(
        source,
        reader,
        divide(available, num_samples, batch_size, is_train, rank, world_size, workers, accumulated),
        collate=partial(
            collate,
            crop_captions=crop_captions and not settings.text_embeddings,
            crop_teachers=[teacher.crop for teacher in teacher_tokenizers],
        ),
        settings=settings,
        resampled=resampled,
        seed=seed,
    )
    return Loader(dataset, workers, features.teachers if features else [])


def open_features(settings: DataSettings, source: Source) -> FeatureSource | None:
    """Opens the stored features of the teachers, if there are any."""
    if settings.dataset_reinforcement:
        scales = settings.distill_logit_scale * len(settings.distill_teacher_dimension)
        widths = enumerate(zip(settings.distill_teacher_dimension, scales, strict=False))
        teachers = [TeacherInfo(f"teacher {n}", width, scale) for n, (width, scale) in widths]
        return ReinforcedFeatures(teachers, CaptionField(settings.real_caption_field))
    return _open_stores(settings, source, settings.feature_stores) if settings.feature_stores else None


def open_embeddings(
    settings: DataSettings, source: Source, adapter: AdapterInfo | None
) -> StoreGroup | EmbeddingTars | Literal["members"] | None:
    """Opens what stands for captions in the place of text, if anything does."""
    if settings.text_embeddings == "members":
        return "members"
    if settings.text_embeddings == "tars":
        return EmbeddingTars(urls_of(source), settings.on_missing_features)
    if not settings.text_embeddings:
        return None
    stores = _open_stores(settings, source, [settings.text_embeddings])
    if adapter:
        check_width(stores, adapter)
    return stores


def caption_fields(settings: DataSettings) -> dict[str, Field] | None:
    """Returns where captions stand if not where the caption flags say, as LLM2CLIP's and DataCompDR's do."""
    if settings.text_embeddings == "tars" and settings.has_usual_caption_fields:
        return {view: CaptionField(f"{view}SV_captions") for view in VIEWS}
    if not settings.dataset_reinforcement:
        return None
    real = CaptionField(settings.real_caption_field)
    synthetic = SyntheticCaptions(settings.dataset_reinforcement_syn_text_key_regex)
    if settings.dataset_reinforcement_mix_synthetic:
        return {"long": MixedCaptions(real, synthetic, settings.dataset_reinforcement_mix_synthetic_ratio)}
    return {"long": real, "short": synthetic}


def _open_stores(settings: DataSettings, source: Source, names: Sequence[str]) -> StoreGroup:
    return open_stores(urls_of(source), names, settings.features_dir, settings.on_missing_features)


def urls_of(source: Source) -> list[str]:
    """Returns the shards of a source, each once."""
    return list(dict.fromkeys(shard.url for shard in source.shards))
