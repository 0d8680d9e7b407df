"""The CPU's tiles of a matrix product: sums that stay in registers, whatever their inputs lie in.

A tile is up to `TILE_ROWS` rows of sums, each `BLOCK` wide: for every input it multiplies a block
of `BLOCK` neighbours in memory with one number a row. Written in the compiler's own terms, because
a compiler that is given loops over arrays keeps the sums in memory. Any sum is taken in the order
of its inputs, so it does not depend on which other rows are in the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
#: Width of a tile: two registers of lanes.
BLOCK = 2 * LANES
#: Rows of a tile: what the registers hold the sums of.
TILE_ROWS = 8 if binding.get_host_cpu_features().get("avx512f") else 3

_FLOAT = ir.FloatType()
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INT32S = ir.VectorType(_INT32, LANES)
#: What one weight is in memory, by the array's dtype; bfloat16 travels as its 16 bits.
_STORED = {"float32": _FLOAT, "uint16": ir.IntType(16), "int8": ir.IntType(8)}
_STORED_BYTES = {"float32": 4, "uint16": 2, "int8": 1}


@intrinsic
def linear_tile(typing_context, weights, offset, x_TD, row, in_column, in_width, num_rows, sums):
    """sums[t, :] = the block of weights at `offset` times row `row + t` of x, `num_rows` rows."""
    int64 = types.int64
    signature = types.void(weights, int64, x_TD, int64, int64, int64, int64, sums)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        weights_array, x_array, sums_array = _arrays(context, builder, signature, arguments)
        _, offset, _, row, in_column, in_width, num_rows, _ = arguments
        stored = str(signature.args[0].dtype)
        block = builder.bitcast(weights_array.data, _STORED[stored].as_pointer())
        block = builder.gep(block, [offset])

        def emit(count: int) -> None:
            x_rows = []
            for t in range(count):
                start = _row(builder, x_array, builder.add(row, _INT64(t)))
                x_rows.append(builder.gep(start, [in_column]))
            totals = _emit_sums(
                builder, count, in_width, lambda k: _emit_load(builder, block, stored, k),
                lambda k: [builder.load(builder.gep(x_row, [k])) for x_row in x_rows],
            )  # fmt: skip
            _emit_store(builder, totals, sums_array.data)

        _emit_by_count(builder, num_rows, emit)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def score_tile(typing_context, queries, k_CH, slots, num_keys, scores):
    """scores[t, :] = key `slots[t]` times a block of queries, [H, BLOCK]; `num_keys` keys."""
    signature = types.void(queries, k_CH, slots, types.int64, scores)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        arrays = _arrays(context, builder, signature, arguments)
        queries_array, k_array, slots_array, scores_array = arrays
        head_dim = builder.extract_value(k_array.shape, 1)

        def emit(count: int) -> None:
            slots = [builder.load(builder.gep(slots_array.data, [_INT64(t)])) for t in range(count)]
            keys = [_row(builder, k_array, slot) for slot in slots]
            totals = _emit_sums(
                builder, count, head_dim,
                lambda h: _emit_load(builder, queries_array.data, "float32", h),
                lambda h: [builder.load(builder.gep(key, [h])) for key in keys],
            )  # fmt: skip
            _emit_store(builder, totals, scores_array.data)

        _emit_by_count(builder, arguments[3], emit)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def value_tile(typing_context, weights, v_CH, slots, num_keys, column, num_columns, sums):
    """sums[t, :] = column `column + t` of the values `slots`, weighted by [num_keys, BLOCK]."""
    int64 = types.int64
    signature = types.void(weights, v_CH, slots, int64, int64, int64, sums)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        arrays = _arrays(context, builder, signature, arguments)
        weights_array, v_array, slots_array, sums_array = arrays
        _, _, _, num_keys, column, num_columns, _ = arguments

        def emit(count: int) -> None:
            def values(k: Any) -> list[Any]:
                slot = builder.load(builder.gep(slots_array.data, [k]))
                value = builder.gep(_row(builder, v_array, slot), [column])
                return [builder.load(builder.gep(value, [_INT64(t)])) for t in range(count)]

            totals = _emit_sums(
                builder, count, num_keys,
                lambda k: _emit_load(builder, weights_array.data, "float32", k),
                values,
            )  # fmt: skip
            _emit_store(builder, totals, sums_array.data)

        _emit_by_count(builder, num_columns, emit)
        return context.get_dummy_value()

    return signature, generate


def _arrays(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> list[Any]:
    return [
        context.make_array(kind)(context, builder, argument)
        for kind, argument in zip(signature.args, arguments, strict=True)
        if isinstance(kind, types.Array)
    ]


def _row(builder: ir.IRBuilder, array: Any, row: Any) -> Any:
    """Where a row of a matrix of floats begins."""
    start = builder.mul(row, builder.extract_value(array.strides, 0))
    address = builder.add(builder.ptrtoint(array.data, _INT64), start)
    return builder.inttoptr(address, _FLOAT.as_pointer())


def _emit_by_count(builder: ir.IRBuilder, count: Any, emit: Callable[[int], None]) -> None:
    """Code for each number of rows: as a constant, it lets the sums be registers."""
    done = builder.append_basic_block("done")
    blocks = [builder.append_basic_block(f"rows{n}") for n in range(1, TILE_ROWS + 1)]
    switch = builder.switch(count, blocks[-1])
    for num_rows, block in enumerate(blocks, start=1):
        if num_rows < TILE_ROWS:
            switch.add_case(_INT64(num_rows), block)
        builder.position_at_end(block)
        emit(num_rows)
        builder.branch(done)
    builder.position_at_end(done)


def _emit_sums(
    builder: ir.IRBuilder,
    num_rows: int,
    num_inputs: Any,
    load_halves: Callable[[Any], Sequence[Any]],
    load_rows: Callable[[Any], Sequence[Any]],
) -> list[Any]:
    """The loop over inputs: two registers of sums for each row."""
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
    )
    before = builder.block
    loop, done = (builder.append_basic_block(name) for name in ("inputs", "summed"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_INT64)
    k.add_incoming(_INT64(0), before)
    sums = [builder.phi(_FLOATS) for _ in range(2 * num_rows)]
    halves = load_halves(k)
    totals = []
    for t, value in enumerate(load_rows(k)):
        x = _emit_splat(builder, value)
        totals += [builder.call(multiply_add, [halves[h], x, sums[2 * t + h]]) for h in (0, 1)]
    for phi, total in zip(sums, totals, strict=True):
        phi.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
        phi.add_incoming(total, loop)
    following = builder.add(k, _INT64(1))
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_inputs), loop, done)
    builder.position_at_end(done)
    return totals


def _emit_store(builder: ir.IRBuilder, totals: Sequence[Any], target: Any) -> None:
    for i, total in enumerate(totals):
        place = builder.gep(target, [_INT64(i * LANES)])
        builder.store(total, builder.bitcast(place, _FLOATS.as_pointer()), align=4)


def _emit_load(builder: ir.IRBuilder, block: Any, stored: str, k: Any) -> list[Any]:
    """The block's weights of input k as fp32, half by half."""
    place = builder.gep(block, [builder.mul(k, _INT64(BLOCK))])
    if stored == "uint16":
        # A bfloat16 is the upper half of the float32 of the same value; see `_interleave`.
        both = builder.load(builder.bitcast(place, _INT32S.as_pointer()), align=4 * LANES)
        lower = builder.shl(both, ir.Constant(_INT32S, [16] * LANES))
        upper = builder.and_(both, ir.Constant(_INT32S, [0xFFFF0000] * LANES))
        return [builder.bitcast(half, _FLOATS) for half in (lower, upper)]
    vector = ir.VectorType(_STORED[stored], LANES)
    halves = []
    for half in (0, 1):
        start = builder.bitcast(builder.gep(place, [_INT64(half * LANES)]), vector.as_pointer())
        raw = builder.load(start, align=_STORED_BYTES[stored] * LANES)
        is_float = stored == "float32"
        halves.append(raw if is_float else builder.sitofp(builder.sext(raw, _INT32S), _FLOATS))
    return halves


def _emit_splat(builder: ir.IRBuilder, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    lone = builder.insert_element(undefined, value, _INT32(0))
    return builder.shuffle_vector(lone, undefined, ir.Constant(_INT32S, [0] * LANES))
