"""A smaller vocabulary for drafts that use the target's whole LM head: FR-Spec (arXiv 2502.14856).

Reading the LM head is most of such a draft's cost, and most tokens are hardly ever right. Tokens left out are never
drafted; the target still says them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_vocabulary(file: str, tokenizer: Any | None, size: int) -> Tensor:
    """Return the tokens that a file names, int64, ascending.

    Args:
        file: A list of ids, the most frequent first (.json, or .pt as torch saves it); anything else is a text, whose
            tokens are counted.
        tokenizer: Of the target; texts need it.
        size: Take so many at most.

    Raises:
        ValueError: If the file is not there, or is no list of ids, or is a text without a tokenizer or without tokens.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"draft_vocab file {file} does not exist")
    ids = _listed(path) if path.suffix in (".json", ".pt") else _counted(path, tokenizer)
    if not len(ids):
        raise ValueError(f"draft_vocab file {file} names no tokens")
    return torch.tensor(sorted(ids[:size]))


def _listed(path: Path) -> list[int]:
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)
        ids = [int(each) for each in content]
    except Exception as error:  # whatever a broken file raises
        raise ValueError(f"draft_vocab file {path} is no list of token ids: {error}") from error
    if len(set(ids)) < len(ids) or min(ids, default=0) < 0:
        raise ValueError(f"draft_vocab file {path} names a token twice, or a negative one")
    return ids


def _counted(path: Path, tokenizer: Any | None) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"draft_vocab file {path} is a text, and without the target's tokenizer it cannot be counted")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"draft_vocab file {path} is neither a text nor a .json or .pt list of ids") from error
    counts = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long).bincount()
    ranked = counts.sort(descending=True, stable=True).indices
    return ranked[: int((counts > 0).sum())].tolist()
