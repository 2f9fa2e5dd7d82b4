"""From a panel and a model to activations on disk, and from disk to shuffled batches."""
