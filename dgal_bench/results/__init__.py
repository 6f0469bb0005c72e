"""What a results folder holds: the rows, their readers and writers, their checks, and their mirror in W&B."""
