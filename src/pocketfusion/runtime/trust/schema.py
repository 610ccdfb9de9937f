"""The operations that the exporter writes, as the schema numbers them: settings, and the rule of each.

Numbers and fields: tensorflow/compiler/mlir/lite/schema/schema.fbs; a test compares them with LiteRT's own.
"""

from __future__ import annotations

from typing import Any

from pocketfusion.runtime.trust import operations as rules
from pocketfusion.runtime.trust.flat import Kind

#: The schema's TensorType, and bits an element.
TYPES = {0: "float32", 1: "float16", 2: "int32", 6: "bool", 9: "int8", 17: "int4"}
BITS = {0: 32, 1: 16, 2: 32, 6: 8, 9: 8, 17: 4}
_ACTIVATION = ("activation", "b", 0)
_WINDOW = (("padding", "b", 0), ("stride_w", "i", 0), ("stride_h", "i", 0))
_DILATION = (("dilation_w", "i", 1), ("dilation_h", "i", 1))
_RESIZE = (("align", "B", 0), ("half_pixel", "B", 0))
_KEEP = (("keep_dims", "B", 0),)
#: A field of the schema that nothing uses.
_UNUSED = ("", "", 0)
_Setting = tuple[str, str, Any]
#: Each operation: its number and that of its settings' table in the schema, the settings in the table's order (name,
#: type as `Kind` has it, default) and its rule.
OPERATIONS: dict[str, tuple[int, int, tuple[_Setting, ...], rules.Rule]] = {
    "ADD": (0, 11, (_ACTIVATION, ("pot_scale", "B", 1)), rules.binary),
    "SUB": (41, 28, (_ACTIVATION, ("pot_scale", "B", 1)), rules.binary),
    "MUL": (18, 21, (_ACTIVATION,), rules.binary),
    "DIV": (42, 29, (_ACTIVATION,), rules.binary),
    "MAXIMUM": (55, 39, (), rules.binary),
    "MINIMUM": (57, 39, (), rules.binary),
    "POW": (78, 56, (), rules.binary),
    "SQUARED_DIFFERENCE": (99, 76, (), rules.binary),
    "SELECT_V2": (123, 98, (), rules.select),
    "ABS": (101, 78, (), rules.unary),
    "COS": (108, 84, (), rules.unary),
    "EXP": (47, 33, (), rules.unary),
    "GELU": (150, 116, (("approximate", "B", 0),), rules.unary),
    "LOGISTIC": (14, 0, (), rules.unary),
    "NEG": (59, 42, (), rules.unary),
    "RELU": (19, 0, (), rules.unary),
    "RSQRT": (76, 0, (), rules.unary),
    "SIN": (66, 0, (), rules.unary),
    "SQRT": (75, 0, (), rules.unary),
    "SQUARE": (92, 66, (), rules.unary),
    "TANH": (28, 0, (), rules.unary),
    "SOFTMAX": (25, 9, (("beta", "f", 0.0),), rules.softmax),
    "CAST": (53, 37, (("from", "b", 0), ("to", "b", 0)), rules.cast),
    "DEQUANTIZE": (6, 38, (), rules.dequantize),
    "RESHAPE": (22, 17, (("new_shape", "at", 0),), rules.reshape),
    "TRANSPOSE": (39, 26, (), rules.transpose),
    "CONCATENATION": (2, 10, (("axis", "i", 0), _ACTIVATION), rules.concatenation),
    "SLICE": (65, 48, (), rules.slice_),
    "STRIDED_SLICE": (
        45,
        32,
        (
            *((key, "i", 0) for key in ("begin", "end", "ellipsis", "new_axis", "shrink")),
            ("offset", "B", 0),
        ),
        rules.strided_slice,
    ),
    "PAD": (34, 22, (), rules.pad),
    "MEAN": (40, 27, _KEEP, rules.reduce),
    "SUM": (74, 27, _KEEP, rules.reduce),
    "REDUCE_MAX": (82, 27, _KEEP, rules.reduce),
    "REDUCE_MIN": (89, 27, _KEEP, rules.reduce),
    "BATCH_MATMUL": (126, 101, (("adj_x", "B", 0), ("adj_y", "B", 0), ("asymmetric", "B", 0)), rules.matmul),
    "FULLY_CONNECTED": (
        9,
        8,
        (
            _ACTIVATION,
            ("weights_format", "b", 0),
            ("keep_dims", "B", 0),
            ("asymmetric", "B", 0),
            ("bias_type", "b", 0),
        ),
        rules.fully_connected,
    ),
    "CONV_2D": (3, 1, (*_WINDOW, _ACTIVATION, *_DILATION, ("bias_type", "b", 0)), rules.convolution),
    "DEPTHWISE_CONV_2D": (4, 2, (*_WINDOW, ("multiplier", "i", 0), _ACTIVATION, *_DILATION), rules.depthwise),
    "RESIZE_NEAREST_NEIGHBOR": (97, 74, _RESIZE, rules.resize),
    "RESIZE_BILINEAR": (23, 15, (_UNUSED, _UNUSED, *_RESIZE), rules.resize),
    "EMBEDDING_LOOKUP": (7, 0, (), rules.embedding),
}
NAMES = {number: name for name, (number, _, _, _) in OPERATIONS.items()}
RULES = {name: rule for name, (_, _, _, rule) in OPERATIONS.items()}


def _kind(settings: tuple[_Setting, ...]) -> Kind:
    return Kind(*(None if key == "" else "at" if kind == "at" else (kind, default) for key, kind, default in settings))


#: Of each operation: the number of its settings' table, the table's kind and the settings' names.
SETTINGS = {
    name: (table, _kind(settings), [key for key, _, _ in settings])
    for name, (_, table, settings, _) in OPERATIONS.items()
}
