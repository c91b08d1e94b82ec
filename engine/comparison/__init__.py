"""How features of two sets are compared: criteria, averagers, distances, references."""
