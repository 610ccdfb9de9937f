"""Networks that are not stock diffusers classes, and adaptors for those that are."""
