"""`eagle-llm` before and after retrofitting, on one prompt: what came out, tau, tokens a second, memory.

Each way runs in a process of its own, one after the other, so that neither's memory counts for the other.
"""

import json
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specx.adapters.eagle_llm import follow_rope_theta, load
from specx.adapters.retrofit import Retrofit, retrofit
from specx.eval.memory import peak_bytes, reset
from specx.hf_config import positions_of

_WARM = 4  # new tokens of a first run, whose figures nobody reads: libraries allocate and kernels are made


@dataclass(frozen=True, slots=True)
class Way:
    """What one way of generating gave.

    Attributes:
        tokens: New ones, cut as transformers would; none where it failed.
        failed: How and where, or "".
        tau: Tokens emitted by verification steps over their number.
        tokens_per_second: Of the whole call, prefill included.
        decode_tokens_per_second: Without prefill; for the package from its second forward on, its first tree for free.
        memory_bytes: The most in use during it, beyond what was in use once both models were loaded.
        plain: What transformers' own greedy decoding of the same target gives; only where specx ran.
        notes: What is known to be computed differently.
        exact: Computed in float32. In half precision ties can fall either way.
    """

    tokens: list[int]
    failed: str = ""
    tau: float | None = None
    tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    memory_bytes: int = 0
    plain: list[int] | None = None
    notes: tuple[str, ...] = ()
    exact: bool = True


def run_both(job: dict[str, Any]) -> tuple[Way, Way]:
    """Run a prompt through `eagle-llm` itself and through the retrofitted object.

    Args:
        job: target and head (directories), ids, new (tokens), device, dtype (None: the checkpoint's), fix_rope (let the
            package follow its target's rope_theta), specextend, and options of `retrofit`.

    Raises:
        RuntimeError: If a process fails before anything was generated; its last line says why.
    """
    own, ours = (run_one(job, retrofitted) for retrofitted in (False, True))
    return own, ours


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Return where two outputs part, or None."""
    pairs = enumerate(zip(left, right, strict=False))
    short = min(len(left), len(right))
    return next((at for at, (one, two) in pairs if one != two), short if len(left) != len(right) else None)


def run_one(job: dict[str, Any], retrofitted: bool) -> Way:
    """Run one way in a process of its own; see `run_both`."""
    job = job | {"retrofitted": retrofitted}
    command = [sys.executable, "-m", "specx.retrofit_check"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode < 0:  # what was written before tells nothing
            last = f"killed by signal {-done.returncode} (9: perhaps out of memory)"
        raise RuntimeError(f"{'the retrofitted model' if job['retrofitted'] else 'eagle-llm'}: {last}")
    return Way(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(job: dict[str, Any]) -> Way:
    """Run one way in this process; see `run_both`."""
    options = {} if job["dtype"] is None else {"dtype": getattr(torch, job["dtype"])}
    model = load(job["target"], job["head"], job["device"], **options)
    if job["fix_rope"]:
        follow_rope_theta(model)
    ids = torch.tensor([job["ids"]], device=job["device"])
    if not job["retrofitted"]:
        return _measured(model, ids, job["new"], None)
    with retrofit(model, job["specextend"], **job["options"]) as handle:
        return _measured(model, ids, job["new"], handle)


def _measured(model: Any, ids: Tensor, new: int, handle: Retrofit | None) -> Way:
    forwards: list[float] = []  # when each began
    counter = model.base_model.model.register_forward_pre_hook(lambda *_: forwards.append(time.perf_counter()))
    try:
        model.eagenerate(ids[:, -64:], temperature=0.0, max_new_tokens=_WARM)
        for name in ("past_key_values", "past_key_values_data", "current_length_data"):
            vars(model).pop(name, None)  # its next call makes them again, and shall be seen to
        if handle is not None:
            handle.engine.release()
        forwards.clear()
        before, began = reset(ids.is_cuda), time.perf_counter()
        # Its own default would end after one step behind 2048 tokens.
        out = model.eagenerate(ids, temperature=0.0, max_new_tokens=new, max_length=ids.shape[1] + 2 * new + 64)
        ended = time.perf_counter()  # the output has been looked at: nothing is under way on a device
        tokens = out[0, ids.shape[1] :].tolist()
        peak = max(0, peak_bytes(ids.is_cuda) - before)
    except Exception as error:  # whatever a package that checks nothing beforehand raises
        return Way([], failed=_where(error))
    finally:
        counter.remove()
    rate, steps = len(tokens) / (ended - began), len(forwards) - 1
    kept = _cut(tokens, model.tokenizer.eos_token_id, new)
    if handle is None or handle.last is None:
        decode = (len(tokens) - 1) / (ended - forwards[1]) if steps else None  # one token is the prefill's
        return Way(kept, "", len(tokens) / steps if steps else None, rate, decode, peak)
    left = (positions_of(handle.engine.config) or ids.shape[1] + new) - ids.shape[1]
    plain = handle.engine.model.generate(
        ids, max_new_tokens=min(new, left), do_sample=False, eos_token_id=model.tokenizer.eos_token_id, pad_token_id=0
    )
    answer, exact = plain[0, ids.shape[1] :].tolist(), handle.engine.dtype == torch.float32
    stats = handle.last.stats
    return Way(
        kept, "", stats["tau"], rate, stats["decode_tokens_per_second"], peak, answer, tuple(handle.notes), exact
    )


def _cut(tokens: list[int], end: int | None, new: int) -> list[int]:
    """EAGLE's last step goes on behind the end."""
    kept = tokens[:new]
    return kept[: kept.index(end) + 1] if end in kept else kept


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(Path(frame.filename).parts[-3:])
    return f"{type(error).__name__} in {frame.name} ({place}:{frame.lineno}): {' '.join(str(error).split())}"


def main() -> None:
    """Read a job from standard input, write what came out to standard output, or why it failed on one line."""
    try:
        found = asdict(measure(json.load(sys.stdin)))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
