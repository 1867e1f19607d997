"""What all analyses share: the Dask executor, ordered sums, moments, open archives and plots. Uses `store` only."""
