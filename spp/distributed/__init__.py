"""Several processes: which rank this is, what all ranks agree on, and weights of which each rank holds a shard."""
