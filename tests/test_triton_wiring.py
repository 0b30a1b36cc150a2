"""The engine over the Triton kernels in their interpreter: a process of its own, for it must be on before import."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from conftest import FIXED, noised, tiny_llama
from specx import attention, hf, static_attention
from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.hf import HFModel

assert static_attention.trouble_with_kernel(torch.device("cpu")) is None
ids = torch.randint(0, 60, (90,), generator=torch.Generator().manual_seed(0))
target = tiny_llama(head_dim=32, num_hidden_layers=1)
own = target.generate(ids[None], max_new_tokens=16, do_sample=False)[0, 90:].tolist()

attention.choose_backend = lambda name, device: ("triton", "interpreted")
launched = set()
for name in ("tree_attention", "commit_rows", "chunk_scores"):
    def watched(*args, name=name, launch=getattr(static_attention.kernel_launch(), name), **options):
        launched.add(name)
        return launch(*args, **options)
    setattr(static_attention.kernel_launch(), name, watched)
engine, small = HFModel(target, graphs=True), HFModel(noised(target, 0.01), graphs=True)
assert engine.backend == "triton" and engine.no_graphs is None
couple = SpeculativeModel(engine, ClassicModel("tiny", small, engine.vocab_size, 64, "the test"), None, FIXED)
out = couple.generate(ids, max_new_tokens=16, policy="auto", chunk_size=4)
assert out.tokens == own, (out.tokens, own)
assert out.stats["tau"] > 1.3, out.stats["tau"]
assert launched == {"tree_attention", "commit_rows", "chunk_scores"}, launched

odd = HFModel(tiny_llama(head_dim=24), graphs=True)  # no kernel for such heads
assert "heads of 24" in odd.no_graphs
print("wired")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_generation_runs_on_the_kernels():
    here = Path(__file__).resolve().parent
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wired" in done.stdout
