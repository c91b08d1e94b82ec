"""How good samples are: metrics, judges, image sets, the three-sample test."""
