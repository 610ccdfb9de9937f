"""Core ML: networks as ML Programs (`.mlpackage`), and a small executor that runs them in torch, on any machine."""
