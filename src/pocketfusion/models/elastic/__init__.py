"""The UNet whose blocks come and go: its architecture, its parts, and their weights."""
