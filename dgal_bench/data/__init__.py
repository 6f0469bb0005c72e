"""Images in memory, the pool of labeled and unlabeled points, and loaders over slices of one tensor."""
