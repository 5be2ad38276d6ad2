"""Settings of a data set: feature stores, stored augmentation, and the order."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from jettclip.settings.option import comma_separated, option
from jettclip.settings.sample import SampleSettings


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class DataSettings(SampleSettings):
    """Data: samples, feature stores, and the order."""

    dataset_type: str = option(
        "auto",
        "webdataset shards, or data without shards: a csv (also TSV and Parquet), a folder of pictures and .txt files, "
        "a json list of conversations, or synthetic pictures; 'auto' goes by the suffix.",
        choices=("auto", "webdataset", "csv", "folder", "json", "synthetic"),
    )
    image_root: str = option("", "Folder of the pictures that a table or JSON list names; its own by default.")
    text_embeddings: str = option(
        "",
        "Captions are stored embeddings instead of text: 'members' if the caption fields hold raw float32, 'tars' if "
        "those stand in NNNNN_text_embeddings.tar beside each shard (LLM2CLIP), or the name of a feature store.",
    )
    features: str = option("", "Feature stores to distil from, by name; several teachers separated by commas.")
    features_dir: str = option("", "Folder of the feature stores; beside the shards by default.")
    on_missing_features: str = option(
        "error", "What a missing or stale feature row is: an error, or a counted drop.", choices=("error", "drop")
    )
    shuffle_buffer: int = option(5000, "Samples each worker holds back to shuffle them.")
    dataset_reinforcement: bool = option(
        False, "Samples carry teacher features and augmentations of MobileCLIP's DataCompDR: syn.json, paug.json, npz."
    )
    dataset_reinforcement_mix_synthetic: bool = option(
        False, "Let synthetic captions take the place of real ones, with their features, in place of a second view."
    )
    dataset_reinforcement_mix_synthetic_ratio: float = option(0.0, "The chance that one does.")
    dataset_reinforcement_sample_sequential: bool = option(
        False, "Take the stored augmentations in turn, one an epoch, instead of at random."
    )
    dataset_reinforcement_syn_text_key_regex: str = option("^syn_text.*$", "Keys of syn.json to take captions from.")
    distill_teacher_dimension: tuple[int, ...] = option(
        (768, 768), "Widths of the teachers side by side in the features of --dataset-reinforcement."
    )
    distill_logit_scale: tuple[float, ...] = option(
        (100.0,), "S = exp(logit scale) of those teachers: one for each, or one for all."
    )

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        found = super().problems()
        if self.shuffle_buffer < 1:
            found.append(f"--shuffle-buffer {self.shuffle_buffer} must be at least 1, which means no shuffling")
        if self.features_dir and not (self.features or self.text_embeddings):
            found.append(f"--features-dir {self.features_dir} is of no use alone; name the store with --features")
        return found + self._reinforcement_problems()

    def _reinforcement_problems(self) -> list[str]:
        ratio, mixes = self.dataset_reinforcement_mix_synthetic_ratio, self.dataset_reinforcement_mix_synthetic
        widths, scales = self.distill_teacher_dimension, self.distill_logit_scale
        checks = [
            (
                not 0 <= ratio <= 1,
                f"--dataset-reinforcement-mix-synthetic-ratio {ratio:g} must be a chance between 0 and 1",
            ),
            (
                ratio and not mixes,
                f"--dataset-reinforcement-mix-synthetic-ratio {ratio:g} does nothing alone; "
                "add --dataset-reinforcement-mix-synthetic",
            ),
            (
                self.dataset_reinforcement and (self.features or self.text_embeddings),
                "--dataset-reinforcement takes teacher features from the samples; leave out --features and "
                "--text-embeddings, or leave it out",
            ),
            (
                self.dataset_reinforcement and not self.real_caption_field,
                f"--long-caption-field {self.long_caption_field}: with --dataset-reinforcement the real caption has "
                "one place, since the stored features are of the caption there; name it, such as txt",
            ),
            (
                not _is_expression(self.dataset_reinforcement_syn_text_key_regex),
                f"--dataset-reinforcement-syn-text-key-regex {self.dataset_reinforcement_syn_text_key_regex!r} is no "
                "regular expression; give one such as ^syn_text.*$",
            ),
            (
                min(widths, default=0) < 1,
                f"--distill-teacher-dimension {list(widths)} must be positive widths, such as 768 768",
            ),
            (
                min(scales, default=0) <= 0 or len(scales) not in (1, len(widths)),
                f"--distill-logit-scale {list(scales)} must be positive, one for all or one for each of the "
                f"{len(widths)} teachers of --distill-teacher-dimension, such as 100",
            ),
        ]
        return [message for wrong, message in checks if wrong] + self._idle_flags()

    def _idle_flags(self) -> list[str]:
        """Returns the flags that do nothing for want of another one."""
        if self.dataset_reinforcement:
            return []
        names = [
            "dataset_reinforcement_mix_synthetic", "dataset_reinforcement_syn_text_key_regex",
            "distill_teacher_dimension", "distill_logit_scale",
        ]  # fmt: skip
        if not self.features:  # whose augmentations can be taken in turn too
            names.append("dataset_reinforcement_sample_sequential")
        defaults = {setting.name: setting.default for setting in fields(DataSettings)}
        return [
            f"--{name.replace('_', '-')} needs the samples of --dataset-reinforcement; add it, or leave the flag out"
            for name in names
            if getattr(self, name) != defaults[name]
        ]

    @property
    def has_usual_caption_fields(self) -> bool:
        """Whether nothing was said of where captions stand."""
        usual = SampleSettings.short_caption_field, SampleSettings.long_caption_field
        return (self.short_caption_field, self.long_caption_field) == usual

    @property
    def real_caption_field(self) -> str:
        """Where the real caption of a sample with stored features stands, ``txt`` if nothing is said; or nothing."""
        if self.long_caption_field == SampleSettings.long_caption_field:
            return "txt"
        return "" if set(self.long_caption_field) & set(",+") else self.long_caption_field

    @property
    def for_evaluation(self) -> DataSettings:
        """The same without teachers, and with short captions that nothing is drawn for."""
        kind = "auto" if self.dataset_type == "synthetic" else self.dataset_type
        policy = "none" if self.short_caption_way == "none" else "first-sentence"
        return replace(self, features="", dataset_reinforcement=False, dataset_type=kind, short_caption_policy=policy)

    @property
    def feature_stores(self) -> list[str]:
        """The names in `features`."""
        return comma_separated(self.features)
