"""`specx train`: a target, text and a kind of draft become a draft in OUT/draft, measured on the way."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from specx.adapters.checkpoints import check_device, check_files, default_device, load_model, load_tokenizer
from specx.adapters.hub import fetch
from specx.adapters.loader import load_draft
from specx.adapters.names import locate
from specx.api import SpeculativeModel
from specx.config import DRAFT_ALONE, Checked, LoadConfig
from specx.hf import HFModel
from specx.ranks import keep_for_ever
from specx.training.data import Tokens
from specx.training.features import FeatureCache, check_writable, fingerprint
from specx.training.kinds import KINDS, Kind, Start
from specx.training.loop import Batch, Course, Loop, warmup_cosine
from specx.training.options import TrainConfig

_FREE = {"save_seconds", "rows", "measure_every", "measure_prompts", "measure_context", "measure_tokens", "precision"}
_FREE |= {"feature_cache", "feature_cache_size"}


@dataclass(frozen=True, slots=True)
class Job:
    """One call of `specx train`.

    Attributes:
        kind: classic, eagle3 or longspec.
        target, data: As the user gave them; see `data.read_texts`.
        out: Takes the draft, the log, the states to resume from and the encoded text.
        own: The kind's own options.
        init: A draft to go on from: a directory, or, for LongSpec, a file.
        load: dtype and device of the target.
    """

    kind: str
    target: str
    data: str
    out: Path
    config: TrainConfig
    own: Checked
    init: str | None
    load: LoadConfig


def train(job: Job) -> dict[str, Any]:
    """Train, or go on where an earlier call with the same options ended; return the last line of the log.

    Raises:
        ValueError: Options or data that cannot be used, or others than those that OUT was begun with.
        RuntimeError: A target that cannot be loaded, a loss that is no number any more.
    """
    device = check_device(job.load.device or default_device())
    config = job.config
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # an Accelerator takes the current one
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")  # the loop has its own
    fresh = accelerator.is_main_process and not job.out.exists()
    try:
        with accelerator.main_process_first():
            check_folder(job)
        torch.manual_seed(config.seed)
        kind, tokens = _prepared(job, accelerator)
        if config.feature_cache is not None:
            kind.watcher.watched = _feature_cache(job, kind, accelerator, bf16)
    except BaseException:
        if fresh:  # nothing was trained: leave nothing behind
            shutil.rmtree(job.out, ignore_errors=True)
        raise
    task = kind.task.to(accelerator.device)
    weights = [each for each in task.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, config.learning_rate, betas=(0.9, 0.95), eps=1e-6, weight_decay=config.weight_decay
    )
    loop = Loop(task, [optimizer], job.out, accelerator, config.rows, bf16, save_seconds=config.save_seconds)
    prompts = tokens.prompts(config.measure_prompts, config.measure_context)

    def measure() -> dict[str, Any]:
        kind.export(job.out / "draft")
        return acceptance(kind, job.out / "draft", prompts, config.measure_tokens)

    loop.run(_course(config, tokens), 0, job.kind, measure, config.measure_every)
    if accelerator.is_main_process:
        kind.export(job.out / "draft")
    accelerator.wait_for_everyone()  # gloo may wait for ever, in its own end, for a process that has left
    if accelerator.num_processes > 1:
        keep_for_ever(torch.distributed.group.WORLD)
    accelerator.end_training()
    return {"step": loop.progress.step, "tokens": loop.progress.tokens}


def _prepared(job: Job, accelerator: Accelerator) -> tuple[Kind, Tokens]:
    """Load the target, encode the text once for all processes, and make the draft's first weights."""
    where = fetch(locate(job.target, "target"), "target")
    check_files(where, "target")
    tokenizer = load_tokenizer(where, job.load.trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"target {job.target} brings no tokenizer; save its tokenizer in that directory")
    with accelerator.main_process_first():
        tokens = Tokens(job.out / "text", job.data, tokenizer)
    options = asdict(job.load) | {"device": str(accelerator.device)}
    model = load_model(where, LoadConfig(**options), "target").requires_grad_(False)
    engine = HFModel(model, pack_weights=False)
    init = None if job.init is None else fetch(locate(job.init, "draft"), "draft")
    start = Start(init, job.config.length)
    return KINDS[job.kind](engine, tokenizer, job.own, tokens, start), tokens


def _feature_cache(job: Job, kind: Kind, accelerator: Accelerator, bf16: bool) -> FeatureCache:
    """Return a cache of what this target gives to this kind of draft, at this precision on this kind of device."""
    about = {"kind": job.kind, "target": fingerprint(kind.target.model), "bf16": bf16}
    about |= {"device": accelerator.device.type, "torch": torch.__version__, "transformers": transformers.__version__}
    folder, size = Path(job.config.feature_cache or "").expanduser(), int(job.config.feature_cache_size * 2**30)
    return FeatureCache(folder, size, about, accelerator.num_processes)


def _course(config: TrainConfig, tokens: Tokens) -> Course:
    count = config.batch * config.length
    total = config.steps * count

    def batches(step: int, done: int) -> Any:
        for number in range(step, config.steps):
            windows = tokens.windows(config.seed, number, config.batch, config.length + 1)
            yield Batch((windows,), ((config.seed, number, 1),), count)

    return Course(total, batches, warmup_cosine(config.learning_rate, total, config.warmup), config.seed)


def acceptance(kind: Kind, folder: Path, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Let the draft in `folder` draft for its target after each prompt, greedily.

    Returns:
        tau: Tokens emitted by verification steps over their number; prompts: how many counted.
    """
    draft = load_draft(str(folder), str(folder), kind.target, None, LoadConfig(device=str(kind.target.device)))
    model, emitted, steps = SpeculativeModel(kind.target, draft, None), 0, 0
    for prompt in prompts:
        out = model.generate(prompt, max_new_tokens=new, **DRAFT_ALONE)
        emitted, steps = emitted + out.emitted, steps + out.steps
    return {"tau": emitted / steps if steps else None, "prompts": len(prompts)}


def check_folder(job: Job) -> None:
    """Keep a call's options beside what it writes; refuse to go on with others.

    Raises:
        ValueError: Naming the first option that differs, or a feature cache that cannot be written.
    """
    if job.config.feature_cache is not None:
        check_writable(Path(job.config.feature_cache).expanduser())
    options = {"kind": job.kind, "target": job.target, "data": job.data, "init": job.init}
    options |= {name: value for name, value in asdict(job.config).items() if name not in _FREE}
    options |= asdict(job.own)
    file = job.out / "train.json"
    if file.is_file():
        before = json.loads(file.read_text())
        wrong = next((name for name in options if before.get(name) != options[name]), None)
        if wrong is not None:
            raise ValueError(
                f"{job.out} was begun with {wrong} {before.get(wrong)}, not {options[wrong]}: go on with the same "
                "options, or give another --out"
            )
        return
    if job.out.exists() and any(job.out.iterdir()):
        raise ValueError(f"--out {job.out} is not empty and holds no training: give another folder")
    job.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options, indent=1) + "\n")
