"""Train the bundled pair: `python -m specx.training.demo --out DIR`.

A thin Llama target and a two-layer draft, on the standard library of the running interpreter without the held-out
modules. Seeded; killed and started again it goes on from its last checkpoint; runs on CPU or CUDA.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specx.data import stdlib
from specx.hf import HFModel
from specx.training.card import card
from specx.training.corpus import WindowSampler, encode_groups, read_groups, train_tokenizer
from specx.training.eagle import TrainableHead, head_config
from specx.training.longspec import LongSpecLoss, LongSpecTask, fresh_block, longspec_config, published_tensors
from specx.training.loop import Batch, Course, Loop
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
    while done < recipe.total:
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


class ModelTask(nn.Module):
    """A whole model in training.

    Args:
        recipe: Of the run in progress.
        teacher: The finished target, for runs that distill.
    """

    def __init__(self, recipe: Recipe, teacher: LlamaForCausalLM | None) -> None:
        super().__init__()
        self.recipe, self.model, self.teacher_of = recipe, build(recipe), [teacher]

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Mean next-token loss in nats on [B, T + 1], or the cross entropy against the teacher's distribution."""
        hidden = self.model.model(tokens[:, :-1], position_ids=positions, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, self.recipe.loss_from :]).float().flatten(0, 1)
        teacher = self.teacher_of[0]
        if not self.recipe.distill or teacher is None:
            return F.cross_entropy(logits, tokens[:, 1 + self.recipe.loss_from :].flatten())
        with torch.no_grad():
            wanted = teacher(tokens[:, :-1], position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits, wanted.float().flatten(0, 1).softmax(-1))


class HeadTask(nn.Module):
    """An EAGLE head over the finished target, its teacher."""

    def __init__(self, recipe: Recipe, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = TrainableHead(recipe.model["version"], teacher, recipe.model["intermediate_size"])

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Loss of the head in its own units; its windows have one token more, at contiguous positions."""
        self.model.unrolled = self.recipe.unrolled
        return self.model.loss(tokens)


class BlockTask(nn.Module):
    """A LongSpec block over the finished target."""

    def __init__(self, recipe: Recipe, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.model = fresh_block(HFModel(teacher), recipe.model["intermediate_size"])
        how = LongSpecLoss(distill=recipe.distill, positions=teacher.config.max_position_embeddings)
        self.task = LongSpecTask(teacher, self.model, how)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Mean loss in nats; the positions are the task's own draw."""
        return self.task(tokens, (int(torch.randint(1 << 62, ())),))


def task_of(recipe: Recipe, teacher: LlamaForCausalLM | None) -> Any:
    """Return what a recipe trains, with its first weights."""
    version = recipe.model.get("version")
    if version is None:
        return ModelTask(recipe, teacher)
    assert teacher is not None
    return (BlockTask if version == "longspec" else HeadTask)(recipe, teacher)


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, LM heads and norms."""
    named = list(model.named_parameters())
    inner = {name for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
    matrices = [p for name, p in named if name in inner]
    others = [p for name, p in named if name not in inner]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def course_of(recipe: Recipe, groups: list[np.ndarray]) -> Course:
    """Return a recipe's run over the training files."""
    stretch_to = recipe.model["max_position_embeddings"] if recipe.long_share else 0
    sampler = WindowSampler(groups, recipe.seed, recipe.copy_rate, stretch_to)

    def windows(step: int, done: int) -> Iterator[Batch]:
        return (Batch(arrays, (), arrays[1].size) for arrays in batches(recipe, sampler, step, done))

    return Course(recipe.total, windows, lambda done: learning_rate(recipe, done), recipe.seed)


def train(
    recipes: tuple[Recipe, ...],
    groups: list[np.ndarray],
    folder: Path,
    device: str,
    teacher: LlamaForCausalLM | None = None,
) -> Any:
    """Train one model, resuming where it was left; losses go to `folder/log.jsonl`."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # an Accelerator takes the current one
    task = task_of(recipes[0], teacher).to(device)
    accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu")
    loop = Loop(task, optimizers_of(task.model), folder, accelerator, bf16=True, save_seconds=SAVE_SECONDS)
    for run, recipe in list(enumerate(recipes))[loop.progress.run :]:
        if run > loop.progress.run:
            for layer in task.model.model.layers if recipe.sharpen != 1 else ():
                layer.self_attn.q_proj.weight.data *= recipe.sharpen
        task.recipe = recipe
        loop.run(course_of(recipe, groups), run, folder.name)
    return task.eval()


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

{kind} ({count:.1f}M parameters) for specx's demo-target, which ships with specx. It drafts Python.

- Data: the standard library of Python (PSF licence) as the target's, {tokens:,} tokens in windows of up to
  {length}, without the modules of `specx.data.stdlib.HELD_OUT` and their tests. It learns the target's own
  distribution.
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
        task = train(RECIPES[name], groups, out / name, device, teacher).to(torch.bfloat16)
        if name in HEADS:
            export_head(name, task, out / f"demo-{name}")
        else:
            export(name, task.model, tokenizer, out / f"demo-{name}")


def export_head(name: str, task: HeadTask | BlockTask, folder: Path) -> None:
    """Write a head as its authors' own training does, with a card."""
    length, tokens = RECIPES[name][-1].phases[-1][2], sum(recipe.total for recipe in RECIPES[name])
    folder.mkdir(exist_ok=True)
    if isinstance(task, BlockTask):
        target = HFModel(task.task.target_of[0])
        config, tensors = (
            longspec_config(task.model, target, target.config.max_position_embeddings),
            published_tensors(task.model),
        )
    else:
        config, tensors = head_config(task.model, length), task.model.state_dict()
    save_file({key: each.contiguous() for key, each in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    count = sum(each.numel() for each in tensors.values())
    (folder / "README.md").write_text(
        HEAD_CARD.format(name=name, kind=HEADS[name], count=count / 1e6, tokens=tokens, length=length)
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
