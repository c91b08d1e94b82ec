"""What of an image is compared: frozen extractors, their taps, and the pass over their features."""
