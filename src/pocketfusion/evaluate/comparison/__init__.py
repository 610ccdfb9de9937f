"""Bundles beside stock diffusers, the same prompts and noise, pair by pair: `pocketfusion compare`."""
