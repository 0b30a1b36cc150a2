"""What `import specx` offers: load a target with a draft, generate, stream."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specx.adapters.checkpoints import (
    check_config,
    check_files,
    check_machine,
    compare_tokenizers,
    load_model,
    load_tokenizer,
)
from specx.adapters.hub import fetch
from specx.adapters.loader import load_draft
from specx.adapters.names import DRAFTS, LOOKUP, known_draft, locate
from specx.adapters.split import check_ranks, check_split
from specx.adapters.vocabulary import read_vocabulary
from specx.adapters.weights import kind_of
from specx.config import LoadConfig, Settings
from specx.decoding import decode
from specx.draft import DraftModel
from specx.experience import Experience
from specx.generation import Generation
from specx.hf import HFModel
from specx.hf_config import positions_of
from specx.hf_split import SplitModel
from specx.profiles import NO_PROFILE, Profile, key_of, load_profile
from specx.ranks import Ranks
from specx.text import TextStream

_SHOWN_TOKENS = 8  # of each kept chunk, in a trace
TREE_SHAPE = frozenset({"nodes", "depth", "beam"})
Prompt = str | Sequence[int] | Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that became certain with one token, and who proposed that token (`generation.SOURCES`)."""

    text: str
    source: str

    @property
    def drafted(self) -> bool:
        """Whether anybody but the target did."""
        return self.source != "target"


class SpeculativeModel:
    """A target with a draft. The Hugging Face models stay unmodified, and nothing of a text outlives a call.

    Attributes:
        target: The Hugging Face target.
        tokenizer: Its tokenizer, or None.
        draft: The loaded draft, or None: plain decoding.
        settings: Defaults of every generation option.
        profile: What `specx tune` measured: it chooses the trees where none is asked for.
        experience: What steps have cost, and how often drafts were right so far, by which the controller chooses.
    """

    def __init__(
        self, target: HFModel, draft: DraftModel | None, tokenizer: Any | None, settings: Settings | None = None
    ) -> None:
        self.engine, self.draft, self.tokenizer = target, draft, tokenizer
        self.profile = NO_PROFILE
        self.target: PreTrainedModel = target.model
        self.settings = settings or Settings()
        self.experience = Experience()

    def generate(
        self, prompt: Prompt, *, trace: bool = False, plain: bool = False, explain: bool = False, **options: Any
    ) -> Generation:
        """Generate after a prompt.

        Args:
            prompt: Text, or token ids (a list, a tensor [L] or [1, L]).
            trace: Record every step in `Generation.trace`.
            plain: Decode without the draft, one token a step.
            explain: Record in `Generation.decisions` when the controller changes its mind, and why.
            options: Any option of `specx.config`, such as max_new_tokens=64 or temperature=0.7.

        Raises:
            ValueError: For an option or a prompt that cannot be served; nothing has been generated then.
        """
        out, run = self.start(prompt, trace=trace, plain=plain, explain=explain, **options)
        for _ in run:
            pass
        return out

    def release(self) -> None:
        """Give back the device memory, and the CUDA graphs over it, that are kept for the next request."""
        for each in (self.engine, getattr(self.draft, "model", None)):
            if isinstance(each, HFModel):
                each.release()

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yield text as it is generated. Takes what `generate` takes; needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer; this target was loaded without one")
        _, run = self.start(prompt, **options)
        return ("".join(each.text for each in segments) for segments in run if any(each.text for each in segments))

    def start(
        self, prompt: Prompt, *, trace: bool = False, plain: bool = False, explain: bool = False, **options: Any
    ) -> tuple[Generation, Generator[list[Segment]]]:
        """Check everything, then return the growing `Generation` and an iterator that drives it step by step."""
        settings = self.settings.override(**options)
        ids = self._encode(prompt)
        self._check_length(len(ids), settings)
        if settings.stopping.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer; this target was loaded without one")
        out = Generation(len(ids), trace=[] if trace else None, decisions=[] if explain else None)
        if self.draft and not plain:
            settings = self._with_tree(settings, not TREE_SHAPE.isdisjoint(options), len(ids), out)
        text = TextStream(self.tokenizer, settings.stopping.stop) if self.tokenizer is not None else None
        texts: list[str] = []

        def stop(token: int) -> bool:
            texts.append(text.push(token) if text else "")
            return text.stopped if text else False

        def run() -> Generator[list[Segment]]:
            try:
                with closing(steps):
                    for piece in steps:
                        if out.trace:
                            self._describe(out.trace[-1], ids, out.tokens, settings.cache.chunk_size)
                        yield [Segment(*each) for each in zip(texts, piece.sources, strict=True)]
                        texts.clear()
                if text and (rest := text.flush()):
                    yield [Segment(rest, "target")]
            finally:
                out.text = text.text if text else ""

        draft = None if plain or settings.tree.nodes == 1 else self.draft
        steps = decode(self.engine, draft, ids, settings, out, stop, experience=self.experience)
        return out, run()

    def _with_tree(self, settings: Settings, asked: bool, context: int, out: Generation) -> Settings:
        """Put in the tree that the profile calls for, unless one was asked for; the stats say which it is."""
        costs, about = self.profile.costs, self.profile.about
        if self.profile.ignored:
            out.notes.append(f"profile {about}")
        if costs and asked:
            about = "not used: a tree was asked for"
        elif costs:
            room = settings.cache.draft_context or self.draft.draft_context if self.draft else 0
            tree = costs.best_tree(context, deepest=max(settings.tree.depth, room // 16))  # deep trees need positions
            settings = settings.override(nodes=tree.nodes, depth=tree.depth, beam=tree.beam)
        shape = settings.tree
        out.facts |= {"profile": about, "nodes": shape.nodes, "depth": shape.depth, "beam": shape.beam}
        return settings

    def _describe(self, record: dict[str, Any], ids: Tensor, new: list[int], chunk_size: int) -> None:
        """Add to a step's record what text each kept chunk starts with."""
        if self.tokenizer is None or record["kept_chunks"] is None:
            return
        record["kept_texts"] = []
        for chunk in record["kept_chunks"]:
            first = chunk * chunk_size
            tokens = ids[first : first + _SHOWN_TOKENS].tolist() + new[max(0, first - len(ids)) :]
            record["kept_texts"].append(self.tokenizer.decode(tokens[: min(_SHOWN_TOKENS, chunk_size)]))

    def _encode(self, prompt: Prompt) -> Tensor:
        if isinstance(prompt, str):
            prompt = self._encode_text(prompt)
        ids = _as_ids(prompt)
        if len(ids) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ValueError(f"a prompt is text or integer token ids; got {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.engine.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token ids must be between 0 and {self.engine.vocab_size - 1}; the prompt holds {wrong}")
        return ids.to(self.engine.device, torch.long)

    def _encode_text(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; this target was loaded without one: give token ids")
        if not prompt:
            raise ValueError("the prompt is empty; give some text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the prompt is not valid Unicode text: it holds half of a surrogate pair") from error
        return self.tokenizer(prompt, verbose=False)["input_ids"]

    def _check_length(self, prompt: int, settings: Settings) -> None:
        wanted, most = settings.stopping.max_new_tokens, positions_of(self.engine.config)
        if most is not None and prompt + wanted > most:
            fits = f"at most {most - prompt} new tokens fit" if prompt < most else "shorten the prompt"
            raise ValueError(
                f"prompt of {prompt} tokens plus max_new_tokens {wanted} exceeds the target's {most} positions: {fits}"
            )
        border = self.engine.rope_border
        if border is not None and prompt <= border < prompt + wanted - 1:  # the last token is never fed
            raise ValueError(
                f"this target rotates contexts of more than {border} tokens by another table, and one generation must "
                f"not cross that length: after a prompt of {prompt} tokens at most {border + 1 - prompt} new ones fit; "
                f"max_new_tokens is {wanted}"
            )


def _as_ids(prompt: Any) -> Tensor:
    """Turn a list, array or tensor of one row into a tensor [L]."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        rows = isinstance(prompt, list | tuple) and any(isinstance(row, str | Sequence) for row in prompt)
        if rows:
            raise ValueError(f"one prompt at a time: the batch must be 1, got {len(prompt)} rows") from error
        raise ValueError(f"a prompt is text or token ids; got {type(prompt).__name__}") from error
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"one prompt at a time: token ids must have shape [L] or [1, L]; got {list(ids.shape)}")
    return ids


def load(
    target: str | PathLike[str] | PreTrainedModel | None = None,
    draft: str | PathLike[str] | PreTrainedModel | None = None,
    *,
    tokenizer: Any | None = None,
    specextend: bool = True,
    ranks: Ranks | None = None,
    **options: Any,
) -> SpeculativeModel:
    """Load a target and its draft; `load()` is the bundled pair.

    Args:
        target: Known name, directory, hub id or a live Hugging Face model. None: the one the draft was made for.
        draft: The same for the draft. None with a target: no draft, plain decoding.
        tokenizer: The target's, for live models.
        specextend: Hybrid tree attention and a bounded draft cache; False is ordinary tree speculation.
        ranks: The processes that hold the target together; all of them load it. The first one gets the model, the
            others one whose `engine.follow()` they call.
        options: Fields of `specx.config.LoadConfig` (dtype, device, backend, ...) and generation defaults.

    Raises:
        ValueError: Unknown names or options, a tokenizer that differs, a model that cannot be enhanced.
        RuntimeError: A checkpoint that cannot be loaded.
    """
    names = {each.name for each in fields(LoadConfig)}
    if isinstance(options.get("dtype"), torch.dtype):
        options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    if isinstance(options.get("device"), torch.device):
        options["device"] = str(options["device"])
    config = LoadConfig(**{name: options.pop(name) for name in names & options.keys()})
    settings = Settings(use_specextend=specextend).override(**options)
    check_machine(config)
    if ranks is not None:
        check_ranks(config)
    target, draft = _complete(_named(target), _named(draft))
    # Everything that can be wrong is looked for before the weights of either model are read.
    where = _directory(target, "target", config.trust_remote_code)
    draft_where = _directory(draft, "draft", config.trust_remote_code)
    whole_head = False
    if ranks is not None:
        whole_head = check_split(target, where, draft, draft_where, ranks.size, config.trust_remote_code)
    if tokenizer is None and where is not None:
        tokenizer = load_tokenizer(where, config.trust_remote_code)
    if tokenizer is not None and draft_where is not None:
        _check_tokenizer(tokenizer, load_tokenizer(draft_where, config.trust_remote_code), str(draft))
    tokens = None
    if config.draft_vocab is not None:
        tokens = read_vocabulary(config.draft_vocab, tokenizer, config.draft_vocab_size)
    target_model = target if where is None else load_model(where, config, "target", ranks.size if ranks else 1)
    engine = _enhanced(target_model, config, specextend, ranks, whole_head)
    if isinstance(engine, SplitModel) and not engine.lead_if_first():
        return SpeculativeModel(engine, None, tokenizer, settings)
    if draft is None:
        return SpeculativeModel(engine, None, tokenizer, settings)
    adapter = load_draft(draft, draft_where, engine, settings.cache.draft_context, config, tokens)
    model = SpeculativeModel(engine, adapter, tokenizer, settings)
    model.profile = _profile(engine, adapter, config.profile, not TREE_SHAPE.isdisjoint(options))
    model.experience = Experience(model.profile.costs)
    return model


def _profile(target: HFModel, draft: DraftModel, wanted: bool | None, asked: bool) -> Profile:
    """Return what was measured of a pair, nothing where a tree was asked for."""
    if wanted is False or (asked and not wanted):
        return Profile(None, "not used: a tree was asked for" if asked else "not used: turned off")
    found = load_profile(key_of(target, draft))
    if wanted and found.costs is None:
        raise ValueError(f"there is no profile of this pair, device and these versions ({found.about}): run specx tune")
    return found


def _named(given: Any) -> Any:
    return str(given) if isinstance(given, PathLike) else given


def _directory(given: Any, role: Literal["target", "draft"], trust_remote_code: bool) -> str | None:
    """Return the checked directory of a named checkpoint, None for a live model or no draft."""
    if isinstance(given, PreTrainedModel) or given is None or (role == "draft" and given == LOOKUP):
        return None
    if not isinstance(given, str):
        raise ValueError(f"{role} must be a name, a directory or a transformers model; got {type(given).__name__}")
    directory = fetch(locate(given, role), role)
    check_files(directory, role)
    if role == "target" or kind_of(directory) == "classic":  # the others' configs are not transformers'
        check_config(directory, role, trust_remote_code)
    return directory


def _complete(target: Any, draft: Any) -> tuple[Any, Any]:
    """Fill in what was not named: the bundled pair, or the target that a known draft was made for."""
    if target is None and draft is None:
        return "demo", "demo"
    if target is None:
        known = known_draft(draft) if isinstance(draft, str) else None
        if isinstance(draft, str):
            locate(draft, "draft")  # an unknown name is the likelier mistake
        if known is None:
            raise ValueError("a draft that is not among the known names needs a target; known: " + ", ".join(DRAFTS))
        return known.target, draft
    return target, draft


def _check_tokenizer(target: Any, draft: Any | None, name: str) -> None:
    if draft is None:
        return
    _, wrong = compare_tokenizers(target, draft)
    if wrong:
        raise ValueError(f"draft {name} does not share the target's tokenizer: {'; '.join(wrong)}")


def _enhanced(
    model: PreTrainedModel, config: LoadConfig, specextend: bool, ranks: Ranks | None, whole_head: bool
) -> HFModel:
    hybrid, flash = (specextend if it is None else it for it in (config.hybrid_attention, config.flash_prefill))
    if ranks is None:
        return HFModel(model, config.backend, hybrid, flash, config.pack_weights, config.graphs)
    return SplitModel(model, ranks, whole_head, backend=config.backend, hybrid=hybrid, flash_prefill=flash)
