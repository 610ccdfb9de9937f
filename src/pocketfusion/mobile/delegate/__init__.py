"""Which operations of a `.tflite` file LiteRT's GPU delegate takes, what it computes, and what cures the rest."""
