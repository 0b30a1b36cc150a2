"""The calls of `EaModel` objects, answered by specx: the released package's and those of EAGLE's repository.

All token tensors are int64 [1, L] on the prompt's device.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specx.config import SamplingConfig, Settings
from specx.decoding import decode
from specx.draft import DraftModel
from specx.experience import Experience
from specx.generation import Generation, Piece
from specx.hf import HFModel
from specx.hf_config import positions_of
from specx.sampling import TokenChooser

_GREEDY = 1e-5  # temperatures up to here are greedy for EAGLE
_STREAMED = 1024  # new tokens after which the released ea_generate ends, which is told no number
Steps = Generator[Piece]


class Calls:
    """What both kinds share.

    Args:
        ea_model: The object; its tokenizer says where a text ends.
        settings: Of cache and tree.
        given: The names of those that were asked for; the object says the tree's size where they are not among them.

    Attributes:
        last: What the last call gave.
    """

    def __init__(
        self, ea_model: Any, engine: HFModel, draft: DraftModel, settings: Settings, given: frozenset[str]
    ) -> None:
        self.ea_model, self.engine, self.draft = ea_model, engine, draft
        self.settings, self.given = settings, given
        self.last: Generation | None = None
        self._experience = Experience()

    def start(
        self,
        input_ids: Tensor,
        sampled: tuple[float, float, float],
        wanted: int,
        most: int | None,
        tree: dict[str, int],
        ends: Sequence[str] = (),
    ) -> tuple[Generation, Steps]:
        """Check a call; return what will come out and the steps that bring it.

        Args:
            sampled: temperature, top_p and top_k as EAGLE understands them: 0 switches each off.
            wanted: New tokens at most.
            most: Prompt and new tokens at most; None: as many as the target has positions.
            tree: The object's own options of the tree.
            ends: Tokens that end a text besides the tokenizer's end-of-text token.

        Raises:
            ValueError: A prompt that cannot be served.
        """
        ids = self._ids(input_ids)
        left = self._left(len(ids), most)
        own = {name: value for name, value in tree.items() if name not in self.given}
        settings = self.settings.override(**own, max_new_tokens=min(wanted, left))
        stop = self._ends(ends)
        out = self.last = Generation(len(ids))
        how: dict[str, Any] = {"chooser": self._chooser(*sampled), "experience": self._experience}
        return out, decode(self.engine, self.draft, ids, settings, out, stop.__contains__, **how)

    def whole(self, input_ids: Tensor, started: tuple[Generation, Steps]) -> Tensor:
        """Run all steps; return prompt and new tokens."""
        out, steps = started
        with closing(steps):
            for _ in steps:
                pass
        return _joined(input_ids, out)

    def streamed(self, input_ids: Tensor, started: tuple[Generation, Steps], limit: int | None) -> Generator[Tensor]:
        """Yield prompt and new tokens after every verification step, at most `limit` times."""
        out, steps = started
        with closing(steps):
            for _ in steps:
                if out.steps:  # EAGLE does not show the token that the prefill gives before a step has followed
                    yield _joined(input_ids, out)
                if limit is not None and out.steps >= limit:
                    return
        if not out.steps:
            yield _joined(input_ids, out)

    def _ids(self, input_ids: Tensor) -> Tensor:
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype != torch.long:
            raise ValueError("input_ids must be an int64 tensor of shape [1, L]")
        if input_ids.shape[0] != 1 or not input_ids.shape[1]:
            raise ValueError(f"one prompt at a time, and not an empty one; input_ids is {list(input_ids.shape)}")
        ids, vocab = input_ids[0].to(self.engine.device), self.engine.vocab_size
        if int(ids.min()) < 0 or int(ids.max()) >= vocab:
            raise ValueError(f"token ids must be between 0 and {vocab - 1}")
        return ids

    def _left(self, prompt: int, most: int | None) -> int:
        positions = positions_of(self.engine.config)
        if most is not None and most <= prompt:
            raise ValueError(
                f"max_length {most} leaves nothing to generate after a prompt of {prompt} tokens; without max_length "
                f"the target's positions are the limit ({positions})"
            )
        if positions is not None and positions <= prompt:
            raise ValueError(f"a prompt of {prompt} tokens fills the target's {positions} positions")
        return min(each for each in (most, positions, prompt + 2**31) if each is not None) - prompt

    def _ends(self, names: Sequence[str]) -> set[int]:
        tokenizer = getattr(self.ea_model, "tokenizer", None)
        if tokenizer is None:
            return set()
        found = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(name) for name in names)]
        return {each for each in found if each is not None}

    def _chooser(self, temperature: float, top_p: float, top_k: float) -> TokenChooser:
        """Return what draws from the distribution that EAGLE means: temperature, then top_p, then top_k."""
        processors = LogitsProcessorList()
        if temperature <= _GREEDY:
            return TokenChooser(processors, SamplingConfig(), self.engine.device)
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if 1e-8 <= top_p < 1.0:
            processors.append(TopPLogitsWarper(float(top_p)))
        if top_k > 0:
            processors.append(TopKLogitsWarper(int(top_k)))
        seed = int(torch.randint(2**31, ()))  # so that torch.manual_seed decides, as it does for EAGLE
        return TokenChooser(processors, SamplingConfig(temperature=temperature, seed=seed), self.engine.device)


class ReleasedCalls(Calls):
    """The calls of `eagle-llm` 1.2.1, whose tree is a list of paths: here only its size counts."""

    def eagenerate(
        self,
        input_ids: Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        tree_choices: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Return prompt and new tokens."""
        sampled = temperature, top_p, top_k
        started = self.start(input_ids, sampled, max_new_tokens, max_length, self._tree(tree_choices))
        return self.whole(input_ids, started)

    def ea_generate(
        self,
        input_ids: Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_steps: int = 512,
        tree_choices: Sequence[Sequence[int]] | None = None,
    ) -> Generator[Tensor]:
        """Yield prompt and new tokens after every step."""
        started = self.start(input_ids, (temperature, top_p, top_k), _STREAMED, None, self._tree(tree_choices))
        return self.streamed(input_ids, started, max_steps)

    def _tree(self, choices: Sequence[Sequence[int]] | None) -> dict[str, int]:
        choices = choices or self.ea_model.ea_layer.tree
        return {
            "nodes": len(choices) + 1,
            "depth": max(map(len, choices)) - 1,
            "beam": max(max(each) for each in choices) + 1,
        }


class OfficialCalls(Calls):
    """The calls of EAGLE's repository; the head says the tree's size, whenever a call comes."""

    def eagenerate(
        self,
        input_ids: Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        log: bool = False,
        is_llama3: bool = False,
    ) -> Tensor | tuple[Tensor, int, int]:
        """Return prompt and new tokens; with `log` also the number of the new ones and the last step's index."""
        sampled = temperature, top_p, top_k
        started = self.start(input_ids, sampled, max_new_tokens, max_length, self._tree(), _ends(is_llama3))
        ids, out = self.whole(input_ids, started), started[0]
        return (ids, len(out.tokens), max(0, out.steps - 1)) if log else ids

    def ea_generate(
        self,
        input_ids: Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        log: bool = False,
        is_llama3: bool = False,
    ) -> Generator[Tensor]:
        """Yield prompt and new tokens after every step; `log` changes nothing, as in EAGLE."""
        sampled = temperature, top_p, top_k
        started = self.start(input_ids, sampled, max_new_tokens, max_length, self._tree(), _ends(is_llama3))
        return self.streamed(input_ids, started, None)

    def _tree(self) -> dict[str, int]:
        head = self.ea_model.ea_layer
        return {"nodes": head.total_tokens + 1, "depth": head.depth, "beam": head.top_k}


def _ends(is_llama3: bool) -> tuple[str, ...]:
    return ("<|eot_id|>",) if is_llama3 else ()


def _joined(input_ids: Tensor, out: Generation) -> Tensor:
    return torch.cat([input_ids, torch.tensor([out.tokens], dtype=torch.long, device=input_ids.device)], 1)
