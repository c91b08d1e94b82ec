"""From a network to a graph that hands its activations to a visitor; all of torch.fx lives here."""
