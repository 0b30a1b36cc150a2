"""Tiny checkpoints on disk, made once a session: what `specx` is given by people who have real ones.

A pytest plugin, not a module of helpers: a test file that wants its fixtures says `pytest_plugins = ["disk"]`.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 400
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SOURCE = Path(__file__).read_text(encoding="utf-8")


def llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(options | overrides))).eval()


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy with a little noise: a draft that agrees with its target most of the time."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return other


def byte_level_bpe(specials: tuple[str, str] = ("<s>", "</s>"), template: str | None = TEMPLATE) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([SOURCE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def llama_tokenizer() -> Tokenizer:
    """Llama 2's kind of tokenizer: a metaspace before every word. No byte tokens: random models would babble them."""
    pieces = ["<unk>", "<s>", "</s>", "▁"]
    pieces += [character for character in sorted(set(SOURCE)) if character.isprintable() and character not in " ▁"]
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("i", "n"), ("▁", "a"), ("r", "e"), ("▁", "in")]
    vocab = {piece: index for index, piece in enumerate(pieces + ["".join(pair) for pair in pairs])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>", fuse_unk=True))
    bpe.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in pieces[:3]])
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    strip = decoders.Strip(content=" ", left=1, right=0)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    return bpe


class Disk:
    """Checkpoint directories below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        model = llama()
        self.target = self.save("target", model, byte_level_bpe())
        self.draft = self.save("draft", twin(model), byte_level_bpe())
        self.no_template = self.save("no_template", model, byte_level_bpe(template=None))
        self.no_tokenizer = self.save("no_tokenizer", model, None)
        self.other_tokenizer = self.save("other_tokenizer", twin(model), byte_level_bpe(("</s>", "<s>")))
        self.pair = ["--target", self.target, "--draft", self.draft]

    def save(self, name: str, model: Any, tokenizer: Any) -> str:
        folder = self.root / name
        folder.mkdir()
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return str(folder)

    def copy(self, name: str, change: Callable[[Path], object]) -> str:
        """A changed copy of the target."""
        folder = self.root / name
        shutil.copytree(self.target, folder)
        change(folder)
        return str(folder)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HF_HOME whose cache holds vicuna's stand-ins, in the layout and with the oddities of the published ones."""
    home = tmp_path_factory.mktemp("hf_home")
    rope = {
        "max_position_embeddings": 1024,
        "max_sequence_length": 4096,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    }
    target = llama(bos_token_id=1, eos_token_id=2, vocab_size=llama_tokenizer().get_vocab_size())
    weights = {name: weight.half() for name, weight in target.state_dict().items()}
    names = sorted(weights)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    folder = _snapshot(home, "lmsys/vicuna-7b-v1.5-16k", target, rope)
    for file, mine in shards.items():
        save_file({name: weights[name] for name in mine}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, mine in shards.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    draft = twin(target)
    folder = _snapshot(home, "double7/vicuna-68m", draft, {"max_position_embeddings": 2048})
    unused = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    torch.save({**draft.half().state_dict(), **unused}, folder / "pytorch_model.bin")
    return home


def _snapshot(home: Path, repo: str, model: LlamaForCausalLM, oddities: dict[str, Any]) -> Path:
    commit = f"{len(repo):040x}"
    base = home / "hub" / f"models--{repo.replace('/', '--')}"
    folder = base / "snapshots" / commit
    folder.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    config = model.config.to_dict() | {"torch_dtype": "float16", "transformers_version": "4.31.0"} | oddities
    for new in ("rope_parameters", "dtype"):
        config.pop(new, None)
    (folder / "config.json").write_text(json.dumps(config))
    sampling = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **sampling}))
    (folder / "tokenizer.json").write_text(llama_tokenizer().to_str())
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "legacy": False, "model_max_length": 4096}))
    return folder


@pytest.fixture(scope="session")
def specx_command() -> tuple[list[str], dict[str, str]]:
    """How a subprocess runs this checkout, and its environment."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return [sys.executable, "-m", "specx"], inherited | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
