"""One model between the real pictures (the ceiling) and shuffled captions (the floor): `pocketfusion score`."""
