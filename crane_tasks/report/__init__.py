"""Reports for people: Markdown, HTML and pictures."""
