"""The merged checkpoint: the edit made of every tensor, and the folder it is written to."""
