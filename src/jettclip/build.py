"""Builds the parts of a run from its options: models, loaders, evaluator, optimizer, schedule, reporter.

This is the other half of `main`: nobody else sees the parsed arguments.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from jettclip import openclip
from jettclip.accumulation import batch_norms
from jettclip.data import conversations, tables
from jettclip.data.loader import Loader
from jettclip.data.pipeline import get_wds_dataset
from jettclip.data.row_source import open_rows
from jettclip.data.sample import TeacherTokenizer, Tokenizer
from jettclip.data.sources import Source
from jettclip.detectors import Detectors
from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.evaluate.runner import Evaluator
from jettclip.evaluate.zero_shot import imagenet_folder, zero_shot_metrics
from jettclip.losses.factory import Loss
from jettclip.losses.formula import DISTANCES, find_recipe, parse_formula, teacher_parts_of, views_of
from jettclip.models.factory import Transform, create_model, create_model_and_transforms, get_tokenizer
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.models.two_towers import TwoTowers
from jettclip.params import Options, all_settings
from jettclip.report import Reporter
from jettclip.rules import distillation_pairs, trackers
from jettclip.settings import DataSettings
from jettclip.types import VIEWS, AdapterInfo


class Place(NamedTuple):
    """Where this process stands: its device, and its rank among the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


def build_model(options: Options, place: Place) -> tuple[TwoTowers, Transform, Transform]:
    """Builds the student on its device, with the towers locked as asked, and its transforms, which end in uint8."""
    args = options.args
    model, train, val = create_model_and_transforms(
        args.model,
        args.pretrained or None,
        device=place.device,
        force_quick_gelu=args.force_quick_gelu,
        force_patch_dropout=args.force_patch_dropout,
        force_image_size=args.force_image_size,
        force_context_length=args.force_context_length,
        pretrained_image=args.pretrained_image,
        image_mean=args.image_mean,
        image_std=args.image_std,
        image_interpolation=args.image_interpolation,
        image_resize_mode=args.image_resize_mode,
        cache_dir=args.cache_dir,
        settings=options.model,
        aug_cfg=args.aug_cfg,
    )
    if args.lock_image:
        model.lock_image_tower(args.lock_image_unlocked_groups, args.lock_image_freeze_bn_stats)
    if args.lock_text:
        model.lock_text_tower(args.lock_text_unlocked_layers, args.lock_text_freeze_layer_norm)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.train_data:
        model.train()  # raises for a model that cannot be trained
    return model, openclip.keep_uint8(train), openclip.keep_uint8(val)


def build_teachers(args: Namespace, student: TwoTowers, place: Place) -> Ensemble | None:
    """Builds the models of ``--distill-model``, which the training asks, if there are any."""
    if not (args.distill_model and args.train_data):
        return None
    teachers = []
    for name, pretrained in distillation_pairs(args):
        model = create_model(name, pretrained, device=place.device, cache_dir=args.cache_dir)
        teacher = Teacher(model, name)
        height, width = teacher.image_size
        logging.info(
            f"Teacher {name} sees the student's views at {height} x {width} pixels and reads the first "
            f"{model.context_length} tokens of a caption; its logit scale is {teacher.info.logit_scale:.1f}"
        )
        teachers.append(teacher)
    return Ensemble(teachers, student.mean, student.std)


def build_train_loader(
    options: Options, model: TwoTowers, transform: Transform, teachers: Ensemble | None, place: Place
) -> Loader | None:
    """Builds the loader of ``--train-data``, if there is any."""
    args = options.args
    if not args.train_data:
        return None
    recipe = find_recipe(options.loss)
    contrasts = sorted({summand.term for summand in parse_formula(recipe.formula)} - {*DISTANCES})
    if contrasts and global_batch(args, place) == 1:
        raise ValueError(
            f"--batch-size {args.batch_size} on 1 rank leaves the loss {recipe.formula!r} one pair a step, and "
            f"{', '.join(contrasts)} would learn nothing without others to tell it from; give a larger --batch-size or "
            "--accum-freq"
        )
    teacher_tokenizers = [
        TeacherTokenizer(get_tokenizer(teacher.name, cache_dir=args.cache_dir), teacher.model.ignores_padding)
        for teacher in (teachers.teachers if teachers else [])
    ]
    if options.data.shifts_pads and not model.end_token_is_largest:
        raise ValueError(
            f"--short-caption-policy {options.data.short_caption_policy}: where captions of {args.model} end cannot be "
            "told from token ids, so that their padding cannot be moved; leave out pad-shift"
        )
    loader = get_wds_dataset(
        options.data,
        open_source(args, options.data, args.train_data, args.train_num_samples),
        transform,
        build_tokenizer(args, model),
        is_train=True,
        batch_size=args.batch_size,
        accumulated=args.accum_freq,
        views=views_of(recipe),
        teacher_parts=teacher_parts_of(recipe),
        teacher_tokenizers=teacher_tokenizers,
        adapter=adapter_of(args, model),
        crop_captions=model.ignores_padding,
        num_samples=args.train_num_samples,
        resampled=args.dataset_resampled,
        weights=args.train_data_upsampling_factors,
        workers=args.workers,
        rank=place.rank,
        world_size=place.world_size,
        seed=args.seed,
    )
    logging.info(
        f"Training in {loader.num_batches // args.accum_freq} steps an epoch, on a global batch of "
        f"{global_batch(args, place)} pairs: {args.batch_size} in a batch x {place.world_size} ranks x "
        f"{args.accum_freq} accumulated"
    )
    return loader


def global_batch(args: Namespace, place: Place) -> int:
    """Returns how many pairs there are in a step, over all ranks and micro-batches."""
    return int(args.batch_size * place.world_size * args.accum_freq)


def open_source(args: Namespace, settings: DataSettings, path: str, num_samples: int | None) -> str | Source:
    """Opens data that is not in shards; returns the path of shards as it is."""
    kind = settings.dataset_type if settings.dataset_type != "auto" else _kind_of(path)
    if kind == "webdataset":
        return path
    if args.dataset_resampled:
        raise ValueError(f"--dataset-resampled draws shards, and {path!r} has none; leave it out")
    return open_rows(
        kind,
        path,
        separator=args.csv_separator,
        image_column=args.csv_img_key,
        caption_column=args.csv_caption_key,
        num_samples=num_samples,
        image_root=settings.image_root or None,
        max_drop_rate=settings.max_drop_rate,
    )


def _kind_of(path: str) -> str:
    if os.path.isdir(path):
        return "folder"
    name = path.lower()
    if name.endswith(tables.SUFFIXES):
        return "csv"
    return "json" if name.endswith(conversations.SUFFIXES) else "webdataset"


def build_tokenizer(args: Namespace, model: TwoTowers) -> Tokenizer | None:
    """Builds the student's tokenizer; an adapter, which reads stored embeddings, has none."""
    if model.embedding_width is not None:
        return None
    return get_tokenizer(args.model, model.context_length, cache_dir=args.cache_dir)


def adapter_of(args: Namespace, model: TwoTowers) -> AdapterInfo | None:
    """Returns what the data must know of a student that reads stored embeddings, and None for any other."""
    return None if model.embedding_width is None else AdapterInfo(args.model, model.embedding_width)


def build_evaluator(options: Options, model: TwoTowers, transform: Transform, place: Place) -> Evaluator:
    """Builds what ``--val-data`` and ``--imagenet-val`` ask for."""
    args, device = options.args, place.device
    if options.evaluation.val_truncate and not model.end_token_is_largest:
        raise ValueError(
            f"--val-truncate: where captions of {args.model} end cannot be told from token ids; leave it out"
        )
    autocast = openclip.get_autocast(args.precision, device_type=device.type)
    evaluator = Evaluator(
        device,
        autocast,
        val_frequency=args.val_frequency,
        zero_shot_frequency=args.zeroshot_frequency,
        truncate=options.evaluation.val_truncate,
    )
    if args.val_data:
        views = set(views_of(find_recipe(options.loss)))
        if not options.data.text_embeddings:  # which need not be there for a view that the loss does not read
            views.add("long")
            if options.data.short_caption_way != "none":  # else a sample without a short caption would be dropped
                views.add("short")
        evaluator.val = get_wds_dataset(
            options.data.for_evaluation,
            open_source(args, options.data.for_evaluation, args.val_data, args.val_num_samples),
            transform,
            build_tokenizer(args, model),
            is_train=False,
            batch_size=args.batch_size,
            views=[view for view in VIEWS if view in views],
            adapter=adapter_of(args, model),
            crop_captions=model.ignores_padding,
            num_samples=args.val_num_samples,
            workers=args.workers,
            rank=place.rank,
            world_size=place.world_size,
        )
    if args.imagenet_val:
        evaluator.zero_shot = partial(
            zero_shot_metrics,
            tokenizer=get_tokenizer(args.model, model.context_length, cache_dir=args.cache_dir),
            images=imagenet_folder(args.imagenet_val, transform),
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            autocast=autocast,
        )
    return evaluator


def build_engine(args: Namespace, model: TwoTowers, loss: Loss, place: Place) -> tuple[DDPEngine, Optimizer]:
    """Builds the engine around the student and its loss, and the optimizer, for the schedule."""
    warning = logging.WARNING if place.rank == 0 else logging.DEBUG  # one rank speaks for all
    if place.device.type == "cpu" and args.precision != "fp32":
        logging.log(
            warning, f"--precision {args.precision} is much slower than fp32 on most CPUs; try --precision fp32"
        )
    if args.use_bn_sync and place.device.type == "cpu":
        raise ValueError("--use-bn-sync needs GPUs, torch has no synchronised BatchNorm for the CPU; leave it out")
    norms = len(batch_norms(model))
    if args.accum_freq > 1 and norms:
        logging.log(
            warning,
            f"--accum-freq {args.accum_freq}: the {norms} BatchNorm layers of {args.model} normalise by the statistics "
            f"of one micro-batch, not of all {args.accum_freq}, so that the gradient is not that of one batch of "
            f"{args.accum_freq * args.batch_size} rows; running statistics take in every micro-batch once. A larger "
            "--batch-size with --grad-checkpointing comes nearer",
        )
    student = Student(model, loss).to(place.device)
    optimizer = create_optimizer(
        student,
        args.opt,
        lr=args.lr,
        weight_decay=args.wd,
        beta1=args.beta1,
        beta2=args.beta2,
        eps=args.eps,
        momentum=args.momentum,
    )
    engine = DDPEngine(
        student,
        optimizer,
        place.device,
        precision=args.precision,
        clip_norm=args.grad_clip_norm,
        logit_scale_max=loss.recipe.logit_scale_max,
        static_graph=args.ddp_static_graph,
        sync_batch_norm=args.use_bn_sync,
        compile_model=args.torchcompile,
    )
    return engine, optimizer


def build_schedule(args: Namespace, optimizer: Optimizer, epoch_steps: int) -> Callable[[int], float]:
    """Builds OpenCLIP's learning rate schedule: a function that sets the rate for a step, and returns it."""
    steps = epoch_steps * args.epochs
    if args.skip_scheduler:
        return lambda _: float(args.lr)
    if args.warmup >= steps:
        logging.warning(
            f"--warmup {args.warmup} is not over in the {steps} steps of this run: --lr {args.lr} is not reached"
        )
    if args.lr_scheduler == "cosine":
        schedule = openclip.cosine_lr(optimizer, args.lr, args.warmup, steps)
    elif args.lr_scheduler == "const":
        schedule = openclip.const_lr(optimizer, args.lr, args.warmup, steps)
    else:
        cooldown = epoch_steps * args.epochs_cooldown
        power, end = args.lr_cooldown_power, args.lr_cooldown_end
        schedule = openclip.const_lr_cooldown(optimizer, args.lr, args.warmup, steps, cooldown, power, end)
    return schedule


def build_detectors(args: Namespace, loss: Loss, place: Place) -> Detectors:
    """Builds what notices training that gets nowhere."""
    largest = loss.recipe.logit_scale_max
    scale_limits = (1.0, largest) if largest else None  # as the engine holds it
    warmup = 0 if args.skip_scheduler else args.warmup
    return Detectors(global_batch(args, place), warmup=warmup, scale_limits=scale_limits)


def build_reporter(options: Options, folder: Path | None, first_step: int | None, place: Place) -> Reporter:
    """Builds the reporter of the run, which on ranks other than 0 reports nothing."""
    args = options.args
    return Reporter(
        folder if place.rank == 0 else None,
        trackers(args),
        name=args.name or (folder.name if folder else ""),
        config=all_settings(options),
        project=args.wandb_project_name,
        notes=args.wandb_notes,
        first_step=first_step,
    )
