"""What models do on held-out rows, and the choice among the points of a sweep."""
