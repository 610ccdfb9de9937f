"""What is checked of a bundle before anything of it is believed: native code gets only what was found sound here."""
