"""From flags and presets to the parts of a run."""
