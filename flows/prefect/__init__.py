"""The pipeline on Prefect: flows, tasks, forms, pages, workers and the server."""
