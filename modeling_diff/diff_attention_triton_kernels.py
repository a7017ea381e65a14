"""
Triton kernels of differential attention: forward and split-KV decode, one source for V1 and V2.

O_i = softmax(s q1 k1^T) v - lambda softmax(s q2 k2^T) v            (arXiv:2410.05258, eq. 1)
y_i = norm_scale * RMSNorm(O_i) * norm_weight                       (V1 only, eq. 3)

Both maps run through one loop over the keys, so that v is read once.

Every mask (causal, left padding, static cache, packing, window) is one key range [lo, hi) per query, and neither end
ever decreases from one query to the next; tiles inside every query's key range skip the comparison.

Sizes: B batch, T queries, S keys, H heads, K KV heads, G = H // K, D head_dim, d map_dim. BLOCK_d and BLOCK_D are d
and D rounded up to powers of two. Offsets inside a tile are int32; everything that moves a tile is int64.
"""

# mypy: ignore-errors
# (a kernel's names are triton's, not Python's)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class tl:  # the name that the kernels' annotations need; without triton they never run
        constexpr = None


def jit(kernel=None, *, any_value=()):
    """Applies triton.jit. Sizes in `any_value` change between calls, so they are not specialized to 1 or 16 n."""
    if kernel is None:
        return lambda kernel: jit(kernel, any_value=any_value)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=any_value)


@jit
def key_range(rows, batch, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL: tl.constexpr):
    """Returns the key ranges [lo, hi) of `rows`, a scalar or a vector of queries, each < T."""
    length = S
    if length_ptr is not None:
        length = tl.load(length_ptr + batch)
    position = rows + (length - T)  # bottom-right alignment: the last query is at the last valid key
    lo = rows * 0
    hi = rows * 0 + length
    if start_ptr is not None:
        lo += tl.load(start_ptr + batch)
    if ranges_ptr is not None:
        ranges_ptr += (batch * T + rows) * 2
        lo = tl.load(ranges_ptr)
        hi = tl.load(ranges_ptr + 1)
    if window is not None:
        lo = tl.maximum(lo, position - (window - 1))
    if CAUSAL:
        hi = tl.minimum(hi, position + 1)
    return lo, tl.maximum(hi, 0)


@jit
def key_phases(
    row0, b, T, S, start_ptr, length_ptr, ranges_ptr, window,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns key ranges of a block of rows, their union [first, last), and the ends of three phases of key tiles.

    Phase 1 holds the tiles that every row sees in full; the tiles of phases 0 and 2 need the comparison.
    """
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_M), T - 1)
    lo, hi = key_range(rows, b, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL)
    first, full_end = key_range(row0, b, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL)
    row = tl.minimum(row0 + BLOCK_M, T) - 1
    full_begin, last = key_range(row, b, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL)
    begin = first // BLOCK_N * BLOCK_N
    full_begin = tl.cdiv(tl.minimum(full_begin, last), BLOCK_N) * BLOCK_N
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
    return lo, hi, first, last, (begin, full_begin, full_end, last)


@jit
def load_tile(ptr, stride, rows, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Loads a tile (rows, BLOCK); columns past WIDTH and, with CHECK, rows not `valid` are 0 (never stale NaN)."""
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if CHECK:
        return tl.load(ptrs, mask=valid[:, None] & (cols[None, :] < WIDTH), other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(ptrs, mask=cols[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(ptrs)


@jit
def store_tile(ptr, stride, rows, valid, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = valid[:, None] & (cols[None, :] < WIDTH)
    tl.store(ptr + rows[:, None] * stride + cols[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@jit
def _softmax_step(scores, m, z, acc, v, scale, PRECISION: tl.constexpr):
    """Takes a step of the online softmax in base 2; m, z and acc are fp32, probabilities are rounded to v's dtype.

    m starts at a finite -1e30: exp2(-inf - (-1e30)) is 0 where exp2(-inf - (-inf)) would be NaN.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    z = z * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, z, acc


@jit
def _attend(
    q1, q2, m1, l1, acc1, m2, l2, acc2, k_ptr, v_ptr, stride_k, stride_v, begin, end, lo, hi, first, last, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes both online softmaxes over the keys [begin, end); [first, last) is the union of the rows' key ranges."""
    # The second scores before the first softmax: then it runs during their product, and the second during p1 v. Wide
    # tiles leave no registers for both.
    EARLY: tl.constexpr = BLOCK_N * BLOCK_d <= 4096
    offsets = tl.arange(0, BLOCK_N)
    k_ptr += begin.to(tl.int64) * stride_k
    v_ptr += begin.to(tl.int64) * stride_v
    for tile_start in range(begin, end, BLOCK_N):
        keys = tile_start + offsets
        valid = (keys >= first) & (keys < last)
        k1 = load_tile(k_ptr, stride_k, offsets, valid, d, BLOCK_d, MASKED)  # (BLOCK_N, BLOCK_d)
        v = load_tile(v_ptr, stride_v, offsets, valid, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)
        s1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MAPS == 2:
            k2 = k1 if SHARE_K else load_tile(k_ptr + d, stride_k, offsets, valid, d, BLOCK_d, MASKED)
            if EARLY:
                s2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        if MASKED:
            seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            s1 = tl.where(seen, s1, float("-inf"))
        m1, l1, acc1 = _softmax_step(s1, m1, l1, acc1, v, scale, PRECISION)
        if MAPS == 2:
            if not EARLY:
                s2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
            if MASKED:
                s2 = tl.where(seen, s2, float("-inf"))
            m2, l2, acc2 = _softmax_step(s2, m2, l2, acc2, v, scale, PRECISION)
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    return m1, l1, acc1, m2, l2, acc2


@jit(any_value=("B", "T", "S"))
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, lam_ptr, weight_ptr, out_ptr, o_ptr, o2_ptr, lse1_ptr, lse2_ptr, rstd_ptr, scratch_ptr,
    start_ptr, length_ptr, ranges_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    B, H, G, T, S, scale, eps, norm_scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TWO_PASS: tl.constexpr,
):  # fmt: skip
    """Computes one block of query rows of one head; stores o (before the norm), o2, lse and rstd if asked for."""
    bh = tl.program_id(0) % (B * H)
    row0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // (B * H)) * BLOCK_M  # the longest rows start first
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    offsets = tl.arange(0, BLOCK_M)
    rows = row0 + offsets
    valid = rows < T
    lo, hi, first, last, ends = key_phases(
        row0, b, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    q_ptr += b * stride_qb + h * MAPS * stride_qh + row0.to(tl.int64) * stride_qt
    k_ptr += b * stride_kb + (h // G) * stride_kh
    v_ptr += b * stride_vb + (h // G) * stride_vh
    q1 = load_tile(q_ptr, stride_qt, offsets, valid, d, BLOCK_d, True)  # (BLOCK_M, BLOCK_d)
    q2 = q1
    m1 = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l1 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m2 = m1
    l2 = l1
    acc2 = acc1
    if MAPS == 2:
        q2 = load_tile(q_ptr + stride_qh, stride_qt, offsets, valid, d, BLOCK_d, True)
    for PHASE in tl.static_range(1 - LOWER, 3):
        m1, l1, acc1, m2, l2, acc2 = _attend(
            q1, q2, m1, l1, acc1, m2, l2, acc2, k_ptr, v_ptr, stride_ks, stride_vs, ends[PHASE], ends[PHASE + 1],
            lo, hi, first, last, scale, 1 if TWO_PASS else MAPS, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N,
            PHASE != 1, PRECISION,
        )  # fmt: skip
    tile = (b * T + row0) * H + h  # (B, T, H, D) is contiguous in out, o and o2
    if TWO_PASS:  # where registers hold one accumulator only, the first waits in memory (in L2, mostly), as fp32
        store_tile(scratch_ptr + tile * D, H * D, offsets, valid, acc1, D, BLOCK_D)
        for PHASE in tl.static_range(1 - LOWER, 3):
            m2, l2, acc2, _m, _l, _acc = _attend(
                q2, q2, m2, l2, acc2, m2, l2, acc2, k_ptr if SHARE_K else k_ptr + d, v_ptr, stride_ks, stride_vs,
                ends[PHASE], ends[PHASE + 1], lo, hi, first, last, scale, 1, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N,
                PHASE != 1, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the load may be laid out over other threads than the store was
        acc1 = load_tile(scratch_ptr + tile * D, H * D, offsets, valid, D, BLOCK_D, True)

    # fp32 up to the only rounding, the store: lambda, norm and weight see the unrounded difference.
    o = acc1 / tl.where(l1 == 0, 1.0, l1)[:, None]  # a row that sees no key has l = 0 and gives 0
    stat = bh.to(tl.int64) * T + rows
    if MAPS == 2:
        o2 = acc2 / tl.where(l2 == 0, 1.0, l2)[:, None]
        lam = tl.load(lam_ptr + tile + offsets * H, mask=valid, other=0.0)[:, None] if LAM_ROW else tl.load(lam_ptr)
        o -= lam * o2
        if o2_ptr is not None:
            store_tile(o2_ptr + tile * D, H * D, offsets, valid, o2, D, BLOCK_D)
            # +inf where no key is seen: the backward's exp2(s - lse) is then 0
            tl.store(lse2_ptr + stat, tl.where(l2 == 0, float("inf"), m2 + tl.log2(l2)), mask=valid)
    if lse1_ptr is not None:
        tl.store(lse1_ptr + stat, tl.where(l1 == 0, float("inf"), m1 + tl.log2(l1)), mask=valid)
    if weight_ptr is not None:
        if o_ptr is not None:
            store_tile(o_ptr + tile * D, H * D, offsets, valid, o, D, BLOCK_D)
        o, rstd = _norm(o, weight_ptr, eps, norm_scale, D, BLOCK_D)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + stat, rstd, mask=valid)
    store_tile(out_ptr + tile * D, H * D, offsets, valid, o, D, BLOCK_D)


@jit
def _norm(o, weight_ptr, eps, norm_scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns norm_scale * RMSNorm(o) * weight in fp32, and 1 / rms; a row of zeros with eps = 0 stays 0."""
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    variance = tl.sum(o * o, 1) / D + eps
    rstd = tl.where(variance > 0, 1.0 / tl.sqrt(variance), 0.0)
    return o * rstd[:, None] * (weight * norm_scale)[None, :], rstd


@jit(any_value=("S", "SPLITS"))
def decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, start_ptr, length_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    K, G, T, S, SPLITS, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, CAUSAL: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to one split of the keys with all G * T query rows of one KV head, so that K and V are read once.

    Writes each map's normalized fp32 output and base-2 lse; row r is query head r // T of the group, query r % T.
    """
    bk = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    b = (bk // K).to(tl.int64)
    kv_head = (bk % K).to(tl.int64)
    offsets = tl.arange(0, BLOCK_M)
    valid = offsets < G * T
    query = tl.minimum(offsets, G * T - 1) % T
    lo, hi = key_range(query, b, T, S, start_ptr, length_ptr, None, window, CAUSAL)
    first, _ = key_range(split * 0, b, T, S, start_ptr, length_ptr, None, window, CAUSAL)
    _, last = key_range(split * 0 + T - 1, b, T, S, start_ptr, length_ptr, None, window, CAUSAL)
    # The splits share the keys that are there, not the buffer that could hold them.
    per_split = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), SPLITS) * BLOCK_N
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, last)

    q_ptr += b * stride_qb + kv_head * G * MAPS * stride_qh
    q_ptrs = q_ptr + (offsets // T) * MAPS * stride_qh + (offsets % T) * stride_qt
    cols = tl.arange(0, BLOCK_d)
    mask = valid[:, None] & (cols[None, :] < d)
    q1 = tl.load(q_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)  # (BLOCK_M, BLOCK_d)
    q2 = q1
    if MAPS == 2:
        q2 = tl.load(q_ptrs[:, None] + stride_qh + cols[None, :], mask=mask, other=0.0)
    m1 = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l1 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m1, l1, acc1, m2, l2, acc2 = _attend(
        q1, q2, m1, l1, acc1, m1, l1, acc1, k_ptr + b * stride_kb + kv_head * stride_kh,
        v_ptr + b * stride_vb + kv_head * stride_vh, stride_ks, stride_vs, begin, end, lo, hi, begin, end, scale,
        MAPS, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    part = tl.program_id(0).to(tl.int64) * MAPS * G * T  # (B, K, SPLITS, MAPS, G * T, D)
    store_tile(part_ptr + part * D, D, offsets, valid, acc1 / tl.where(l1 == 0, 1.0, l1)[:, None], D, BLOCK_D)
    tl.store(lse_ptr + part + offsets, tl.where(l1 == 0, float("-inf"), m1 + tl.log2(l1)), mask=valid)
    if MAPS == 2:
        part += G * T
        store_tile(part_ptr + part * D, D, offsets, valid, acc2 / tl.where(l2 == 0, 1.0, l2)[:, None], D, BLOCK_D)
        tl.store(lse_ptr + part + offsets, tl.where(l2 == 0, float("-inf"), m2 + tl.log2(l2)), mask=valid)


@jit
def _merge(part_ptr, lse_ptr, stride, SPLITS, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Merges one map's output of one row from its splits: sum 2^(lse_j - max) o_j / sum 2^(lse_j - max)."""
    cols = tl.arange(0, BLOCK_D)
    m = tl.max(tl.full([BLOCK_S], -1.0e30, tl.float32), 0)
    z = m * 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for split0 in range(0, SPLITS, BLOCK_S):
        splits = split0 + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + splits * stride, mask=splits < SPLITS, other=float("-inf"))
        mask = (splits < SPLITS)[:, None] & (cols < D)[None, :]
        part = tl.load(part_ptr + splits.to(tl.int64)[:, None] * stride * D + cols[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - m_new)
        alpha = tl.exp2(m - m_new)
        z = z * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m = m_new
    return acc / tl.where(z == 0, 1.0, z)


@jit(any_value=("SPLITS",))
def combine_kernel(
    part_ptr, lse_ptr, lam_ptr, weight_ptr, out_ptr, H, G, T, SPLITS, eps, norm_scale,
    MAPS: tl.constexpr, LAM_ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row of one head, then applies lambda and the norm, in fp32; rows are (B, T, H)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // (T * H)
    t = row // H % T
    h = row % H
    stride = MAPS * G * T  # from one split to the next
    part = (b * (H // G) + h // G) * SPLITS * stride + h % G * T + t
    o = _merge(part_ptr + part * D, lse_ptr + part, stride, SPLITS, D, BLOCK_D, BLOCK_S)
    if MAPS == 2:
        part += G * T
        lam = tl.load(lam_ptr + (row if LAM_ROW else 0))
        o -= lam * _merge(part_ptr + part * D, lse_ptr + part, stride, SPLITS, D, BLOCK_D, BLOCK_S)
    o = o[None, :]
    if weight_ptr is not None:
        o, _ = _norm(o, weight_ptr, eps, norm_scale, D, BLOCK_D)
    cols = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out_ptr + row * D + cols, o.to(out_ptr.dtype.element_ty), mask=cols < D)
