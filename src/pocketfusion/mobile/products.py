"""Products of two activations as BATCH_MATMUL, whatever the converter made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.mobile.flatbuffer import has_data, operation_code, operation_name


def mend_products(model: Any) -> int:
    """Makes every FULLY_CONNECTED whose weight is computed a BATCH_MATMUL, in place; returns how many there were.

    The converter writes QKᵀ of a single head so, as in the autoencoder's attention. XNNPACK takes layers with constant
    weights only, and LiteRT's own kernel took a sixth of a whole decoder's time for this one product (docs/speed.md).
    """
    count = 0
    for graph in model.subgraphs:
        for operator in graph.operators:
            if operation_name(model, operator) != "FULLY_CONNECTED":
                continue
            layer, weight = operator.builtinOptions, graph.tensors[operator.inputs[1]]
            more = layer.fusedActivationFunction or (len(operator.inputs) > 2 and operator.inputs[2] >= 0)
            keeps = layer.keepNumDims or len(graph.tensors[operator.inputs[0]].shape) == 2
            if has_data(model, weight) or more or not keeps:
                continue
            operator.opcodeIndex = operation_code(model, schema.BuiltinOperator.BATCH_MATMUL)
            operator.inputs = np.array(operator.inputs[:2], np.int32)
            operator.builtinOptionsType = schema.BuiltinOptions.BatchMatMulOptions
            operator.builtinOptions = schema.BatchMatMulOptionsT()
            operator.builtinOptions.adjY = True
            count += 1
    return count
