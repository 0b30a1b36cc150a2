"""Triton kernels: hybrid tree attention in one pass, chunk scores, and the copy that commits a path.

Launchers with their checks, and a plain truth beside each kernel, are in `specx.kernel_launch`; tensors are described
there. How many rows are committed is always read from the device, so that nothing on the host, a captured CUDA graph
least of all, depends on it.

Scores are kept as the matrix product left them and are scaled where they meet the exponential: with
`factor` = scale * log2(e), 2^(score * factor - best) is e^(scaled score - best) for one fused multiply-add.
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # a running maximum that is never infinite: -inf - -inf would be NaN
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(
    pointers: tl.tensor,
    inside: tl.tensor,
    dims: tl.tensor,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BOUNDED: tl.constexpr,
) -> tl.tensor:
    """Load [N, PADDED]; dims from DIM on are 0, and so are, where BOUNDED, the rows that `inside` [N] excludes."""
    if BOUNDED:
        return tl.load(pointers, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM == PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)


@triton.jit
def _raw_scores(query: tl.tensor, key: tl.tensor, inner: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """[M, D] x [N, D] -> [M, N]; where CAPPED, tanh(score / softcap), with inner = 2 log2(e) scale / softcap."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if CAPPED:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * inner))  # tanh(x) = 1 - 2 / (1 + e^2x), right also at e^2x = inf
    return scores


@triton.jit
def _fold(
    scores: tl.tensor, value: tl.tensor, out: tl.tensor, total: tl.tensor, best: tl.tensor, factor: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take one block of keys into the running softmax: out [M, D], total [M] and best [M] (in powers of two)."""
    higher = tl.maximum(best, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - higher[:, None])
    shrink = tl.exp2(best - higher)
    out = tl.dot(weights.to(value.dtype), value, out * shrink[:, None], input_precision="ieee")
    return out, total * shrink + tl.sum(weights, 1), higher


@triton.jit
def _half_word(halves: tl.tensor, num_halves: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Half number `index` [M] of each query row's mask words, uint32 [M]; 0 where there is none."""
    return tl.load(halves + index, mask=(index >= 0) & (index < num_halves), other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _visible(
    start: tl.tensor,
    committed: tl.tensor,
    position: tl.tensor,
    halves: tl.tensor,
    num_halves: tl.tensor,
    window: tl.tensor,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tl.tensor:
    """Which cache rows [start, start + N), prefix and tail, each query row sees: bool [M, N].

    `halves` are the mask words as 32-bit halves, the low one first, for 32-bit shifts are cheaper.
    """
    columns = tl.arange(0, BLOCK_N)
    rows = start + columns
    first = tl.zeros_like(position) + start - committed  # [M], all equal; negative where the block begins in the prefix
    shift = (first & 31).to(tl.uint32)
    low = _half_word(halves, num_halves, first >> 5)
    bits = tl.zeros([1, 1], tl.uint32)
    for part in tl.static_range((BLOCK_N + 31) // 32):
        high = _half_word(halves, num_halves, (first >> 5) + (part + 1))
        aligned = (low >> shift) | ((high << 1) << (31 - shift))  # in two steps, for a shift by 32 is undefined
        bits = tl.where((columns // 32 == part)[None, :], aligned[:, None], bits)
        low = high
    in_tail = ((bits >> (columns & 31).to(tl.uint32)[None, :]) & 1) != 0
    in_prefix = (rows < committed)[None, :]
    if WINDOWED:
        return tl.where(in_prefix, rows[None, :] > position[:, None] - window, in_tail)
    else:
        return in_prefix | in_tail


@triton.jit(do_not_specialize=["tokens", "tail", "num_halves", "window", "capacity"])
def tree_attention_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, length: tl.tensor, halves: tl.tensor, positions: tl.tensor,
    part_out: tl.tensor, part_lse: tl.tensor, inner: tl.tensor, factor: tl.tensor, tokens: tl.tensor, tail: tl.tensor,
    num_halves: tl.tensor, window: tl.tensor, capacity: tl.tensor, groups: tl.tensor, query_b: tl.tensor,
    query_h: tl.tensor, query_t: tl.tensor, key_b: tl.tensor, key_g: tl.tensor, key_n: tl.tensor, value_b: tl.tensor,
    value_g: tl.tensor, value_n: tl.tensor, SHARE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """One split of the keys for BLOCK_M of the SHARE * T query rows that share a KV head.

    Prefix and tail lie behind one another in the cache, so both are one range of blocks, divided evenly among the
    splits. Blocks cut by the window, by the end of the prefix or by the tree are masked; all others are plain.
    Grid: (row blocks, splits, B * G): row blocks that read the same keys run side by side and share them in L2.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = packed < tokens * SHARE
    token = tl.minimum(packed // SHARE, tokens - 1)  # rows that pad the block repeat the last token
    head = group * SHARE + packed % SHARE
    # [M], row of the partial results
    slot = (tl.cast((batch * groups * SHARE + head) * tokens + token, tl.int64)) * splits + split

    committed = tl.load(length)
    end = tl.minimum(committed + tail, capacity)
    begin_block, plain_begin = 0, 0
    position = token
    if WINDOWED:
        position = tl.load(positions + token)
        begin_block = tl.minimum(tl.maximum(tl.min(position, 0) - window + 1, 0), committed) // BLOCK_N
        plain_begin = tl.cdiv(tl.maximum(tl.max(position, 0) - window + 1, 0), BLOCK_N)
    blocks = tl.cdiv(end, BLOCK_N) - begin_block
    first = begin_block + split * blocks // splits
    last = begin_block + (split + 1) * blocks // splits
    if first >= last:
        tl.store(part_lse + slot, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=own)
        return

    dims = tl.arange(0, PADDED)
    rows = tl.arange(0, BLOCK_N)
    query_row = (
        tl.cast(batch, tl.int64) * query_b + tl.cast(head, tl.int64) * query_h + tl.cast(token, tl.int64) * query_t
    )
    # [M, D]
    queries = tl.load(query + query_row[:, None] + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
    key += tl.cast(batch, tl.int64) * key_b + tl.cast(group, tl.int64) * key_g
    value += tl.cast(batch, tl.int64) * value_b + tl.cast(group, tl.int64) * value_g
    key_offsets = rows[:, None] * key_n + dims[None, :]
    value_offsets = rows[:, None] * value_n + dims[None, :]
    halves += token * num_halves

    out = tl.zeros([BLOCK_M, PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], _LOWEST, tl.float32)

    front_end = tl.minimum(tl.maximum(plain_begin, first), last)
    back_begin = tl.minimum(tl.maximum(committed // BLOCK_N, front_end), last)
    for number in tl.range(0, front_end - first + last - back_begin):
        block = first + number + tl.where(number >= front_end - first, back_begin - front_end, 0)
        start = tl.cast(block, tl.int64) * BLOCK_N
        inside = block * BLOCK_N + rows < end
        keys = _load_rows(key + start * key_n + key_offsets, inside, dims, DIM, PADDED, True)
        scores = _raw_scores(queries, keys, inner, CAPPED)
        seen = _visible(block * BLOCK_N, committed, position, halves, num_halves, window, BLOCK_N, WINDOWED)
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        # rows behind the end may hold NaN, and 0 * NaN is NaN: they are not loaded
        values = _load_rows(value + start * value_n + value_offsets, inside, dims, DIM, PADDED, True)
        out, total, best = _fold(scores, values, out, total, best, factor)
    for block in tl.range(front_end, back_begin):
        start = tl.cast(block, tl.int64) * BLOCK_N
        keys = _load_rows(key + start * key_n + key_offsets, rows, dims, DIM, PADDED, False)
        scores = _raw_scores(queries, keys, inner, CAPPED)
        values = _load_rows(value + start * value_n + value_offsets, rows, dims, DIM, PADDED, False)
        out, total, best = _fold(scores, values, out, total, best, factor)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = out / total[:, None]
    tl.store(part_lse + slot, tl.where(empty, float("-inf"), best + tl.log2(total)), mask=own)
    tl.store(part_out + slot[:, None] * DIM + dims[None, :], out, mask=own[:, None] & (dims < DIM)[None, :])


@triton.jit(do_not_specialize=["splits", "tokens"])
def merge_splits_kernel(
    part_out: tl.tensor, part_lse: tl.tensor, sinks: tl.tensor, out: tl.tensor, lse: tl.tensor, splits: tl.tensor,
    tokens: tl.tensor, heads: tl.tensor, out_b: tl.tensor, out_h: tl.tensor, out_t: tl.tensor, lse_b: tl.tensor,
    lse_h: tl.tensor, lse_t: tl.tensor, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_S: tl.constexpr, SINKS: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the splits of one query row by log-sum-exp. Grid: (B * H * T,)."""
    number = tl.program_id(0)
    token, head, batch = number % tokens, number // tokens % heads, number // tokens // heads
    row = tl.cast(number, tl.int64)
    dims = tl.arange(0, PADDED)
    every = tl.arange(0, ALL_S)
    lses = tl.load(part_lse + row * splits + every, mask=every < splits, other=float("-inf"))
    best = tl.maximum(tl.max(lses, 0), _LOWEST)
    total = tl.sum(tl.exp2(lses - best), 0)
    merged = tl.zeros([PADDED], tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        some = start + tl.arange(0, BLOCK_S)
        weights = tl.exp2(tl.load(part_lse + row * splits + some, mask=some < splits, other=float("-inf")) - best)
        written = (some < splits)[:, None] & (dims < DIM)[None, :]
        parts = tl.load(part_out + (row * splits + some)[:, None] * DIM + dims[None, :], mask=written, other=0.0)
        # a split that saw nothing has written no output; to load it all the same need not wait for the weights
        merged += tl.sum(tl.where((weights > 0.0)[:, None], parts * weights[:, None], 0.0), 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    merged = merged / total
    whole = tl.where(empty, float("-inf"), (best + tl.log2(total)) * _LN_2)
    if SINKS:  # a sink takes its share of the softmax and gives nothing
        merged = merged / (1.0 + tl.exp2((tl.load(sinks + head).to(tl.float32) - whole) * _LOG2_E))
    batch = tl.cast(batch, tl.int64)
    tl.store(lse + batch * lse_b + head * lse_h + token * lse_t, whole)
    to = out + batch * out_b + head * out_h + token * out_t + dims
    tl.store(to, merged.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=["capacity"])
def chunk_scores_kernel(
    query: tl.tensor, key: tl.tensor, lse: tl.tensor, length: tl.tensor, scores: tl.tensor, inner: tl.tensor,
    factor: tl.tensor, capacity: tl.tensor, query_h: tl.tensor, key_g: tl.tensor, key_n: tl.tensor, SHARE: tl.constexpr,
    BLOCK_H: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, CAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """Mean softmax weight of each chunk's keys for the query heads of one KV head.

    A tile is TILE chunks of at most SPAN rows, or SPAN rows of one longer chunk. Grid: (parts, G).
    """
    part, parts, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    heads = tl.arange(0, BLOCK_H)
    head = group * SHARE + tl.minimum(heads, SHARE - 1)
    dims = tl.arange(0, PADDED)
    columns = tl.arange(0, TILE * SPAN)
    # [H/G, D]
    queries = tl.load(query + head[:, None] * query_h + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
    shift = tl.load(lse + head) * _LOG2_E
    chunks = tl.cdiv(capacity, CHUNK)
    to = scores + tl.cast(head, tl.int64)[:, None] * chunks
    key += tl.cast(group, tl.int64) * key_g

    committed = tl.minimum(tl.load(length), capacity)
    used = tl.cdiv(tl.cdiv(committed, CHUNK), TILE)
    for tile in tl.range(part * used // parts, (part + 1) * used // parts):
        sums = tl.zeros([BLOCK_H, TILE], tl.float32)
        for offset in tl.range(0, CHUNK, SPAN):
            column = offset + columns % SPAN
            local = columns // SPAN * CHUNK + column
            inside = (column < CHUNK) & (tile * (TILE * CHUNK) + local < committed)
            pointers = key + tl.cast(tile, tl.int64) * (TILE * CHUNK) * key_n + local[:, None] * key_n + dims[None, :]
            keys = _load_rows(pointers, inside, dims, DIM, PADDED, True)
            weights = tl.exp2(_raw_scores(queries, keys, inner, CAPPED) * factor - shift[:, None])
            weights = tl.where(inside[None, :], weights, 0.0)
            sums += tl.sum(tl.reshape(weights, (BLOCK_H, TILE, SPAN)), 2)
        number = tile * TILE + tl.arange(0, TILE)
        count = tl.minimum(tl.maximum(committed - number * CHUNK, 1), CHUNK)
        wanted = (heads < SHARE)[:, None] & (number < chunks)[None, :]
        tl.store(to + number[None, :], sums / count.to(tl.float32)[None, :], mask=wanted)
    unused = tl.cdiv(chunks, TILE) - used
    for tile in tl.range(used + part * unused // parts, used + (part + 1) * unused // parts):
        number = tile * TILE + tl.arange(0, TILE)
        wanted = (heads < SHARE)[:, None] & (number < chunks)[None, :]
        tl.store(to + number[None, :], tl.zeros([BLOCK_H, TILE], tl.float32), mask=wanted)


@triton.jit
def _move_rows(
    block: tl.tensor, committed: tl.tensor, moved: tl.tensor, wanted: tl.tensor, to: tl.tensor, dims: tl.tensor,
    layer: tl.tensor, batch: tl.tensor, group: tl.tensor, block_l: tl.tensor, block_b: tl.tensor, block_g: tl.tensor,
    block_n: tl.tensor, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Move rows committed + moved [R] of one layer and KV head to committed + to [R]."""
    block += (
        tl.cast(layer, tl.int64) * block_l + tl.cast(batch, tl.int64) * block_b + tl.cast(group, tl.int64) * block_g
    )
    block += tl.cast(committed, tl.int64) * block_n
    mask = wanted[:, None] & (dims < DIM)[None, :]
    values = tl.load(block + moved[:, None] * block_n + dims[None, :], mask=mask)
    # A row may be the source of one move and the destination of another: all are read, by every warp, before any is
    # written. No other program touches these dims of this head.
    tl.debug_barrier()
    tl.store(block + to[:, None] * block_n + dims[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["count", "batches", "groups"])
def commit_rows_kernel(
    keys: tl.tensor, values: tl.tensor, rows: tl.tensor, length: tl.tensor, count: tl.tensor, batches: tl.tensor,
    groups: tl.tensor, key_l: tl.tensor, key_b: tl.tensor, key_g: tl.tensor, key_n: tl.tensor, value_l: tl.tensor,
    value_b: tl.tensor, value_g: tl.tensor, value_n: tl.tensor, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Move accepted pending rows behind the committed ones. Grid: (layers * B * G, blocks of dims, keys or values)."""
    group = tl.program_id(0) % groups
    batch = tl.program_id(0) // groups % batches
    layer = tl.program_id(0) // groups // batches
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    to = tl.arange(0, BLOCK_R)
    moved = tl.load(rows + to, mask=to < count, other=-1).to(tl.int64)
    wanted = (moved >= 0) & (moved != to)  # negative: no row; equal: in place already
    committed = tl.load(length)
    if tl.program_id(2) == 0:
        _move_rows(keys, committed, moved, wanted, to, dims, layer, batch, group, key_l, key_b, key_g, key_n, KEY_DIM)
    else:
        _move_rows(values, committed, moved, wanted, to, dims, layer, batch, group, value_l, value_b, value_g, value_n,
                   VALUE_DIM)  # fmt: skip
