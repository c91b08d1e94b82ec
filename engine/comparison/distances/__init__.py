"""Pure functions of two sets of features; nothing here knows a network."""
