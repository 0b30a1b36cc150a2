"""Tiny random models, made once a session. No download, no GPU."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.config import DRAFT_ALONE, Settings
from specx.hf import HFModel

torch.set_num_threads(1)  # threads only wait for each other on models this small


def shared(*parts: str) -> Path | None:
    """A folder of data that is no part of the repository: beside the checkout, or in SPECX_SHARED; None: not there."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared"
    found = Path(os.environ.get("SPECX_SHARED", beside)).joinpath(*parts)
    return found if found.is_dir() else None


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama with logits far enough apart that float32 rounding decides nothing."""
    options: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(options | overrides))).eval()


def noised(model: Any, std: float, seed: int = 1) -> Any:
    """A copy with noise on its weights: a draft that agrees with its target most of the time."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    for weight in twin.parameters():
        weight.data += std * torch.randn(weight.shape, generator=generator)
    return twin


# The draft alone and its whole tree in every round, as most tests want it.
FIXED = Settings().override(**DRAFT_ALONE)


def pair(target: Any, draft: Any, draft_context: int = 128, backend: str = "auto", **kwargs: Any) -> SpeculativeModel:
    """A target and a classic draft without tokenizer, ids only."""
    engine = HFModel(target, backend)
    plug = ClassicModel("tiny", HFModel(draft, backend), engine.vocab_size, draft_context, "the test")
    return SpeculativeModel(engine, plug, None, **({"settings": FIXED} | kwargs))


@pytest.fixture(scope="session", autouse=True)
def no_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user has measured on this machine decides nothing in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_pair(tiny: LlamaForCausalLM) -> SpeculativeModel:
    return pair(tiny, noised(tiny, 0.02))


@pytest.fixture
def prompt_of() -> Callable[[int], torch.Tensor]:
    """prompt_of(n) gives n random ids, the same each time."""
    return lambda n: torch.randint(1, 64, (n,), generator=torch.Generator().manual_seed(n))
