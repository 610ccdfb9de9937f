"""LoRA adapters at export: read whoever wrote them, merged into the weights, drawn in few steps by their method."""
