"""From a model folder to a LiteRT bundle: graph rewrites, conversion, smaller weights and the parity gate."""
