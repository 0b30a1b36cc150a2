"""How the bundled models were trained: the runs of each, one after the other."""

from dataclasses import dataclass, field, replace
from typing import Any

VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Recipe:
    """One run of a model's training. `phases` are (end as a share of all tokens, rows, window length)."""

    model: dict[str, Any]
    tokens: int
    learning_rate: float
    phases: tuple[tuple[float, int, int], ...]
    copy_rate: float
    long_share: float = 0.0  # of the tokens, drawn evenly over the last 30 % of training
    long_length: int = 0
    long_tail: int = 0  # long windows after that, at a fifth of the learning rate falling to zero
    long_within: bool = False  # long windows are cut from one group of files, with a copied span every 1024 tokens
    copies: int = 0  # copied spans every 1024 tokens of every window, each window cut from one group of files
    scramble: float = 0.0  # share of copied spans of random tokens, which nothing but copying predicts
    until: int | None = None  # tokens after which the run was ended although its schedule goes on
    sharpen: float = 1.0  # scales the queries as the run begins: attention over many keys is spread too thin
    loss_from: int = 0  # tokens of each window that are only read
    distill: bool = False  # learn the finished target's distribution instead of the text's next token
    unrolled: int = 1  # steps of EAGLE-3's training-time test
    seed: int = 0
    common: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": VOCAB_SIZE,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rms_norm_eps": 1e-5,
        }
    )

    @property
    def total(self) -> int:
        """Tokens after which the run ends."""
        return self.until or self.tokens + self.long_tail * self.long_length


TARGET = Recipe(
    model={
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    },
    tokens=7_000_000,
    learning_rate=3e-3,
    phases=((0.6, 4, 1024), (1.0, 2, 2048)),
    copy_rate=0.15,
    long_share=0.08,
    long_length=12288,
    long_tail=40,
)
DRAFT = Recipe(
    model={
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    tokens=10_000_000,
    learning_rate=3e-3,
    phases=((0.7, 8, 512), (1.0, 4, 1024)),
    copy_rate=0.4,
)


def _head(version: str, until: int) -> tuple[Recipe, ...]:
    first = Recipe(
        model={"version": version, "intermediate_size": 688},
        tokens=9_000_000,
        learning_rate=3e-3,
        phases=((1.0, 4, 512),),
        copy_rate=0.0,
        copies=2,
        scramble=0.1,
        until=until,
    )
    longer = replace(
        first,
        tokens=1_200_000,
        learning_rate=1.5e-3,
        phases=((0.7, 4, 1024), (1.0, 2, 2048)),
        until=None,
        unrolled=3,
        seed=1,
    )
    return (first, longer)


# Later runs go on from the weights of the one before: warmed up again, with other windows. The bundled draft was
# distilled from the target as it was after its third run.
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "target": (
        TARGET,
        replace(
            TARGET,
            tokens=4_500_000,
            learning_rate=1.5e-3,
            phases=((1.0, 2, 2048),),
            long_share=0.06,
            long_tail=60,
            long_within=True,
            until=4_882_432,
            seed=1,
        ),
        replace(
            TARGET,
            tokens=3_200_000,
            learning_rate=1.2e-3,
            phases=((1.0, 1, 4096),),
            long_share=0.12,
            long_tail=0,
            copies=4,
            scramble=0.15,
            seed=2,
        ),
        replace(
            TARGET,
            tokens=50 * 13312,
            learning_rate=5e-4,
            phases=((1.0, 1, 13312),),
            long_share=0.0,
            long_tail=0,
            copies=1,
            seed=3,
        ),
        replace(
            TARGET,
            tokens=24 * 13312,
            learning_rate=3e-4,
            phases=((1.0, 1, 13312),),
            long_share=0.0,
            long_tail=0,
            copies=2,
            seed=4,
        ),
        replace(
            TARGET,
            tokens=40 * 13312,
            learning_rate=5e-4,
            phases=((1.0, 1, 13312),),
            long_share=0.0,
            long_tail=0,
            copies=1,
            sharpen=1.1,
            loss_from=2048,
            seed=5,
        ),
    ),
    "draft": (
        DRAFT,
        replace(DRAFT, tokens=16_000_000, learning_rate=2e-3, phases=((1.0, 4, 1024),), copy_rate=0.6, seed=1),
        replace(
            DRAFT, tokens=10_000_000, learning_rate=2e-3, phases=((1.0, 4, 1024),), copies=4, scramble=0.15, seed=2
        ),
        replace(
            DRAFT,
            tokens=2_000_000,
            learning_rate=1e-3,
            phases=((1.0, 4, 1024),),
            copies=2,
            distill=True,
            seed=3,
        ),
    ),
    "eagle1": _head("eagle1", until=5_000_000),
    "eagle3": _head("eagle3", until=6_000_000),
    "longspec": (
        Recipe(
            model={"version": "longspec", "intermediate_size": 688},
            tokens=4_000_000,
            learning_rate=3e-3,
            phases=((0.5, 4, 1024), (1.0, 2, 2048)),
            copy_rate=0.0,
            copies=2,
            scramble=0.1,
            distill=True,
        ),
    ),
}
PAIR = ("target", "draft")
HEADS = {"eagle1": "An EAGLE-1 head", "eagle3": "An EAGLE-3 head", "longspec": "A LongSpec draft"}
