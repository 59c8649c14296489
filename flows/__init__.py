"""The front door: which stages run, in which order, and who sees what."""
