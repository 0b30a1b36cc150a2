"""Token streams for training the bundled pair: windows of library source in which spans recur."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (any bytes can be written with it) of `vocab_size` tokens; id 0 ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_groups(tokenizer: PreTrainedTokenizerFast, groups: list[list[str]]) -> list[np.ndarray]:
    """Encode each group of related files (a module and its tests) to one uint16 array, files ended by id 0."""
    encoded = []
    for texts in groups:
        ids = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), 0]]
        encoded.append(np.asarray(ids, dtype=np.uint16))
    return encoded


class WindowSampler:
    """Draws training windows; the same (seed, step) always gives the same batch, so a resumed run continues exactly.

    Args:
        groups: Token arrays; windows are cut from their concatenation in an order shuffled by `seed`.
        copy_rate: Share of windows in which spans recur (a later stretch is overwritten by a copy of an earlier
            one, with a few tokens consistently renamed). Copying is what a draft needs to use retrieved context.
        stretch_to: Positions of some windows skip ahead up to here (PoSE, arXiv 2309.10400), so that short
            windows teach long distances. 0 leaves positions contiguous.
    """

    def __init__(self, groups: list[np.ndarray], seed: int, copy_rate: float, stretch_to: int) -> None:
        order = np.random.default_rng(seed).permutation(len(groups))
        self.stream = np.concatenate([groups[i] for i in order])
        sizes = np.array([len(groups[i]) for i in order])
        self.groups = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)  # (start, size) of each in the stream
        self.seed, self.copy_rate, self.stretch_to = seed, copy_rate, stretch_to

    def batch(
        self, step: int, rows: int, length: int, copies: int = 0, scramble: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids [rows, length + 1], positions [rows, length]), both int64.

        `copies` above 0 cuts each window from one group that is long enough and lets that many spans recur in it for
        every 1024 tokens, so that what lies far back is worth looking at; a share `scramble` of them is random tokens.
        """
        rng = np.random.default_rng((self.seed, step))
        if copies:
            starts = self._starts_within(rng, rows, length)
        else:
            starts = rng.integers(0, len(self.stream) - length - 1, rows)
        ids = np.stack([self.stream[s : s + length + 1].astype(np.int64) for s in starts])
        positions = np.tile(np.arange(length), (rows, 1))
        for row in range(rows):
            if copies or rng.random() < self.copy_rate:
                times = copies * length // 1024 if copies else int(rng.integers(1, 5))
                self._copy_spans(ids[row], rng, times, scramble)
            if self.stretch_to > 2 * length and rng.random() < 0.5:
                self._stretch(positions[row], rng)
        return ids, positions

    def _starts_within(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        fitting = self.groups[self.groups[:, 1] > length]
        if not len(fitting):
            raise ValueError(f"no group of files has {length + 1} tokens")
        chosen = fitting[rng.integers(0, len(fitting), rows)]
        return chosen[:, 0] + rng.integers(0, chosen[:, 1] - length)

    def _copy_spans(self, ids: np.ndarray, rng: np.random.Generator, times: int, scramble: float) -> None:
        length = len(ids)
        for _ in range(times):
            span = int(rng.integers(16, min(192, length // 3)))
            source = int(rng.integers(0, length - 2 * span))
            target = int(rng.integers(source + span, length - span + 1))
            if scramble and rng.random() < scramble:
                ids[source : source + span] = rng.choice(self.stream, span)
            copied = ids[source : source + span].copy()
            for old in rng.choice(copied, int(rng.integers(0, 3))):
                copied[copied == old] = rng.choice(ids)
            ids[target : target + span] = copied

    def _stretch(self, positions: np.ndarray, rng: np.random.Generator) -> None:
        length = len(positions)
        first = int(rng.integers(0, self.stretch_to - length))
        second = int(rng.integers(first, self.stretch_to - length + 1)) - first
        positions[int(rng.integers(1, length)) :] += second
        positions += first


def read_groups(files: list[tuple[str, Path]], group_of: dict[str, str]) -> list[list[str]]:
    """Read files and put those of one group side by side, in the given order."""
    groups: dict[str, list[str]] = {}
    for name, path in files:
        groups.setdefault(group_of[name], []).append(path.read_text(encoding="utf-8"))
    return list(groups.values())
