"""Fréchet distance against CLIP score over the guidance scale: `pocketfusion evaluate` (SnapFusion's Figure 1)."""
