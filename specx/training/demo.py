"""Train the bundled pair: `python -m specx.training.demo --out DIR`.

A thin Llama target and a two-layer draft, on the standard library of the running interpreter without the held-out
modules. Seeded; killed and started again it goes on from its last checkpoint; runs on CPU or CUDA.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specx.data import stdlib
from specx.training.card import card
from specx.training.corpus import WindowSampler, encode_groups, read_groups, train_tokenizer
from specx.training.eagle import TrainableHead, head_config
from specx.training.recipes import HEADS, PAIR, RECIPES, VOCAB_SIZE, Recipe

SAVE_SECONDS = 300


def _causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Plain causal attention, whatever the positions say: stretched positions must not look like packed texts."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("specx_training", _causal_attention)


def build(recipe: Recipe) -> LlamaForCausalLM:
    """Return the recipe's model, freshly initialised from its seed, in float32."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(LlamaConfig(**recipe.common, **recipe.model))
    model.set_attn_implementation("specx_training")
    return model.train()


def batches(recipe: Recipe, sampler: WindowSampler, step: int, done: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids, positions) from `step` on until the recipe's tokens are used up."""
    while done < (recipe.until or recipe.tokens + recipe.long_tail * recipe.long_length):
        share = min(done / recipe.tokens, 0.999)
        rows, length = next((rows, length) for end, rows, length in recipe.phases if share < end)
        every = round(0.3 / recipe.long_share * recipe.long_length / (rows * length)) if recipe.long_share else 0
        long = every and (done >= recipe.tokens or (share > 0.7 and step % every == 0))
        if long:
            rows, length = 1, recipe.long_length
        copies = recipe.copies or int(bool(long) and recipe.long_within)
        yield sampler.batch(step, rows, length, copies, recipe.scramble)
        step, done = step + 1, done + rows * length


def learning_rate(recipe: Recipe, done: int) -> float:
    """Linear warm-up over 2 % of the tokens, then cosine to a fiftieth; the tail of long windows as its own ramp."""
    share = done / recipe.tokens
    if share >= 1:
        left = 1 - (done - recipe.tokens) / max(1, recipe.long_tail * recipe.long_length)
        return 0.2 * recipe.learning_rate * max(left, 0.02)
    if share < 0.02:
        return recipe.learning_rate * (share / 0.02 + 0.01)
    return recipe.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * (share - 0.02) / 0.98)))


class Trainer:
    """A model with its optimisers: Muon for the matrices of the layers, AdamW for embeddings and norms."""

    def __init__(self, recipe: Recipe, device: str, teacher: LlamaForCausalLM | None = None) -> None:
        self.recipe, self.device, self.teacher = recipe, device, teacher
        self.model: Any = self.build().to(device)
        named = list(self.model.named_parameters())
        inner = {name for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
        matrices = [p for name, p in named if name in inner]
        others = [p for name, p in named if name not in inner]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.run = self.steps = self.tokens = 0

    def build(self) -> nn.Module:
        """Return the model with its first weights."""
        return build(self.recipe)

    def begin(self, run: int, recipe: Recipe) -> None:
        """Take up a run of the model's training: where it was left, or at its start."""
        if run > self.run:
            self.run, self.steps, self.tokens = run, 0, 0
            for layer in self.model.model.layers if recipe.sharpen != 1 else ():
                layer.self_attn.q_proj.weight.data *= recipe.sharpen
        self.recipe = recipe

    def loss(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Mean next-token loss in nats, or the cross entropy against the teacher's distribution."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            hidden = self.model.model(tokens[:, :-1], position_ids=positions, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, self.recipe.loss_from :]).float().flatten(0, 1)
            if not self.recipe.distill:
                return F.cross_entropy(logits, tokens[:, 1 + self.recipe.loss_from :].flatten())
            assert self.teacher is not None
            with torch.no_grad():
                wanted = self.teacher(tokens[:, :-1], position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits, wanted.float().flatten(0, 1).softmax(-1))

    def step(self, ids: np.ndarray, positions: np.ndarray) -> float:
        """One step of next-token loss; ids [B, T + 1], positions [B, T]. Return the mean loss in nats."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, self.tokens)
        tokens = torch.from_numpy(ids).to(self.device)
        loss = self.loss(tokens, torch.from_numpy(positions).to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps, self.tokens = self.steps + 1, self.tokens + positions.size
        return loss.item()

    def save(self, file: Path) -> None:
        """Write everything that a resumed run needs, in one move."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        counts = {"run": self.run, "steps": self.steps, "tokens": self.tokens}
        torch.save(counts | {"model": self.model.state_dict(), "optim": optimizers}, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def resume(self, file: Path) -> None:
        """Go on from a saved state, if there is one."""
        if file.exists():
            content = torch.load(file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(content["model"])
            for optimizer, state in zip(self.optimizers, content["optim"], strict=True):
                optimizer.load_state_dict(state)
            self.run, self.steps, self.tokens = content["run"], content["steps"], content["tokens"]


class HeadTrainer(Trainer):
    """An EAGLE head over the finished target, its teacher."""

    def build(self) -> nn.Module:
        """Return the head with its first weights."""
        assert self.teacher is not None
        torch.manual_seed(self.recipe.seed)
        return TrainableHead(self.recipe.model["version"], self.teacher, self.recipe.model["intermediate_size"])

    def begin(self, run: int, recipe: Recipe) -> None:
        """Take up a run; each says how far the head is unrolled."""
        super().begin(run, recipe)
        self.model.unrolled = recipe.unrolled

    def loss(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Loss of the head in its own units; its windows have one token more."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return self.model.loss(tokens)


def train(
    recipes: tuple[Recipe, ...],
    groups: list[np.ndarray],
    folder: Path,
    device: str,
    teacher: LlamaForCausalLM | None = None,
) -> Any:
    """Train one model, resuming from `folder/state.pt` where there is one; losses go to `folder/log.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = (HeadTrainer if "version" in recipes[0].model else Trainer)(recipes[0], device, teacher)
    trainer.resume(folder / "state.pt")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.1f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, (folder / "log.jsonl").open("a") as log:
        for run, recipe in list(enumerate(recipes))[trainer.run :]:
            trainer.begin(run, recipe)
            bar = progress.add_task(folder.name, total=recipe.tokens, completed=trainer.tokens)
            saved = time.monotonic()
            for row in _rows(trainer, groups):
                log.write(json.dumps(row) + "\n")
                log.flush()
                progress.update(bar, completed=trainer.tokens, description=f"{folder.name} loss {row['loss']:.3f}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    trainer.save(folder / "state.pt")
                    saved = time.monotonic()
            trainer.save(folder / "state.pt")
    return trainer.model.eval()


def _rows(trainer: Trainer, groups: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """Take the steps that are left of the trainer's run; yield what the log says of each."""
    recipe = trainer.recipe
    stretch_to = recipe.model["max_position_embeddings"] if recipe.long_share else 0
    sampler = WindowSampler(groups, recipe.seed, recipe.copy_rate, stretch_to)
    for ids, positions in batches(recipe, sampler, trainer.steps, trainer.tokens):
        began = time.monotonic()
        loss = round(trainer.step(ids, positions), 4)
        counts = {"run": trainer.run, "step": trainer.steps, "tokens": trainer.tokens}
        yield counts | {"length": positions.shape[1], "loss": loss, "seconds": round(time.monotonic() - began, 2)}


def prepare(out: Path) -> tuple[PreTrainedTokenizerFast, list[np.ndarray]]:
    """Train (or load) the tokenizer and encode the training files; both are kept in `out`."""
    files = stdlib.training_files()
    texts = read_groups(files, {name: stdlib.group_of(name) for name, _ in files})
    if (out / "tokenizer" / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = train_tokenizer([t for group in texts for t in group], VOCAB_SIZE, 16384)
        tokenizer.save_pretrained(out / "tokenizer")
    cache = out / "corpus.npz"
    if not cache.exists():
        np.savez(cache, *encode_groups(tokenizer, texts))
    with np.load(cache) as arrays:
        return tokenizer, [arrays[name] for name in arrays.files]


def export(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint directory that every transformers 5 reads, with its model card."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("backend", "is_local", "local_files_only"):  # of the newest release only
        content.pop(key, None)
    settings.write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # save_pretrained leaves weights unreadable to others
    runs = [asdict(recipe) for recipe in RECIPES[name]]
    text = card(name, model, tokenizer, runs, "python -m specx.training.demo --out DIR")
    (folder / "README.md").write_text(text)


HEAD_CARD = """---
license: apache-2.0
---
# specx demo-{name}

An {version} head ({count:.1f}M parameters) for specx's demo-target, which ships with specx. It drafts Python.

- Data: the standard library of Python (PSF licence) as the target's, {tokens:,} tokens in windows of up to
  {length}, without
  the modules of `specx.data.stdlib.HELD_OUT` and their tests. It learns the target's own distribution.
- Command: `python -m specx.training.demo --out DIR --part target --part {name}`
- Licence: Apache-2.0.
"""


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for everything.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(list(RECIPES)),
    multiple=True,
    help="Of these models only. Default: target and draft.",
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(out: Path, parts: tuple[str, ...], device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, groups = prepare(out)
    click.echo(f"{sum(map(len, groups)):,} training tokens in {len(groups)} groups")
    for name in parts or PAIR:
        (out / name).mkdir(exist_ok=True)
        (out / name / "recipe.json").write_text(json.dumps([asdict(r) for r in RECIPES[name]], indent=1))
        teacher = teacher_from(out / "demo-target", device) if name != "target" else None
        model = train(RECIPES[name], groups, out / name, device, teacher).to(torch.bfloat16)
        if teacher is not None and name in HEADS:
            export_head(name, model, out / f"demo-{name}")
        else:
            export(name, model, tokenizer, out / f"demo-{name}")


def export_head(name: str, model: TrainableHead, folder: Path) -> None:
    """Write a head as its authors' own training does, with a card."""
    length, tokens = RECIPES[name][-1].phases[-1][2], sum(recipe.until or recipe.tokens for recipe in RECIPES[name])
    folder.mkdir(exist_ok=True)
    save_file({key: each.contiguous() for key, each in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(head_config(model, length), indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    count = sum(each.numel() for each in model.parameters())
    (folder / "README.md").write_text(
        HEAD_CARD.format(name=name, version=HEADS[name], count=count / 1e6, tokens=tokens, length=length)
    )


def teacher_from(folder: Path, device: str) -> LlamaForCausalLM:
    """Load the finished target."""
    if not folder.exists():
        raise click.UsageError("the draft learns from the target: train that first (--part target, same --out)")
    teacher = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    teacher.set_attn_implementation("specx_training")
    return teacher.eval()


if __name__ == "__main__":
    main()
