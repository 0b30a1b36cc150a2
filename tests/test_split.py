"""One target held by two processes (gloo, on the CPU): what comes out is what one process gives."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import heads
import pytest
import split_job
import torch
from click.testing import CliRunner
from conftest import noised, tiny_llama
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config, Qwen3ForCausalLM

import specx
from specx import cli
from specx.adapters.split import check_ranks, unsplittable
from specx.config import DRAFT_ALONE, LoadConfig

pytest_plugins = ["disk"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = {"max_new_tokens": 24, "draft_context": 96, "chunk_size": 8, "top_chunks": 4, "recent": 24}
GREEDY = SMALL | DRAFT_ALONE
SAMPLED = SMALL | {"temperature": 0.8, "top_p": 0.9, "seed": 3}  # with the context and the controller


def tiny_qwen3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 64, "head_dim": 16}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = Qwen3Config(**sizes, **ends, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return Qwen3ForCausalLM(config).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory, disk, specx_command):
    """Folder, command, cases, and how torchrun ended."""
    folder = tmp_path_factory.mktemp("split")
    llama, qwen = tiny_llama(eos_token_id=None), tiny_qwen3()
    target, other = saved(llama, folder / "llama"), saved(qwen, folder / "qwen3")
    head = heads.head_tensors(heads.EAGLE1)
    assert "lm_head.weight" not in head  # it reads the target's, of which each process holds a part
    cases = [
        {
            "target": target,
            "draft": saved(noised(llama, 0.02), folder / "draft"),
            "runs": [GREEDY, GREEDY | {"score_heads": "max", "beside": True}, SAMPLED],
        },
        {"target": other, "draft": saved(noised(qwen, 0.02), folder / "draft3"), "runs": [GREEDY, SAMPLED]},
        {
            "target": saved(heads.tiny_target(), folder / "wide"),
            "draft": heads.save(folder / "head", heads.flat_config(), head),
            "runs": [GREEDY],
        },
    ]
    tokenizer = AutoTokenizer.from_pretrained(disk.target)
    spoken = disk.save("two_heads", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    command = ["run", "--target", spoken, "--draft", disk.draft, "--prompt", "def name(steps):"]
    command += ["--max-new-tokens", "8", "--stats-json", str(folder / "stats.json")]
    (folder / "job.json").write_text(json.dumps([command, cases]))
    parts = [*TORCHRUN, str(Path(split_job.__file__)), str(folder)]
    done = subprocess.run(parts, env=specx_command[1], capture_output=True, text=True, timeout=240)
    assert (folder / "found.json").exists(), done.stderr
    return folder, command, cases, done


def test_the_command_is_that_of_one_process(job):
    folder, command, _, done = job
    written = json.loads((folder / "stats.json").read_text())
    alone = CliRunner().invoke(cli.main, command)
    assert done.stdout == alone.stdout
    assert written["new_tokens"] == 8
    said = done.stderr.splitlines()
    assert len([line for line in said if "on cpu in 2 processes" in line]) == 1
    assert len([line for line in said if line.startswith("8 tokens after ")]) == 1


def test_two_processes_give_what_one_gives(job):
    folder, _, cases, _ = job
    found = json.loads((folder / "found.json").read_text())
    expected = split_job.run(cases, None)
    assert len(found) == len(expected) == 6
    for mine, other in zip(found, expected, strict=True):
        assert mine["tokens"] == other["tokens"]
    for number in (0, 1, 3, 5):  # where no clock decides what is drafted
        assert found[number] == expected[number]
        assert [each for each in found[number]["kept"] if each]  # retrieval kept chunks, the same ones
    assert any(int(n) > 1 for n in found[0]["accepted"])
    assert found[0]["kept"] != found[1]["kept"]  # mean and maximum over the heads of both processes


def test_a_process_that_fails_ends_all_with_one_message(job):
    *_, done = job
    assert done.returncode != 0
    own = [
        line.split("]: ")[-1] for line in done.stderr.splitlines() if "Error: " in line and "ChildFailed" not in line
    ]
    assert own == ["RuntimeError: the second device is full"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=2), "its 2 key/value heads cannot be shared among 4"),
        (MistralConfig(num_attention_heads=6, num_key_value_heads=2), "its 6 attention heads cannot be shared among 4"),
        (GPT2Config(), "transformers has no tensor-parallel plan for gpt2"),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=4), None),
    ],
    ids=["key/value heads", "attention heads", "no plan", "fits"],
)
def test_what_cannot_be_split_is_said(config, said):
    reason = unsplittable(config, 4)
    assert reason is None if said is None else reason.startswith(said)


def test_what_cannot_be_loaded_by_several_is_refused_before_anything_is_read(disk, tiny, monkeypatch):
    ranks: Any = SimpleNamespace(size=2, rank=0)
    for target, draft, said in [
        (tiny, None, "a live target cannot be split"),
        (disk.target, disk.draft, "cannot be split over 2 processes: its 1 key/value heads cannot be shared"),
    ]:
        with pytest.raises(ValueError, match=said):
            specx.load(target, draft, ranks=ranks)
    ranks.size = 1
    monkeypatch.setattr("specx.adapters.split.kind_of", lambda directory: "longspec")
    monkeypatch.setattr("specx.api.check_config", lambda *_: None)
    with pytest.raises(ValueError, match="reads the target's keys and values, of which each process holds a part"):
        specx.load(disk.target, disk.draft, ranks=ranks)


@pytest.mark.parametrize(
    ("option", "value"), [("device", "cpu"), ("device_map", "auto"), ("quantization", "4bit"), ("graphs", True)]
)
def test_options_that_do_not_go_with_it(option, value):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} does not go with torchrun"):
        check_ranks(LoadConfig(**{option: value}))


@pytest.mark.parametrize(("rank", "said"), [("0", "specx eval runs in one process"), ("1", "")])
def test_other_commands_are_refused_once(monkeypatch, rank, said):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # followers replace both
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    try:
        result = CliRunner().invoke(cli.main, ["eval", "--data", "stdlib"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 2
    assert said in result.stderr
    assert bool(result.stderr) == bool(said)
