"""What draws: generators, priors, sampling, saved generators."""
