"""What may not be asked of OpenCLIP's flags: every rule with value, reason and remedy."""

from __future__ import annotations

from argparse import Namespace

from jettclip.settings import DataSettings, comma_separated

Rules = list[tuple[object, str]]
"""Whether each rule is broken, and what to say then."""

PRECISIONS = {"fp32": "fp32", "amp": "amp", "amp_bf16": "amp_bf16", "amp_bfloat16": "amp_bf16"}

TRACKERS = ("tensorboard", "wandb")
"""What ``--report-to`` may name."""

SIGLIP_EXCHANGES = ("bidir", "shift", "reduce", "gather")
"""What ``--loss-dist-impl`` may name, as in OpenCLIP's ``SigLipLoss``."""

MOBILECLIP_FLAGS = {
    "dataset-reinforcement-config": "the augmentations stand with the samples, in paug.json; leave it out",
    "dataset-reinforcement-filter-image-size": "make shards without small images once: scripts/build_shards.py "
    "--min-side N",
    "distill-average-after-softmax": "ensembles always average probabilities; leave it out",
    "distill-logit-bias": "teachers with a bias are not supported; leave it out",
}
"""Flags that MobileCLIP's patch (github.com/apple/ml-mobileclip-dr) adds to OpenCLIP's trainer: what to do instead."""


def range_rules(args: Namespace) -> Rules:
    """Returns the rules for single flags of OpenCLIP's, each with whether it is broken."""
    least = {"batch_size": 1, "epochs": 1, "workers": 0, "warmup": 0, "log_every_n_steps": 1, "accum_freq": 1}
    unknown = sorted(set(trackers(args)) - set(TRACKERS))
    return [
        *(
            (getattr(args, name) < bound, f"{flag_of(name)} {getattr(args, name)} must be at least {bound}")
            for name, bound in least.items()
        ),
        (
            args.force_context_length is not None and args.force_context_length < 3,
            f"--force-context-length {args.force_context_length} leaves no word between the start and end tokens; "
            "give 3 or more",
        ),
        (args.lr is not None and args.lr <= 0, f"--lr {args.lr} must be positive, such as 5e-4"),
        (args.wd < 0, f"--wd {args.wd} must be positive, or 0 for no weight decay"),
        (
            args.grad_clip_norm is not None and args.grad_clip_norm <= 0,
            f"--grad-clip-norm {args.grad_clip_norm} must be positive, such as 1; leave it out for no clipping",
        ),
        (
            args.lr_scheduler not in ("cosine", "const", "const-cooldown"),
            f"--lr-scheduler {args.lr_scheduler!r} is not one of cosine, const, const-cooldown",
        ),
        (
            args.loss_dist_impl not in (None, *SIGLIP_EXCHANGES),
            f"--loss-dist-impl {args.loss_dist_impl!r} is not one of {', '.join(SIGLIP_EXCHANGES)}, which all compute "
            "the same loss; leave it out",
        ),
        (unknown, f"--report-to {args.report_to!r} names {', '.join(unknown)}; give tensorboard, wandb or all"),
    ]


def combination_rules(args: Namespace, data: DataSettings) -> Rules:
    """Returns the rules for flags that need or exclude one another, each with whether it is broken."""
    return [
        (
            not (args.train_data or args.val_data or args.imagenet_val),
            "no data: give --train-data to train, or --val-data or --imagenet-val to evaluate",
        ),
        (
            args.opt.startswith("timm/") and args.lr is None,
            f"--opt {args.opt} has no default learning rate; give --lr",
        ),
        (
            args.lr_scheduler == "const-cooldown" and args.epochs_cooldown is None,
            "--lr-scheduler const-cooldown needs --epochs-cooldown, the epochs to cool down for",
        ),
        (
            args.epochs_cooldown is not None and not 0 <= args.epochs_cooldown <= args.epochs,
            f"--epochs-cooldown {args.epochs_cooldown} must be part of the run, 0 to --epochs {args.epochs}",
        ),
        (
            args.report_to and is_unlogged(args),
            f"--report-to {args.report_to} writes into the folder of the run; give --logs a folder",
        ),
        (
            args.resume == "latest" and (is_unlogged(args) or not args.name),
            "--resume latest looks into the folder of the run, which must be known; give --name, and --logs a folder",
        ),
        (
            args.train_data_upsampling_factors and not args.dataset_resampled,
            "--train-data-upsampling-factors weighs shards that are drawn; add --dataset-resampled",
        ),
        (
            args.dataset_resampled and args.train_data and not args.train_num_samples,
            "--dataset-resampled has no end; give the length of an epoch with --train-num-samples",
        ),
        (
            data.dataset_type == "synthetic" and not args.train_num_samples,
            "--dataset-type synthetic has no end; give the length of an epoch with --train-num-samples",
        ),
        *distillation_rules(args, data),
    ]


def distillation_rules(args: Namespace, data: DataSettings) -> Rules:
    """Returns the rules for teachers that are asked in training."""
    models, checkpoints = comma_separated(args.distill_model), comma_separated(args.distill_pretrained)
    return [
        (
            (args.distill_model is None) != (args.distill_pretrained is None),
            "--distill-model and --distill-pretrained go together; OpenCLIP ignores one without the other",
        ),
        (
            models and checkpoints and len(models) != len(checkpoints),
            f"--distill-model {args.distill_model} names {len(models)} teachers, and --distill-pretrained "
            f"{args.distill_pretrained} {len(checkpoints)} checkpoints; give one of them for each, separated by commas",
        ),
        (
            args.distill_model and (data.features or data.dataset_reinforcement),
            "--distill-model computes teacher features that --features and --dataset-reinforcement read; give one of "
            "them",
        ),
        (
            args.distill_model and data.text_embeddings in ("members", "tars"),
            f"--distill-model reads captions, and with --text-embeddings {data.text_embeddings} there are none; "
            "keep captions in the shards, and the embeddings in a store that --text-embeddings names",
        ),
        (
            data.features and data.text_embeddings in ("members", "tars"),
            f"--features {data.features} belong to captions, and with --text-embeddings {data.text_embeddings} there "
            "are none; keep captions in the shards, and the embeddings in a store that --text-embeddings names",
        ),
    ]


def distillation_pairs(args: Namespace) -> list[tuple[str, str]]:
    """Returns model and checkpoint of every teacher that ``--distill-model`` names."""
    models, checkpoints = comma_separated(args.distill_model), comma_separated(args.distill_pretrained)
    return list(zip(models, checkpoints, strict=True))


def unsupported_flags(args: Namespace) -> Rules:
    """Returns OpenCLIP's flags that mean nothing here or are not there yet, each with whether it is set."""
    return [
        (args.horovod, "--horovod is not supported; start the processes with torchrun"),
        (args.torchscript, "--torchscript is not supported; use --torchcompile"),
        (args.trace, "--trace is not supported; use --torchcompile"),
        (args.use_bnb_linear, "--use-bnb-linear is not supported: it trains in int8; use --precision amp_bf16"),
        (args.copy_codebase, "--copy-codebase is not supported; the run folder keeps config.yaml and the versions"),
        (
            (args.coca_caption_loss_weight, args.coca_contrastive_loss_weight) != (2.0, 1.0),
            "--coca-caption-loss-weight and --coca-contrastive-loss-weight belong to CoCa, which is not supported",
        ),
        (args.imagenet_v2, "--imagenet-v2 is not there yet; use --imagenet-val"),
        (args.remote_sync, "--remote-sync is not supported; copy the run folder with a tool of your own"),
        (
            args.precision not in PRECISIONS,
            f"--precision {args.precision} keeps weights, BatchNorm statistics and the logit scale in half precision, "
            "which loses them; use amp_bf16, amp or fp32",
        ),
    ]


def is_unlogged(args: Namespace) -> bool:
    """Tells whether the run has no folder, by ``--logs none``."""
    return str(args.logs).lower() == "none"


def trackers(args: Namespace) -> list[str]:
    """Returns the trackers that ``--report-to`` names."""
    names = comma_separated(args.report_to)
    return list(TRACKERS) if "all" in names else names


def flag_of(name: str) -> str:
    """Returns the flag of a setting: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def name_of(flag: str) -> str:
    """Returns the setting of a flag, given without its dashes: ``batch_size`` for ``batch-size``."""
    return flag.replace("-", "_")
