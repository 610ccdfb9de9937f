"""The latency lookup table: what each part of a UNet costs on the target runtime, measured, stored, added up."""
