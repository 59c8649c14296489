"""The stage store: persistent, content-addressed results in plain Zarr."""
