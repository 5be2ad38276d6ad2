"""Trains and evaluates: ``python -m jettclip.main``, or ``torchrun ... -m -- jettclip.main`` on several devices."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from jettclip import openclip
from jettclip.build import (
    Place,
    build_detectors,
    build_engine,
    build_evaluator,
    build_model,
    build_reporter,
    build_schedule,
    build_teachers,
    build_train_loader,
)
from jettclip.checkpoint import (
    Position,
    delete_checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_position,
    save_checkpoint,
)
from jettclip.engine.optimizer import optimizer_options
from jettclip.evaluate.runner import Evaluator, Metrics
from jettclip.interrupt import interruptible
from jettclip.losses.factory import create_loss
from jettclip.losses.formula import check_teacher_scales, find_recipe, teacher_parts_of
from jettclip.losses.unused import find_unused
from jettclip.models.checkpoints import check_description, describe, load_weights
from jettclip.models.config import get_model_config
from jettclip.models.two_towers import TwoTowers
from jettclip.params import Options, is_kept, is_saved, parse_args, run_folder, save_config
from jettclip.report import METRICS, set_up_logging
from jettclip.seeding import seed_everything
from jettclip.settings import comma_separated
from jettclip.train import NonFiniteLoss, train_one_epoch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_args(argv, find_mistakes)
    args = options.args
    world = openclip.init_distributed_device_so(
        args.device, args.dist_backend, args.dist_url, no_set_device_rank=args.no_set_device_rank
    )
    try:
        with interruptible():
            run(options, Place(torch.device(world["device"]), world["global_rank"], world["world_size"]))
    except KeyboardInterrupt:
        name = f"--name {args.name}" if args.name else "--name RUN_FOLDER"
        logging.warning(f"Interrupted; the same command with {name} --resume latest goes on from the last checkpoint")
        return 130
    except (ValueError, NonFiniteLoss) as error:  # what a user can cause: the message says what to change
        logging.error(error)
        logging.debug("", exc_info=True)
        return 1  # at once: to take leave of the process group could mean to wait for the other ranks
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def run(options: Options, place: Place) -> None:
    """Trains for all epochs, evaluating and saving after each; or evaluates once, if there is nothing to train on."""
    args = options.args
    for name in (args.model, *comma_separated(args.distill_model)):
        get_model_config(name)  # raises for an unknown one, before there is a folder
    folder = open_run_folder(options, place)
    seed_everything(args.seed)  # the same on every rank, for the same weights
    model, train_transform, val_transform = build_model(options, place)
    teachers = build_teachers(args, model, place)
    seed_everything(args.seed, place.rank)
    train_data = build_train_loader(options, model, train_transform, teachers, place)
    evaluator = build_evaluator(options, model, val_transform, place)
    checkpoints = folder / "checkpoints" if folder else None
    resumed = find_checkpoint(args.resume, checkpoints)

    if resumed:
        read_position(resumed)  # raises for what is no checkpoint of a run, before its weights are looked at
        check_description(model, resumed)
    if train_data is None:
        step, metrics = evaluate(args, model, evaluator, resumed)
        with build_reporter(options, folder, None, place) as reporter:
            reporter.log("val", step, metrics)
        return

    loss = create_loss(options.loss, model.embed_dim, teachers.infos if teachers else train_data.teachers)
    logging.info(f"Loss: {loss.description}")
    is_loaded = bool(args.pretrained)  # with a scale of its own, and perhaps a bias
    model.start_logit_scale(None if is_loaded and loss.recipe.keeps_checkpoint_scale else loss.recipe.logit_scale_init)
    model.start_logit_bias(loss.recipe.logit_bias_init, keep=is_loaded)
    engine, optimizer = build_engine(args, model, loss, place)
    done = load_checkpoint(resumed, engine) if resumed else Position(0, 0)
    epoch_steps = train_data.num_batches // args.accum_freq
    schedule = build_schedule(args, optimizer, epoch_steps)
    taken = done.epoch * epoch_steps  # by the present length of an epoch
    if taken != done.step:
        logging.warning(f"Epochs are of another length than in {resumed}: its {done.step} steps count as {taken}")
    detectors = build_detectors(args, loss, place)
    newest = done.epoch if args.delete_previous_checkpoint or args.save_most_recent else None
    with build_reporter(options, folder, taken, place) as reporter:
        for epoch in range(done.epoch, args.epochs):
            train_one_epoch(
                engine,
                loss,
                train_data,
                epoch,
                schedule=schedule,
                reporter=reporter,
                detectors=detectors,
                report_every=args.log_every_n_steps,
                teachers=teachers,
                accumulated=args.accum_freq,
            )
            done = Position(epoch + 1, (epoch + 1) * epoch_steps)
            metrics = evaluator.run(model, done.epoch, args.epochs)
            if metrics:
                reporter.log("val", done.step, metrics)
            if checkpoints and is_saved(args, done.epoch):
                save_checkpoint(checkpoints, engine, done, describe(model))
                if place.rank == 0 and newest is not None and not is_kept(args, newest):
                    delete_checkpoint(checkpoints, newest)
                newest = done.epoch
    logging.info(f"Done: {done.epoch} epochs, {done.step} steps" + (f"; the run is in {folder}" if folder else ""))


def evaluate(args: Namespace, model: TwoTowers, evaluator: Evaluator, resumed: Path | None) -> tuple[int, Metrics]:
    """Evaluates a checkpoint of a run, or the weights that the model was built with; returns the step, and the metrics.

    Raises:
        ValueError: if there are neither.
    """
    if resumed is None:
        if not (args.pretrained or args.pretrained_image):
            raise ValueError("there are no weights to evaluate; give --pretrained, or --name and --resume latest")
        return 0, evaluator.run(model)
    load_weights(model, resumed)
    return read_position(resumed).step, evaluator.run(model)


def find_mistakes(options: Options) -> list[str]:
    """Returns the mistakes that only the components can see: a wrong formula or optimizer."""
    args, found = options.args, []
    checks: list[Callable[[], object]] = [
        lambda: found.extend(find_loss_mistakes(options)),
        lambda: optimizer_options(args.opt, beta1=args.beta1, beta2=args.beta2, eps=args.eps, momentum=args.momentum),
    ]
    for check in checks:
        try:
            check()
        except ValueError as mistake:
            found.append(str(mistake))
    return found or find_embedding_mistakes(options)


def find_loss_mistakes(options: Options) -> list[str]:
    """Returns the mistakes about what the loss reads: settings that it does not, and teachers.

    Raises:
        ValueError: if the settings make no loss, or its teachers are of another number.
    """
    if options.loss.problems():
        return []  # which are known, and a recipe of them is none
    found = find_unused(options.loss)
    if found or not options.args.train_data:
        return found
    recipe = find_recipe(options.loss)
    parts = teacher_parts_of(recipe)
    teachers = {
        "--features": options.data.features,
        "--distill-model": options.args.distill_model,
        "--dataset-reinforcement": options.data.dataset_reinforcement,
    }
    if parts and not any(teachers.values()):
        found.append(f"--loss {options.loss.loss!r} distils; name a store with --features, or a --distill-model")
    if options.data.dataset_reinforcement_mix_synthetic and "short" in parts:
        found.append(
            f"--loss {options.loss.loss!r} distils on short captions, and --dataset-reinforcement-mix-synthetic "
            "leaves one caption an image, the long one; try 1*kd@long"
        )
    for flag, given in teachers.items():
        if given and not parts:
            remedy = "--loss '1*siglip@long + 1*kd@long'" if options.args.siglip else "jettclip"
            found.append(f"{flag} {given!r} goes unused by --loss {options.loss.loss!r}; try {remedy}")
    names = comma_separated(options.args.distill_model) or options.data.feature_stores
    if options.data.dataset_reinforcement:
        names = [f"{width} wide" for width in options.data.distill_teacher_dimension]
    may_be_more = bool(options.data.features)  # a store may hold those of several
    if parts and names and not (may_be_more and len(recipe.teacher_scale) >= len(names)):
        check_teacher_scales(recipe.teacher_scale, names)
    return found


def find_embedding_mistakes(options: Options) -> list[str]:
    """Returns the mistakes about stored text embeddings, which adapters read and other models do not."""
    args, source = options.args, options.data.text_embeddings
    teachers = comma_separated(args.distill_model)
    try:
        adapters = {name for name in (args.model, *teachers) if get_model_config(name).text_tower == "adapter"}
    except ValueError:
        return []  # an unknown model, of which `run` says more
    found = [
        f"--distill-model {name} reads stored embeddings, and teachers are asked about captions; choose another"
        for name in teachers
        if name in adapters
    ]
    if args.model not in adapters:
        if source:
            found.append(
                f"--text-embeddings {source}: --model {args.model} reads text; "
                "leave it out, or choose a model that reads embeddings, such as LLM2CLIP-ViT-L-14"
            )
        return found
    if (args.train_data or args.val_data) and not source:
        found.append(
            f"--model {args.model} reads stored embeddings of the captions; give --text-embeddings the name of "
            "their store, or 'members' if they stand in the shards in place of the captions"
        )
    flags = {
        "--imagenet-val": args.imagenet_val,
        "--val-truncate": options.evaluation.val_truncate,
        "--force-context-length": args.force_context_length,
    }
    needing = [flag for flag, value in flags.items() if value]
    if needing:
        found.append(f"{', '.join(needing)}: --model {args.model} reads stored embeddings, not text; leave it out")
    return found


def open_run_folder(options: Options, place: Place) -> Path | None:
    """Creates the run's folder with its log and ``config.yaml``; returns it, or None for ``--logs none``.

    Raises:
        ValueError: if a run of this name exists and is not resumed.
    """
    args = options.args
    date = [datetime.now().strftime("%Y_%m_%d-%H_%M_%S")]
    if dist.is_initialized():
        dist.broadcast_object_list(date, src=0)
    folder = run_folder(args, date[0])
    if folder is None or (place.rank and not args.log_local):
        set_up_logging(None, place.rank, args.debug)
        return folder
    log = folder / (f"out-{place.rank}.log" if args.log_local else "out.log")
    taken = any((folder / name).exists() for name in ("checkpoints", METRICS))
    if taken and args.resume != "latest" and args.train_data:
        raise ValueError(f"--name {folder.name} exists in {folder.parent}; choose another, or add --resume latest")
    folder.mkdir(parents=True, exist_ok=True)
    set_up_logging(log, place.rank, args.debug)
    config = folder / "config.yaml"
    if place.rank == 0 and (args.train_data or not config.exists()):
        save_config(options, config)  # an evaluation of a run leaves that of its training
    return folder


if __name__ == "__main__":
    sys.exit(main())
