"""Rows of an archive as blocks, Dask arrays and tables; choosing them; held-out splits. Uses `support`."""
