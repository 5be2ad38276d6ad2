from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from open_clip_train.params import parse_args as openclip_parse_args

from jettclip.losses.formula import teacher_parts_of
from jettclip.losses.presets import PRESETS
from jettclip.main import find_mistakes
from jettclip.params import is_kept, is_saved, parse_args, run_folder, save_config
from jettclip.rules import MOBILECLIP_FLAGS

# Launch lines of OpenCLIP's README and docs (github.com/mlfoundations/open_clip, v3.3), with shards where those have
# CSV files; for flags that no published line uses, lines made of them.
OPENCLIP_LINES = {
    "single process": """--save-frequency 1 --zeroshot-frequency 1 --report-to tensorboard
        --train-data=/data/{0000..0099}.tar --val-data=/data/val.tar --csv-img-key filepath --csv-caption-key title
        --imagenet-val=/path/to/imagenet/root/val/ --warmup 10000 --batch-size=128 --lr=1e-3 --wd=0.1 --epochs=30
        --workers=8 --model RN50""",
    "torchrun": """--train-data /data/cc12m/cc12m-train-{0000..2175}.tar --train-num-samples 10968539
        --dataset-type webdataset
        --batch-size 320 --precision amp --workers 4
        --imagenet-val /data/imagenet/validation/""",
    "slurm": """--save-frequency 1 --report-to tensorboard --train-data=/data/LAION-400M/{00000..41455}.tar
        --warmup 2000 --batch-size=256 --epochs=32 --workers=8 --model ViT-B-32 --name ViT-B-32-Vanilla
        --seed 0 --local-loss
        --gather-with-grad""",
    "resume": """--train-data=/path/to/train.tar --val-data=/path/to/val.tar
        --resume /path/to/checkpoints/epoch_K.pt""",
    "several sources": """--train-data /data/cc3m/{0000..0331}.tar::/data/cc12m/{0000..1242}.tar --dataset-resampled
        --train-data-upsampling-factors 1::0.5 --train-num-samples 1000000""",
    "distillation": """--train-data /data/{0000..0099}.tar --model ViT-B-32 --distill-model ViT-L-14
        --distill-pretrained openai""",
    "wandb": """--train-data /data/{0000..0099}.tar --report-to wandb --wandb-project-name open_clip --wandb-notes a""",
    "bf16": """--train-data /data/{0000..0099}.tar --opt adamw --beta2 0.95 --precision amp_bfloat16
        --grad-checkpointing --torchcompile --delete-previous-checkpoint""",
    "evaluation": """--val-data=/path/to/val.tar --model RN101 --pretrained /path/to/checkpoints/epoch_K.pt""",
    "lock": """--train-data /data/{0000..0099}.tar --lock-image --lock-text --lock-text-unlocked-layers 10
        --lock-text-freeze-layer-norm --aug-cfg scale=(0.4,1.0) color_jitter=(0.32,0.32,0.32,0.08)""",
    "image": """--train-data /data/{0000..0099}.tar --image-mean 0.5 0.5 0.5 --image-std 0.5 0.5 0.5
        --force-image-size 256 --image-interpolation bilinear --image-resize-mode squash""",
    "schedule": """--train-data /data/{0000..0099}.tar --lr-scheduler const-cooldown --epochs 10 --epochs-cooldown 2
        --opt timm/sgd --lr 1e-3 --momentum 0.9""",
}

# MobileCLIP's run_datacompdr12m.sh (github.com/apple/ml-mobileclip-dr), without the launcher's part.
MOBILECLIP_LINE = """--save-frequency 1 --local-loss --gather-with-grad 
    --train-data /data/DataCompDR-12M/{00000000..00001023}.tar
    --train-num-samples 12800000 --warmup 1000 --dataset-type webdataset --precision amp --workers 4 --model ViT-B-16
    --batch-size 1024 --epochs 30 --lr 1e-3 --name datacompdr12m --seed 0 --report-to wandb --resume latest
    --dataset-reinforcement --dataset-reinforcement-config configs/datacompdr12m.json --distill-logit-scale 100
    --distill-loss-weights 0.0 1.0 --distill-teacher-dimension 768 768 --distill-average-after-softmax"""


def errors(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_args(argv, find_mistakes)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("line", OPENCLIP_LINES.values(), ids=OPENCLIP_LINES)
def test_openclips_published_launch_lines_parse_as_openclip_parses_them(line: str) -> None:
    argv = shlex.split(line)
    assert vars(parse_args(argv, find_mistakes).args) == vars(openclip_parse_args(argv))


def test_mobileclips_launch_line_is_told_what_to_write_instead(capsys: pytest.CaptureFixture[str]) -> None:
    said = errors(capsys, *shlex.split(MOBILECLIP_LINE))
    asked = [flag for flag in MOBILECLIP_FLAGS if f"--{flag} " in MOBILECLIP_LINE.replace("\n", " ") + " "]
    assert len(asked) == 2
    assert all(f"--{flag}: {MOBILECLIP_FLAGS[flag]}" in said for flag in asked)
    assert "2 mistakes" in said  # and nothing else is wrong with it


def test_mobileclips_launch_line_parses_once_translated() -> None:
    line = re.sub(r"--dataset-reinforcement-config \S+", "", MOBILECLIP_LINE)
    options = parse_args(shlex.split(line.replace("--distill-average-after-softmax", "")), find_mistakes)
    assert options.args.batch_size == 1024
    assert (options.loss.loss, options.loss.distill_loss_weights) == ("mobileclip-dr", (0.0, 1.0))
    assert options.data.dataset_reinforcement
    assert (options.data.distill_teacher_dimension, options.data.distill_logit_scale) == ((768, 768), (100.0,))


def test_with_mixed_captions_there_is_one_view_to_distil() -> None:
    options = parse_args(["--train-data", "x.tar", "--dataset-reinforcement", "--dataset-reinforcement-mix-synthetic"])
    assert options.loss.loss == "1*kd@long"


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset-reinforcement", "--loss", "openclip"],
        ["--distill-model=a", "--distill-pretrained=b", "--loss=openclip"],
    ],
)
def test_a_loss_that_is_asked_for_is_kept(flags: list[str]) -> None:
    assert parse_args(["--train-data", "x.tar", *flags]).loss.loss == "openclip"


def test_synthetic_data_needs_no_name() -> None:
    options = parse_args(["--dataset-type", "synthetic", "--train-num-samples", "64"])
    assert (options.data.dataset_type, options.args.train_data) == ("synthetic", "synthetic")
    assert options.data.for_evaluation.dataset_type == "auto"


def test_an_unknown_flag_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trian-data" in errors(capsys, "--trian-data", "x.tar")


def test_all_mistakes_are_shown_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = errors(
        capsys, "--train-data", "x.tar", "--lr", "-1", "--horovod", "--position-keep=0", "--pretrained=x",
        "--label-smoothing", "2", "--val-truncate", "1", "--precision", "pure_fp16",
    )  # fmt: skip
    assert "6 mistakes" in said
    for part in (
        "--lr -1.0",
        "--horovod",
        "--position-keep 0",
        "--label-smoothing 2",
        "--val-truncate 1",
        "use amp_bf16",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--torchscript"], "use --torchcompile"),
        (["--accum-freq", "0"], "--accum-freq 0 must be at least 1"),
        (["--siglip", "--loss", "openclip"], "--siglip asks for the sigmoid loss, and --loss 'openclip' has no such"),
        (
            ["--loss-dist-impl", "gather"],
            "--loss-dist-impl gather is for the siglip term, which --loss 'openclip' does not have",
        ),
        (["--clip-margin", "-1"], "--clip-margin -1 must be positive"),
        (["--clip-margin", "0.5", "--loss", "siglip"], "--clip-margin 0.5 is for the clip term"),
        (["--multi-positive", "--loss", "kd@long"], "--multi-positive is for the clip and siglip terms"),
        (["--pca-variance", "1"], "--pca-variance 1.0 must be between 0 and 1, such as 0.9"),
        (["--pca-variance", "0.9", "--pca-components", "8"], "and so does --pca-components 8; give one of them"),
        (["--pca-side", "both"], "invalid choice: 'both'"),
        (["--teacher-scale", "100", "0"], "--teacher-scale 0 is S = exp(logit scale) and must be positive"),
        (["--teacher-scale", "inf"], "--teacher-scale inf is S = exp(logit scale) and must be positive and finite"),
        (["--teacher-scale", "nan"], "--teacher-scale nan is S = exp(logit scale) and must be positive and finite"),
        (["--teacher-scale"], "--teacher-scale: expected at least one argument"),
        (["--distill-loss-weights"], "--distill-loss-weights: expected at least one argument"),
        (["--logit-scale-max", "nan"], "--logit-scale-max nan is S = exp(logit scale), which is held at 1 and above"),
        (["--logit-scale-max", "inf"], "a finite number such as 100, or 0 for no limit"),
        (["--logit-scale-max", "0.5"], "--logit-scale-max 0.5 is S"),
        (["--logit-scale-max=-3"], "--logit-scale-max -3 is S"),
        (["--logit-scale-init", "inf"], "--logit-scale-init inf is S"),
        (["--logit-scale-init", "nan"], "--logit-scale-init nan is S"),
        (["--logit-scale-init", "0.5"], "--logit-scale-init 0.5 is S = exp(logit scale), which is held at 1 and above"),
        (["--logit-scale-init", "200"], "would start at S = 200 (--logit-scale-init), above its limit 100"),
        (["--loss", "1e400*clip@long"], "is too large for a number"),
        (["--loss", "himo-clip", "--pca-components", "0"], "with --pca-side text and no principal components"),
        (["--loss", "longclip", "--pca-side", "text", "--pca-components", "0"], "give --pca-components 32, or"),
        (
            ["--loss", "mobileclip-dr", "--pca-side", "text", "--features", "a"],
            "'mobileclip-dr' with --pca-side text and no principal components",
        ),
        (["--pca-detach"], "--pca-detach is for the short view, which --loss 'openclip' does not have"),
        (
            ["--distill-model=a,b", "--distill-pretrained=x,y", "--teacher-scale", "1", "2", "3"],
            "--teacher-scale 1 2 3 must be one for all or one for each of the 2 teachers, a, b",
        ),
        (
            ["--features", "a,b,c", "--loss", "kd@long", "--teacher-scale", "1", "2"],
            "--teacher-scale 1 2 must be one for all or one for each of the 3 teachers, a, b, c",
        ),
        (
            ["--dataset-reinforcement", "--teacher-scale", "1", "2", "3"],
            "--teacher-scale 1 2 3 must be one for all or one for each of the 2 teachers, 768 wide, 768 wide",
        ),
        (
            ["--siglip", "--dataset-reinforcement"],
            "goes unused by --loss 'siglip'; try --loss '1*siglip@long + 1*kd@long'",
        ),
        (["--loss-tile", "0"], "--loss-tile '0' must be auto, off, or a number of rows, such as 512"),
        (["--loss-tile", "big"], "--loss-tile 'big' must be"),
        (["--distill-loss-weights", "1"], "--distill-loss-weights 1 must be two weights, of clip and of kd"),
        (["--distill-loss-weights", "0", "0"], "--distill-loss-weights 0 0 leave no loss"),
        (["--distill-loss-weights", "inf", "1"], "--distill-loss-weights inf 1 must be two weights"),
        (
            ["--distill-loss-weights", "0", "1"],
            "belong to --loss mobileclip-dr; in --loss 'openclip' write the weights",
        ),
        (["--dataset-type", "synthetic"], "synthetic has no end"),
        (["--short-caption-policy", "sample"], "'sample' is not one of first-sentence"),
        (["--short-caption-policy", "none+pad-shift+pad-shift"], "is not one of first-sentence"),
        (["--dataset-reinforcement", "--features", "x"], "takes teacher features from the samples"),
        (["--dataset-reinforcement-mix-synthetic"], "needs the samples of --dataset-reinforcement"),
        (["--dataset-reinforcement", "--dataset-reinforcement-mix-synthetic-ratio", "0.5"], "does nothing alone"),
        (["--dataset-reinforcement", "--dataset-reinforcement-syn-text-key-regex", "("], "is no regular expression"),
        (["--distill-logit-scale", "50"], "--distill-logit-scale needs the samples of --dataset-reinforcement"),
        (["--dataset-reinforcement-sample-sequential"], "needs the samples of --dataset-reinforcement"),
        (["--dataset-reinforcement", "--long-caption-field", "txt,json:text"], "the real caption has one place"),
        (
            ["--dataset-reinforcement", "--dataset-reinforcement-mix-synthetic", "--loss", "mobileclip-dr"],
            "leaves one caption an image",
        ),
        (["--dataset-reinforcement", "--distill-model=RN50", "--distill-pretrained=x"], "give one of them"),
        (["--distill-logit-scale", "1", "2", "3"], "one for all or one for each of the 2 teachers"),
        (["--distill-teacher-dimension", "0", "768"], "must be positive widths"),
        (["--dataset-resampled"], "--train-num-samples"),
        (["--train-data-upsampling-factors", "1::2"], "--dataset-resampled"),
        (["--report-to", "mlflow"], "mlflow"),
        (["--loss", "jettclip"], "--features"),
        (["--features", "vitl"], "goes unused"),
        (["--loss", "1*clip@medium"], "clip@medium"),
        (["--distill-model", "ViT-B-32"], "--distill-pretrained"),
        (["--distill-model=RN50", "--distill-pretrained=x", "--loss=longclip"], "--distill-model 'RN50' goes unused"),
        (["--features-dir", "x"], "--features-dir x"),
        (["--max-drop-rate", "5"], "between 0 and 1"),
        (["--position-keep", "9"], "-tail say how a checkpoint's positions are stretched; add --pretrained"),
        (["--force-context-length", "2"], "--force-context-length 2 leaves no word"),
        (["--position-ratio", "nan"], "--position-ratio nan must be positive"),
        (["--position-ratio", "0"], "--position-ratio 0 must be positive"),
        (["--freeze-position-prefix", "-1"], "--freeze-position-prefix -1"),
        (["--lr-scheduler", "linear"], "cosine"),
        (["--batch-size", "0"], "at least 1"),
        (["--opt", "lion"], "timm/lion"),
        (["--resume", "latest"], "--name"),
        (["--text-embeddings", "members"], "reads text; leave it out"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in errors(capsys, "--train-data", "x.tar", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--distill-loss-weights", "1"],
        ["--distill-loss-weights", "1", "2", "3"],
        ["--distill-loss-weights", "0", "0"],
        ["--distill-loss-weights", "0", "0", "--loss", "mobileclip-dr", "--features", "a"],
        ["--logit-scale-max", "nan"],
        ["--logit-scale-init", "inf"],
        ["--loss", "himo-clip", "--pca-components", "0"],
        ["--loss", "1e400*clip@long"],
        ["--siglip", "--dataset-reinforcement"],
        ["--siglip", "--loss-dist-impl", "both"],
    ],
)
def test_one_wrong_value_is_one_mistake(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: 1 mistakes" in errors(capsys, "--train-data", "x.tar", *flags)


def test_a_store_may_hold_the_features_of_several_teachers() -> None:
    flags = ["--train-data", "x.tar", "--loss", "kd@long", "--features", "several", "--teacher-scale", "70", "60"]
    assert parse_args(flags, find_mistakes).loss.teacher_scale == (70, 60)


def test_no_data_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--train-data" in errors(capsys, "--model", "Nano-248")


def test_distill_model_means_openclips_distillation() -> None:
    line = ["--train-data", "x.tar", "--distill-model", "ViT-B-32", "--distill-pretrained", "openai"]
    assert parse_args(line).loss.loss == "1*clip@long + 1*kd@long"
    assert parse_args([*line, "--loss", "jettclip"]).loss.loss == "jettclip"
    assert parse_args([*line, "--siglip"], find_mistakes).loss.loss == "1*siglip@long + 1*kd@long"


@pytest.mark.parametrize("way", ["bidir", "shift", "reduce", "gather"])
def test_how_openclip_exchanges_is_accepted_for_a_siglip_term_and_checked(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train-data", "x.tar", "--loss", "1*siglip@long + 1*clip@long", "--loss-dist-impl"]
    assert parse_args([*flags, way], find_mistakes).args.loss_dist_impl == way
    assert f"--loss-dist-impl '{way}s' is not one of bidir, shift, reduce, gather" in errors(capsys, *flags, way + "s")


@pytest.mark.parametrize("flags", [[], ["--loss-dist-impl", "shift"], ["--loss", "0.5*siglip@long + 0.5*siglip@short"]])
def test_siglip_means_the_sigmoid_loss(flags: list[str]) -> None:
    options = parse_args(["--train-data", "x.tar", "--siglip", *flags], find_mistakes)
    assert options.loss.loss == (flags[1] if "--loss" in flags else "siglip")


def test_help_shows_our_flags_by_group_and_openclips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    places = [
        shown.index(text) for text in ("\nData:", "\n  --features ", "\nLoss:", "\n  --pca-comp", "\n  --zeroshot")
    ]
    assert places == sorted(places)


def test_a_saved_config_repeats_the_options(tmp_path: Path) -> None:
    argv = shlex.split(OPENCLIP_LINES["lock"] + " " + OPENCLIP_LINES["image"])
    argv += ["--loss", "0.5*clip@long + 2*clip@short", "--val-truncate", "20", "77", "--allow-pipe-urls"]
    argv += ["--multi-positive", "--teacher-scale", "70", "60", "--loss-tile", "64", "--clip-margin", "0.5"]
    options = parse_args(argv)
    save_config(options, tmp_path / "config.yaml")
    again = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert (again.data, again.loss, again.evaluation) == (options.data, options.loss, options.evaluation)

    def plain(value: Any) -> Any:  # YAML has no tuples
        return yaml.safe_load(yaml.safe_dump(vars(value)))

    assert plain(again.args) == plain(options.args)


@pytest.mark.parametrize("loss", PRESETS)
def test_the_saved_config_of_every_preset_is_accepted(loss: str, tmp_path: Path) -> None:
    argv = ["--train-data", "x.tar", "--loss", loss]
    if teacher_parts_of(PRESETS[loss]):
        argv += ["--features", "a"]
    options = parse_args(argv, find_mistakes)
    save_config(options, tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")], find_mistakes).loss == options.loss


def test_the_command_line_overrides_the_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train_data: x.tar\nbatch-size: 12\npca_components: 4\nlocal_loss: true\n")
    options = parse_args(["--config", str(tmp_path / "c.yaml"), "--batch-size", "24"])
    assert (options.args.batch_size, options.loss.pca_components, options.args.local_loss) == (24, 4, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batchsize: 3", "did you mean batch_size"),
        ("- a\n- b", "one mapping"),
        ("a: [", "cannot be read"),
        ("x: !!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_bad_config_is_explained(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert expected in errors(capsys, "--config", str(tmp_path / "c.yaml"))


def test_a_missing_config_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in errors(capsys, "--config", "nowhere.yaml")


def test_the_run_folder_is_named_or_made_of_the_settings(tmp_path: Path) -> None:
    named = parse_args(["--train-data", "x.tar", "--logs", str(tmp_path), "--name", "first"])
    assert run_folder(named.args, "today") == tmp_path / "first"
    unnamed = parse_args(["--train-data", "x.tar", "--logs", str(tmp_path), "--model", "hf/x"])
    assert "today-model_hf-x" in str(run_folder(unnamed.args, "today"))
    assert run_folder(parse_args(["--train-data", "x.tar", "--logs", "None"]).args, "today") is None


def test_which_checkpoints_are_written_and_which_stay() -> None:
    args = parse_args(["--train-data", "x.tar", "--epochs", "5", "--save-frequency", "2"]).args

    def written_and_kept() -> tuple[list[int], list[int]]:
        written = [epoch for epoch in range(1, 6) if is_saved(args, epoch)]
        return written, [epoch for epoch in written if is_kept(args, epoch)]

    assert written_and_kept() == ([2, 4, 5], [2, 4])
    args.delete_previous_checkpoint = True
    assert written_and_kept() == ([2, 4, 5], [])
    args.save_most_recent = True
    assert written_and_kept() == ([1, 2, 3, 4, 5], [])
    args.delete_previous_checkpoint = False
    assert written_and_kept() == ([1, 2, 3, 4, 5], [2, 4])
    args.save_frequency = 0
    args.save_most_recent = False
    assert written_and_kept() == ([5], [])
