"""Language models that embed captions; a feature store keeps what they say for the adapter of LLM2CLIP.

A sentence encoder averages all tokens it has read, its start and end tokens too, as sentence-transformers does
(arXiv 1908.10084). A decoder's first token gathers attention and says nothing, so that only the caption's own tokens
and an end token are averaged, as LLM2Vec does (arXiv 2404.05961); LLM2CLIP stores these averages (arXiv 2411.04997).
An instruction is read, and left out of the average, by both, before the caption and after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.models.teacher import Frozen, weights_digest

POOLINGS = ("mean", "cls", "last")
CAPTION = "{caption}"

PADDING, READ, POOLED = range(3)
"""The role of a token: none, to be read, to be read and averaged. Padding is 0, as `pad_sequence` pads."""


@dataclass(frozen=True)
class TextEncoderOptions:
    """How captions become embeddings; a store tells all of it.

    Raises:
        ValueError: for a value that makes no encoder.
    """

    pooling: str = "mean"  # mean of the caption's tokens, or the first or last token alone
    bidirectional: bool = False  # a decoder's tokens attend to those after them, too
    instruction: str = ""  # read before the caption, or a template with {caption}
    max_length: int = 512  # tokens, those of the instruction included
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"--text-pooling {self.pooling!r} must be one of {', '.join(POOLINGS)}")
        if self.max_length < 1:
            raise ValueError(f"--text-max-length {self.max_length} must be at least 1, such as 512")
        if self.instruction.count(CAPTION) > 1:
            raise ValueError(f"--instruction {self.instruction!r} has {CAPTION} more than once; name its place once")


class CaptionTokenizer:
    """Gives the tokens of a caption, each with its role; needs no model, so that loader workers can have it.

    Args:
        tokenizer: of transformers, a fast one.
        options: how captions are read.
        is_decoder: leave out of the average what stands before the caption, even without an instruction.

    Attributes:
        truncated: captions that were cut so far.

    Raises:
        ValueError: if the tokenizer does not tell where a token stands in the text, or the instruction leaves no token
            for a caption.
    """

    def __init__(self, tokenizer: Any, options: TextEncoderOptions, is_decoder: bool) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell where a token stands in the text; give the folder of the "
                "text model a tokenizer.json"
            )
        self.tokenizer, self.truncated = tokenizer, 0
        self.before, _, self.after = options.instruction.partition(CAPTION)
        self.averages_all = not (is_decoder or options.instruction)
        self.max_length = options.max_length
        if len(tokenizer(self.before)["input_ids"]) >= self.max_length:
            raise ValueError(
                f"of {self.max_length} tokens, --instruction {options.instruction!r} leaves none for a caption; "
                "shorten it, or raise --text-max-length if the model reads more"
            )

    def __call__(self, caption: str) -> Tensor:
        """Returns int64 [1, L, 2]: token ids, and their roles; L is 0 for a caption without a token of its own."""
        encoded = self.tokenizer(
            self.before + caption + self.after,
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        self.truncated += bool(encoded.encodings[0].overflowing)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        roles = torch.full_like(ids, READ)
        begin, stop = len(self.before), len(self.before) + len(caption)
        is_special = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
        is_within = [end > begin and start < stop for start, end in encoded["offset_mapping"]]
        is_own = ~is_special & torch.tensor(is_within, dtype=torch.bool)
        if not is_own.any():
            return ids.new_empty(1, 0, 2)
        is_end = is_special & (is_own.cumsum(dim=0) > 0)
        roles[slice(None) if self.averages_all else is_own | is_end] = POOLED
        return torch.stack([ids, roles], dim=-1).unsqueeze(0)


class TextEncoder(Frozen):
    """A frozen language model with its tokenizer.

    Args:
        model: of transformers, token ids and a mask to hidden states.
        tokenizer: of transformers, a fast one.
        name: what to call it in stores and logs.
        options: how captions become embeddings.

    Raises:
        ValueError: if the tokenizer or the options do not fit the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, options: TextEncoderOptions) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        # a tokenizer without a limit gives a huge number, a model without one nothing
        positions = getattr(self.model.config, "max_position_embeddings", None) or options.max_length
        self.name = name
        self.options = replace(options, max_length=min(options.max_length, tokenizer.model_max_length, positions))
        self.eval()
        is_decoder = not _reads_ahead(self.model)
        if options.bidirectional:
            _make_bidirectional(self.model, name)
        self.tokenizer = CaptionTokenizer(tokenizer, self.options, is_decoder)

    @property
    def width(self) -> int:
        """The width of its embeddings."""
        return int(self.model.config.hidden_size)

    @property
    def preparation(self) -> dict[str, Any]:
        """How captions become embeddings, for the metadata of a store."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {**asdict(self.options), "dtype": dtype}

    def weights_digest(self) -> str:
        """Returns a digest of all weights, to tell stores of one model from another's."""
        return weights_digest(self.model)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Embeds captions.

        Args:
            tokens: ids and roles, int64 [b, L, 2], of the `CaptionTokenizer`, padded on the right with zeros.

        Returns:
            float32 [b, width].
        """
        ids, roles = tokens.unbind(-1)
        is_read = roles != PADDING
        hidden: Tensor = self.model(input_ids=ids, attention_mask=is_read.long()).last_hidden_state.float()
        if self.options.pooling == "mean":
            shares = F.normalize((roles == POOLED).float(), p=1, dim=1)
            pooled = torch.einsum("bl,bld->bd", shares, hidden)
        else:
            place = is_read.sum(dim=1) - 1 if self.options.pooling == "last" else torch.zeros_like(ids[:, 0])
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), place]
        return F.normalize(pooled, dim=1) if self.options.normalize else pooled


def load_text_encoder(
    source: str,
    options: TextEncoderOptions = TextEncoderOptions(),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Loads a language model and its tokenizer; code that comes with a model is never run.

    What sentence-transformers does after pooling, such as a dense layer, is not done.

    Args:
        source: folder of transformers, GGUF file, or a name on the Hugging Face Hub, which is downloaded unless a copy
            is at hand.
        options: how captions become embeddings.
        dtype: to compute in.
        device: where to put the model.

    Raises:
        ValueError: if transformers is not installed, or has no such model, or it has no tokenizer.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ValueError(f"--text-model {source} needs transformers ({error}); pip install transformers") from error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place, gguf = (str(Path(source).parent), {"gguf_file": Path(source).name}) if _is_gguf(source) else (source, {})
    model = _load("model", AutoModel.from_pretrained, place, dtype=dtype, **gguf)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.config.use_cache = False  # of keys and values, for generating text
    tokenizer = _load("tokenizer", AutoTokenizer.from_pretrained, place, **gguf)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise ValueError(f"--text-model {source} has no tokenizer that can be loaded: it knows no words")
    logging.info(f"Loaded {source}, {type(model).__name__} of width {model.config.hidden_size}")
    return TextEncoder(model.to(device), tokenizer, Path(source).name, options)


def _is_gguf(source: str) -> bool:
    return source.endswith(".gguf")


def _load(what: str, load: Callable[..., Any], source: str, **options: Any) -> Any:
    """Loads from a folder or from what was downloaded before, else from the Hub.

    Raises:
        ValueError: in one line.
    """
    is_folder = Path(source).is_dir()
    try:
        try:
            return load(source, trust_remote_code=False, local_files_only=True, **options)
        except OSError:
            if is_folder:
                raise
            return load(source, trust_remote_code=False, **options)
    except Exception as error:  # by what is wrong with the files: OSError, ValueError, KeyError, SafetensorError, ...
        reason = " ".join(str(error).split())
        hint = "" if is_folder else ", neither as a folder nor on the Hugging Face Hub"
        raise ValueError(f"--text-model {source} has no {what} that can be loaded{hint}: {reason[:300]}") from error


@torch.no_grad()
def _reads_ahead(model: nn.Module, padding: int = 0) -> bool:
    """Tells whether the first token's hidden state depends on the tokens after it."""
    device = next(model.parameters()).device
    mask = torch.tensor([[1] * 3 + [0] * padding], device=device)

    def first_state(last_id: int) -> Tensor:  # one at a time: the same shapes round alike, so that equal means equal
        ids = torch.tensor([[5, 6, last_id] + [0] * padding], device=device)
        state: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 0]
        return state

    return not torch.equal(first_state(7), first_state(8))


def _make_bidirectional(model: Any, name: str) -> None:
    """Lets every token attend to the whole caption, as LLM2Vec does with a decoder's (arXiv 2404.05961).

    Raises:
        ValueError: if the model's attention does not follow.
    """
    model.config.is_causal = False  # heeded by the masks and attention kernels of transformers
    if not (_reads_ahead(model) and _reads_ahead(model, padding=1)):
        raise ValueError(
            f"--bidirectional: {type(model).__name__} of {name} keeps its causal attention with this release of "
            "transformers; leave the flag out, or try transformers 5.23"
        )
