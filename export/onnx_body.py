"""The body of the HyperAttention function in ONNX: exact attention in primitive operators.

It lets the file run where our library is not loaded, and in onnx.reference. It is exact at every length (it never
approximates) and needs memory for Sq x Sk logits a head. Rules 1, 2 and 4 of docs/operator.md hold.
"""

from __future__ import annotations

from onnx import FunctionProto, parser

from hyperattention.config import DOMAIN, OP_TYPE, Config

OPSET = 18

# group = Hq / Hkv query heads share one key head, so K and V are never copied. Casts: 1 is FLOAT, 7 is INT64.
_BODY = """
<domain: "%(domain)s", opset_import: ["" : %(opset)d]>
%(name)s <%(attributes)s> (Q, K, V, lengths) => (O, LSE)
{
    scale_attribute = Constant <value_float: float = @scale> ()
    causal_attribute = Constant <value_int: int = @causal> ()
    batch = Shape <start = 0, end = 1> (Q)
    heads_q = Shape <start = 1, end = 2> (Q)
    rows = Shape <start = 2, end = 3> (Q)
    head_dim = Shape <start = 3, end = 4> (Q)
    heads_kv = Shape <start = 1, end = 2> (K)
    keys = Shape <start = 2, end = 3> (K)
    head_dim_v = Shape <start = 3, end = 4> (V)
    group = Div (heads_q, heads_kv)
    group_rows = Mul (group, rows)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_f = Constant <value_float = 0.0> ()
    one_f = Constant <value_float = 1.0> ()
    lowest = Constant <value_float = -3.4028234e38> ()
    minus_infinity = Constant <value_float = -inf> ()
    last_axis = Constant <value_ints = [-1]> ()
    key_axes = Constant <value_ints = [0, 1, 2]> ()
    length_axes = Constant <value_ints = [1, 2, 3]> ()
    row_axes = Constant <value_ints = [0, 1, 3]> ()

    head_dim_f = Cast <to = 1> (head_dim)
    root = Sqrt (head_dim_f)
    default_scale = Div (one_f, root)
    has_scale = Greater (scale_attribute, zero_f)
    scale = Where (has_scale, scale_attribute, default_scale)

    keys_0d = Squeeze (keys)
    rows_0d = Squeeze (rows)
    key = Range (zero, keys_0d, one)
    key_4d = Unsqueeze (key, key_axes)
    row = Range (zero, rows_0d, one)
    offset = Sub (keys_0d, rows_0d)
    position = Add (row, offset)
    position_4d = Unsqueeze (position, row_axes)
    past = LessOrEqual (key_4d, position_4d)
    free = Equal (causal_attribute, zero)
    ahead_ok = Or (past, free)
    lengths_64 = Cast <to = 7> (lengths)
    lengths_4d = Unsqueeze (lengths_64, length_axes)
    valid = Less (key_4d, lengths_4d)
    visible_4d = And (valid, ahead_ok)
    group_axis = Constant <value_ints = [2]> ()
    visible = Unsqueeze (visible_4d, group_axis)

    q_shape = Concat <axis = 0> (batch, heads_kv, group_rows, head_dim)
    q_wide = Cast <to = 1> (Q)
    q = Reshape (q_wide, q_shape)
    k = Cast <to = 1> (K)
    k_turned = Transpose <perm = [0, 1, 3, 2]> (k)
    products = MatMul (q, k_turned)
    logits_shape = Concat <axis = 0> (batch, heads_kv, group, rows, keys)
    products_5d = Reshape <allowzero = 1> (products, logits_shape)
    logits = Mul (products_5d, scale)
    masked = Where (visible, logits, lowest)
    largest = ReduceMax (masked, last_axis)
    shifted = Sub (masked, largest)
    powers = Exp (shifted)
    p = Where (visible, powers, zero_f)
    total = ReduceSum (p, last_axis)
    p_shape = Concat <axis = 0> (batch, heads_kv, group_rows, keys)
    p_4d = Reshape <allowzero = 1> (p, p_shape)
    key_last = Transpose <perm = [0, 1, 3, 2]> (key_4d)
    valid_v = Less (key_last, lengths_4d)
    v_wide = Cast <to = 1> (V)
    v = Where (valid_v, v_wide, zero_f)
    sums = MatMul (p_4d, v)
    rows_shape = Concat <axis = 0> (batch, heads_kv, group, rows, head_dim_v)
    sums_5d = Reshape (sums, rows_shape)
    none = Equal (total, zero_f)
    divisor = Where (none, one_f, total)
    o_5d = Div (sums_5d, divisor)
    o_shape = Concat <axis = 0> (batch, heads_q, rows, head_dim_v)
    o = Reshape (o_5d, o_shape)
    O = CastLike (o, Q)
    log_total = Log (divisor)
    lse_seen = Add (log_total, largest)
    lse_5d = Where (none, minus_infinity, lse_seen)
    lse_shape = Concat <axis = 0> (batch, heads_q, rows)
    LSE = Reshape (lse_5d, lse_shape)
}
"""


def attention_function() -> FunctionProto:
    """HyperAttention's function for model.functions: inputs Q, K, V, lengths; outputs O, LSE; every attribute of Config."""
    text = _BODY % {"domain": DOMAIN, "opset": OPSET, "name": OP_TYPE, "attributes": ", ".join(Config().attributes())}
    function = parser.parse_function(text)
    function.doc_string = "Exact attention, causal bottom-right, lengths, grouped heads; needs memory for Sq x Sk logits a head."
    return function
