"""What `specx train` can train: each kind's task with its first weights, and how it is published."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specx.adapters.checkpoints import load_model, quiet
from specx.adapters.eagle_checkpoints import read_head
from specx.adapters.longspec_checkpoints import read_block
from specx.adapters.longspec_loader import fitted_block
from specx.config import Checked, LoadConfig
from specx.hf import HFModel
from specx.hf_config import positions_of
from specx.training.classic import ClassicTask, fresh_model
from specx.training.data import Tokens
from specx.training.eagle import TrainableHead, head_config
from specx.training.longspec import (
    MAX_OFFSET,
    LongSpecLoss,
    LongSpecTask,
    fresh_block,
    longspec_config,
    published_tensors,
)
from specx.training.options import ClassicConfig, Eagle3Config, LongSpecConfig

_EAGLE3_LAYERS = 6  # of a target, so that the three that it reads differ


@dataclass(frozen=True, slots=True)
class Start:
    """What a draft starts from: another one's files, or None; and the positions that its windows have."""

    draft: str | None
    positions: int


class Kind:
    """A draft in training.

    Attributes:
        task: Its parameters are the draft's; `task(ids [B, T + 1], draw)` is the loss.
        watcher: What asks the target, through `watched`, which a `features.FeatureCache` may stand in for.
    """

    task: nn.Module
    watcher: Any

    def __init__(self, target: HFModel, tokenizer: Any) -> None:
        self.target, self.tokenizer = target, tokenizer

    def export(self, folder: Path) -> None:
        """Write the draft, in the target's dtype, as its kind is published; what was there is replaced at once."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.write(partial)
        for file in partial.glob("*.safetensors"):
            file.chmod(0o644)  # transformers leaves weights unreadable to others
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    def write(self, folder: Path) -> None:
        """Write its files."""
        raise NotImplementedError

    def write_tensors(self, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write config.json and model.safetensors."""
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        dtype = self.target.dtype
        own = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
        save_file({name: each.detach().cpu().contiguous() for name, each in own.items()}, folder / "model.safetensors")


class LongSpecKind(Kind):
    """A LongSpec block."""

    def __init__(self, target: HFModel, tokenizer: Any, config: LongSpecConfig, tokens: Tokens, start: Start) -> None:
        super().__init__(target, tokenizer)
        how = LongSpecLoss(
            anchor_offset=config.anchor_offset is not False,
            noisy=config.noisy is not False,
            lag=config.lag,
            distill=config.distill,
            positions=positions_of(target.config) or MAX_OFFSET,
        )
        if start.draft is None:
            self.block = fresh_block(target, config.intermediate)
        else:
            block, tensors = read_block(start.draft)
            self.block = fitted_block(start.draft, block, target)
            tensors = {name: each.float() for name, each in tensors.items()}
            self.block.load_state_dict(tensors, assign=True)
        self.task = self.watcher = LongSpecTask(target.model, self.block, how)
        self.positions = min(how.positions, start.positions) if not how.anchor_offset else how.positions

    def write(self, folder: Path) -> None:
        self.write_tensors(
            folder, longspec_config(self.block, self.target, self.positions), published_tensors(self.block)
        )


class _HeadTask(nn.Module):
    def __init__(self, head: TrainableHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, ids: Tensor, draw: tuple[int, ...]) -> Tensor:
        return self.head.loss(ids)


class Eagle3Kind(Kind):
    """An EAGLE-3 head, in the official layout."""

    def __init__(self, target: HFModel, tokenizer: Any, config: Eagle3Config, tokens: Tokens, start: Start) -> None:
        super().__init__(target, tokenizer)
        layers, known = target.config.num_hidden_layers, target.vocab_size
        if layers < _EAGLE3_LAYERS:
            raise ValueError(f"EAGLE-3 reads three layers, of {_EAGLE3_LAYERS} or more; this target has {layers}")
        many, vocabulary, first = config.draft_vocabulary, None, dict[str, Tensor]()
        wide = config.intermediate or target.config.intermediate_size
        if many is not None and many < known:
            vocabulary = torch.from_numpy(tokens.frequent(many, known))
        if start.draft is not None:
            first, vocabulary = _official(start.draft)
            wide = len(first["midlayer.mlp.up_proj.weight"])
        self.head = TrainableHead("eagle3", target.model, wide, vocabulary, config.unrolled)
        if first:
            try:
                self.head.load_state_dict(self.head.state_dict() | first)
            except RuntimeError as error:
                raise ValueError(f"--init {start.draft} is no head that can be trained here: {error}") from error
        self.task, self.watcher, self.positions = _HeadTask(self.head), self.head, start.positions

    def write(self, folder: Path) -> None:
        self.write_tensors(folder, head_config(self.head, self.positions), self.head.state_dict())


def _official(path: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """Read an EAGLE-3 head under the official names, and the tokens that it drafts; None: all."""
    head, tensors = read_head(path)
    if head.version != "EAGLE-3" or head.before_fc or head.layers > 1:
        raise ValueError(f"--init {path} is an {head.version} head; one in EAGLE-3's official form is needed")
    table = tensors.get("d2t")
    names = {name.replace("layers.0.", "midlayer."): each for name, each in tensors.items() if name != "d2t"}
    return names, None if table is None else table + torch.arange(len(table))


class ClassicKind(Kind):
    """A small language model with the target's tokenizer."""

    def __init__(self, target: HFModel, tokenizer: Any, config: ClassicConfig, tokens: Tokens, start: Start) -> None:
        super().__init__(target, tokenizer)
        if start.draft is None:
            self.model: Any = fresh_model(config, target, start.positions)
        else:
            self.model = load_model(start.draft, LoadConfig(dtype="float32", device=str(target.device)), "draft")
            if self.model.config.vocab_size != target.vocab_size:
                raise ValueError(
                    f"--init {start.draft} knows {self.model.config.vocab_size} tokens, the target {target.vocab_size}"
                )
        self.task = self.watcher = ClassicTask(self.model.train(), target.model if config.distill else None)

    def write(self, folder: Path) -> None:
        with quiet():
            copy.deepcopy(self.model).to(self.target.dtype).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


KINDS: dict[str, Callable[..., Kind]] = {"longspec": LongSpecKind, "eagle3": Eagle3Kind, "classic": ClassicKind}
OPTIONS: dict[str, type[Checked]] = {"longspec": LongSpecConfig, "eagle3": Eagle3Config, "classic": ClassicConfig}
