#!/usr/bin/env python
"""Measures how many captions a second our tokenizer, OpenCLIP's and the Rust one (package tokenizers) read.

    python benchmarks/tokenizer.py            # --quick: fewer captions

All read the same captions, one a call as a loader worker does, on one thread; a rate is the median over interleaved
repeats, each of new captions, of captions per second of CPU time. No number is given for a tokenizer whose token ids
are not OpenCLIP's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version

os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from torch import Tensor

from jettclip.models.tokenizer import CachedTokenizer
from jettclip.openclip import SimpleTokenizer

CONTEXT = 248
WARM_UP = 5000  # long captions before the others are timed: a loader worker reads many more, and remembers
OPENCLIP, RUST, OURS = "OpenCLIP", "Rust", "ours"
LONG = "long English, 150 words"
Tokenizer = Callable[[str], Tensor]

ODD = [
    "",
    "a <start_of_text> b",
    "dog<End_Of_Text>cat",
    "!<start_of_text>",
    "it's 3.14 A_B'LL",
    "caf\u00c3\u00a9 &amp;amp; bar\u2019s",  # mojibake
    "\U0001f468\u200d\U0001f469 \u4e00\u53ea\u72d7\u3002",  # emoji, Chinese
    "a\x00b\x1bc\x0bd",
    "\u0130 \u017ft '\u017f \u03a3\u03a3 \ufb01sh\u00a0\uff26\uff35",  # peculiar case, ligature, full width
    "word " * 10_000,
]


class Captions:
    """Draws captions by Zipf's law from 10,000 words of CLIP's own vocabulary, which stand there about by frequency.

    A fifth of them are two words in one, which the vocabulary does not have. Some words are followed by punctuation or
    replaced by a number.
    """

    def __init__(self, tokenizer: SimpleTokenizer, seed: int = 0) -> None:
        self.random = random.Random(seed)
        parts = [part.removesuffix("</w>") for part in tokenizer.encoder if part.endswith("</w>")]
        known = [part for part in parts if len(part) > 1 and part.isascii() and part.isalpha()]
        self.words = [word + self.random.choice(known) * (rank % 5 == 4) for rank, word in enumerate(known[:10_000])]
        self.weights = [1 / (rank + 3) for rank in range(len(self.words))]

    def english(self, count: int, words: int) -> list[str]:
        """Returns captions of so many words, in sentences of 8 to 20."""
        return [" ".join(self._sentences(words)) for _ in range(count)]

    def decorated(self, count: int, words: int) -> list[str]:
        """Returns such captions with accents, curly quotes and an HTML entity in each."""
        tail = "The caf\u00e9\u2019s sign reads \u201cbread &amp; wine\u201d."
        return [f"{text} {tail}" for text in self.english(count, words - 7)]

    def nonsense(self, count: int, words: int) -> list[str]:
        """Returns captions of 4 to 8 random letters a word, which hardly ever come twice."""
        return [" ".join(self._letters() for _ in range(words)) for _ in range(count)]

    def _letters(self) -> str:
        return "".join(self.random.choices(string.ascii_lowercase, k=self.random.randint(4, 8)))

    def _sentences(self, words: int) -> Iterator[str]:
        drawn = self.random.choices(self.words, self.weights, k=words)
        while drawn:
            length = self.random.randint(8, 20)
            sentence, drawn = drawn[:length], drawn[length:]
            for place, word in enumerate(sentence):
                kind = self.random.random()
                if kind < 0.02:
                    sentence[place] = str(self.random.randint(1, 2000))
                elif kind < 0.12:
                    sentence[place] = word + self.random.choice([",", ",", "'s", ";"])
            yield " ".join(sentence).capitalize() + "."


def rust_tokenizer(reference: SimpleTokenizer) -> Tokenizer | None:
    """Builds CLIP's byte pair encoding of the package tokenizers, after OpenCLIP's cleaning; None without it."""
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, processors
    except ImportError:
        return None
    start, end = "<start_of_text>", "<end_of_text>"
    core = tokenizers.Tokenizer(
        models.BPE(vocab=reference.encoder, merges=list(reference.bpe_ranks), end_of_word_suffix="</w>")
    )
    core.add_special_tokens([start, end])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(f"(?i){reference.pat.pattern}"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, reference.sot_token_id), (end, reference.eot_token_id)],
    )
    core.enable_truncation(CONTEXT)
    core.enable_padding(length=CONTEXT, pad_id=0)
    return lambda text: torch.tensor([core.encode(reference.clean_fn(text)).ids])


def timed(tokenize: Tokenizer, texts: list[str]) -> tuple[float, list[Tensor]]:
    """Returns the CPU time that it takes to tokenize some texts, and their ids."""
    start = time.process_time()
    ids = [tokenize(text) for text in texts]
    return time.process_time() - start, ids


def rates(sides: dict[str, Tokenizer], draws: Iterable[list[str]]) -> dict[str, float]:
    """Returns the median captions a second of each side; every draw begins with another side.

    Those whose ids are not OpenCLIP's are left out.
    """
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    wrong = set()
    for draw in draws:
        found = {name: timed(sides[name], draw) for name in names}
        for name, (seconds, ids) in found.items():
            taken[name].append(seconds / len(draw))
            if not all(map(torch.equal, ids, found[OPENCLIP][1])):
                wrong.add(name)
        names = names[1:] + names[:1]
    return {name: 1 / statistics.median(taken[name]) for name in sides if name not in wrong}


def differing(tokenize: Tokenizer, reference: Tokenizer, texts: list[str]) -> list[str]:
    """Returns the texts to which two tokenizers give different ids."""
    return [text for text in texts if not torch.equal(tokenize(text), reference(text))]


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer captions and repeats")
    args = parser.parse_args()
    count, repeats = (200, 5) if args.quick else (500, 21)
    torch.set_num_threads(1)
    reference, ours = SimpleTokenizer(context_length=CONTEXT), CachedTokenizer(context_length=CONTEXT)
    rust = rust_tokenizer(reference)
    sides: dict[str, Tokenizer] = {OPENCLIP: reference, OURS: ours, **({RUST: rust} if rust else {})}
    captions = Captions(reference)
    cases: dict[str, Callable[[], list[str]]] = {
        LONG: lambda: captions.english(count, 150),
        "short English, 12 words": lambda: captions.english(count * 5, 12),
        "long, with accents, curly quotes, &amp;": lambda: captions.decorated(count // 2, 150),
        "150 random non-words": lambda: captions.nonsense(count // 4, 150),
    }
    cold = rates(sides, [captions.english(WARM_UP, 150)])
    measured = {case: rates(sides, (draw() for _ in range(repeats))) for case, draw in cases.items()}
    measured[f"long English, a worker's first {WARM_UP:,}"] = cold
    odd = {name: differing(tokenize, reference, ODD) for name, tokenize in sides.items()}
    wrong = [*odd[OURS], *(case for case, by_side in measured.items() if OURS not in by_side)]
    if wrong:
        sys.exit(f"our token ids are not OpenCLIP's, so there is nothing to compare: {wrong}")
    report(measured, odd.get(RUST))
    return 0


def report(measured: dict[str, dict[str, float]], rust_differs: list[str] | None) -> None:
    """Prints the table, what it was measured with, and the JSON."""
    print("Captions per second of CPU time, one thread\n")
    print(f"| captions | {OPENCLIP} | {RUST} | {OURS} | {OURS} / {OPENCLIP} | {OURS} / {RUST} |")
    print("|---|--:|--:|--:|--:|--:|")
    for case, by_side in measured.items():
        shown = [f"{by_side[name]:,.0f}" if name in by_side else "-" for name in (OPENCLIP, RUST, OURS)]
        shown += [f"{by_side[OURS] / by_side[name]:.1f}" if name in by_side else "-" for name in (OPENCLIP, RUST)]
        print(f"| {case} | {' | '.join(shown)} |")
    if rust_differs is None:
        print("\nRust: not measured, since the package tokenizers is not installed")
    else:
        print(f"\nRust: tokenizers {version('tokenizers')}, after OpenCLIP's cleaning")
        print(f"  gives other ids than OpenCLIP for {len(rust_differs)} of {len(ODD)} odd texts: {rust_differs}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("open_clip_torch", "regex", "ftfy", "torch"))
    print(f"Python {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores, of which one is used\n")
    ratio = measured[LONG][OURS] / measured[LONG][OPENCLIP]
    print(json.dumps({"ratio": round(ratio, 2), "ids_equal": True, "captions_per_second": measured}))


if __name__ == "__main__":
    sys.exit(main())
