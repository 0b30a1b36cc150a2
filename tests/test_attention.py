"""Every backend against a float64 softmax written out, and the exactness of merged parts."""

import itertools
import random

import pytest
import torch

from specx import attention, backends
from specx.attention import MASKED, additive, attend, choose_backend, hybrid_tree_attention, merge_states

BACKEND = pytest.mark.parametrize(
    "backend", [name for name in attention.BACKENDS if attention.DEVICE_OF.get(name, "cpu") == "cpu"]
)
SEEDS = pytest.mark.parametrize("seed", range(10))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-10}


def dense(query, key, value, scale, seen=None, softcap=None):
    """Softmax attention in float64 with repeated heads. seen: bool [T, N]; a row may see nothing."""
    query, key, value = query.double(), key.double(), value.double()
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = torch.einsum("bhtd,bhnd->bhtn", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.clamp(min=-1e300)[..., None])
    return torch.einsum("bhtn,bhnd->bhtd", weights, value), lse


def inputs(rows, keys, heads=4, groups=2, dim=32, value_dim=None, dtype=torch.float32, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, rows, dim), (groups, keys, dim), (groups, keys, value_dim or dim)]
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def random_mask(rows, keys, seed=0):
    """A mask whose rows each see at least one key."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, keys, generator=generator) < 0.5
    mask[torch.arange(rows), torch.randint(0, keys, (rows,), generator=generator)] = True
    return mask


def tree_mask(rows, seed):
    rng = random.Random(seed)
    mask = torch.eye(rows, dtype=torch.bool)
    for row in range(1, rows):
        mask[row] |= mask[rng.randrange(row)]
    return mask


def assert_same(found, expected, dtype=torch.float32):
    (out, lse), (true_out, true_lse) = found, expected
    bound = TOLERANCE[dtype]
    assert out.dtype == dtype
    assert out.shape == true_out.shape
    assert lse.shape == true_lse.shape
    torch.testing.assert_close(out.double(), true_out, atol=bound, rtol=bound)
    torch.testing.assert_close(lse.double(), true_lse, atol=bound, rtol=bound)


@BACKEND
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (8, 1)], ids=["H/G=1", "H/G=4", "H/G=8"])
@pytest.mark.parametrize("keys", [0, 1, 31, 513])
@pytest.mark.parametrize("rows", [1, 7, 33, 65])
def test_shapes(backend, rows, keys, heads, groups):
    for dim, masked in itertools.product((32, 80, 64), (False, True)):
        query, key, value = inputs(rows, keys, heads, groups, dim, seed=rows + keys + dim)
        seen = random_mask(rows, keys) if masked and keys else None
        bias = None if seen is None else additive(seen, query.dtype)
        found = attend(query, key, value, scale=dim**-0.5, bias=bias, backend=backend)
        assert found[1].dtype == torch.float32
        assert_same(found, dense(query, key, value, dim**-0.5, seen))


@BACKEND
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("value_dim", [32, 48], ids=["Dv=D", "Dv>D"])
@pytest.mark.parametrize("masking", ["none", "bias", "causal"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)], ids=["H/G=1", "H/G=4"])
def test_masks_softcap_and_value_dim(backend, heads, groups, masking, value_dim, softcap):
    rows = 33
    keys = rows if masking == "causal" else 47
    query, key, value = inputs(rows, keys, heads, groups, 32, value_dim)
    seen = {"none": None, "bias": random_mask(rows, keys), "causal": torch.ones(rows, rows).tril().bool()}[masking]
    bias = additive(seen, query.dtype) if masking == "bias" else None
    found = attend(
        query, key, value, scale=0.3, bias=bias, causal=masking == "causal", softcap=softcap, backend=backend
    )
    assert_same(found, dense(query, key, value, 0.3, seen, softcap))


@BACKEND
@pytest.mark.parametrize("rows", [1, 7, 65, 300])
@pytest.mark.parametrize("masking", ["none", "bias", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(backend, dtype, masking, rows):
    keys = rows if masking == "causal" else 300
    query, key, value = inputs(rows, keys, 8, 2, 64, dtype=dtype)
    seen = {"none": None, "bias": random_mask(rows, keys), "causal": torch.ones(rows, rows).tril().bool()}[masking]
    bias = additive(seen, dtype) if masking == "bias" else None
    found = attend(query, key, value, scale=0.125, bias=bias, causal=masking == "causal", backend=backend)
    assert found[1].dtype == torch.float32
    assert_same(found, dense(query, key, value, 0.125, seen), dtype)


@BACKEND
@pytest.mark.parametrize("rows", [1, 9, 300])
@pytest.mark.parametrize("which", ["query", "key", "value", "all"])
@pytest.mark.parametrize("layout", ["transposed heads", "view of a cache", "non-unit last stride", "every second"])
def test_any_strides(backend, layout, which, rows):
    def disguise(tensor):
        if layout == "transposed heads":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "view of a cache":
            room = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + 9, tensor.shape[3]), torch.nan)
            room[:, :, 4 : 4 + tensor.shape[2]] = tensor
            return room[:, :, 4 : 4 + tensor.shape[2]]
        if layout == "non-unit last stride":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        room = tensor.new_full((*tensor.shape[:3], 2 * tensor.shape[3]), torch.nan)
        room[..., ::2] = tensor
        return room[..., ::2]

    query, key, value = inputs(rows, 300, 8, 2, 32)
    seen = random_mask(rows, 300)
    plain = {"query": query, "key": key, "value": value}
    odd = {name: disguise(tensor) if which in (name, "all") else tensor for name, tensor in plain.items()}
    found = attend(**odd, scale=0.2, bias=additive(seen, query.dtype), backend=backend)
    assert_same(found, dense(query, key, value, 0.2, seen))


@BACKEND
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("keys", [21, 400])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)], ids=["H/G=1", "H/G=4"])
def test_bias_of_any_strides(backend, heads, groups, rows, keys):
    query, key, value = inputs(rows, keys, heads, groups, 32)
    seen = random_mask(rows, keys)
    expected = dense(query, key, value, 0.2, seen)
    turned = additive(seen, query.dtype).t().contiguous().t()
    sliced = torch.cat([additive(seen, query.dtype), torch.full((rows, 6), 9.0)], dim=1)[:, :keys]
    for bias in (turned, sliced):
        assert_same(attend(query, key, value, scale=0.2, bias=bias, backend=backend), expected)


@pytest.mark.parametrize("threads", [1, 16])
def test_a_single_row_however_it_is_divided_among_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, value = inputs(1, 700, 8, 2, 64, dtype=torch.bfloat16)
    assert_same(attend(query, key, value, scale=0.125, backend="cpu"), dense(query, key, value, 0.125), torch.bfloat16)


@BACKEND
def test_batches(backend):
    query, key, value = inputs(7, 19, 4, 2, 32, batch=3)
    seen = random_mask(7, 19)
    found = attend(query, key, value, scale=0.2, bias=additive(seen, query.dtype), backend=backend)
    assert_same(found, dense(query, key, value, 0.2, seen))


@BACKEND
def test_large_scores_do_not_overflow(backend):
    query, key, value = inputs(7, 19)
    query = query * 1e4
    assert_same(attend(query, key, value, scale=1.0, backend=backend), dense(query, key, value, 1.0))


def test_reference_works_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(backends, "_BLOCK_ELEMENTS", 4 * 33 * 10)  # ten rows at once
    query, key, value = inputs(33, 33)
    causal = torch.ones(33, 33).tril().bool()
    assert_same(attend(query, key, value, scale=0.2, causal=True), dense(query, key, value, 0.2, causal))
    seen = random_mask(33, 33)
    bias = additive(seen, query.dtype)
    assert_same(attend(query, key, value, scale=0.2, bias=bias), dense(query, key, value, 0.2, seen))


def test_reference_keeps_float64():
    query, key, value = inputs(7, 19, dtype=torch.float64)
    assert_same(attend(query, key, value, scale=0.2), dense(query, key, value, 0.2), torch.float64)


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_fully_masked_row_has_no_weight(backend, rows, dtype):
    """Its lse is so low that merging with any other part leaves nothing of it, and it is never nan."""
    query, key, value = inputs(rows, 40, 8, 2, 32, dtype=dtype)
    seen = random_mask(rows, 40)
    seen[rows // 2] = False
    out, lse = attend(query, key, value, scale=0.2, bias=additive(seen, dtype), backend=backend)
    assert out.isfinite().all()
    assert (lse[:, :, rows // 2] < -6e4).all()
    other = rows // 2 + 1
    true_out, true_lse = dense(query, key, value, 0.2, seen)
    assert_same((out[:, :, other:], lse[:, :, other:]), (true_out[:, :, other:], true_lse[:, :, other:]), dtype)
    merged, merged_lse = merge_states(out, lse, torch.ones_like(out), torch.full_like(lse, -30.0))
    assert (merged[:, :, rows // 2] == 1).all()
    torch.testing.assert_close(merged_lse[:, :, rows // 2], torch.full_like(lse[:, :, rows // 2], -30.0))


@BACKEND
@pytest.mark.parametrize("cut", [0, 1, 20, 40, 41])
def test_merged_parts_equal_the_whole(backend, cut):
    query, key, value = inputs(9, 41, 8, 2, 64)
    parts = [
        attend(query, key[:, :, part], value[:, :, part], scale=0.2, backend=backend)
        for part in (slice(0, cut), slice(cut, 41))
    ]
    expected = dense(query, key, value, 0.2)
    assert_same(merge_states(*parts[0], *parts[1]), expected)
    assert_same(merge_states(*parts[1], *parts[0]), expected)


@pytest.mark.parametrize("gap", [0.0, 5.0, 200.0, 1e4])
def test_merge_of_far_apart_parts(gap):
    """Weights by hand: e^a / (e^a + e^b), also where e^a overflows."""
    ones, lse = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1)
    out, merged = merge_states(3 * ones, lse + gap, ones, lse)
    weight = 1 / (1 + torch.exp(torch.tensor(-gap, dtype=torch.float64)))
    assert out.double() == pytest.approx(torch.full((1, 1, 1, 4), float(1 + 2 * weight)))
    assert float(merged) == pytest.approx(gap + float(torch.log1p(torch.exp(torch.tensor(-gap)))))


def test_merge_with_an_empty_part_is_bit_for_bit_the_other():
    query, key, value = inputs(9, 41)
    whole = attend(query, key, value, scale=0.2)
    empty = attend(query, key[:, :, :0], value[:, :, :0], scale=0.2)
    assert not empty[0].any()
    assert (empty[1] == -torch.inf).all()
    for merged in (merge_states(*whole, *empty), merge_states(*empty, *whole)):
        assert merged[0].equal(whole[0])
        assert merged[1].equal(whole[1])


def test_two_empty_parts_are_empty():
    query, key, value = inputs(3, 0)
    empty = attend(query, key, value, scale=0.2)
    out, lse = merge_states(*empty, *empty)
    assert not out.any()
    assert (lse == -torch.inf).all()


@BACKEND
@pytest.mark.parametrize("prefix", [0, 1, 300])
@SEEDS
def test_hybrid_equals_dense_on_random_trees(backend, seed, prefix):
    rows = random.Random(seed).choice([1, 2, 5, 16, 61])
    tree = tree_mask(rows, seed)
    query, key, value = inputs(rows, prefix + rows, 8, 2, 32, seed=seed)
    seen = torch.cat([torch.ones(rows, prefix, dtype=torch.bool), tree], 1)
    bias = additive(tree, query.dtype)
    found = hybrid_tree_attention(query, key, value, prefix, tail_bias=bias, scale=0.2, backend=backend)
    assert_same(found, dense(query, key, value, 0.2, seen))


@BACKEND
@pytest.mark.parametrize("prefix", [0, 1, 300])
def test_hybrid_tail_longer_than_the_rows(backend, prefix):
    """A draft's level sees the rows of earlier levels that are pending in front of it."""
    tree = tree_mask(12, 3)[8:]
    query, key, value = inputs(4, prefix + 12, 4, 2, 32)
    seen = torch.cat([torch.ones(4, prefix, dtype=torch.bool), tree], 1)
    bias = additive(tree, query.dtype)
    found = hybrid_tree_attention(query, key, value, prefix, tail_bias=bias, scale=0.2, backend=backend)
    assert_same(found, dense(query, key, value, 0.2, seen))


@BACKEND
@pytest.mark.parametrize("prefix", [0, 1, 300])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_hybrid_prefill_chunk_is_causal(backend, rows, prefix):
    query, key, value = inputs(rows, prefix + rows, 8, 2, 32)
    seen = torch.ones(rows, prefix + rows).tril(prefix).bool()
    found = hybrid_tree_attention(query, key, value, prefix, tail_bias=None, scale=0.2, backend=backend)
    assert_same(found, dense(query, key, value, 0.2, seen))


@BACKEND
@pytest.mark.parametrize("window", [1, 2, 4, 50, 1000])
@SEEDS
def test_hybrid_with_a_window(backend, seed, window):
    """Tree nodes of many depths: the window cuts the prefix, and for small windows the tree, row by row."""
    prefix, rows = 120, 20
    tree = tree_mask(rows, seed)
    query, key, value = inputs(rows, prefix + rows, 8, 2, 32, seed=seed)
    positions = prefix + tree.sum(1) - 1
    past = positions[:, None] - torch.arange(prefix) < window
    tail = tree & (positions[:, None] - positions < window)
    start = max(0, prefix - window + 1)
    found = hybrid_tree_attention(
        query,
        key,
        value,
        prefix,
        tail_bias=additive(tail, query.dtype),
        prefix_bias=additive(past[:, start:], query.dtype),
        start=start,
        scale=0.2,
        backend=backend,
    )
    assert_same(found, dense(query, key, value, 0.2, torch.cat([past, tail], 1)))


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_row_whose_prefix_is_cut_off_by_a_window(backend, dtype):
    """The last node of a chain as deep as the window sees the tail only; its lse is the tail's."""
    prefix, rows, window = 50, 6, 4
    query, key, value = inputs(rows, prefix + rows, 4, 2, 32, dtype=dtype)
    positions = torch.arange(prefix, prefix + rows)
    seen = positions[:, None] - torch.arange(prefix + rows) < window
    seen &= torch.ones(rows, prefix + rows).tril(prefix).bool()
    start = prefix - window + 1
    assert not seen[-1, :prefix].any()
    found = hybrid_tree_attention(
        query,
        key,
        value,
        prefix,
        tail_bias=additive(seen[:, prefix:], dtype),
        prefix_bias=additive(seen[:, start:prefix], dtype),
        start=start,
        scale=0.2,
        backend=backend,
    )
    assert_same(found, dense(query, key, value, 0.2, seen), dtype)


@pytest.mark.parametrize("dtype", list(MASKED), ids=str)
def test_additive_bias_is_finite(dtype):
    bias = additive(torch.tensor([[True, False]]), dtype)
    assert bias.dtype == dtype
    assert bias.tolist() == [[0.0, torch.finfo(dtype).min]]


def test_causal_takes_no_bias():
    query, key, value = inputs(3, 3)
    with pytest.raises(ValueError, match="causal attention takes no bias"):
        attend(query, key, value, scale=1.0, causal=True, bias=torch.zeros(3, 3))


def test_causal_needs_as_many_keys_as_queries():
    query, key, value = inputs(3, 4)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attend(query, key, value, scale=1.0, causal=True)


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [("auto", "cpu", "cpu"), ("auto", "meta", "reference"), ("reference", "cpu", "reference"), ("cpu", "cpu", "cpu")],
)
def test_choice_of_backend(name, device, chosen):
    found, why = choose_backend(name, torch.device(device))
    assert found == chosen
    assert why


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of auto, reference, cpu, triton, torch, flash; got 'flush'"):
        choose_backend("flush", torch.device("cpu"))


def test_cpu_backend_needs_a_cpu():
    with pytest.raises(ValueError, match="needs a CPU device"):
        choose_backend("cpu", torch.device("cuda"))


@pytest.mark.parametrize("backend", ["triton", "torch", "flash"])
def test_cuda_backends_need_a_gpu(backend):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_backend(backend, torch.device("cpu"))


def test_a_backend_is_tried_until_it_is_right_once(monkeypatch):
    answers = iter(["out of memory", None])
    monkeypatch.setattr(attention, "trouble_with", lambda name, device: next(answers))
    monkeypatch.setattr(attention, "_sound", set())
    device = torch.device("cpu")
    assert choose_backend("auto", device)[0] == "reference"
    assert choose_backend("auto", device)[0] == "cpu"
    assert choose_backend("cpu", device)[0] == "cpu"


def stand_in_for_flash(monkeypatch, lse_of=lambda lse: lse):
    """Let PyTorch's CUDA flash op be one that computes its contract on a CPU: layout [B, T, H, D], lse [B, H, T]."""

    def op(query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert (cu_q, cu_k, max_q, max_k, dropout, debug) == (None, None, query.shape[1], key.shape[1], 0.0, False)
        inputs = (each.transpose(1, 2) for each in (query, key, value))
        out, lse = backends.reference(*inputs, scale, None, causal, None)
        return out.transpose(1, 2), lse_of(lse), None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    monkeypatch.setattr(backends, "_fits", lambda query, key, value, bias: bias is None)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_flash_is_called_in_its_own_layout(monkeypatch, causal):
    stand_in_for_flash(monkeypatch)
    query, key, value = inputs(6, 6)
    found = attend(query, key, value, scale=0.3, causal=causal, backend="torch")
    truth = attend(query, key, value, scale=0.3, causal=causal)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize(
    ("lse_of", "said"),
    [(lambda lse: lse.transpose(1, 2), "shape"), (lambda lse: lse / 0.6931, "off by"), (None, "TypeError")],
    ids=["transposed", "base 2", "broken"],
)
def test_a_flash_kernel_of_another_contract_is_found_out(monkeypatch, lse_of, said):
    assert backends.trouble_with("torch", torch.device("cpu")) is None
    stand_in_for_flash(monkeypatch, lse_of)
    assert said in backends.trouble_with("torch", torch.device("cpu"))


def test_why_flash_attn_is_not_taken(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert "not installed" in backends.trouble_with("flash", torch.device("cpu"))
