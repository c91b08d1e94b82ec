"""What is computed once from the whole real data set."""
