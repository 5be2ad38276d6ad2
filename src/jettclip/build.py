"""Builds the parts of a run from its options: models, loaders, evaluator, optimizer, schedule, reporter.

This is the other half of `main`: nobody else sees the parsed arguments.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from jettclip import openclip
from jettclip.data.pipeline import Loader, get_wds_dataset
from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.evaluate.runner import Evaluator
from jettclip.evaluate.zero_shot import imagenet_folder, zero_shot_metrics
from jettclip.losses.factory import Loss, teacher_parts_of, views_of
from jettclip.losses.formula import find_recipe
from jettclip.models.factory import (
    Transform,
    create_model,
    create_model_and_transforms,
    get_tokenizer,
    same_tokenizer,
)
from jettclip.models.teacher import Teacher
from jettclip.models.two_towers import TwoTowers
from jettclip.params import Options, all_settings
from jettclip.report import Reporter
from jettclip.rules import trackers
from jettclip.types import VIEWS


class Place(NamedTuple):
    """Where this process stands: its device, and its rank among the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


def build_model(args: Namespace, place: Place) -> tuple[TwoTowers, Transform, Transform]:
    """Builds the student on its device, with the towers locked as asked, and its transforms, which end in uint8."""
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
        aug_cfg=args.aug_cfg,
    )
    if args.lock_image:
        model.lock_image_tower(args.lock_image_unlocked_groups, args.lock_image_freeze_bn_stats)
    if args.lock_text:
        model.lock_text_tower(args.lock_text_unlocked_layers, args.lock_text_freeze_layer_norm)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model, openclip.keep_uint8(train), openclip.keep_uint8(val)


def build_teacher(args: Namespace, student: TwoTowers, place: Place) -> Teacher | None:
    """Builds the model of ``--distill-model``, if there is one.

    Raises:
        ValueError: if it cannot read the student's batches.
    """
    if not args.distill_model:
        return None
    model = create_model(args.distill_model, args.distill_pretrained, device=place.device, cache_dir=args.cache_dir)
    found = []
    sizes = [towers.preprocess_cfg["size"] for towers in (model, student)]
    if sizes[0] != sizes[1]:
        found.append(f"takes images of {sizes[0]} pixels, not of {sizes[1]}")
    pixels = [torch.cat([towers.mean, towers.std]) for towers in (model, student)]
    if args.aug_cfg.get("use_timm") and not torch.equal(*pixels):
        found.append("has another mean and std than those by which timm's augmentation normalises")
    if not same_tokenizer(args.distill_model, args.model):
        found.append("has another tokenizer")
    elif model.context_length < student.context_length and not model.end_token_is_largest:
        found.append(f"reads {model.context_length} tokens only, and where a caption ends cannot be told from its ids")
    if found:
        raise ValueError(
            f"--distill-model {args.distill_model} cannot read the batches of {args.model}: it {', and '.join(found)}; "
            "extract its features with scripts/extract_features.py and train with --features"
        )
    return Teacher(model, args.distill_model)


def build_train_loader(
    options: Options, model: TwoTowers, transform: Transform, teacher: Teacher | None, place: Place
) -> Loader | None:
    """Builds the loader of ``--train-data``, if there is any."""
    args = options.args
    if not args.train_data:
        return None
    formula = find_recipe(options.loss).formula
    loader = get_wds_dataset(
        options.data,
        args.train_data,
        transform,
        get_tokenizer(args.model, args.force_context_length, cache_dir=args.cache_dir),
        is_train=True,
        batch_size=args.batch_size,
        views=views_of(formula),
        teacher_parts=teacher_parts_of(formula),
        crop_captions=model.ignores_padding and (teacher is None or teacher.model.ignores_padding),
        num_samples=args.train_num_samples,
        resampled=args.dataset_resampled,
        weights=args.train_data_upsampling_factors,
        workers=args.workers,
        rank=place.rank,
        world_size=place.world_size,
        seed=args.seed,
    )
    logging.info(
        f"Training on {loader.num_batches} batches of {args.batch_size} on each of {place.world_size} ranks an epoch"
    )
    return loader


def build_evaluator(options: Options, model: TwoTowers, transform: Transform, place: Place) -> Evaluator:
    """Builds what ``--val-data`` and ``--imagenet-val`` ask for."""
    args, device = options.args, place.device
    if options.evaluation.val_truncate and not model.end_token_is_largest:
        raise ValueError(
            f"--val-truncate: where captions of {args.model} end cannot be told from token ids; leave it out"
        )
    tokenizer = get_tokenizer(args.model, args.force_context_length, cache_dir=args.cache_dir)
    autocast = openclip.get_autocast(args.precision, device_type=device.type)
    evaluator = Evaluator(
        device,
        autocast,
        val_frequency=args.val_frequency,
        zero_shot_frequency=args.zeroshot_frequency,
        truncate=options.evaluation.val_truncate,
    )
    if args.val_data:
        views = set(views_of(find_recipe(options.loss).formula)) | {"long"}
        if options.data.short_caption_policy != "none":  # else a sample without a short caption would be dropped
            views.add("short")
        evaluator.val = get_wds_dataset(
            replace(options.data, features=""),
            args.val_data,
            transform,
            tokenizer,
            is_train=False,
            batch_size=args.batch_size,
            views=[view for view in VIEWS if view in views],
            crop_captions=model.ignores_padding,
            num_samples=args.val_num_samples,
            workers=args.workers,
            rank=place.rank,
            world_size=place.world_size,
        )
    if args.imagenet_val:
        evaluator.zero_shot = partial(
            zero_shot_metrics,
            tokenizer=tokenizer,
            images=imagenet_folder(args.imagenet_val, transform),
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            autocast=autocast,
        )
    return evaluator


def build_engine(args: Namespace, model: TwoTowers, loss: Loss, place: Place) -> tuple[DDPEngine, Optimizer]:
    """Builds the engine around the student and its loss, and the optimizer, for the schedule."""
    if place.device.type == "cpu" and args.precision != "fp32":
        logging.warning(f"--precision {args.precision} is much slower than fp32 on most CPUs; try --precision fp32")
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
