"""OpenCLIP's tokenizer, many times faster on captions, which repeat their words."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jettclip import openclip

MOST_WORDS = 2**17
"""The cache is emptied when it holds so many words: some 30 MB, and more words than most captions share."""

LONGEST_WORD = 64
"""Longer words are not kept: they are addresses, or whole sentences of a script without spaces, and rarely repeat."""

_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # ASCII without & (it may begin an HTML entity) and without control characters
_BYTES_PER_ID = 8


class CachedTokenizer(openclip.SimpleTokenizer):
    """Gives the token ids of OpenCLIP's `SimpleTokenizer` for any text, and takes its arguments.

    A token never spans white space, so that a cleaned text can be looked up word by word; a new word takes OpenCLIP's
    way, by its pattern and byte pair encoding. Cleaning mends encodings and HTML entities, of which plain ASCII has
    none. With additional special tokens, which may span white space, everything takes OpenCLIP's way.

    Attributes:
        truncated: captions that were cut so far, since they have more than ``context_length`` tokens; a
            ``reduction_mask`` leaves tokens out by a rule of its own, which is not counted.
    """

    cache: dict[str, str]  # inherited: how `bpe` splits the words it has met; without a bound, it would only grow

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.truncated = 0
        self._ids: dict[str, bytes] = {}  # by cleaned word; bytes, since those join and pad at memory speed
        self._special = dict(self.cache)
        self._lowers = self.clean_fn is openclip.get_clean_fn("lower")
        self._word_by_word = len(self._special) == 2

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None) -> Tensor:
        """Returns token ids int64 [texts, L], start and end tokens included, padded with 0.

        Args:
            texts: one or several.
            context_length: L; by default the one given to the constructor. Longer captions are cut to it, the end
                token last.
        """
        length = context_length or self.context_length
        if self.reduction_fn is not None or not length:
            return super().__call__(texts, context_length)
        start, end = _pack([self.sot_token_id]), _pack([self.eot_token_id])
        size = length * _BYTES_PER_ID
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = start + self._packed(text) + end
            if len(row) > size:
                self.truncated += 1
                row = row[: size - _BYTES_PER_ID] + end
            rows.append(row.ljust(size, b"\0"))
        return torch.from_numpy(np.frombuffer(bytearray().join(rows), np.int64).reshape(-1, length))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without start and end."""
        return memoryview(self._packed(text)).cast("q").tolist()

    def bpe(self, token: str) -> str:
        """Splits a word into the parts that the vocabulary has, separated by blanks.

        The inherited one takes quadratic time, 7 s for 20,000 letters, and its cache has no bound.
        """
        if len(token) > LONGEST_WORD:
            return self._split_long(token)
        if len(self.cache) >= MOST_WORDS:
            self.cache = dict(self._special)
        return super().bpe(token)

    def _split_long(self, word: str) -> str:
        """Merges the pair of lowest rank, the leftmost first, until none is left; in n log n steps for n letters.

        A pair that a merge makes has a higher rank than the merge, so that the order is that of merging all pairs of
        one rank before any of the next.
        """
        parts: list[str] = [*word[:-1], word[-1] + "</w>"]
        before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        waiting: list[tuple[int, int]] = []

        def rank_at(left: int) -> int | None:
            joins = left >= 0 and parts[left] and after[left] < len(parts)
            return self.bpe_ranks.get((parts[left], parts[after[left]])) if joins else None

        def wait(left: int) -> None:
            if (rank := rank_at(left)) is not None:
                heappush(waiting, (rank, left))

        for left in range(len(parts)):
            wait(left)
        while waiting:
            rank, left = heappop(waiting)
            if rank != rank_at(left):
                continue  # one of the two has been merged with another since
            right = after[left]
            parts[left], parts[right] = parts[left] + parts[right], ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            wait(before[left])
            wait(left)
        return " ".join(filter(None, parts))

    def _packed(self, text: str) -> bytes:
        """Returns the token ids of a text, without start and end, as the bytes of native int64."""
        if not self._word_by_word:
            return _pack(super().encode(text))
        text = text.lower() if self._lowers and _PLAIN.fullmatch(text) else self.clean_fn(text)
        return b"".join([self._ids.get(word) or self._learn(word) for word in text.split()])

    def _learn(self, word: str) -> bytes:
        """Returns the ids of a word that is not remembered: those of its tokens, which may be (``dog`` of ``dog,``)."""
        tokens = self.pat.findall(word)
        if len(tokens) == 1:
            parts = self.bpe("".join([self.byte_encoder[byte] for byte in tokens[0].encode()])).split(" ")
            ids = _pack([self.encoder[part] for part in parts])
        else:
            ids = b"".join([self._ids.get(token) or self._learn(token) for token in tokens])
        if len(word) <= LONGEST_WORD:
            if len(self._ids) >= MOST_WORDS:
                self._ids.clear()
            self._ids[word] = ids
        return ids


def _pack(ids: Iterable[int]) -> bytes:
    return array("q", ids).tobytes()
