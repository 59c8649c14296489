"""The edits that a recipe can name by `merge.method`, one file each."""
