"""Which policy a draft's cache follows in one request, and the draft that starts with it."""

from specx.config import Settings
from specx.draft import Draft, DraftModel
from specx.hf import HFModel
from specx.retrieval import CachePolicy

_WHY_NOT = {
    "gather": "this draft's keys cannot be moved to other positions",
    "recompute": "what this draft computes its keys from is not kept",
}


def policy_of(model: HFModel, draft: DraftModel, settings: Settings, length: int, notes: list[str]) -> CachePolicy:
    """Return the policy that `settings` ask for, or the nearest that these models can follow.

    Args:
        model: The target.
        length: Prompt and new tokens.
        notes: Told what differs from what was asked for.

    Raises:
        ValueError: If the settings fit neither model.
    """
    name, config = settings.policy, settings.cache
    context = config.draft_context or draft.draft_context
    if draft.max_positions is not None:
        context = min(context, draft.max_positions)
        if name == "full" and length + settings.tree.depth > draft.max_positions:
            name = "window"
            notes.append(f"policy full became window: the draft has {draft.max_positions} positions")
    layers = model.config.num_hidden_layers
    if config.score_layer is not None and config.score_layer >= layers:
        raise ValueError(f"score_layer must be below {layers}, the target's layers; got {config.score_layer}")
    if name in ("retrieval", "auto") and config.score_layer is None and model.score_layer() is None:
        name = "window"
        notes.append("retrieval became window: every layer of the target slides, none sees the context")
    return CachePolicy.plan(name, config, settings.tree, context)


def started(model: DraftModel, policy: CachePolicy, settings: Settings, tokens: int, notes: list[str]) -> Draft | None:
    """Start a draft with room for `tokens` tokens, as many of them as `policy` keeps; see `policy_of`."""
    tree, cache = settings.tree, settings.cache
    rows = tokens if policy.name == "full" else min(tokens, policy.limit)
    drops = not policy.fits(tokens)
    draft = model.start(rows, tree.beam * tree.depth, tokens if drops else 0, cache)
    if draft and drops and cache.refill and cache.refill != draft.refill:
        notes.append(f"refill {cache.refill} became {draft.refill}: {_WHY_NOT[cache.refill]}")
    return draft
