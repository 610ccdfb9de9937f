"""ONNX files: made by torch.onnx, their weights in smaller forms, and the layout that diffusers reads."""
